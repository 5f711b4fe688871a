"""Waiting in line on real servers: those without a limit go on, bursts go through, who leaves or is told to end is gone."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from time import monotonic, sleep
from typing import Any

import pytest

from . import gauge
from .chaos import LONG
from .servers import free_port, get, gunicorn, running, uvicorn
from .support import backend_entry, wait_until
from .test_queueing import WAITING

CLIENTS = 2000 if LONG else 300
#: Clients that are connected at the same time at most: each takes files of this process and of the server.
AT_ONCE = 400
#: Clients that come in a second.
A_SECOND = 100 if LONG else 250


class Server:
    def __init__(self, port: int, process: Popen[bytes], gauge_file: Path) -> None:
        self.port, self.process, self.gauge_file = port, process, gauge_file

    def get(self, path: str) -> tuple[int, bytes]:
        """Also where the line is long: an answer is waited for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            return get(self.port, path, connection)
        finally:
            connection.close()

    def line(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/-/held/")[1])
        return found

    def workers(self) -> list[int]:
        """The processes that gunicorn has started."""
        master = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]

    def is_empty(self) -> bool:
        return self.line() == {"held": [], "waiting": 0}

    def seen(self) -> gauge.Reading:
        return gauge.read(str(self.gauge_file))["stays"]


@contextmanager
def serving(
    command: str,
    folder: Path,
    *options: str,
    backend: dict[str, Any],
    waiters: int = 4,
    **fields: Any,
) -> Iterator[Server]:
    policy = {"url_names": ["stays", "astays"], "key": "global", **fields}
    limit = {
        "BACKENDS": {"default": backend},
        "POLICIES": {"policies": {"cap": policy}},
        "MAX_SYNC_WAITERS": waiters,
    }
    with serving_by(command, folder, *options, limit=limit) as server:
        yield server


@contextmanager
def serving_by(command: str, folder: Path, *options: str, limit: dict[str, Any]) -> Iterator[Server]:
    """`limit` is the setting."""
    port = free_port()
    gauge_file = folder / "gauge"
    gauge_file.touch()
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.waiting_settings",
        "TEST_CONCURRENCY_LIMIT": json.dumps(limit),
        "TEST_GAUGE_FILE": str(gauge_file),
    }
    start = gunicorn if command == "gunicorn" else uvicorn
    with running(start(port, *options), port, gauge_file, env) as process:
        yield Server(port, process, gauge_file)


