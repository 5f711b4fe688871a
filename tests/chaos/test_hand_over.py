"""A view answers 202 and its slot lives on: in a thread of the server, and in a second process, which may be killed."""

from __future__ import annotations

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

TTL = 1.0 if LONG else 0.6
TASK = """
import sys, django
django.setup()
from django_concurrency_mw import SlotLost, hold
try:
    with hold(sys.argv[1]) as held:
        print(held.policies[0].state, flush=True)
        sys.stdin.readline()
    print("done", flush=True)
except SlotLost:
    print("lost", flush=True)
"""

Task = subprocess.Popen[str]


class Shop:
    """A running site with one slot."""

    def __init__(self, port: int, kind: str, env: dict[str, str]) -> None:
        self.port, self._prefix, self._env = port, "a" if kind == "uvicorn" else "", env

    def status(self) -> int:
        return get(self.port, f"/{self._prefix}work/?for=1")[0]

    def hand_over(self, query: str = "") -> str:
        status, body = get(self.port, f"/{self._prefix}hand-over/{query}")
        assert status == 202
        return body if isinstance(body, str) else body.decode()

    @contextmanager
    def task(self, token: str) -> Iterator[tuple[Task, str]]:
        """A process that claims it, and its first word."""
        task = subprocess.Popen(
            [sys.executable, "-c", TASK, token],
            env={**os.environ, "PYTHONPATH": str(ROOT), **self._env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert task.stdin
        assert task.stdout
        try:
            yield task, task.stdout.readline().strip()
        finally:
            task.kill()
            task.wait()
            task.stdin.close()
            task.stdout.close()

    def full_for(self, seconds: float) -> bool:
        """Is everybody turned away all the while?"""
        end = monotonic() + seconds
        return not wait_until(lambda: self.status() != 429, seconds) and monotonic() >= end


@contextmanager
def shop(kind: str, env: dict[str, str], folder: Path) -> Iterator[Shop]:
    port = free_port()
    command: Callable[[], list[str]] = {
        "gthread": lambda: gunicorn(port, "--workers", "2", "--threads", "4"),
        "uvicorn": lambda: uvicorn(port, "--workers", "2"),
    }[kind]
    with running(command(), port, folder / "log", env):
        yield Shop(port, kind, env)


@pytest.fixture(
    params=["gthread-redis", "uvicorn-redis", "gthread-host"] if LONG else ["uvicorn-redis", "gthread-host"]
)
def site(request: pytest.FixtureRequest, redis_server: RedisServer, prefix: str, tmp_path: Path) -> Iterator[Shop]:
    kind, _, store = request.param.partition("-")
    env = {"CHAOS_POLICY": f'{{"max_concurrent": 1, "ttl": {TTL}}}', "CHAOS_MODE": "deny", "CHAOS_TIMEOUT": "2"}
    if store == "redis":
        env |= {
            "DJANGO_SETTINGS_MODULE": "tests.chaos.settings",
            "CHAOS_REDIS": redis_server.url,
            "CHAOS_PREFIX": prefix,
        }
    else:
        env |= own_settings(tmp_path, "tests.chaos.settings")
    with shop(kind, env, tmp_path) as running_shop:
        running_shop.is_host = store == "host"  # type: ignore[attr-defined]  # for what a test expects
        yield running_shop


def test_a_thread_and_a_second_process_go_on_holding(site: Shop) -> None:
    site.hand_over(f"?thread={2000 * TTL}")
    assert site.full_for(1.6 * TTL), "renewed by the thread's process, long after the answer"
    assert wait_until(lambda: site.status() == 200)
    token = site.hand_over()
    assert site.status() == 429, "nobody has claimed it yet, and it is counted"
    with site.task(token) as (task, word):
        assert word == "held"
        assert site.full_for(1.6 * TTL), "renewed by the second process"
        with site.task(token) as (_, other):
            assert other == "lost", "a second claim"
        assert site.status() == 429
        assert task.stdin
        task.stdin.write("\n")
        task.stdin.flush()
        assert wait_until(lambda: site.status() == 200)
    assert wait_until(lambda: site.status() == 200)


def test_killed_it_comes_back_within_the_lease(site: Shop) -> None:
    with site.task(site.hand_over()) as (task, word):
        assert word == "held"
        assert site.full_for(1.2 * TTL)
        task.kill()
        killed = monotonic()
        assert wait_until(lambda: site.status() == 200, 5 * TTL)
        took = monotonic() - killed
        print(f"back after {took:.2f} s")
        assert took < (0.5 if site.is_host else 2.0) * TTL  # type: ignore[attr-defined]  # set by the fixture


def test_unclaimed_it_ends_with_its_lease(site: Shop) -> None:
    token = site.hand_over()
    began = monotonic()
    assert wait_until(lambda: site.status() == 200, 5 * TTL)
    assert 0.5 * TTL < monotonic() - began < 2.0 * TTL
    with site.task(token) as (_, word):
        assert word == "lost"
