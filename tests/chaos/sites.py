"""The chaos site as a test starts it: which server, which numbers, which Redis; and what it says of itself."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import count
from pathlib import Path
from subprocess import Popen
from typing import Any

from ..redis_server import RedisServer
from ..servers import free_port, get, gunicorn, running, uvicorn

_numbers = count()


@dataclass
class Site:
    """A running one. `view` is the path of the limited view that suits the server."""

    port: int
    view: str
    redis: RedisServer
    prefix: str
    log: Path
    process: Popen[bytes]

    def gauge(self, reset: bool = False) -> dict[str, int]:
        _, body = get(self.port, "/agauge/" + ("?reset" if reset else ""))
        told: dict[str, int] = json.loads(body)
        return told

    def held(self) -> int:
        return self.redis.held(self.prefix)

    def status(self, until: Path | int = 1) -> int:
        """Of one short request; 0 where there is no answer."""
        try:
            return get(self.port, f"{self.view}?{'for' if isinstance(until, int) else 'until'}={until}")[0]
        except (OSError, HTTPException):
            return 0

    def hold(self, number: int, until: Path | int) -> list[threading.Thread]:
        """So many requests inside at once, each in a thread of its own: for so many milliseconds, or until the file is there.

        Those that the server drops end quietly.
        """
        threads = [threading.Thread(target=self.status, args=(until,), daemon=True) for _ in range(number)]
        for thread in threads:
            thread.start()
        return threads

    def text(self) -> str:
        return self.log.read_text()


@contextmanager
def chaos_site(
    server: str,
    redis: RedisServer,
    folder: Path,
    *options: str,
    url: str = "",
    mode: str = "deny",
    timeout: float = 5.0,
    prefix: str = "",
    **policy: Any,
) -> Iterator[Site]:
    """`server` is gthread, sync or uvicorn, with its `options`. A store that fails shows as a 503, unless `mode` says other."""
    port, prefix = free_port(), prefix or f"chaos-{os.getpid()}-{next(_numbers)}"
    if server == "uvicorn":
        command, view = uvicorn(port, *options), "/awork/"
    else:
        command, view = gunicorn(port, "--worker-class", server, *options), "/work/"
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.chaos.settings",
        "CHAOS_REDIS": url or redis.url,
        "CHAOS_PREFIX": prefix,
        "CHAOS_MODE": mode,
        "CHAOS_TIMEOUT": str(timeout),
        "CHAOS_POLICY": json.dumps(policy),
    }
    with running(command, port, folder / "log", env) as process:
        yield Site(port, view, redis, prefix, folder / f"log.{port}.log", process)
