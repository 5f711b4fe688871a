"""Costs: a slot takes as much of its limit as it costs, in every store, from threads and on an event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.host import access
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.semaphore import Held, Semaphore
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import UNLIMITED, Full, Slot, Taken, TakeReply

from .host_file import consistent
from .proxy import Proxy
from .redis_server import RedisServer
from .support import wait_until
from .test_steps import BACKENDS

NEVER = float("inf")


def slot(
    cost: int, limit: int = 5, token: str = "t", policy: str = "p", block: bool = True, ttl: float = 60, **more: Any
) -> Slot:
    return Slot(policy, make_key("k"), limit, ttl, token, block, "/path/", cost, since=1_000.0, **more)


class Asked:
    """A store, asked from a thread or on an event loop."""

    def __init__(self, store: BaseBackend, runner: asyncio.Runner | None) -> None:
        self.store, self.runner = store, runner

    def take(self, *slots: Slot) -> TakeReply:
        if self.runner is None:
            return self.store.take(slots)
        return self.runner.run(self.store.atake(slots))

    def give(self, *slots: Slot) -> Sequence[bool]:
        if self.runner is None:
            return self.store.give(slots)
        return self.runner.run(self.store.agive(slots))

    def count(self, policy: str = "p") -> int:
        """Asked on the way that a give goes, so that it has been carried out."""
        reply = self.take(slot(1, 0, "looks", policy))
        assert isinstance(reply, Full)
        return reply.in_flight[0]

    def costs(self) -> dict[str, int]:
        """Of who is held, by token."""
        self.count()
        holders = self.store.snapshot()
        costs = {holder.token: holder.cost for holder in holders}
        assert len(costs) == len(holders), "somebody stands there twice"
        return costs


@pytest.fixture(params=["threads", "loop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner | None]:
    if request.param == "threads":
        yield None
        return
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def asked(request: pytest.FixtureRequest, runner: asyncio.Runner | None) -> Iterator[Asked]:
    store = request.param(request)
    yield Asked(store, runner)
    if isinstance(store, HostBackend):
        table = store._access._table
        assert table is not None
        assert consistent(table) == []
    if not isinstance(store, MemoryBackend):
        store.close()


def test_costs_add_up_to_the_limit_and_no_further(asked: Asked) -> None:
    assert asked.take(slot(3, token="a")) == Taken((True,), (3,))
    assert asked.take(slot(3, token="b")) == Full((True,), (3,))
    assert asked.take(slot(2, token="c")) == Taken((True,), (5,))
    assert asked.take(slot(1, token="d")) == Full((True,), (5,))
    asked.give(slot(3, token="a"))
    assert asked.take(slot(4, token="d")) == Full((True,), (2,))
    assert asked.take(slot(3, token="d")) == Taken((True,), (5,))
    assert asked.costs() == {"c": 2, "d": 3}


def test_what_costs_more_than_the_limit_never_fits(asked: Asked) -> None:
    assert asked.take(slot(6)) == Full((True,), (0,))
    assert asked.take(slot(1000, 999)) == Full((True,), (0,))
    assert asked.take(slot(1000, 1000)) == Taken((True,), (1000,))


def test_each_caller_applies_its_own_limit_to_the_common_sum(asked: Asked) -> None:
    asked.take(slot(4, 9, "a"))
    assert asked.take(slot(2, 5, "b")) == Full((True,), (4,))
    assert asked.take(slot(2, 6, "b")) == Taken((True,), (6,))


def test_what_is_unlimited_counts_and_always_fits(asked: Asked) -> None:
    for number in range(3):
        assert asked.take(slot(1000, UNLIMITED, f"t-{number}")) == Taken((True,), (1000 * (number + 1),))
    assert asked.take(slot(1, 3000, "other")) == Full((True,), (3000,))
    asked.give(*[slot(1000, UNLIMITED, f"t-{number}") for number in range(3)])
    assert asked.count() == 0


def test_asking_twice_is_asking_once(asked: Asked) -> None:
    assert asked.take(slot(5)) == Taken((True,), (5,))
    assert asked.take(slot(5)) == Taken((True,), (5,))
    assert asked.take(slot(1, token="other")) == Full((True,), (5,))
    asked.give(slot(5))
    asked.give(slot(5))
    assert asked.count() == 0


def test_all_are_taken_or_none(asked: Asked) -> None:
    asked.take(slot(4, policy="full", token="other"))
    assert asked.take(slot(3, policy="free"), slot(2, policy="full")) == Full((False, True), (0, 4))
    assert asked.take(slot(3, policy="free"), slot(1, policy="full")) == Taken((True, True), (3, 5))


def test_what_does_not_block_is_held_where_all_of_it_fits(asked: Asked) -> None:
    asked.take(slot(3, policy="shadow", token="other"))
    assert asked.take(slot(1, policy="a"), slot(3, policy="shadow", block=False)) == Taken((True, False), (1, 3))
    assert asked.take(slot(1, policy="b"), slot(2, policy="shadow", block=False)) == Taken((True, True), (1, 5))


def test_who_costs_1_and_who_costs_more_do_not_touch_each_other(asked: Asked) -> None:
    """One token begins like the other."""
    asked.take(slot(2, 99, "t-1"))
    asked.take(slot(1, 99, "t-2"))
    assert asked.take(slot(22, 99, "t-22")) == Taken((True,), (25,))
    asked.give(slot(2, 99, "t-1"))
    assert asked.costs() == {"t-2": 1, "t-22": 22}
    asked.give(slot(1, 99, "t-2"))
    assert asked.count() == 22


def test_all_of_a_lapsed_one_goes_at_once(asked: Asked) -> None:
    asked.take(slot(4, token="short", ttl=0.02))
    asked.take(slot(1, token="long"))
    assert wait_until(lambda: isinstance(asked.take(slot(4, token="next")), Taken))
    assert asked.count() == 5
    assert asked.costs() == {"long": 1, "next": 4}
    assert list(asked.store.renew([(slot(4, token="short"), 60)])) == [False]


def test_all_of_a_renewed_one_stays(asked: Asked) -> None:
    asked.take(slot(4, token="renewed", ttl=10))
    asked.take(slot(1, token="lapses", ttl=0.1))
    assert list(asked.store.renew([(slot(4, token="renewed"), 60)])) == [True]
    assert wait_until(lambda: asked.count() == 4)
    assert asked.costs() == {"renewed": 4}
    assert list(asked.store.renew([(slot(4, token="renewed"), 0.01)])) == [True]
    assert wait_until(lambda: asked.count() == 0)


def test_a_lease_that_is_asked_for_again_begins_again_for_all_of_it(asked: Asked) -> None:
    asked.take(slot(4, token="again", ttl=10))
    asked.take(slot(4, token="again", ttl=60))
    asked.take(slot(1, token="lapses", ttl=0.02))
    assert wait_until(lambda: asked.count() == 4)
    (holder,) = asked.store.snapshot()
    assert holder.lease_left > 30


def test_who_is_counted_again_counts_with_his_cost_whatever_the_limit(asked: Asked) -> None:
    asked.take(slot(4, token="other"))
    assert list(asked.store.restore([Restore(slot(3, token="lost"), 60, NEVER)])) == [True]
    assert asked.count() == 7
    assert list(asked.store.restore([Restore(slot(3, token="lost"), 60, NEVER)])) == [True]
    assert asked.costs() == {"other": 4, "lost": 3}
    asked.give(slot(3, token="lost"))
    assert asked.count() == 4


def test_all_of_an_evicted_one_goes_and_stays_away(asked: Asked) -> None:
    asked.take(slot(3, token="t-1"))
    asked.take(slot(2, token="t-11"))
    assert asked.store.evict("t-1")
    assert not asked.store.evict("t-1")
    assert asked.count() == 2
    assert list(asked.store.restore([Restore(slot(3, token="t-1"), 60, NEVER)])) == [False]
    assert asked.costs() == {"t-11": 2}


def test_people_see_one_holder(asked: Asked) -> None:
    asked.take(Slot("p", make_key("user:42"), 9, 60, "t", True, "/reports/", 5))
    asked.count()
    (holder,) = asked.store.snapshot()
    assert (holder.policy, holder.key, holder.token, holder.path) == ("p", "user:42", "t", "/reports/")
    assert holder.cost == 5
    assert holder.age < 30 < holder.lease_left


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [False, True])
def test_an_exception_half_way_leaves_a_right_total(leaves: bool) -> None:
    """A signal handler's may come between any two steps; here behind the step that changes who is there."""

    class Struck(Semaphore):
        armed = False

        def __setitem__(self, token: str, held: Held) -> None:
            super().__setitem__(token, held)
            if self.armed:
                raise KeyboardInterrupt

        def __delitem__(self, token: str) -> None:
            super().__delitem__(token)
            if self.armed:
                raise KeyboardInterrupt

    semaphore = Struck()
    semaphore.add("a", Held(slot(3), 0, 1))
    semaphore.armed = True
    with pytest.raises(KeyboardInterrupt):
        semaphore.remove("a") if leaves else semaphore.add("b", Held(slot(4), 0, 1))
    semaphore.armed = False
    expected = 0 if leaves else 7
    assert semaphore.total() == expected
    semaphore.add("c", Held(slot(10), 0, 1))
    assert semaphore.total() == expected + 10


