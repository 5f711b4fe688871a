"""The store forgets, or is another one all of a sudden: a flush, scripts that are gone, a master that was demoted, an
operator who takes slots away."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from time import monotonic

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot, Taken
from django_concurrency_mw.tokens import new_token

from ..proxy import Proxy
from ..redis_server import RedisServer
from ..servers import crowd
from ..support import wait_until
from . import LONG
from .sites import chaos_site

SERVERS = {
    "gthread": ("gthread", "--workers", "1", "--threads", "64"),
    "gthread-2": ("gthread", "--workers", "2", "--threads", "32"),
    "uvicorn": ("uvicorn", "--workers", "1"),
}


def backend(url: str, prefix: str, timeout: float = 5.0) -> RedisBackend:
    return RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": timeout}))


@pytest.mark.parametrize("server", list(SERVERS) if LONG else ["gthread-2"])
def test_long_holders_are_counted_again_after_a_flush(server: str, redis_server: RedisServer, tmp_path: Path) -> None:
    """FLUSHALL with 5 holders. Who came in before they were counted again runs to its end; nobody does later."""
    name, *options = SERVERS[server]
    ttl, over = 6, tmp_path / "over"
    with chaos_site(name, redis_server, tmp_path, *options, ttl=ttl) as site:
        site.hold(5, over)
        assert wait_until(lambda: site.held() == 5)
        assert wait_until(lambda: site.status() == 429)
        with redis_server.client() as client:
            client.flushall()
        flushed = monotonic()
        assert site.held() == 0
        assert wait_until(lambda: site.held() == 5)
        counted = monotonic() - flushed
        print(f"{server}: all counted again {counted:.2f} s after FLUSHALL")
        assert counted < ttl, "with its next renewal; later nobody could know whose place it is"
        rejected = 0
        while rejected < 20 or (LONG and monotonic() < flushed + 0.8 * ttl):
            assert site.status() == 429, "admitted above the cap"
            rejected += 1
            threading.Event().wait(0.02)
        assert wait_until(lambda: "had lost" in site.text())
        over.touch()
        assert wait_until(lambda: site.held() == 0)


@pytest.mark.parametrize("server", ["gthread", "uvicorn"])
def test_scripts_that_are_flushed_are_not_missed(server: str, redis_server: RedisServer, tmp_path: Path) -> None:
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options) as site, redis_server.client() as client:
        over = threading.Event()

        def flush() -> None:
            while not over.wait(0.02):
                client.script_flush()

        flushing = threading.Thread(target=flush)
        flushing.start()
        statuses: Counter[int] = Counter()
        for _ in range(40):
            statuses += crowd(site.port, f"{site.view}?for=5", 16, 1.5 if LONG else 0.5)
            if statuses[200] >= 100:
                break
        over.set()
        flushing.join()
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 100
        assert wait_until(lambda: site.held() == 0)


@pytest.mark.parametrize("half", ["threads", "loop"])
def test_a_demoted_master_fails_one_acquire_per_connection_at_most(redis_server: RedisServer, half: str) -> None:
    """The name points to the new master, but the connections are to the old one, which says READONLY."""
    old, new = RedisServer(), RedisServer()
    proxy = Proxy(old.port)
    store = backend(proxy.url, f"demoted-{half}")
    failures: list[Exception] = []
    connections = 8 if half == "threads" else 1

    def slot() -> Slot:
        return Slot("p", make_key("k"), 1000, 60.0, new_token())

    def in_threads(each: int) -> None:
        barrier = threading.Barrier(8)

        def client() -> None:
            barrier.wait()
            for _ in range(each):
                one = slot()
                try:
                    assert isinstance(store.take([one]), Taken)
                    store.give([one])
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def on_a_loop(each: int) -> None:
        for _ in range(each):
            one = slot()
            try:
                assert isinstance(await store.atake([one]), Taken)
                await store.agive([one])
            except Exception as error:
                failures.append(error)

    def demote() -> None:
        with old.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", new.port)
        proxy.target_port = new.port

    async def both() -> None:
        await on_a_loop(50)
        await asyncio.to_thread(demote)
        await on_a_loop(100)

    try:
        if half == "threads":
            in_threads(20)
            demote()
            in_threads(50)
        else:
            asyncio.run(both())
        print(f"{half}: {len(failures)} failed acquires on {connections} connections: {failures[:3]}")
        assert len(failures) <= connections
        assert wait_until(lambda: new.held(f"demoted-{half}") == 0)
    finally:
        store.close()
        proxy.stop()
        old.stop()
        new.stop()


@pytest.mark.parametrize("server", ["gthread", "uvicorn"] if LONG else ["gthread"])
def test_an_evicted_holder_that_still_runs_never_comes_back(
    server: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=3, max_concurrent=1) as site:
        site.hold(1, tmp_path / "over")
        assert wait_until(lambda: site.held() == 1)
        operator = backend(redis_server.url, site.prefix)
        (holder,) = operator.snapshot()
        assert operator.evict(holder.token)
        tokens: set[str] = set()

        def lost() -> bool:
            """At its next heartbeat, a second after the last one."""
            tokens.update(known.token for known in operator.snapshot())
            assert wait_until(lambda: site.status() == 200)
            return "its slot is lost" in site.text()

        assert wait_until(lost)
        noticed = monotonic()
        while monotonic() < noticed + (2.5 if LONG else 0.3):
            lost()
        assert holder.token not in tokens
        (tmp_path / "over").touch()
        assert wait_until(lambda: site.held() == 0)
        operator.close()


def test_a_lapsed_holder_that_still_runs_never_comes_back(redis_server: RedisServer, tmp_path: Path) -> None:
    """Without `renew`, or stopped for longer than its ttl: it is replaced, and not counted when it goes on."""
    with chaos_site("gthread", redis_server, tmp_path, *SERVERS["gthread"][1:], ttl=1, max_concurrent=1) as site:
        site.hold(1, tmp_path / "over")
        assert wait_until(lambda: site.held() == 1)
        operator = backend(redis_server.url, site.prefix)
        worker = site.gauge()["pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            assert wait_until(lambda: operator.snapshot() == [])
            other = Slot("cap", make_key("global"), 1, 60.0, new_token())
            assert isinstance(operator.take([other]), Taken)
        finally:
            os.kill(worker, signal.SIGCONT)

        def lost() -> bool:
            """It finds out at its next heartbeat."""
            assert [known.token for known in operator.snapshot()] == [other.token]
            assert site.status() == 429
            return "its slot is lost" in site.text()

        assert wait_until(lost)
        noticed = monotonic()
        while monotonic() < noticed + (1.5 if LONG else 0.3):
            lost()
        (tmp_path / "over").touch()
        operator.give([other])
        assert wait_until(lambda: site.held() == 0)
        operator.close()
