"""A view answers 202 and its slot lives on: in a thread of the server, and in a second process, which may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from ..redis_server import RedisServer
from ..servers import ROOT, free_port, get, gunicorn, running, uvicorn
from ..support import wait_until
from . import LONG
from .test_host_servers import own_settings

#: Seconds. A heartbeat is due each third of it, and may be late by the other two.
TTL = 3.0
TASK = """
import sys, django
django.setup()
from django_concurrency_mw import SlotLost, conf, hold
from django_concurrency_mw.backends import get_backend
get_backend("default", conf.current().backends).snapshot()  # it is connected, and what it needs is imported
print("ready", flush=True)
try:
    with hold(sys.stdin.readline().strip()) as held:
        print(held.policies[0].state, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
except SlotLost:
    print("lost", flush=True)
"""


class Task:
    """A process that is up before there is a token: starting Python may take longer than a lease lasts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.ready = False

    def claim(self, token: str) -> str:
        """Its first word."""
        self.wait()
        self._say(token)
        return self._word()

    def wait(self) -> None:
        """Until it could claim."""
        if not self.ready:
            assert self._word() == "ready"
            self.ready = True

    def finish(self) -> None:
        """Its work is done."""
        self._say("")

    def _say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _word(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


class Shop:
    """A running site with one slot."""

    def __init__(self, port: int, kind: str, env: dict[str, str], is_host: bool) -> None:
        self.port, self._prefix, self._env, self.is_host = port, "a" if kind == "uvicorn" else "", env, is_host

    def status(self) -> int:
        return get(self.port, f"/{self._prefix}work/?for=1")[0]

    def hand_over(self, query: str = "") -> str:
        status, body = get(self.port, f"/{self._prefix}hand-over/{query}")
        assert status == 202
        return body if isinstance(body, str) else body.decode()

    @contextmanager
    def task(self) -> Iterator[Task]:
        """A second process of the site."""
        process = subprocess.Popen(
            [sys.executable, "-c", TASK],
            env={**os.environ, "PYTHONPATH": str(ROOT), **self._env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield Task(process)
        finally:
            process.kill()
            process.communicate()

    def left(self) -> float:
        """Seconds of the only lease that there is."""
        (left,) = json.loads(get(self.port, "/leases/")[1])["left"]
        return float(left)

    def renewed(self) -> bool:
        """Does the lease end later than it would have, with everybody turned away all the while?"""
        ends = self.left() + monotonic()  # or before

        def later() -> bool:
            assert self.status() == 429
            asked = monotonic()
            return asked + self.left() > ends + 0.01

        return wait_until(later)


@contextmanager
def shop(kind: str, env: dict[str, str], folder: Path, is_host: bool) -> Iterator[Shop]:
    port = free_port()
    command: Callable[[], list[str]] = {
        "gthread": lambda: gunicorn(port, "--workers", "2", "--threads", "4"),
        "uvicorn": lambda: uvicorn(port, "--workers", "2"),
    }[kind]
    with running(command(), port, folder / "log", env):
        yield Shop(port, kind, env, is_host)


SITES = ["gthread-redis", "uvicorn-redis", "gthread-host"] if LONG else ["uvicorn-redis", "gthread-host"]


@pytest.fixture(
    scope="module",
    params=SITES,
)
def site(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    """Each test leaves it with its slot free."""
    kind, _, store = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    env = {"CHAOS_POLICY": f'{{"max_concurrent": 1, "ttl": {TTL}}}', "CHAOS_MODE": "deny", "CHAOS_TIMEOUT": "5"}
    if store == "redis":
        env |= {
            "DJANGO_SETTINGS_MODULE": "tests.chaos.settings",
            "CHAOS_REDIS": redis_server.url,
            "CHAOS_PREFIX": f"hand-over-{request.param}",
        }
    else:
        env |= own_settings(folder, "tests.chaos.settings")
    with shop(kind, env, folder, is_host=store == "host") as running_shop:
        yield running_shop


def test_a_thread_and_a_second_process_go_on_holding(site: Shop, tmp_path: Path) -> None:
    over = tmp_path / "over"
    with site.task() as task, site.task() as other:
        site.hand_over(f"?thread={over}")
        assert site.renewed(), "by the thread's process, long after the answer"
        over.touch()
        assert wait_until(lambda: site.status() == 200)
        task.wait()
        other.wait()
        token = site.hand_over()
        assert site.status() == 429, "nobody has claimed it yet, and it is counted"
        assert task.claim(token) == "held"
        assert site.renewed(), "by the second process"
        assert other.claim(token) == "lost", "a second claim"
        assert site.status() == 429
        task.finish()
        assert wait_until(lambda: site.status() == 200)


def test_killed_it_comes_back_within_the_lease(site: Shop) -> None:
    with site.task() as task:
        task.wait()
        assert task.claim(site.hand_over()) == "held"
        left, killed = site.left(), monotonic()
        task.process.kill()
        assert wait_until(lambda: site.status() == 200)
        took = monotonic() - killed
        print(f"back after {took:.2f} s")
        # The kernel tells the host store at once: there most of the lease, which has just begun, is left.
        assert took < (0.8 * left if site.is_host else 5.0 * TTL)


@pytest.mark.parametrize("site", SITES if LONG else SITES[-1:], indirect=True)
def test_unclaimed_it_ends_with_its_lease(site: Shop) -> None:
    with site.task() as task:
        task.wait()
        began = monotonic()
        token = site.hand_over()
        assert wait_until(lambda: site.status() == 200)
        assert 0.9 * TTL < monotonic() - began < 5.0 * TTL
        assert task.claim(token) == "lost"
