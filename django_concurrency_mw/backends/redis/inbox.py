"""What comes in on an event loop's connection: numbers are handed on at once, all else redis-py reads, one reply at a time.

Nearly all replies are numbers, and a stream, a parser and a task that wakes for each cost more than everything else that is
done about it. So a connection that redis-py has made gets this protocol in the place of redis-py's own, which is given the
bytes of just those replies that it is to read, and every word about the connection itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.exceptions import ConnectionError

from .replies import numbers, reply

#: What RESP 3 begins with that is no reply: something that the server tells unasked. Nobody here listens to it.
PUSH: Final = ord(">")


class Inbox(asyncio.Protocol):
    """Of one connection of redis-py's, from now on. `heard` is called with the numbers, in order.

    Whatever it raises, and a reply that nobody can read, ends the connection.
    """

    def __init__(self, conn: Any, heard: Callable[[Sequence[int | list[int]]], None]) -> None:
        writer = getattr(conn, "_writer", None)  # private, as in `connecting`
        if writer is None or _has_ended(conn._reader):  # of which we would not be told again
            raise ConnectionError("the connection was closed as soon as it was made")
        self.transport: asyncio.WriteTransport = writer.transport
        self._heard = heard
        self._unread = b""
        #: It is redis-py's turn: what comes meanwhile is kept.
        self._waits = False
        self._lost = False
        self._error: Exception | None = None
        #: There is something for redis-py to read: a reply, or that the connection is lost.
        self._due = asyncio.Event()
        self._former: Any = self.transport.get_protocol()
        self.transport.set_protocol(self)

    async def other(self) -> None:
        """Until redis-py has one reply to read, or that the connection is lost. Raises: ConnectionError."""
        await self._due.wait()
        if self._error is not None:
            raise ConnectionError(f"a reply that nobody can read: {self._error!r}") from self._error

    def go_on(self) -> None:
        """Redis-py has read it, and it was answered: so it is the turn of those behind it."""
        self._waits = False
        if not self._lost:
            self._due.clear()
        self._read(b"")

    def hand_back(self) -> None:
        """All that nobody has read yet, and all that comes, is redis-py's."""
        self._waits = True
        if not self._lost:
            self.transport.set_protocol(self._former)
            unread, self._unread = self._unread, b""
            if unread:
                self._former.data_received(unread)

    def _read(self, data: bytes) -> None:
        try:
            self._unread += data
            while self._unread and not self._waits:
                found, end = numbers(self._unread)
                self._unread = self._unread[end:]
                if found:
                    self._heard(found)
                if not self._unread or not self._read_other():
                    return
        except BaseException as error:  # nobody knows now whose the next reply is
            self._waits, self._unread = True, b""
            self.transport.abort()
            if not isinstance(error, Exception):
                raise
            self._error = error
            self._due.set()

    def _read_other(self) -> bool:
        """What comes next is no number, or not here yet. Returns whether it was read."""
        _, end = reply(self._unread, 0)
        if end < 0:
            return False
        other, self._unread = self._unread[:end], self._unread[end:]
        if other[0] != PUSH:
            self._waits = True
            if not self._lost:  # else redis-py has been told so, and takes no more: what is unanswered is sent again
                self._former.data_received(other)
            self._due.set()
        return True

    # -- as the transport calls it ------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._read(data)

    def eof_received(self) -> bool | None:
        stays: bool | None = self._former.eof_received()
        self._end()
        return stays

    def connection_lost(self, error: Exception | None) -> None:
        self._former.connection_lost(error)
        self._end()

    def pause_writing(self) -> None:
        self._former.pause_writing()

    def resume_writing(self) -> None:
        self._former.resume_writing()

    def _end(self) -> None:
        self._lost = True
        self._due.set()


def _has_ended(reader: asyncio.StreamReader) -> bool:
    return reader.at_eof() or reader.exception() is not None
