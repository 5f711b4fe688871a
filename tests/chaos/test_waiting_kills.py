"""Processes that wait and hold are killed, and the connections that wake them are cut: the cap holds, those who are left go on,
and nothing stays of the dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.outcomes import Taken

from ..host_file import consistent, held_by_state
from ..redis_server import RedisServer
from ..support import backend_entry, wait_until
from . import LONG
from .nursery import Nursery
from .scenarios.common import Client
from .scenarios.kills import CAP
from .test_host_chaos import table_of

#: Seconds that a dead one's slot stays taken on Redis; the kernel tells the host store at once.
TTL = {"host": 60.0, "redis": 0.6}
#: Seconds between two kills, on average. On Redis it has to be so long that most slots are not with the dead.
PAUSE = {"host": 0.05, "redis": 0.2}
#: Seconds without an admission: the promise, and what a busy machine may make of it.
STALL, LOOSER = 1.5, 5
#: Seconds in which each one gets ten more slots, when all is well again: about one, and thirty where nobody is woken.
CALM = 15.0


def keeps_the_promises(seen: dict[str, Any]) -> None:
    print({name: round(value, 2) if isinstance(value, float) else value for name, value in seen.items()})
    assert seen["began"]
    assert seen["most"] == CAP, "never above it, and all of it was used"
    assert seen["rejected"] == 0
    assert seen["goes on"], "somebody waits for ever"
    assert seen["calm"] < CALM, "those who wait are not woken any more, and find out only when they ask again"
    assert set(seen["codes"]) == {0}
    assert seen["left"] == []
    assert seen["stall"] < STALL * LOOSER


def has_nothing_left(kind: str, backend: dict[str, Any], server: RedisServer | None) -> None:
    """Looked at from outside."""
    if server is not None:
        prefix = f"{{{backend['KEY_PREFIX']}}}:1:"
        with server.client() as client:
            assert wait_until(lambda: not list(client.scan_iter(f"{prefix}[^!]*")))
            assert all(client.pttl(key) > 0 for key in client.scan_iter(f"{prefix}*")), "it would stay for ever"
    else:
        store = HostBackend(BackendConfig("default", "host", options=backend["OPTIONS"]))
        one = Client(store, "after")
        assert isinstance(one.ask(), Taken), "it sweeps the dead"
        one.give()
        assert held_by_state(table_of(store)) == {}
        assert consistent(table_of(store)) == []
        store.close()


@pytest.mark.parametrize("kind", ["host", "redis"])
def test_those_who_are_left_go_on_while_others_are_killed(
    kind: str, nursery: Nursery, request: pytest.FixtureRequest, prefix: str, tmp_path: Path
) -> None:
    backend = backend_entry(kind, request, prefix, tmp_path)
    seen = nursery.run(
        "killing",
        backend=backend,
        folder=str(tmp_path),
        lasting=10.0 if LONG else 2.0,
        pause=PAUSE[kind],
        ttl=TTL[kind],
    )
    keeps_the_promises(seen)
    assert min(seen["kills"].values()) > 0, "some held a slot, others only waited"
    has_nothing_left(kind, backend, request.getfixturevalue("redis_server") if kind == "redis" else None)


@pytest.mark.parametrize("kind", ["host", "redis"])
def test_who_stands_behind_the_dead_does_not_wait_for_them(
    kind: str, nursery: Nursery, request: pytest.FixtureRequest, prefix: str, tmp_path: Path
) -> None:
    """Nothing is granted to them, one after another, until each lease ends."""
    seen = nursery.run("behind_the_dead", backend=backend_entry(kind, request, prefix, tmp_path), dead=10)
    print(f"{kind}: {seen}")
    assert (seen["stand"], seen["ahead"], seen["got"]) == (True, 10, True)
    assert seen["waited"] < 2 * STALL, "less than what is granted to the dead is kept for them"


def test_those_whose_wake_up_calls_are_cut_off_go_on(
    nursery: Nursery, redis_server: RedisServer, request: pytest.FixtureRequest, prefix: str, tmp_path: Path
) -> None:
    backend = backend_entry("redis", request, prefix, tmp_path)
    times = 50 if LONG else 10
    seen = nursery.run("cutting", backend=backend, folder=str(tmp_path), times=times, pause=0.1, ttl=60.0)
    keeps_the_promises(seen)
    assert seen["cut"] >= times
    has_nothing_left("redis", backend, redis_server)


def test_a_store_that_admits_more_than_it_should_is_caught(nursery: Nursery, prefix: str, tmp_path: Path) -> None:
    backend = {"BACKEND": "host", "KEY_PREFIX": prefix, "OPTIONS": {"path": str(tmp_path / "table"), "slots": 256}}
    seen = nursery.run(
        "killing", backend=backend, folder=str(tmp_path), lasting=0.3, pause=0.05, ttl=60.0, limit=CAP + 1
    )
    assert seen["most"] == CAP + 1
