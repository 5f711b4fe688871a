"""The command against live servers: with views held at a barrier it says exactly what the servers do."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from .redis_server import RedisServer
from .servers import ROOT, free_port, gunicorn, running, uvicorn
from .support import wait_until

#: Requests that are held at the barrier.
HELD = 3


@dataclass
class Site:
    """A running one. `path` is that of a view which waits and suits the server."""

    port: int
    path: str
    barrier: Path
    environment: dict[str, str]
    answers: list[tuple[int, Any]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def ask(self, path: str, tenant: str = "acme") -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path, headers={"X-Tenant": tenant} if tenant else {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def hold(self, path: str, tenant: str) -> None:
        """One request more at the barrier."""
        thread = threading.Thread(target=lambda: self.answers.append(self.ask(path, tenant)), daemon=True)
        thread.start()
        self.threads.append(thread)

    def open(self) -> None:
        self.barrier.touch()
        for thread in self.threads:
            thread.join(10)

    def command(self, *arguments: str, given: str = "") -> tuple[int, Any]:
        """Exit code and JSON document."""
        done = subprocess.run(
            [sys.executable, "-m", "django", "concurrency", *arguments, "--json"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            input=given,
            timeout=30,
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout)

    def held(self, number: int) -> list[dict[str, Any]]:
        """Wait until so many slots are held, by the command's own word."""
        found: list[dict[str, Any]] = []

        def are_held() -> bool:
            found[:] = self.command("holders")[1]["holders"]
            return len(found) == number

        assert wait_until(are_held, 20), found
        return found


@contextmanager
def site(server: str, backend: dict[str, Any], folder: Path) -> Iterator[Site]:
    port, barrier = free_port(), folder / "barrier"
    if server == "uvicorn":
        command, path = uvicorn(port), "/aexport/7/"
    else:
        command, path = gunicorn(port, "--workers", "2", "--threads", "8"), "/export/7/"
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.inspected_settings",
        "PYTHONPATH": str(ROOT),
        "INSPECTED_BACKEND": json.dumps(backend),
        "INSPECTED_BARRIER": str(barrier),
    }
    with running(command, port, folder / "log", environment):
        one = Site(port, path, barrier, environment)
        try:
            yield one
        finally:
            one.open()


@pytest.fixture(params=["gthread-redis", "uvicorn-redis", "gthread-host"])
def live(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Iterator[Site]:
    server, _, store = request.param.partition("-")
    backend: dict[str, Any] = {"BACKEND": store, "KEY_PREFIX": prefix}
    if store == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        backend |= {"LOCATION": redis.url, "OPTIONS": {"socket_timeout": 2}}
    else:
        backend["OPTIONS"] = {"path": str(tmp_path / "table"), "slots": 256}
    with site(server, backend, tmp_path) as one:
        yield one


def states(document: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(one["policy"], one["in_flight"], one["state"]) for one in document["policies"] if one["applies"]]


def test_explain_and_holders_say_what_the_server_does(live: Site) -> None:
    began = monotonic()
    code, before = live.command("explain", live.path, "--header", "X-Tenant: acme")
    assert (code, before["admitted"]) == (0, True)
    assert states(before) == [("exports", 0, "held"), ("everything", 0, "held"), ("watch", 0, "held")]
    for _ in range(HELD):
        live.hold(live.path, "acme")
    rows = live.held(3 * HELD - 1)  # the third one of an address is over the shadow policy's limit
    longest = monotonic() - began

    # Who holds: all that the site knows of it.
    assert sorted(row["policy"] for row in rows) == ["everything"] * 3 + ["exports"] * 3 + ["watch"] * 2
    assert {row["path"] for row in rows} == {live.path}
    assert {row["host"] for row in rows} == {socket.gethostname()}
    pids = {live.ask("/-/held/")[1]["pid"] for _ in range(40)}
    assert {row["pid"] for row in rows} <= pids
    assert all(0 <= row["age"] <= longest for row in rows)
    assert not any(row["overran"] or row["not_renewed"] for row in rows)
    assert all("acme" not in row["key"] for row in rows)

    # What the next one is told: the same by the command and by the server.
    code, full = live.command("explain", live.path, "--header", "X-Tenant: acme")
    status, answer = live.ask(live.path)
    assert (code, status) == (1, 429)
    assert full["rejection"]["violated"] == answer["violated-policies"] == ["exports"]
    assert full["rejection"]["reason"] == answer["reason"] == "full"
    exports = next(one for one in full["policies"] if one["policy"] == "exports")
    assert (exports["in_flight"], exports["limit"]) == (3, 3)
    code, other = live.command("explain", live.path + "?go", "--header", "X-Tenant: other")
    status, answer = live.ask(live.path + "?go", "other")
    assert (code, status) == (0, 200)
    told = [(name, count - (state == "held"), state) for name, _, state, count, _ in answer["policies"]]
    assert states(other) == told == [("exports", 0, "held"), ("everything", 3, "held"), ("watch", 2, "over")]

    # Evicted while it is full: its slots are free, the request runs on.
    token = next(row["token"] for row in rows if row["policy"] == "watch")
    assert live.command("holders", "--evict", token, "--yes") == (
        0,
        {"token": token, "evicted": True, "backends": ["default"]},
    )
    live.held(3 * HELD - 1 - 3)
    assert live.ask(live.path + "?go")[0] == 200
    assert live.command("holders", "--evict", token, "--yes")[0] == 1

    live.open()
    assert [status for status, _ in live.answers] == [200] * HELD
    assert live.held(0) == []
    assert live.command("holders")[0] == 1


def test_the_table_as_it_is_used(live: Site) -> None:
    for tenant in ("acme", "acme", "acme", "other"):
        live.hold(live.path, tenant)
    live.held(4 + 4 + 2)
    assert wait_until(lambda: used(live)["exports"]["peak"] == 3, 15)
    found = used(live)
    assert [found["exports"][name] for name in ("limit", "in_flight", "keys", "busiest")] == [3, 4, 2, 3]
    assert len(found["exports"]["at_limit"]) == 1
    assert [found["everything"][name] for name in ("limit", "in_flight", "at_limit")] == [
        4,
        4,
        ["gl~" + found["everything"]["at_limit"][0][3:]],
    ]
    assert (found["own"]["limit"], found["own"]["in_flight"], found["own"]["peak"]) == (1, 0, None)
    assert live.ask("/decorated/")[0] == 200
    live.open()
    live.held(0)
    assert wait_until(lambda: used(live)["own"]["peak"] == 1, 15), (
        "the keeper notes it, though nothing is held any more"
    )
    assert used(live)["everything"]["peak"] == 4
    assert live.command("policies", "--reset-peak")[1]["peaks_reset"]
    assert wait_until(lambda: used(live)["everything"]["peak"] in (None, 0), 15)


def used(live: Site) -> dict[str, dict[str, Any]]:
    code, document = live.command("policies")
    assert code == 0
    return {one["policy"]: one for one in document["policies"]}
