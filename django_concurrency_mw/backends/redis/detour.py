"""The way to the node that a slot is moving to, for the commands that the old node answered with ASK.

The old node carries out what it still has the keys of, and no key comes back to it, so the order of two commands for one key
is kept: the ones that it sends on are carried out here one after another, as their ASKs came. If a connection is lost here,
nothing that it still had under way may be carried out behind what comes next: the next one kills it at the server first.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

from redis.exceptions import ConnectionError, RedisError, TimeoutError

from .connecting import areply, hang_up
from .errors import passes
from .leftovers import Client, Release
from .redirects import Ask, Node
from .rights import ASKING


class Detour:
    """Of the threads of one store: one connection for all, one at a time. `open` makes a line to a node, within the deadline,
    and fences off the connections that were lost there."""

    def __init__(
        self, opened: Callable[[Node, float, Sequence[Client]], Any], fence: Callable[[Client | None], None]
    ) -> None:
        self._open, self._fence = opened, fence
        self.forget()

    def forget(self) -> None:
        """In a forked child: the connection is the parent's."""
        self._busy = threading.Lock()
        self._line: Any = None
        self._there: Node | None = None
        self._lost: deque[Client] = deque(maxlen=1000)

    def call(self, ask: Ask, packed: Sequence[bytes], deadline: float) -> list[Any]:
        """One reply to each; errors of the server's are among them. Raises: RedisError, OSError."""
        if not self._busy.acquire(timeout=max(0.0, deadline - monotonic())):
            raise TimeoutError("the deadline has passed")
        try:
            if self._there != ask.node:
                self._close()
            old = self._line is not None
            try:
                return self._call(ask.node, packed, deadline)
            except ConnectionError:
                if not old:
                    raise
            return self._call(ask.node, packed, deadline)  # it had died meanwhile
        finally:
            self._busy.release()

    def carry_out(self, releases: Sequence[Release], replies: Sequence[Any], deadline: float) -> list[Release]:
        """Those of these releases that were answered with ASK. Returns those that nobody could carry out now."""
        both = list(zip(releases, replies, strict=False))
        asked = [release for release, reply in both if isinstance(reply, Ask)]
        refused = [release for release, reply in both if passes(reply) and not isinstance(reply, Ask)]
        if not asked:
            return refused
        ask = next(reply for reply in replies if isinstance(reply, Ask))
        try:
            answers = self.call(ask, [release.packed for release in asked], deadline)
        except (RedisError, OSError):
            return [*refused, *asked]
        return [*refused, *[release for release, reply in zip(asked, answers, strict=True) if passes(reply)]]

    def tend(self, since: float) -> None:
        """Close it if it was not used since then (monotonic seconds)."""
        if self._line is not None and self._busy.acquire(blocking=False):
            try:
                if self._line is not None and self._line.used < since:
                    self._close()
            finally:
                self._busy.release()

    def _call(self, there: Node, packed: Sequence[bytes], deadline: float) -> list[Any]:
        try:
            if self._line is None:
                self._line, self._there = self._open(there, deadline, tuple(self._lost)), there
                self._lost.clear()
            line = self._line
            line.until(deadline)
            line.send(b"".join([ASKING + each for each in packed]))
            replies = [line.read()]
            if isinstance(replies[0], Exception):
                # One that may not say ASKING is told so, and then that the slot is elsewhere.
                self._close()
                return replies * len(packed)
            replies += [line.read() for _ in range(2 * len(packed) - 1)]
        except BaseException:
            self._close()
            raise
        line.used = monotonic()
        return replies[1::2]

    def _close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            if line.client is not None:
                self._lost.append(line.client)
            self._fence(line.client)  # when the slot has moved, that node is met by all connections
            line.conn.disconnect()


class LoopDetour:
    """Of one event loop, whose one reader calls it. `open` makes a greeted connection to a node, and says who it is there."""

    def __init__(
        self,
        opened: Callable[[Node, Sequence[Client]], Awaitable[tuple[Any, Client | None]]],
        fence: Callable[[Client | None], None],
        timeout: float,
    ) -> None:
        self._open, self._fence, self._timeout = opened, fence, timeout
        self._conn: Any = None
        self._there: Node | None = None
        self._client: Client | None = None
        self._lost: list[Client] = []

    async def call(self, ask: Ask, packed: bytes) -> Any:
        """The reply; an error of the server's is one. Raises: RedisError, OSError, asyncio.TimeoutError."""
        if self._there != ask.node:
            await self.close()
        async with asyncio.timeout(self._timeout):
            if self._conn is not None:
                try:
                    return await self._call(packed)
                except ConnectionError:  # it had died meanwhile
                    pass
            self._conn, self._client = await self._open(ask.node, tuple(self._lost))
            self._there = ask.node
            self._lost.clear()
            return await self._call(packed)

    async def _call(self, packed: bytes) -> Any:
        try:
            await self._conn.send_packed_command([ASKING + packed], check_health=False)
            said = await areply(self._conn)
            if isinstance(said, Exception):  # as above
                await self.close()
                return said
            return await areply(self._conn)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Whatever it has still under way."""
        conn, self._conn = self._conn, None
        if conn is not None:
            if self._client is not None:
                self._lost.append(self._client)
            self._fence(self._client)
            await hang_up(conn)
