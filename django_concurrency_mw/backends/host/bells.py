"""The bells of the host store: who gives back wakes one who waits in another process by a datagram.

Each waiting thread has a socket of its own, and so has each event loop, for all its waiters; their abstract names are numbers,
which stand in the table. What is sent is empty: it says no more than that it is worth asking. It may be lost, as where the
receiver's queue is full or it lives in another network namespace, and then it asks a little later by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

from ... import afresh
from ...bells import Bell
from .layout import QUEUED

#: Whom to wake as soon as the table is unlocked.
outbox: deque[int] = deque()
#: Datagrams that are read at once; a queue has room for 10, by default.
AT_ONCE: Final = 64


def ring() -> None:
    """Wake whoever is in the outbox. Waits for nothing, and never fails."""
    numbers = set()
    while outbox:
        with contextlib.suppress(IndexError):  # another thread rings, too
            numbers.add(outbox.popleft())
    numbers.discard(0)
    for number in numbers:
        _send(number)


def _send(number: int) -> None:
    global _sender
    with contextlib.suppress(OSError):
        if _sender is None:
            _sender = _Post()
        _sender.socket.sendto(b"", _name(number))


def _name(number: int) -> bytes:
    return b"\0concurrency-%016x" % number


class _Post:
    """A socket with a number. Raises OSError where there can be none."""

    __slots__ = ("__weakref__", "number", "socket")

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # Not a name of the kernel's choice: those are soon another program's.
        self.number = int.from_bytes(os.urandom(8), "little") or 1
        try:
            self.socket.setblocking(False)  # a patched socket takes no notice of SOCK_NONBLOCK
            self.socket.bind(_name(self.number))
        except BaseException:
            self.socket.close()
            raise
        _posts.add(self)

    def close(self) -> None:
        self.number = 0
        self.socket.close()

    def __del__(self) -> None:
        if hasattr(self, "number"):
            self.close()

    def empty(self) -> None:
        """Nothing that has come until now is left."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(0.0)
            for _ in range(AT_ONCE):
                self.socket.recv(1)


_posts: weakref.WeakSet[_Post] = weakref.WeakSet()
#: By which this process rings.
_sender: _Post | None = None


class HostBell(Bell):
    """A bell that other processes can ring. Waits by it are awaited on its own event loop, or by its own thread."""

    __slots__ = ()

    @property
    def number(self) -> int:
        """By which others ring it; 0 where nobody can."""
        raise NotImplementedError

    def stands(self, mapped: mmap.mmap, states: list[int]) -> None:
        """It waits for one of these bytes to be something else than QUEUED."""


class ThreadBell(HostBell):
    """Of one thread, which waits for its own socket. Raises OSError where there can be none."""

    __slots__ = ("_post",)

    def __init__(self) -> None:
        super().__init__()
        self._post = _Post()

    @property
    def number(self) -> int:
        return self._post.number

    def ring(self) -> None:
        self._rung = True
        if number := self._post.number:
            _send(number)

    def wait(self, seconds: float) -> None:
        post = self._post
        if not post.number:  # as in a forked child
            super().wait(seconds)
            return
        try:
            if not self._rung:  # asked after the socket is there: a ring in between is in it
                with contextlib.suppress(OSError):  # the time is over
                    post.socket.settimeout(max(0.0, seconds))
                    post.socket.recv(1)
        finally:
            if self._rung:  # here, and maybe often; others ring once, and what they send twice costs a question
                self._rung = False
                post.empty()

    def close(self) -> None:
        super().close()
        self._post.close()


class LoopBell(HostBell):
    """Of a coroutine, which waits for its loop to hear of it. Raises OSError, NotImplementedError where it could not."""

    __slots__ = ("_loop", "_woken")

    def __init__(self) -> None:
        super().__init__()
        self._woken: asyncio.Future[None] | None = None
        self._loop = _LoopPost.of(asyncio.get_running_loop())
        self._loop.bells[id(self)] = weakref.ref(self)

    @property
    def number(self) -> int:
        return self._loop.post.number

    def ring(self) -> None:
        self._rung = True
        if self._woken is not None:
            self._loop.soon(self.ring_here)

    def ring_here(self) -> None:
        """`ring`, on its own loop."""
        self._rung, woken = True, self._woken
        if woken is not None and not woken.done():
            woken.set_result(None)

    async def await_(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        timer = loop.call_later(seconds, self.ring_here)
        try:
            if not self._rung:
                await self._woken
        finally:
            timer.cancel()
            self._woken, self._rung = None, False

    def stands(self, mapped: mmap.mmap, states: list[int]) -> None:
        self._loop.standing[id(self)] = (mapped, states[0], states[1:])

    def close(self) -> None:
        super().close()
        self._loop.leave(id(self))

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.leave(id(self))


class _LoopPost:
    """The one socket of an event loop that somebody waits on. It goes with the last of its bells."""

    __slots__ = ("__weakref__", "_loop", "bells", "post", "standing")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self.bells: dict[int, weakref.ref[LoopBell]] = {}
        #: By the id of a bell: the bytes it waits for.
        self.standing: dict[int, tuple[mmap.mmap, int, list[int]]] = {}
        self.post = _Post()
        loop.add_reader(self.post.socket, self._read)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopPost:
        """The one of this loop, which is the running one."""
        found = _of_loops.get(loop)
        if found is None or not found.post.number:
            found = _of_loops[loop] = cls(loop)
        return found

    def soon(self, call: Callable[[], object]) -> None:
        """On its loop, from any thread."""
        loop = self._loop()
        with contextlib.suppress(RuntimeError):  # it has ended
            if loop is not None:
                loop.call_soon_threadsafe(call)

    def leave(self, bell: int) -> None:
        """Nobody waits by this one. From any thread, in a garbage collection, too."""
        self.standing.pop(bell, None)
        if self.bells.pop(bell, None) is None or self.bells or not self.post.number:
            return
        loop = self._loop()
        if loop is None or loop.is_closed():
            self.post.close()
        else:
            self.soon(self._close)  # not here, where this may be a garbage collection

    def _close(self) -> None:
        loop = self._loop()
        if self.bells or not self.post.number:
            return
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self.post.socket)
        self.post.close()

    def _read(self) -> None:
        """Somebody's turn has come. Whose is plain to see in the table, so that no datagram that was lost makes a difference:
        one is lost only where others are still to be read."""
        self.post.empty()
        # In one piece, as a garbage collection in another thread may close a bell.
        for bell, (mapped, first, more) in list(self.standing.items()):
            if mapped[first] == QUEUED and not (more and any(mapped[at] != QUEUED for at in more)):
                continue
            self.standing.pop(bell, None)
            reference = self.bells.get(bell)
            rung = None if reference is None else reference()
            if rung is not None:
                rung.ring_here()


_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopPost] = weakref.WeakKeyDictionary()


def number_of(bell: Bell) -> int:
    """By which others ring it; 0 where nobody can."""
    return bell.number if isinstance(bell, HostBell) else 0


def bell() -> Bell:
    """For a thread. One without a socket, where there can be none, asks often."""
    try:
        return ThreadBell()
    except OSError:
        return Bell()


def abell() -> Bell:
    """For a coroutine of the running loop. One whose loop hears of no socket asks often."""
    try:
        return LoopBell()
    except (OSError, NotImplementedError):
        return Bell()


def _forked() -> None:
    """What comes for the parent is not to be read here. Its loop's own ear is shared with it, so nothing is said there."""
    global _sender
    outbox.clear()
    for post in list(_posts):
        post.close()
    _sender = None
    _of_loops.clear()


afresh.begin_with(_forked)