@pytest.fixture
def backend(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    return backend_entry(request.param, request, prefix, tmp_path)


MEMORY = {"BACKEND": "memory"}


def on(*short: str, also: tuple[Any, ...] = ()) -> pytest.MarkDecorator:
    """On these stores in the short run, and on all of them in the long one; with each of `also`, or in the short run with the
    first."""
    stores = WAITING if LONG else [name for name in short if name in WAITING] or WAITING[:1]
    if not also:
        return pytest.mark.parametrize("backend", stores, indirect=True)
    pairs = [(store, one) for store in stores for one in (also if LONG else also[:1])]
    return pytest.mark.parametrize(("backend", "path"), pairs, indirect=["backend"])


@on("host")
def test_a_view_without_a_limit_goes_on_answering_while_a_line_is_full(tmp_path: Path, backend: dict[str, Any]) -> None:
    """Eight threads: two inside, four in line, and the other two turn away who comes then, and serve everybody else."""
    options = ("--workers", "1", "--threads", "8")
    with serving("gunicorn", tmp_path, *options, backend=backend, max_concurrent=2, wait=5) as server:
        over = threading.Event()
        took: list[float] = []

        def asks_for_what_is_free() -> None:
            while not over.is_set():
                began = monotonic()
                status, _ = server.get("/free/")
                took.append(monotonic() - began)
                assert status == 200

        with ThreadPoolExecutor(24) as clients:
            free = clients.submit(asks_for_what_is_free)
            try:
                inside = [clients.submit(server.get, "/stays/?for=700") for _ in range(2)]
                assert wait_until(lambda: server.seen().inside == 2)
                others = [clients.submit(server.get, "/stays/?for=700") for _ in range(18)]
                answers = [one.result(60) for one in inside + others]
            finally:
                over.set()
            free.result(60)
        statuses = Counter(status for status, _ in answers)
        reasons = Counter(json.loads(body)["reason"] for status, body in answers if status == 429)
        print(f"{statuses}, {reasons}, /free/ {len(took)} times, {max(took):.3f} s at most, {server.seen()}")
        assert statuses[200] + statuses[429] == 20, "all are answered"
        assert statuses[200] >= 6, "two inside and four in line"
        assert set(reasons) == {"queue_full"}
        assert server.seen().most == 2
        assert max(took) < 5, "it waited for those who wait"
        assert len(took) > 20
        assert wait_until(server.is_empty)


@on("redis", also=("/astays/", "/stays/"))
def test_a_burst_is_admitted_whole(tmp_path: Path, backend: dict[str, Any], path: str) -> None:
    with (
        serving("uvicorn", tmp_path, "--workers", "1", backend=backend, max_concurrent=5, wait=30) as server,
        ThreadPoolExecutor(50) as clients,
    ):
        statuses = Counter(status for status, _ in clients.map(server.get, [path] * 50))
        assert statuses == {200: 50}
        assert server.seen().most == 5, "never above the cap, and reached"
        assert server.seen().admitted == 50
        assert wait_until(server.is_empty)


@pytest.mark.parametrize(("wait", "grace"), [(30, 2), (0.5, 20)] if LONG else [(30, 2)])
def test_a_worker_that_is_told_to_end_does_so_within_its_grace(tmp_path: Path, wait: float, grace: int) -> None:
    """Threads that wait are requests like others: they are let to their end, for as long as the server lets them."""
    options = ("--workers", "1", "--threads", "8", "--graceful-timeout", str(grace))
    with (
        serving("gunicorn", tmp_path, *options, backend=MEMORY, max_concurrent=1, wait=wait) as server,
        ThreadPoolExecutor(8) as clients,
    ):
        stays = 20_000 if grace < 10 else 300

        def ask() -> int:
            with suppress(OSError, http.client.HTTPException):
                return server.get(f"/stays/?for={stays}")[0]
            return 0

        asked = [clients.submit(ask) for _ in range(4)]
        assert wait_until(lambda: server.line() == {"held": ["cap"], "waiting": 3})
        began = monotonic()
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(grace + 10 if grace < 10 else 15)
        except TimeoutExpired:
            pytest.fail("it is still there")
        print(f"wait {wait}, grace {grace}: ended {monotonic() - began:.2f} s after it was told to")
        statuses = Counter(one.result(60) for one in asked)
        assert grace < 10 or 0 not in statuses, "cut off, though there was time"


async def _leave(port: int, path: str, after: float) -> None:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    with suppress(TimeoutError, OSError):
        await asyncio.wait_for(reader.read(-1), after)
    writer.transport.abort()


async def _storm(port: int, path: str, number: int) -> None:
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        # A server that has more to begin than it can would be told of who left only when it has begun all.
        await asyncio.sleep(random.uniform(0, number / A_SECOND))
        async with room:
            await _leave(port, path, random.uniform(0, 1.0))

    await asyncio.gather(*[one() for _ in range(number)])


@on("memory", "redis", also=("/astays/", "/thread/"))
def test_clients_that_leave_while_they_wait_leave_nothing(tmp_path: Path, backend: dict[str, Any], path: str) -> None:
    """In a coroutine, and in the thread of a sync view; without a lease's or a wait's end in sight."""
    number = CLIENTS if path == "/astays/" else CLIENTS // 4
    with serving(
        "uvicorn",
        tmp_path,
        "--workers",
        "1",
        backend=backend,
        waiters=1000,
        max_concurrent=3,
        wait=600,
        ttl=600,
        max_waiting=10_000,
    ) as server:
        assert server.get(f"{path}?for=1")[0] == 200
        longest = [0]

        def watches() -> None:
            while not over.is_set():
                longest[0] = max(longest[0], server.line()["waiting"])
                sleep(0.05)

        over = threading.Event()
        with ThreadPoolExecutor(1) as watching:
            watched = watching.submit(watches)
            try:
                for _ in range(20):  # on a busy machine all may have left before they stood in line
                    asyncio.run(_storm(server.port, f"{path}?for=100", number))
                    if longest[0] > 3:
                        break
            finally:
                over.set()
            left = monotonic()
            assert wait_until(server.is_empty), server.line()
            empty = monotonic() - left
            watched.result()
        print(
            f"{path}, {backend['BACKEND']}: {number} clients, {longest[0]} in line at most, empty {empty:.2f} s later"
        )
        assert longest[0] > 3
        assert server.seen().most <= 3
        assert server.get(f"{path}?for=1")[0] == 200
