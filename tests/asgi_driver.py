"""Drives an ASGI application in the test's own event loop: a client that can leave, and a server that can cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from django.core.handlers.asgi import ASGIHandler

from .support import SOON


class Left(OSError):
    """What `send` raises once the client has gone."""


class Exchange:
    """One request over ASGI, driven step by step.

    `events` collects what the application sent. `leave()` is the client's disconnect; `cancel()` the server's.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        path: str,
        *,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        send_fails_after: int | None = None,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self._fails_after = send_fails_after
        self._changed = asyncio.Event()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [
                (n.lower().encode(), v.encode("latin1")) for n, v in {"host": "testserver", **(headers or {})}.items()
            ],
            "client": ("203.0.113.9", 4711),
            "server": ("testserver", 80),
            "scheme": "http",
        }
        self.task = asyncio.get_running_loop().create_task(app(scope, self._inbox.get, self._send))  # type: ignore[arg-type]

    async def _send(self, event: dict[str, Any]) -> None:
        if self._fails_after is not None and len(self.events) >= self._fails_after:
            raise Left("the client has gone")
        self.events.append(event)
        self._changed.set()
        await asyncio.sleep(0)

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    def cancel(self) -> None:
        self.task.cancel()

    async def until_sent(self, number: int) -> None:
        """Wait for that many events."""
        while len(self.events) < number:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), SOON)

    async def end(self) -> None:
        """The application's end, however it comes."""
        await asyncio.wait([self.task], timeout=SOON)
        if not self.task.done():
            raise AssertionError("the application did not end")
        if not self.task.cancelled():
            self.task.exception()

    @property
    def status(self) -> int:
        return next(event["status"] for event in self.events if event["type"] == "http.response.start")

    @property
    def headers(self) -> dict[str, str]:
        start = next(event for event in self.events if event["type"] == "http.response.start")
        return {name.decode().lower(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(event.get("body", b"") for event in self.events if event["type"] == "http.response.body")


async def fetch(path: str, **options: Any) -> Exchange:
    """One whole request through a fresh handler."""
    exchange = Exchange(ASGIHandler(), path, **options)
    await exchange.end()
    return exchange
