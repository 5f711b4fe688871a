"""Masters of a Redis Cluster that go, under load: no caller gets an exception, and the cap holds afterwards."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, sleep

import pytest

from django_concurrency_mw import ConcurrencyLimitExceeded, hold

from .chaos import LONG
from .cluster_load import CAP, Crew, pause
from .redis_cluster import RedisCluster
from .support import Limits, everything, wait_until

#: Seconds of a lease, here: what a holder that nobody renews keeps its slot for.
TTL = 2.0
THREADS, TASKS = 6, 6


@dataclass
class Answer:
    at: float
    half: str
    #: held, local, full, or the exception that a caller must never see.
    state: str
    took: float


class Site(Crew):
    """Threads and a loop that hold a slot for a moment, again and again."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.inside = self.most = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._in_thread) for _ in range(THREADS)]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._on_loop())))

    def works(self, answers: int = 40) -> bool:
        """From now on the store counts for both halves."""
        since = monotonic()

        def both() -> bool:
            held = Counter(each.half for each in list(self.answers) if each.at > since and each.state == "held")
            return all(held[half] >= answers for half in ("threads", "loop"))

        return wait_until(both, 30)

    def fresh(self) -> None:
        """Count anew the most that were inside."""
        with self._lock:
            self.most = self.inside

    def _enters(self, began: float, half: str, state: str) -> None:
        with self._lock:
            self.answers.append(Answer(began, half, state, monotonic() - began))
            if state in ("held", "local"):
                self.inside += 1
                self.most = max(self.most, self.inside)

    def _leaves(self) -> None:
        with self._lock:
            self.inside -= 1

    def _in_thread(self) -> None:
        while not self._ended:
            began = monotonic()
            try:
                with hold("all") as concurrency:
                    self._enters(began, "threads", concurrency.policies[0].state)
                    sleep(0.002)
                    self._leaves()
            except ConcurrencyLimitExceeded:
                self._enters(began, "threads", "full")
            except Exception as error:
                self._enters(began, "threads", repr(error))
            sleep(pause())

    async def _on_loop(self) -> None:
        await asyncio.gather(*(self._in_task() for _ in range(TASKS)))

    async def _in_task(self) -> None:
        while not self._ended:
            began = monotonic()
            try:
                async with hold("all") as concurrency:
                    self._enters(began, "loop", concurrency.policies[0].state)
                    await asyncio.sleep(0.002)
                    self._leaves()
            except ConcurrencyLimitExceeded:
                self._enters(began, "loop", "full")
            except Exception as error:
                self._enters(began, "loop", repr(error))
            await asyncio.sleep(pause())


@pytest.fixture
def shard(redis_cluster: RedisCluster, prefix: str, limits: Limits) -> Iterator[str]:
    """The prefix of a site whose master has a replica; at the end the Cluster is whole again."""
    ours = redis_cluster.with_replica(prefix)
    options = {"cluster": True, "socket_timeout": 1}
    entry = {"BACKEND": "redis", "LOCATION": redis_cluster.urls, "KEY_PREFIX": ours, "OPTIONS": options}
    limits(everything(CAP, ttl=TTL), BACKENDS={"default": entry}, ON_BACKEND_ERROR="local")
    with redis_cluster.watchful():
        yield ours


def figures(site: Site, since: float) -> str:
    later = [each for each in site.answers if each.at + each.took > since]
    affected = [each for each in later if each.state == "local" or each.took > 0.1]
    back = max((each.at + each.took for each in affected), default=since)
    return (
        f"{len(later)} asked, {len(affected)} affected ({sum(each.state == 'local' for each in affected)} counted locally), "
        f"works again after {back - since:.2f} s"
    )


def unexpected(site: Site) -> set[str]:
    return {each.state for each in site.answers} - {"held", "local", "full"}


#: How often each of these happens.
TIMES = range(5 if LONG else 1)


@pytest.mark.parametrize("_", TIMES)
def test_a_replica_takes_over(_: int, redis_cluster: RedisCluster, shard: str) -> None:
    """CLUSTER FAILOVER: nothing is lost, so the cap holds all the while."""
    old = redis_cluster.owner(shard)
    replica = redis_cluster.replica_of(old)
    with Site() as site:
        assert site.works()
        began = monotonic()
        redis_cluster.fail_over(replica)
        assert wait_until(lambda: not old.is_master)
        assert site.works()
    print(figures(site, began))
    assert unexpected(site) == set()
    assert 0 < site.most <= CAP
    assert redis_cluster.owner(shard) is replica
    assert wait_until(lambda: redis_cluster.held(shard) == 0), "a release was lost"


@pytest.mark.parametrize("_", TIMES)
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_master_goes(how: str, _: int, redis_cluster: RedisCluster, shard: str) -> None:
    """Killed, or stopped with all its connections open. What its replica had not heard of is lost with it."""
    old = redis_cluster.owner(shard)
    replica = redis_cluster.replica_of(old)
    with Site() as site:
        assert site.works()
        began = monotonic()
        old.kill() if how == "killed" else old.send(signal.SIGSTOP)
        try:
            assert wait_until(lambda: replica.is_master)
            assert site.works()
        finally:
            old.start() if how == "killed" else old.send(signal.SIGCONT)
        said = figures(site, began)
        assert wait_until(redis_cluster.is_whole, 30)
        site.fresh()
        assert site.works()
    print(said)
    assert unexpected(site) == set()
    assert "local" in {each.state for each in site.answers}
    assert site.most <= CAP
    # Nobody renews what is held no more: what is there still after a lease was never given back.
    assert wait_until(lambda: redis_cluster.held(shard) == 0, TTL + 5)
