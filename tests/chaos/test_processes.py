"""Processes that end: killed, told to end within the grace and past it, replaced after a number of requests, and forked."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from time import monotonic, sleep

import pytest

from ..redis_server import RedisServer
from ..servers import crowd
from ..support import wait_until
from . import LONG
from .sites import chaos_site

#: Seconds of the lease that a killed process leaves behind.
TTL = 10 if LONG else 1.5
FOREVER = 60_000

SERVERS = {
    "sync": ("sync", "--workers", "5"),
    "gthread": ("gthread", "--workers", "1", "--threads", "16"),
    "gthread-preload": ("gthread", "--workers", "2", "--threads", "16", "--preload"),
    "uvicorn": ("uvicorn", "--workers", "1"),
    "uvicorn-2": ("uvicorn", "--workers", "2"),
    "uvicorn-lifespan-off": ("uvicorn", "--workers", "1", "--lifespan", "off"),
}


@pytest.mark.parametrize("server", ["gthread", "gthread-preload", "sync", "uvicorn-2"] if LONG else ["gthread"])
def test_a_killed_workers_slots_come_back_with_its_lease(
    server: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=TTL) as site:
        site.hold(5, FOREVER)
        assert wait_until(lambda: site.held() == 5)
        workers = children(site.process.pid)
        assert workers
        killed = monotonic()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        # sync: the other requests would take up its workers again, so only what Redis says is looked at meanwhile.
        assert wait_until(lambda: site.status() == 200, TTL + 30)
        print(f"{server}: admitting again {monotonic() - killed:.2f} s after kill -9 at ttl {TTL}")
        assert monotonic() - killed < TTL + 10, "a new worker has to begin, too"
        assert wait_until(lambda: living(site.redis, site.prefix) == 0)


@pytest.mark.parametrize("server", list(SERVERS) if LONG else ["gthread-preload", "uvicorn-2"])
def test_told_to_end_within_the_grace_it_leaves_nothing(server: str, redis_server: RedisServer, tmp_path: Path) -> None:
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=600) as site:
        site.hold(5, tmp_path / "over")
        assert wait_until(lambda: site.held() == 5)
        site.process.send_signal(signal.SIGTERM)
        sleep(0.3)  # it is ending, and they are inside
        assert site.held() == 5
        (tmp_path / "over").touch()
        site.process.wait(60)
        assert site.held() == 0


@pytest.mark.parametrize("server", ["gthread", "uvicorn"] if LONG else ["uvicorn"])
def test_told_to_end_past_the_grace_its_slots_end_with_their_leases(
    server: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    name, *options = SERVERS[server]
    options += ["--graceful-timeout", "1"] if name == "gthread" else ["--timeout-graceful-shutdown", "1"]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=TTL) as site:
        site.hold(5, 8000)
        assert wait_until(lambda: site.held() == 5)
        site.process.send_signal(signal.SIGTERM)
        site.process.wait(60)
        ended = monotonic()
        assert wait_until(lambda: living(site.redis, site.prefix) == 0, TTL + 30)
        print(f"{server}: {monotonic() - ended:.2f} s after it had ended, at ttl {TTL}")


@pytest.mark.parametrize("server", ["sync", "gthread", "gthread-preload"] if LONG else ["gthread-preload"])
def test_workers_that_are_replaced_leave_nothing(server: str, redis_server: RedisServer, tmp_path: Path) -> None:
    """Every few requests a new process begins. Somebody may get no answer when a worker ends, but no slot is left."""
    name, *more = SERVERS[server]
    more += ["--max-requests", "15", "--max-requests-jitter", "5"]
    with chaos_site(name, redis_server, tmp_path, *more, ttl=600) as site:
        statuses: Counter[int] = Counter()
        for _ in range(60):
            statuses += crowd(site.port, f"{site.view}?for=5", *((16, 1.0) if LONG else (8, 0.5)))
            if statuses[200] >= 100 and site.text().count("Booting worker") > 5:
                break
        print(f"{server}: {statuses}")
        assert set(statuses) <= {200, 429, 0}
        assert statuses[200] >= 100
        assert site.text().count("Booting worker") > 5
        assert wait_until(lambda: site.held() == 0)


@pytest.mark.parametrize("server", ["gthread", "sync"] if LONG else ["gthread"])
def test_a_child_that_is_forked_inside_a_request_gives_nothing_back(
    server: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """It says that it is done and runs its exit handlers while its parent still is inside; that goes on as before."""
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=600) as site:
        view = "/fork/"
        site.view = view
        holders = site.hold(5, tmp_path / "over")
        assert wait_until(lambda: site.gauge()["inside"] == 5 if name == "gthread" else site.held() == 5)
        assert site.held() == 5, "a child gave its parent's slots back"
        if name == "gthread":
            assert site.status() == 429
        (tmp_path / "over").touch()
        for thread in holders:
            thread.join()
        assert wait_until(lambda: site.held() == 0)
        assert site.status(10) == 200


def children(pid: int) -> list[int]:
    """The worker processes of a server; uvicorn's have a resource tracker beside them, which is none."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"resource_tracker" not in command:
                found.append(int(child))
    return found


def living(redis: RedisServer, prefix: str) -> int:
    """Holders whose lease has not ended."""
    with redis.client() as client:
        seconds, micros = client.time()
        now = int(seconds) * 1000 + int(micros) // 1000
        return sum(int(client.zcount(key, now, "+inf")) for key in client.scan_iter(f"{{{prefix}}}:1:[^!]*"))
