"""Redis from asyncio: one multiplexed connection per event loop.

`call` is a plain function: it queues a command and returns a future of the reply. `tell` queues releases that nobody waits
for. Replies come in order, so the left end of `_unanswered` always owns the next one. Nothing but its reply ever takes a
command out of that queue: a caller that is cancelled or late leaves a done future there. So there is no desynchronisation,
and a release that is queued behind its acquire is always carried out after it.

Replies that are numbers, as nearly all are, come straight from the transport (`inbox`); a task reads all others.

When the connection is lost, what is unanswered is sent again in order on the next one, as every command may be sent twice.
An acquire that nobody waits for any more is dropped (its release stands behind it). The old connection is killed at the
server first, so that what it still had under way cannot overtake.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from redis.exceptions import ConnectionError, NoScriptError, RedisError, TimeoutError

from .connecting import Recipe, areply, hang_up, send
from .detour import LoopDetour
from .errors import is_final, passes
from .greeting import Greeting
from .inbox import Inbox
from .leftovers import Client, Leftovers, Release, Work
from .redirects import Ask, Moved, Node, tries_again

LOST = (RedisError, OSError, EOFError, asyncio.TimeoutError)
#: Timeouts without any reply after which a connection is given up.
DEAD_AFTER = 2
#: Commands unanswered at most.
MOST = 20_000
#: Attempts to connect that may fail in a row, each in a way that passes, before new calls are refused for a while.
TRIES = 50
#: Seconds until a command whose keys are at two nodes is tried again.
PAUSE = 0.01
#: Of its own: a project that seeds the usual one makes no two processes come back at once, and is not disturbed from here.
_dice = random.SystemRandom()
#: Seconds until the next attempt to connect, at most. (At 0.5 a store that was back was found after 0.59 s.)
BACK_OFF = 0.25


class Command:
    """One command whose reply `waiter` gets; `pack(*about)` makes it. `sent` is in seconds by the loop's clock."""

    __slots__ = ("about", "pack", "packed", "refused", "sent", "waiter")

    def __init__(
        self,
        packed: bytes,
        sent: float,
        waiter: asyncio.Future[Any],
        pack: Callable[..., bytes],
        about: tuple[Any, ...],
    ) -> None:
        self.packed, self.sent, self.waiter, self.pack, self.about = packed, sent, waiter, pack, about
        #: What goes by, and why it is sent once more.
        self.refused: Exception | None = None


