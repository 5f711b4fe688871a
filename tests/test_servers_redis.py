"""Real servers with two workers each on one Redis: a cap of 5 under 64 clients, by the views' own gauge in another Redis.

gunicorn (gthread, 2 x 32) and uvicorn (2 workers) run side by side on one prefix, so there is one cap over all four workers.
Every kind of view: 32 clients at each server at the same time, then all 64 at one of them alone; for 3 seconds and for 1 in
the long run, less in the short one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from . import gauge
from .chaos import LONG
from .redis_server import RedisServer
from .server_settings import KINDS
from .servers import crowd, free_port, gunicorn, running, uvicorn
from .support import wait_until

CLIENTS = 64
CAP = 5
#: How often a crowd comes at most, until enough of it was admitted and the cap was reached: a busy machine admits as exactly,
#: but fewer.
ROUNDS = 4 if LONG else 30
PREFIX = "servers"
#: Who is asked -> seconds, and how many have to be admitted at least (250 a second are possible). The short run asks both.
CROWDS = {
    "gunicorn gthread 2x32 and uvicorn x2": (("gunicorn", "uvicorn"), 3.0 if LONG else 0.5, 50 if LONG else 15),
    "gunicorn gthread 2x32": (("gunicorn",), 1.0, 15),
    "uvicorn x2": (("uvicorn",), 1.0, 15),
}
if not LONG:
    CROWDS = dict(list(CROWDS.items())[:1])


@dataclass
class Site:
    """Both servers, and the two Redis: where the slots are, and where the views count."""

    ports: dict[str, int]
    limiter: RedisServer
    witness: RedisServer


@pytest.fixture(scope="module")
def site(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    logs = tmp_path_factory.mktemp("servers") / "servers"
    witness = RedisServer()
    env = {
        "TEST_LIMITER_REDIS": redis_server.url,
        "TEST_LIMITER_PREFIX": PREFIX,
        "TEST_GAUGE_REDIS": witness.url,
    }
    ports = {"gunicorn": free_port(), "uvicorn": free_port()}
    try:
        with (
            running(gunicorn(ports["gunicorn"], "--workers", "2", "--threads", "32"), ports["gunicorn"], logs, env),
            running(uvicorn(ports["uvicorn"], "--workers", "2"), ports["uvicorn"], logs, env),
        ):
            yield Site(ports, redis_server, witness)
    finally:
        witness.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("asked", "seconds", "at_least"), list(CROWDS.values()), ids=list(CROWDS))
def test_one_cap_holds_over_all_workers_is_reached_and_nothing_is_left(
    site: Site, kind: str, asked: tuple[str, ...], seconds: float, at_least: int
) -> None:
    with site.witness.client() as client:
        client.flushdb()
        each = CLIENTS // len(asked)
        by_server: dict[str, Counter[int]] = {name: Counter() for name in asked}
        for _ in range(ROUNDS):
            with ThreadPoolExecutor() as crowds:
                counted = crowds.map(lambda name: crowd(site.ports[name], f"/busy/{kind}/", each, seconds), asked)
                for name, statuses in zip(asked, counted, strict=True):
                    by_server[name] += statuses
            assert wait_until(lambda: site.limiter.held(PREFIX) == 0)
            reading = gauge.read_redis(client, kind)
            if reading.admitted >= at_least and reading.most >= CAP:
                break
    print(f"{kind}: {by_server}, {reading}, redis {site.limiter.version}")
    total: Counter[int] = sum(by_server.values(), Counter())
    assert reading.most == CAP, "never above the cap, and reached"
    assert reading.inside == 0
    assert reading.admitted >= at_least
    admitted = 500 if kind == "raising" else 200
    assert set(total) == {admitted, 429}, "an answer that neither the view nor the limit gave"
    assert total[admitted] == reading.admitted
    assert all(by_server.values()), "a server that gave no answer"


def test_both_workers_of_each_server_take_part(site: Site) -> None:
    """What is counted here is four processes, not one at a time."""
    with site.witness.client() as client:
        client.flushdb()

        def all_four() -> bool:
            for port in site.ports.values():
                crowd(port, "/busy/sync/", 8, 0.2)
            return int(client.scard("processes")) == 4

        assert wait_until(all_four)
