"""A line: one connection of threads, with what it still has to answer.

`Line.owed` is that, in order; each entry makes what must be sent again if the connection dies first, which hardly any does.
What interrupts a reading leaves what was read and what is owed in agreement, or else the line has to be given up: of the errors
that it raises only a TimeoutError of redis-py's means that it is in order still.
"""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NoReturn

from redis.exceptions import ConnectionError, RedisError, ResponseError, TimeoutError

from .connecting import refusal
from .detour import Detour
from .errors import passes
from .leftovers import Client, Leftovers, Release
from .sockets import ReplySocket

BuiltinTimeoutError = builtins.TimeoutError
#: Makes the releases that take back what a command may have taken.
Undo = Callable[[], Sequence[Release]]


def nothing() -> Sequence[Release]:
    """The undo of what takes nothing."""
    return ()


class Line:
    """One connection, which is made. `client` is who it is to the server, `used` the monotonic second of its last use."""

    __slots__ = ("client", "conn", "late", "owed", "socket", "used")

    def __init__(self, conn: Any) -> None:
        self.conn = conn
        self.socket: ReplySocket = conn.bounded_socket
        self.owed: deque[tuple[Undo, int]] = deque()
        self.late = 0
        self.client: Client | None = None
        self.used = monotonic()

    def until(self, deadline: float) -> None:
        """Everything from here on has to be over at `deadline` (monotonic seconds)."""
        self.socket.deadline = deadline

    def send(self, packed: bytes) -> None:
        """Raises: ConnectionError, TimeoutError; then it is closed, as a part may have been sent."""
        try:
            self.socket.sendall(packed)
        except BaseException as error:
            self.conn.disconnect()
            if isinstance(error, OSError):
                raise self._failure(error, "writing to") from error
            raise

    def read(self) -> Any:
        """One reply; an error of the server's is returned. Raises: ConnectionError, TimeoutError."""
        try:
            number = self.socket.number()
        except OSError as error:
            self._give_up(error)
        return self._other() if number is None else number

    def read_all(self, leftovers: Leftovers, detour: Detour) -> Any:
        """Hear all owed entries but the last, whose reply it returns, and leaves it to whoever asked to cross that off.
        Raises: ConnectionError, TimeoutError."""
        due = 0
        for _, replies in self.owed:
            due += replies
        try:
            number = self.socket.last(due)
        except OSError as error:
            self._give_up(error)
        if number is not None:
            return number
        self.hear(len(self.owed) - 1, leftovers, detour)
        return self.read()

    def hear(self, entries: int, leftovers: Leftovers, detour: Detour) -> None:
        """Read the replies of so many owed entries. What the server could not carry out now is left over."""
        owed = self.owed
        for _ in range(entries):
            undo, replies = owed[0]
            while replies:
                reply = self.read()
                replies -= 1
                if replies:
                    owed[0] = (undo, replies)
                if type(reply) is not int and passes(reply):  # the last replies are those of the last releases
                    releases = undo()
                    refused = releases[len(releases) - 1 - replies :][:1]
                    leftovers.add(detour.carry_out(refused, [reply], self.socket.deadline))
            owed.popleft()

    def _other(self) -> Any:
        """A reply that is no number, which redis-py reads."""
        try:
            return self.conn.read_response(disconnect_on_error=False)
        except ResponseError as error:
            return refusal(self.conn, error)
        except TimeoutError as error:
            if self.socket.is_late:
                raise
            # As above: it may have a part of the reply, and nobody knows of how much.
            raise ConnectionError("a reply was interrupted") from error

    def _give_up(self, error: OSError) -> NoReturn:
        """Nothing was read."""
        if isinstance(error, BuiltinTimeoutError) and error.errno is None and not self.socket.is_late:
            raise error  # from a signal handler: what was read just then may be lost
        raise self._failure(error, "reading from") from error

    def _failure(self, error: OSError, doing: str) -> RedisError:
        """What redis-py would make of it."""
        there = getattr(self.conn, "path", None) or f"{self.conn.host}:{self.conn.port}"
        if isinstance(error, BuiltinTimeoutError) and error.errno is None:
            return TimeoutError(f"Timeout {doing} {there}")
        return ConnectionError(f"Error while {doing} {there}: {error}")