# -- host -------------------------------------------------------------------------------------------------------------


def test_slots_of_one_take_count_for_each_other(tmp_path: Path) -> None:
    store = HostBackend(BackendConfig("default", "host", options={"path": tmp_path / "table", "slots": 64}))
    assert store.take([slot(3, token="a"), slot(3, token="b")]) == Full((False, True), (0, 0))
    assert store.take([slot(3, token="a"), slot(2, token="b")]) == Taken((True, True), (3, 5))
    store.close()


def test_costs_are_entered_in_a_file_that_replaces_a_removed_one(tmp_path: Path) -> None:
    path = tmp_path / "table"
    store = HostBackend(BackendConfig("default", "host", options={"path": path, "slots": 64}))
    store.take([slot(4)])
    os.unlink(path)
    store._access._looked -= access.LOOK_EVERY + 1
    assert store.take([slot(2, token="other")]) == Full((True,), (4,))
    assert [holder.cost for holder in store.snapshot()] == [4]
    store.close()


# -- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(redis_server: RedisServer, proxy: Proxy, prefix: str) -> Iterator[Callable[[str], RedisBackend]]:
    """Stores that have delivered all before the proxy stops."""
    made: list[RedisBackend] = []

    def make(url: str) -> RedisBackend:
        made.append(RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 0.25})))
        return made[-1]

    yield make
    for store in made:
        store.close()
        assert wait_until(lambda store=store: not store._delivering and not store._leftovers)


