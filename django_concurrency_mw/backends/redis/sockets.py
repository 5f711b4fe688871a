"""The socket of a thread's connection: all its calls have one deadline, and it gives redis-py one reply at a time.

Nearly all replies are numbers, which are read off it without redis-py. As that never has more than the reply that it reads just
now, all that came behind it is still here, whoever reads next.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

from .replies import reply

#: Of greenlets each step may take the time of a call, and a call so many of these in all.
STEPS = 20
#: Bytes that are asked for at once; hardly any reply has more.
CHUNK = 4096

#: Are these whole replies, and numbers all of them? Then the last is found; or the array that comes last.
_numbers = re.compile(rb"(?::-?\d+\r\n)*:(-?\d+)\r\n").fullmatch
_numbers_and_array = re.compile(rb"((?::-?\d+\r\n)*)\*(\d+)\r\n((?::-?\d+\r\n)*)").fullmatch


class DeadlineSocket:
    """A socket whose every call has what is left until `deadline` (monotonic seconds), to within 5 percent.

    A greenlet that waits comes to its turn when all the others have had theirs, in a burst long after the reply has come: that
    time would be held against the server. So each of its calls has `step` seconds of its own (None: there are threads).
    """

    def __init__(self, inner: socket.socket, deadline: float, step: float | None) -> None:
        self._inner, self.deadline, self._step, self._set = inner, deadline, step, 0.0
        # One with a timeout never blocks in the kernel: Python waits until it is ready, which is one more system call.
        self._writes = step is None and os.name == "posix" and type(inner) is socket.socket and bool(inner.gettimeout())

    @property
    def is_late(self) -> bool:
        """May a call have given up as its time was over? Else its TimeoutError is somebody's own, from a signal handler."""
        return self._step is not None or self.deadline - monotonic() <= 0.1 * self._set

    def recv(self, size: int) -> bytes:
        if self._step is None:
            self._bound()
            return self._inner.recv(size)
        return in_time(self._bound, self._inner.recv, size)  # type: ignore[no-any-return]  # what recv returns

    def sendall(self, data: bytes) -> None:
        if self._writes:
            try:
                sent = os.write(self._inner.fileno(), data)
            except BlockingIOError:  # the kernel has too much of ours that the server does not read
                sent = 0
            if sent == len(data):  # as nearly always
                return
            data = data[sent:]
        self._bound()
        self._inner.sendall(data)

    def settimeout(self, value: float | None) -> None:
        """redis-py sets the timeout of the call to come; ours is the deadline."""

    def _bound(self) -> float:
        left = self.deadline - monotonic()
        if self._step is not None or left <= 0:
            left = left_until(self.deadline, self._step)
        if not 0.95 * self._set <= left <= 1.05 * self._set:  # setting it is a system call, and mostly it stands
            self._inner.settimeout(left)
            self._set = left
        return left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class ReplySocket(DeadlineSocket):
    """One that is read from a reply at a time."""

    def __init__(self, inner: socket.socket, deadline: float, step: float | None) -> None:
        super().__init__(inner, deadline, step)
        #: What has come and nobody has read; of that, so many bytes are left of the reply that redis-py reads.
        self._unread, self._due = b"", 0

    def last(self, due: int) -> int | list[int] | None:
        """The last of so many replies, all of them taken off, if the others are numbers and it is one, or an array of them: as
        nearly always. None: nothing is taken off, or not all of that has come. Raises: OSError."""
        unread = self._unread or self._more()
        while unread:
            found = _numbers(unread)
            if found is None:
                return self._last_array(due)
            here = unread.count(b":")
            if here == due:
                self._unread = b""
                return int(found[1])
            if here > due:
                return None
            unread = self._more()
        return None

    def _last_array(self, due: int) -> list[int] | None:
        found = _numbers_and_array(self._unread)
        if found is None:
            return None
        before, count, numbers = found.groups()
        each = numbers.split()
        if before.count(b":") != due - 1 or len(each) != int(count):
            return None
        self._unread = b""
        return [int(one[1:]) for one in each]

    def number(self) -> int | list[int] | None:
        """The next reply, taken off, if it is a number or an array of them. None: it is something else, left for redis-py to
        read, or there is none. Raises: OSError."""
        value, end = self._next()
        if value is not None:
            self._unread = self._unread[end:]
        return value

    def recv(self, size: int) -> bytes:
        if not self._due:
            _, self._due = self._next()
        data = self._unread[: min(size, self._due)]
        self._unread, self._due = self._unread[len(data) :], self._due - len(data)
        return data

    def recv_into(self, buffer: bytearray) -> int:
        data = self.recv(len(buffer))
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def _next(self) -> tuple[int | list[int] | None, int]:
        """The next reply and its length, waited for; a length of 0 where no more will come."""
        unread = self._unread or self._more()
        while unread:
            try:
                value, end = reply(unread, 0)
            except ValueError:  # no server says that, and redis-py says so
                return None, len(unread)
            if end > 0:
                return value, end
            unread = self._more()
        return None, 0

    def _more(self) -> bytes:
        """All that is unread when more has come; nothing where no more will."""
        data = super().recv(max(CHUNK, len(self._unread)))
        if not data:
            return data
        self._unread += data
        return self._unread


def left_until(deadline: float, step: float | None) -> float:
    """Seconds that the next call may take. Raises: TimeoutError where that is none."""
    left = deadline - monotonic()
    if step is not None and left > -STEPS * step:
        return step
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def in_time(bound: Callable[[], float], call: Callable[..., Any], *arguments: Any) -> Any:
    """Make this call, once more where it gives up too early: the timers of greenlets begin with the turn of all the others."""
    while True:
        left, began = bound(), monotonic()
        try:
            return call(*arguments)
        except TimeoutError as error:
            if error.errno is not None or monotonic() - began > 0.9 * left:  # the kernel's own comes once
                raise
