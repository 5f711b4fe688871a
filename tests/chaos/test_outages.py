"""The store goes away in every way that it can, under 16 clients at a cap of 5, on gthread and uvicorn, in each mode."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import monotonic

import pytest

from ..proxy import Proxy
from ..redis_server import RedisServer
from ..servers import free_port, get, gunicorn, running, uvicorn
from ..support import wait_until
from . import LONG

CLIENTS = 16
CAP = 5
_numbers = count()

#: Server -> its command, its view.
SERVERS: dict[str, tuple[Callable[[int], list[str]], str]] = {
    "gthread": (lambda port: gunicorn(port, "--workers", "1", "--threads", "32"), "/work/?for=20"),
    "uvicorn": (lambda port: uvicorn(port, "--workers", "1"), "/awork/?for=20"),
}
#: What happens -> seconds that it lasts, in the short run and in the long one.
OUTAGES = {
    "killed": (0.6, 3.0),
    "refused": (0.6, 3.0),
    "2 s of latency": (1.0, 6.0),
    "black hole": (1.0, 10.0),
}


@dataclass
class Answer:
    at: float
    status: int
    ours: float
    state: str


@dataclass
class Crowd:
    """Clients that ask again and again until they are told to stop."""

    port: int
    path: str
    answers: list[Answer] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def one(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self.stopped.is_set():
            at = monotonic()
            try:
                connection.request("GET", self.path)
                response = connection.getresponse()
                response.read()
                ours, state = float(response.headers.get("X-Ours", "0")), response.headers.get("X-State", "")
                status = response.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status, ours, state = 0, 0.0, ""
            self.answers.append(Answer(at, status, ours, state))
            if status != 200:
                self.stopped.wait(0.02)
        connection.close()

    def since(self, begin: float, end: float) -> list[Answer]:
        return [answer for answer in list(self.answers) if begin <= answer.at <= end]


@contextmanager
def crowd(port: int, path: str) -> Iterator[Crowd]:
    clients = Crowd(port, path)
    threads = [threading.Thread(target=clients.one) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        clients.stopped.set()
        for thread in threads:
            thread.join()


@dataclass
class Site:
    server: str
    port: int
    path: str
    mode: str
    proxy: Proxy
    redis: RedisServer
    prefix: str

    def gauge(self, reset: bool = False) -> dict[str, int]:
        _, body = get(self.port, "/agauge/" + ("?reset" if reset else ""))
        told: dict[str, int] = json.loads(body)
        return told


@pytest.fixture(
    params=[
        (server, mode)
        for server in SERVERS
        for mode in ("local", "allow", "deny")
        if LONG or (server, mode) in (("gthread", "local"), ("uvicorn", "deny"))
    ],
    ids=lambda param: "-".join(param),
)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """The store is absent while it boots."""
    server, mode = request.param
    command, path = SERVERS[server]
    redis, port, prefix = RedisServer(), free_port(), f"chaos-{os.getpid()}-{next(_numbers)}"
    proxy = Proxy(redis.port)
    proxy.shut()
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.chaos.settings",
        "CHAOS_REDIS": proxy.url,
        "CHAOS_PREFIX": prefix,
        "CHAOS_MODE": mode,
    }
    try:
        with running(command(port), port, tmp_path / "log", env):
            yield Site(server, port, path, mode, proxy, redis, prefix)
    finally:
        print((tmp_path / f"log.{port}.log").read_text()[-3000:])
        proxy.stop()
        redis.stop()


def begin(site: Site, what: str) -> None:
    if what == "killed":
        site.redis.kill()
    elif what == "refused":
        site.proxy.shut()
    elif what == "2 s of latency":
        site.proxy.delay = lambda: 1.0
    else:
        site.proxy.black_hole = True


def end(site: Site, what: str) -> None:
    if what == "killed":
        site.redis.start()
    elif what in ("refused", "absent at boot"):
        site.proxy.open()
    elif what == "2 s of latency":
        site.proxy.delay = lambda: 0.0
    else:
        site.proxy.black_hole = False


#: In the short run each server has its own; both of them the absence at boot.
SHORT = {"gthread": ("killed", "black hole"), "uvicorn": ("refused", "2 s of latency")}


def test_a_store_that_goes_away(site: Site) -> None:
    outages = ["absent at boot", *(OUTAGES if LONG else SHORT[site.server])]
    with crowd(site.port, site.path) as clients:
        for what in outages:
            began = monotonic()
            if what == "absent at boot":
                lasts = 1.0 if LONG else 0.6
            else:
                begin(site, what)
                lasts = OUTAGES[what][LONG]
            clients.stopped.wait(lasts)
            later = began + min(lasts / 2, 0.8)  # who was just asking when it began had to wait for it
            assert wait_until(lambda: enough(site, clients.since(began, monotonic()), later)), (  # noqa: B023
                f"{what}: the site stood still"
            )
            over = monotonic()
            end(site, what)
            assert wait_until(lambda over=over: is_served_again(clients, over)), f"{what}: not healthy again"
            now = monotonic()
            during, whole = clients.since(began, over), clients.since(began - 0.3, now)
            late = clients.since(later, over)
            most = site.gauge(reset=True)["most"] if what != outages[-1] or site.mode != "allow" else 0
            worst = max(answer.ours for answer in whole)
            while_open = sorted(answer.ours for answer in late)
            print(
                f"{what}: {dict(Counter((answer.status, answer.state) for answer in during))}, most {most}, worst delay "
                f"{worst * 1000:.0f} ms, while open p50 {while_open[len(while_open) // 2] * 1000:.1f} ms, p99 "
                f"{while_open[int(len(while_open) * 0.99)] * 1000:.1f} ms, served again after {(now - over) * 1000:.0f} ms"
            )
            statuses = {answer.status for answer in whole}
            assert statuses <= ({200, 429, 503} if site.mode == "deny" else {200, 429}), statuses
            if site.mode != "allow":
                assert most <= CAP, f"{what}: {most} at once in one process"
            assert worst < 3
            assert while_open[int(len(while_open) * 0.9)] < 0.2  # seen: 0.001; who is to wait for it waits 0.25
            assert now - over < 10
    assert wait_until(lambda: site.redis.held(site.prefix) == 0), "slots are left"


#: Answers.
ENOUGH = 50
ADMITTED_BY = {"local": "local", "allow": "unprotected"}


def enough(site: Site, answers: list[Answer], later: float) -> bool:
    """Has the site gone on without its store, as its mode says, and was it asked when that was old news, often enough?"""
    if site.mode in ADMITTED_BY:
        went_on = [one for one in answers if one.status == 200 and one.state == ADMITTED_BY[site.mode]]
    else:
        went_on = [one for one in answers if one.status == 503]
    return len(went_on) >= ENOUGH and sum(one.at >= later for one in answers) >= ENOUGH


def is_served_again(clients: Crowd, over: float) -> bool:
    """Does the store decide about all of them? Behind the last one it did not there are many that it did."""
    answers = sorted(clients.since(over, monotonic()), key=lambda answer: answer.at)
    states = [answer.state for answer in answers[-ENOUGH:]]
    return len(states) == ENOUGH and "held" in states and all(state in ("held", "over") for state in states)