def test_a_cost_of_1_is_on_the_wire_what_it_was() -> None:
    keys, one = wire.Keys("c"), slot(1, token="t")
    name = b"{c}:1:p:" + one.key.digest.hex().encode()
    stored = b"t\n1000000\nk\n/path/"
    assert keys.give([one])[0].packed == wire.pack(b"ZREM", name, stored)
    assert keys.take([one]) == wire.pack(b"EVALSHA", wire.TAKE.sha, b"1", name, b"5", b"60000", b"1", stored)
    shadow = slot(1, token="t", block=False)
    assert keys.take([shadow]) == wire.pack(b"EVALSHA", wire.TAKE.sha, b"1", name, b"5", b"60000", b"0", stored)


def test_a_release_has_the_same_length_whatever_the_cost() -> None:
    keys = wire.Keys("c")
    cheap, dear = (len(keys.give([slot(cost)])[0].packed) for cost in (2, 1000))
    assert dear - cheap == len("1000") - len("2")
    assert dear < 1000


def test_a_cost_is_as_many_members_of_which_each_end_is_the_same(
    make: Callable[[str], RedisBackend], redis_server: RedisServer, prefix: str
) -> None:
    store = make(redis_server.url)
    store.take([slot(3)])
    client = redis_server.client()
    (key,) = client.scan_iter(f"{{{prefix}}}:1:*")
    members = client.zrange(key, 0, -1, withscores=True)
    assert sorted(member for member, _ in members) == [b"t\n1000000x3\nk\n/path/", b"t\n2", b"t\n3"]
    assert len({score for _, score in members}) == 1


@pytest.mark.parametrize("half", ["threads", "loop"])
def test_a_take_whose_reply_is_lost_leaves_nothing_of_its_cost(
    make: Callable[[str], RedisBackend], proxy: Proxy, redis_server: RedisServer, prefix: str, half: str
) -> None:
    """The undo of a cost is a script, carried out behind the take or by the next connection."""
    store = make(proxy.url)
    with asyncio.Runner() as runner:
        asked = Asked(store, runner if half == "loop" else None)
        asked.take(slot(1, 9, "warm"))
        proxy.drop_replies = True
        with pytest.raises(BackendError):
            asked.take(slot(5, 9, "cut"))
        proxy.drop_replies = False
        assert wait_until(lambda: redis_server.held(prefix) == 1)


def test_a_release_that_no_line_is_at_hand_for_is_left_over_and_done(
    make: Callable[[str], RedisBackend], redis_server: RedisServer, prefix: str
) -> None:
    store = make(redis_server.url)
    store.take([slot(5)])
    store.close()
    redis_server.client().script_flush()
    store.give([slot(5)])
    assert wait_until(lambda: redis_server.held(prefix) == 0)
