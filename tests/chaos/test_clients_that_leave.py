"""Clients that leave: thousands of requests, dropped at random moments while their slot is asked for, held or given back."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from time import monotonic

import pytest

from ..proxy import Proxy, between
from ..redis_server import RedisServer
from ..servers import get
from ..support import wait_until
from . import LONG
from .sites import Site, chaos_site

REQUESTS = 2000 if LONG else 500
AT_ONCE = 12
#: A view's kind -> its path on uvicorn.
VIEWS = {"async": "/awork/", "sync": "/work/", "async-stream": "/astream/", "sync-stream": "/stream/"}


async def leave(port: int, path: str, after: float) -> None:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    try:
        await asyncio.wait_for(reader.read(-1), after)
    except (TimeoutError, OSError):
        pass
    finally:
        writer.transport.abort()


async def storm(port: int, path: str, number: int) -> None:
    """So many requests, AT_ONCE at a time, each dropped 0 to 120 ms after it was sent."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with room:
            await leave(port, path, random.uniform(0, 0.12))

    await asyncio.gather(*[one() for _ in range(number)])
    await asyncio.sleep(0.02)


@pytest.mark.parametrize("limit", [1000, 5] if LONG else [5])
@pytest.mark.parametrize("view", list(VIEWS) if LONG else ["async"])
def test_no_slot_stays_when_clients_leave(view: str, limit: int, redis_server: RedisServer, tmp_path: Path) -> None:
    proxy = Proxy(redis_server.port)
    proxy.delay = between(0.0, 0.03)
    try:
        # Without a lease's end in sight: only a release frees a slot.
        with chaos_site(
            "uvicorn", redis_server, tmp_path, url=proxy.url, max_concurrent=limit, ttl=3600, mode="deny"
        ) as site:
            site.view = VIEWS[view]
            for number in (REQUESTS, *[REQUESTS // 4] * 20):
                asyncio.run(storm(site.port, f"{VIEWS[view]}?for=40", number))
                if site.gauge()["admitted"] >= 100:  # a busy machine admits fewer of those who stay so short a time
                    break
            over = monotonic()
            assert wait_until(lambda: site.held() == 0), f"{site.held()} slots are left"
            print(f"{view}, limit {limit}: {site.gauge()}, 0 held {monotonic() - over:.2f} s after the last one")
            told = site.gauge()
            assert told["admitted"] >= 100
            assert told["most"] <= limit
            assert told["inside"] == 0
            admitting(site)
    finally:
        proxy.stop()


def admitting(site: Site) -> None:
    """Five at a time, again and again, as if nothing had been."""
    for _ in range(3):
        threads = site.hold(5, 100)
        for thread in threads:
            thread.join()
        # A release may still be on its way when the answer is there.
        assert wait_until(lambda: get(site.port, f"{site.view}?for=1")[0] == 200)
