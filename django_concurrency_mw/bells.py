"""The bell: wakes one who waits for a slot, a thread or a coroutine.

It is only a hint that it is worth asking the store again. Rung before somebody waits, it is not waited for; one that rings
in vain costs a question. `ring` may be called from any thread, and in the middle of anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable


class Bell:
    """Used by one waiter; closed by whoever asked for it."""

    __slots__ = ("__weakref__", "_closing", "_rung", "_wake")

    def __init__(self) -> None:
        self._rung = False
        self._wake: Callable[[], object] | None = None
        self._closing: list[Callable[[], object]] = []

    def ring(self) -> None:
        """Somebody has a reason to ask again."""
        self._rung = True
        wake = self._wake
        if wake is not None:
            wake()

    def wait(self, seconds: float) -> None:
        """In a thread: until it rings, `seconds` at most."""
        # A bare lock, and no Event: that has a lock of its own inside, and a garbage collection in the middle of its wait() may
        # give a slot back, and so ring this very bell.
        closed = threading.Lock()
        closed.acquire()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # it was rung before
                closed.release()

        self._wake = wake
        try:
            if not self._rung:  # asked after `_wake` is there: a ring in between is seen by one of the two
                closed.acquire(timeout=seconds)
        finally:
            self._wake, self._rung = None, False

    async def await_(self, seconds: float) -> None:
        """The same in a coroutine."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_end, woken)

        self._wake = wake
        timer = loop.call_later(seconds, _end, woken)
        try:
            if not self._rung:
                await woken
        finally:
            timer.cancel()
            self._wake, self._rung = None, False

    def at_close(self, call: Callable[[], object]) -> None:
        """To be called once, when nobody waits by it any more."""
        self._closing.append(call)

    def close(self) -> None:
        """Nobody waits by it any more. Any number of times."""
        while self._closing:
            self._closing.pop()()


def _end(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
