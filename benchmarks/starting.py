"""The Redis of a run: one of its own, where there is a server to start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@contextlib.contextmanager
def running_redis() -> Iterator[Any]:
    """A RedisServer, stopped in the end; None where there is none to start."""
    try:
        from tests.redis_server import RedisServer, binary

        binary()
    except (ImportError, AssertionError) as error:
        print(f"Redis is left out: {error}", file=sys.stderr)
        yield None
        return
    server = RedisServer()
    try:
        yield server
    finally:
        server.stop()
