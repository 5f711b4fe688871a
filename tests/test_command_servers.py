"""The command against live servers: with views held at a barrier it says exactly what the servers do."""

from __future__ import annotations

import http.client
import io
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
from django.core.management import call_command
from django.test import override_settings

from django_concurrency_mw.keys import masked

from . import inspected_settings
from .chaos import LONG
from .redis_server import RedisServer
from .servers import PATIENCE, ROOT, free_port, gunicorn, running, uvicorn
from .support import SOON, wait_until

#: Requests that are held at the barrier.
HELD = 3


@dataclass
class Site:
    """A running one. `path` is that of a view which waits and suits the server."""

    port: int
    path: str
    barrier: Path
    environment: dict[str, str]
    backend: dict[str, Any]
    answers: list[tuple[int, Any]] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def ask(self, path: str, tenant: str = "acme") -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
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
            thread.join(SOON)

    def command(self, *arguments: str) -> tuple[int, Any]:
        """Exit code and JSON document, asked from this process."""
        stream = io.StringIO()
        names = ("CONCURRENCY_LIMIT", "ROOT_URLCONF", "MIDDLEWARE")
        limits = {**inspected_settings.CONCURRENCY_LIMIT, "BACKENDS": {"default": self.backend}}
        with override_settings(
            **{name: getattr(inspected_settings, name) for name in names} | {"CONCURRENCY_LIMIT": limits}
        ):
            try:
                call_command("concurrency", *arguments, "--json", stdout=stream)
            except SystemExit as end:
                return int(end.code or 0), json.loads(stream.getvalue())
        return 0, json.loads(stream.getvalue())

    def program(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of the command as a program of its own."""
        command = [sys.executable, "-m", "django", "concurrency", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    def held(self, number: int) -> list[dict[str, Any]]:
        """Wait until so many slots are held, by the command's own word."""
        found: list[dict[str, Any]] = []

        def are_held() -> bool:
            found[:] = self.command("holders")[1]["holders"]
            return len(found) == number

        assert wait_until(are_held), found
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
        "COLUMNS": "200",
        "INSPECTED_BACKEND": json.dumps(backend),
        "INSPECTED_BARRIER": str(barrier),
    }
    with running(command, port, folder / "log", environment):
        yield Site(port, path, barrier, environment, backend)


@pytest.fixture(
    scope="module",
    params=["gthread-redis", "uvicorn-redis", "gthread-host"] if LONG else ["uvicorn-redis", "gthread-host"],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("inspected")
    server, _, store = request.param.partition("-")
    backend: dict[str, Any] = {"BACKEND": store, "KEY_PREFIX": f"inspected-{os.getpid()}-{request.param}"}
    if store == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        backend |= {"LOCATION": redis.url, "OPTIONS": {"socket_timeout": 5}}
    else:
        backend["OPTIONS"] = {"path": str(folder / "table"), "slots": 256}
    with site(server, backend, folder) as one:
        yield one


@pytest.fixture
def live(served: Site) -> Iterator[Site]:
    """With the barrier closed and nobody inside."""
    served.barrier.unlink(missing_ok=True)
    served.answers.clear()
    served.threads.clear()
    yield served
    served.open()
    served.held(0)


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
    assert wait_until(lambda: all(row["pid"] for row in live.held(len(rows)))), "each process says who it is"
    rows, longest = live.held(len(rows)), monotonic() - began

    # Who holds: all that the site knows of it.
    assert sorted(row["policy"] for row in rows) == ["everything"] * 3 + ["exports"] * 3 + ["watch"] * 2
    assert {row["path"] for row in rows} == {live.path}
    assert {row["host"] for row in rows} == {socket.gethostname()}
    pids: set[int] = set()

    def all_known() -> bool:
        """Each request may be answered by any worker."""
        pids.add(live.ask("/-/held/")[1]["pid"])
        return {row["pid"] for row in rows} <= pids

    assert wait_until(all_known)
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

    # As a program of its own; in the short run once, as it says the same of either store.
    programs = LONG or live.backend["BACKEND"] == "host"
    if programs:
        code, text = live.program("explain", live.path, "--header", "X-Tenant: acme")
        assert code == 1
        assert "Now: 429 full (exports), Retry-After of 1 to 5 seconds." in text
        code, text = live.program("holders", "--policy", "exports")
        assert (code, text.count(live.path)) == (0, 3)

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
    if programs:
        assert live.program("holders") == (1, "Nobody holds a slot.\n")


def test_the_table_as_it_is_used(live: Site) -> None:
    for tenant in ("acme", "acme", "acme", "other"):
        live.hold(live.path.replace("export/7", "job"), tenant)
    live.held(4 + 4)
    assert wait_until(lambda: used(live)["jobs"]["peak"] == 3)
    found = used(live)
    assert [found["jobs"][name] for name in ("limit", "in_flight", "keys", "busiest")] == [3, 4, 2, 3]
    assert len(found["jobs"]["at_limit"]) == 1
    assert [found["all-jobs"][name] for name in ("limit", "in_flight", "at_limit")] == [4, 4, [masked("global")]]
    assert (found["own"]["limit"], found["own"]["in_flight"], found["own"]["peak"]) == (1, 0, None)
    assert live.ask("/decorated/")[0] == 200
    live.open()
    live.held(0)
    assert wait_until(lambda: used(live)["own"]["peak"] == 1), "the keeper notes it, though nothing is held any more"
    assert wait_until(lambda: used(live)["all-jobs"]["peak"] == 4)
    assert live.command("policies", "--reset-peak")[1]["peaks_reset"]
    assert used(live)["all-jobs"]["peak"] is None


def used(live: Site) -> dict[str, dict[str, Any]]:
    code, document = live.command("policies")
    assert code == 0
    return {one["policy"]: one for one in document["policies"]}
