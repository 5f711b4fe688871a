"""Views that outlive their ttl, with a neighbour that keeps the processor busy; and a slow store with many clients."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from pathlib import Path
from time import monotonic, sleep

import pytest

from ..proxy import Proxy
from ..redis_server import RedisServer
from ..servers import crowd, get
from ..support import wait_until
from . import LONG
from .sites import Site, chaos_site

SERVERS = {
    "gthread": ("gthread", "--workers", "1", "--threads", "80"),
    "uvicorn": ("uvicorn", "--workers", "1"),
}


@pytest.mark.parametrize("server", list(SERVERS) if LONG else ["gthread"])
def test_a_renewed_lease_holds_the_cap_beside_a_busy_neighbour(
    server: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Views of 4 s under `ttl: 1`, 64 clients, and one more request that spins in Python all the while.

    In the short run once, 4 s under `ttl: 3`: where others keep the machine busy too, a heartbeat may be late by 2 s.
    """
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=1 if LONG else 3) as site:
        over = threading.Event()

        def keep_busy() -> None:
            while not over.is_set():
                get(site.port, "/spin/?for=1000")

        busy = threading.Thread(target=keep_busy)
        busy.start()
        statuses: Counter[int] = Counter()
        at_least = 10 if LONG else 5
        try:
            for _ in range(8):
                # Past the leases that the first ones took; in the short run not until there is room for others.
                statuses += crowd(site.port, f"{site.view}?for=4000", 64, 6 if LONG else 3.6)
                told = site.gauge()
                if told["admitted"] >= at_least:
                    break
        finally:
            over.set()
            busy.join()
        print(f"{server}: {statuses}, {told}")
        assert told["most"] == 5, "never above the cap, and reached"
        assert statuses[200] == told["admitted"] >= at_least
        assert set(statuses) == {200, 429}
        assert wait_until(lambda: site.held() == 0)
        assert "slot is lost" not in site.text()


@pytest.mark.parametrize("server", list(SERVERS) if LONG else ["gthread"])
def test_without_renewal_the_slot_ends_and_the_late_release_is_told_once(
    server: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    name, *options = SERVERS[server]
    with chaos_site(name, redis_server, tmp_path, *options, ttl=1, renew=False) as site:
        first = site.hold(5, tmp_path / "first")
        assert wait_until(lambda: site.gauge()["inside"] == 5)
        second = []
        for inside in (6, 7, 8):  # one by one: the leases of the first do not end at the same moment
            assert wait_until(lambda: site.status() == 200), "its ttl did not end it"
            second += site.hold(1, tmp_path / "second")
            assert wait_until(lambda inside=inside: site.gauge()["inside"] == inside)  # type: ignore[misc]
        sleep(0.3)  # so that it is late by its own clock, too
        (tmp_path / "first").touch()
        for thread in first:
            thread.join()
        assert site.gauge()["inside"] == 3
        assert wait_until(lambda: "slot is lost" in site.text())
        (line,) = [line for line in site.text().splitlines() if "slot is lost" in line]
        assert "policy cap" in line
        assert re.search(r"lease ended \d+\.\d", line), line
        assert "Raise `ttl`" in line
        (tmp_path / "second").touch()
        for thread in second:
            thread.join()
        assert wait_until(lambda: site.held() == 0)


def test_a_slow_store_and_200_clients_at_once(redis_server: RedisServer, tmp_path: Path) -> None:
    """300 ms of latency, a limit of 1,000: nobody is turned away, nothing fails. One after the other would take a minute.

    The `socket_timeout` of 5 s is for busy machines: 200 requests keep the event loop from hearing replies for a while.
    """
    proxy = Proxy(redis_server.port)
    proxy.delay = lambda: 0.15
    try:
        with chaos_site(
            "uvicorn", redis_server, tmp_path, url=proxy.url, timeout=5.0, max_concurrent=1000, ttl=600
        ) as site:
            assert site.status() == 200  # connected
            statuses = asyncio.run(everybody(site, 200))
            assert statuses == [200] * 200
            assert wait_until(lambda: site.held() == 0)
            assert "fails" not in site.text()
    finally:
        proxy.stop()


async def everybody(site: Site, number: int) -> list[int]:
    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(f"GET {site.view}?for=50 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status

    began = monotonic()
    statuses = await asyncio.gather(*[one() for _ in range(number)])
    print(f"{number} in {monotonic() - began:.2f} s")
    return list(statuses)