class Mux:
    """The connection of one event loop; made inside it."""

    def __init__(self, recipe: Recipe, leftovers: Leftovers) -> None:
        self._recipe, self._leftovers = recipe, leftovers
        self._timeout = recipe.timeout
        self.loop = asyncio.get_running_loop()
        #: A release, which nobody waits for, stands for itself.
        self._unanswered: deque[Command | Release] = deque()
        self._outbox: list[bytes] = []
        #: Redis-py's connection, and what comes in on it: both, or neither.
        self._conn: Any = None
        self._inbox: Inbox | None = None
        self._owner: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._client: Client | None = None
        self._error: BaseException | None = None
        self._next_try = self._not_before = self._heard = self._connected_at = 0.0
        #: Since when something is unanswered.
        self._since = 0.0
        self._failures = 0
        #: How many calls are in the outbox; and whether the last write was of several.
        self._calls, self._crowded = 0, False
        #: A reply was read that has no effect yet.
        self._on_its_way = False
        self._hurry = asyncio.Event()
        self._detour = LoopDetour(self._open_there, leftovers.fence, recipe.timeout)
        self.connects = self.dropped = 0

    # -- for callers --------------------------------------------------------------------------------------------------

    def call(self, pack: Callable[..., bytes], *about: Any) -> asyncio.Future[Any]:
        """A future of the reply to `pack(*about)`; with `whole=True` that makes the form which needs no script loaded.

        Raises at once, with nothing sent, while no connection can be had: ConnectionError.
        """
        now = self.loop.time()
        if self._conn is None and now < self._not_before:
            raise ConnectionError(
                f"Redis cannot be reached, next try in {self._not_before - now:.2f} s: {_words(self._error)}"
            ) from self._error
        if len(self._unanswered) >= MOST:
            raise ConnectionError(f"{MOST} commands are unanswered")
        waiter: asyncio.Future[Any] = self.loop.create_future()
        self._ask(Command(pack(*about), now, waiter, pack, about))
        return waiter

    def tell(self, releases: Sequence[Release]) -> None:
        """Send releases; their replies are waited for by nobody."""
        if self.loop.is_closed():  # a coroutine that nobody ended is collected
            self._leftovers.add(releases)
            return
        for release in releases:
            if len(self._unanswered) >= MOST:
                self.dropped += 1  # the lease's end gives the slot back
            else:
                self._queue(release)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _ask(self, command: Command) -> None:
        """Who is alone has to wait for no others who may follow; where there are several, they are written together."""
        self._calls += 1
        if len(self._outbox) < len(self._unanswered) or self._crowded or self._inbox is None:
            self._queue(command)
            return
        try:
            self._expect(command)  # nothing is under way
            self._outbox.append(command.packed)
            self._write(self._inbox)
        except BaseException:
            self._cut_short()
            raise

    def _queue(self, command: Command | Release) -> None:
        try:
            self._expect(command)
            if self._inbox is not None:
                self._outbox.append(command.packed)
                if len(self._outbox) == 1:  # the first of this turn of the loop: all that follow share its write
                    self.loop.call_soon(self._write, self._inbox)
            elif self._owner is None:
                self._owner = self.loop.create_task(self._own())
                self._owner.add_done_callback(self._ended)  # a task cancelled before its first step runs no `finally`
        except BaseException:
            self._cut_short()
            raise

    def _cut_short(self) -> None:
        """By a signal's handler, say: nobody knows whether all that is expected was sent, so it is sent again, elsewhere."""
        if self._inbox is not None:
            self._inbox.transport.abort()

    def _expect(self, command: Command | Release) -> None:
        if not self._unanswered:
            self._since = self.loop.time()
        self._unanswered.append(command)
        if self._timer is None:
            self._timer = self.loop.call_later(self._timeout, self._sweep)

    def _write(self, inbox: Inbox) -> None:
        """What it cannot send the transport keeps: MOST commands at most."""
        if inbox is not self._inbox or not self._outbox:  # lost meanwhile: it is sent again; or it was sent at once
            return
        try:
            batch = b"".join(self._outbox)
            self._outbox.clear()
            self._crowded, self._calls = self._calls > 1, 0
            send(inbox.transport, batch)
        except BaseException:
            self._cut_short()
            raise

    # -- time ---------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """One timer for every deadline: they expire in the order of the queue."""
        now, following = self.loop.time(), None
        self._timer = None
        for command in self._unanswered:
            if isinstance(command, Release) or command.waiter.done():
                continue
            if command.sent + self._timeout > now:
                following = command.sent + self._timeout
                break
            command.waiter.set_exception(command.refused or TimeoutError(f"no answer from Redis in {self._timeout} s"))
        if self._unanswered:
            silent = now - max(self._since, self._heard)
            if self._conn is not None and self._reading is not None and silent > DEAD_AFTER * self._timeout:
                self._reading.cancel()
            self._timer = self.loop.call_at(following or now + self._timeout, self._sweep)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _hear(self, numbers: Sequence[int | list[int]]) -> None:
        """Replies as the inbox hands them on."""
        self._heard = self.loop.time()
        unanswered = self._unanswered
        for number in numbers:
            command = unanswered[0]
            if not isinstance(command, Release) and not command.waiter.done():
                command.waiter.set_result(number)
            unanswered.popleft()  # only now: whatever cuts this short, nobody is forgotten who was not answered

    async def _read(self, conn: Any, inbox: Inbox) -> None:
        """All other replies."""
        while True:
            await inbox.other()
            reply = await areply(conn)
            self._heard = self.loop.time()
            if isinstance(reply, Ask):
                await self._send_on(reply)
            else:
                self._answer(reply)
            inbox.go_on()

    async def _send_on(self, ask: Ask) -> None:
        """The next answer is that of the node that the slot is moving to. All others wait for it: so the order is kept."""
        command = self._unanswered[0]
        if isinstance(command, Command) and command.waiter.done():  # nobody waits for it, and nothing was carried out
            self._answer(ask)
            return
        self._on_its_way = True
        try:
            reply = await self._detour.call(ask, command.packed)
        except Moved:
            raise
        except LOST:  # it may have been carried out; the release that follows is carried out behind it, see `detour`
            reply = ask
        self._on_its_way = False
        self._answer(reply)

    def _answer(self, reply: Any) -> None:
        command = self._unanswered[0]
        if isinstance(command, Release):
            if passes(reply):
                self._leftovers.add([command])
        elif command.waiter.done():
            pass
        elif isinstance(reply, NoScriptError):
            command.packed = command.pack(*command.about, whole=True)
            self._ask(command)
        elif tries_again(reply) and self.loop.time() + PAUSE < command.sent + self._timeout:
            command.refused = reply
            self.loop.call_later(PAUSE, self._once_more, command)
        elif isinstance(reply, Exception):
            command.waiter.set_exception(reply)
        else:
            command.waiter.set_result(reply)
        self._unanswered.popleft()  # only now, as above

    def _once_more(self, command: Command) -> None:
        if not command.waiter.done():  # else its release has been sent
            self._ask(command)

    # -- the connection -----------------------------------------------------------------------------------------------

    async def _own(self) -> None:
        """Connect, read until the connection is lost, connect again while something is unanswered; then end."""
        conn = None
        error: BaseException | None
        try:
            while True:
                await self._pause()
                try:
                    conn = await self._connect()
                    inbox = self._send_again(conn)
                    self._reading = self.loop.create_task(self._read(conn, inbox))
                    await asyncio.wait([self._reading])  # unlike awaiting it: raises only if *we* are cancelled
                    error = TimeoutError("no reply") if self._reading.cancelled() else self._reading.exception()
                except Exception as lost:  # also what a keyword or a credential provider of the project's raises
                    error = lost
                if conn is not None:
                    self._recipe.gave_up(conn, error)
                self._failed(error, connected=conn is not None)
                self._conn = self._inbox = None
                await self._detour.close()
                if conn is not None:
                    await hang_up(conn)
                    conn = None
                if not self._prune():
                    break
        finally:
            if conn is not None and not self.loop.is_closed():  # we are cancelled: the loop ends
                if self._reading is not None:
                    self._reading.cancel()
                    await asyncio.wait([self._reading])
                await self._farewell(conn)
                self._conn = self._inbox = None
                # To close it properly takes TLS a round trip, which an ending loop does not wait for.
                await hang_up(conn)
                await self._detour.close()
            self._owner = None

    async def _pause(self) -> None:
        self._hurry.clear()
        left = self._next_try - self.loop.time()
        if left > 0:
            # Not wait_for: that of Python 3.11 may swallow the cancel by which the loop ends, which then waits for us for ever.
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(left):
                    await self._hurry.wait()

    def retry_now(self) -> None:
        """Somebody else has reached the server."""
        self._next_try = self._not_before = 0.0
        self._hurry.set()

    def leave(self) -> None:
        """In its loop: if the connection goes where nobody is to be asked any more, make another one."""
        if self._conn is not None and self._reading is not None and self._recipe.where.is_former(self._conn):
            self._reading.cancel()

    async def _farewell(self, conn: Any) -> None:
        """Send the last releases and hear their replies, but not for long."""
        inbox = self._inbox
        # Where one was read that has had no effect, the next would not be that to the next command.
        if inbox is None or self._on_its_way or (self._reading is not None and not self._reading.cancelled()):
            return

        async def hear() -> None:
            self._write(inbox)
            inbox.hand_back()
            while self._unanswered:
                self._answer(await areply(conn))

        with contextlib.suppress(*LOST, asyncio.CancelledError):
            await asyncio.wait_for(hear(), self._timeout)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Cancelled: the loop ends."""
        if self._owner is task:  # it was cancelled before its first step
            self._owner = None
        if task.cancelled() or task.exception() is not None:
            self.abandon()

    def abandon(self) -> None:
        """The loop has ended, or does now: nobody waits for ever, and no release is forgotten."""
        left, self._unanswered = self._unanswered, deque()
        if left or self._conn is not None:
            self._leftovers.fence(self._client)
        self._leftovers.add([command for command in left if isinstance(command, Release)])
        for command in left:
            if isinstance(command, Command) and not command.waiter.done() and not self.loop.is_closed():
                command.waiter.set_exception(ConnectionError("the event loop is closing"))

    async def _connect(self) -> Any:
        work = self._leftovers.pick_up()
        conn = None
        try:
            async with asyncio.timeout(self._timeout):  # not wait_for: see _pause
                conn = await self._recipe.async_connection()
                refused = await self._greet(conn, work)
        except BaseException as error:
            self._leftovers.put_back(work)
            self._leftovers.remind()
            if conn is not None:
                self._recipe.gave_up(conn, error)
                await hang_up(conn)
            raise
        if refused:
            self._leftovers.put_behind(refused)
            self._leftovers.remind()
        self.connects += 1
        return conn

    async def _greet(self, conn: Any, work: Work) -> list[Release]:
        await conn.connect()
        greeting = Greeting(work, self._client)
        await conn.send_packed_command([greeting.packed], check_health=False)
        client, refused = greeting.heard([await areply(conn) for _ in range(greeting.replies)])
        # Only now: had this attempt failed, the older one would still have to be fenced off.
        self._client = client
        return refused

    async def _open_there(self, there: Node, lost: Sequence[Client]) -> tuple[Any, Client | None]:
        """For the detour."""
        conn = await self._recipe.async_connection(there)
        try:
            await conn.connect()
            greeting = Greeting(Work(list(lost), []))
            await conn.send_packed_command([greeting.packed], check_health=False)
            client, _ = greeting.heard([await areply(conn) for _ in range(greeting.replies)])
        except BaseException:
            await hang_up(conn)
            raise
        return conn, client

    def _failed(self, error: BaseException | None, *, connected: bool) -> None:
        self._error = error
        if connected and self._heard > self._connected_at:  # it did work: try again at once
            self._failures, self._next_try, self._not_before = 0, 0.0, 0.0
            return
        self._failures += 1
        final = is_final(error)
        if not final and self._failures < TRIES:
            # It was cut while it was being made, say. Those who wait have their own deadlines, and more may come.
            self._next_try = self.loop.time() + 0.01
            return
        wait = min(BACK_OFF, 0.05 * 2 ** min(self._failures, 6)) * (0.5 + _dice.random() / 2)
        self._next_try = self._not_before = self.loop.time() + wait
        if final:
            for command in self._unanswered:
                if isinstance(command, Command) and not command.waiter.done():
                    unreachable = ConnectionError(f"Redis cannot be reached: {_words(error)}")
                    unreachable.__cause__ = error
                    command.waiter.set_exception(unreachable)

    def _prune(self) -> bool:
        """Drop what need not be sent again; is anything left?"""
        now = monotonic()
        self._unanswered = deque(
            command
            for command in self._unanswered
            if (command.until > now if isinstance(command, Release) else not command.waiter.done())
        )
        return bool(self._unanswered)

    def _send_again(self, conn: Any) -> Inbox:
        self._connected_at = self._heard = self.loop.time()
        inbox = Inbox(conn, self._hear)
        self._prune()
        self._outbox = [command.packed for command in self._unanswered]
        self._calls, self._on_its_way = 0, False
        self._conn, self._inbox = conn, inbox
        self._write(inbox)
        return inbox


def _words(error: BaseException | None) -> str:
    """The repr of redis-py 8's errors has none."""
    return str(error) or repr(error)
