"""The ear: the connection by which a process hears that somebody of it, who waits in a line of the store, has to ask.

One per store and process, for its threads and its event loops alike, read by a daemon thread; there while somebody waits and
a little longer. What is heard is a token, and a hint only: who waits asks the store, and asks it again after a while without
a word. So while there is no such connection, those who wait ask often, and when it is there again they all ask at once.
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from ...bells import Bell
from ...tokens import process_id, process_of
from .connecting import Recipe
from .errors import passes
from .wire import pack

PING = pack(b"PING")
#: Seconds after which a silent connection is asked whether it lives, and for which one stays that nobody needs.
ASK_AFTER, CLOSE_AFTER = 1.0, 10.0
#: Seconds until the next attempt to connect, at most; and after the server has forbidden to listen.
BACK_OFF, FORBIDDEN_FOR = 0.25, 30.0
#: Attempts that fail in a row until those who wait have to know.
ASK_OFTEN_AFTER = 3
#: Of its own: a project that seeds the usual one makes no two processes come back at once, and is not disturbed from here.
_dice = random.SystemRandom()


class Ear:
    """`channel` names the channel of this process. `forbidden` is told why it may not listen, and `stray` the token of whoever
    is called and does not wait any more: what it was let in to is to be taken back."""

    def __init__(
        self,
        recipe: Recipe,
        channel: Callable[[], bytes],
        forbidden: Callable[[Exception], None],
        stray: Callable[[str], None],
    ) -> None:
        self._recipe, self._channel, self._forbidden, self._stray = recipe, channel, forbidden, stray
        self._conn: Any = None
        self.forget()
        _ears.add(self)

    def forget(self) -> None:
        """In a forked child: the connection is the parent's, and its thread is not here. The socket has to be closed all the
        same, or the server would take the parent for alive as long as the child lives."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(Exception):
                conn.bounded_socket.close()
        #: An RLock, as a garbage collection inside may end a stream, whose own code closes a bell.
        self._lock = threading.RLock()
        self._bells: dict[str, Bell] = {}
        #: Those who wait for the first attempt to listen.
        self._arriving: list[Bell] = []
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._tried = self._hears = False
        self._not_before = 0.0
        self.connects = 0

    def hears(self, token: str, bell: Bell) -> bool:
        """From now on the bell rings when the token is heard. Does it hear by now? In a thread."""
        first = self._enter(token, bell)
        if first is not None:
            first.wait(self._recipe.timeout)
        return self._hears

    async def ahears(self, token: str, bell: Bell) -> bool:
        """The same on an event loop."""
        first = self._enter(token, bell)
        if first is not None:
            await first.await_(self._recipe.timeout)
        return self._hears

    def refusal(self) -> ResponseError | None:
        """What the server says to whoever wants to listen, if it refuses. Raises: whatever a lost connection does."""
        try:
            self._connect()
        except ResponseError as error:
            return None if passes(error) else error
        finally:
            conn, self._conn = self._conn, None
            if conn is not None:
                conn.disconnect()
        return None

    def leave(self) -> None:
        """If it is listened where nobody is told any more, do so where they are."""
        conn = self._conn
        if conn is not None and self._recipe.where.is_former(conn):
            self._shut(conn)

    def close(self) -> None:
        """Stop listening, if nobody waits."""
        with self._lock:
            thread = self._thread
            if self._bells or thread is None:
                return
            self._hurry.set()
            self._shut(self._conn)
        if thread is not threading.current_thread():
            thread.join(1.0)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _enter(self, token: str, bell: Bell) -> Bell | None:
        """Returns what rings after the first attempt to listen, if that is still to come."""
        if self._bells.get(token) is bell and self._hears:
            return None
        with self._lock:
            if self._bells.get(token) is not bell:
                self._bells[token] = bell
                bell.at_close(partial(self._bells.pop, token, None))
            if self._thread is None and monotonic() >= self._not_before:
                self._start()
            if self._tried or self._thread is None:
                return None
            first = Bell()
            self._arriving.append(first)
            return first

    def _start(self) -> None:
        self._tried = False
        self._hurry.clear()
        thread = threading.Thread(target=self._run, args=(self._hurry,), name="concurrency-ear", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends
            return
        self._thread = thread

    def _run(self, hurry: threading.Event) -> None:
        """The thread: listen while somebody waits, connect again when the connection is lost."""
        failures = 0
        while True:
            began = monotonic()
            try:
                self._listen()
            except Exception as error:  # also whatever a keyword or a credential provider of the project's raises
                if self._conn is not None:
                    self._recipe.gave_up(self._conn, error)
                failures = 0 if self._hears and monotonic() - began > ASK_AFTER else failures + 1
                if isinstance(error, ResponseError) and not passes(error):
                    self._refused(error)
            finally:
                conn, self._conn = self._conn, None
                if conn is not None:
                    with contextlib.suppress(Exception):
                        conn.disconnect()
            # Mostly it is there again at once, and they ask then. Where it is not, they have to ask often from now on.
            self._settle(hears=False, ring=failures == ASK_OFTEN_AFTER)
            if self._ends(hurry):
                return
            if failures >= ASK_OFTEN_AFTER:
                hurry.wait(min(BACK_OFF, 0.05 * 2 ** min(failures, 6)) * (0.5 + _dice.random() / 2))
            elif failures:
                hurry.wait(0.01)

    def _refused(self, error: Exception) -> None:
        """It is not allowed to listen, or to tell others: nobody tries again at once."""
        self._not_before = monotonic() + FORBIDDEN_FOR
        self._forbidden(error)

    def _ends(self, hurry: threading.Event) -> bool:
        with self._lock:
            if self._bells and monotonic() >= self._not_before:
                hurry.clear()
                return False
            self._thread = None
            return True

    def _settle(self, *, hears: bool, ring: bool) -> None:
        """Whoever waits for the first attempt knows now; and all others, to `ring`, have a reason to ask."""
        with self._lock:
            self._hears, self._tried = hears, True
            arriving, self._arriving = self._arriving, []
            bells = list(self._bells.values()) if ring else []
        for bell in arriving + bells:
            bell.ring()

    def _listen(self) -> None:
        """Connect and listen until nobody has waited for a while. Raises: whatever ends it before."""
        conn = self._connect()
        self._settle(hears=True, ring=True)
        asked, idle_since = False, monotonic()
        while True:
            if self._bells:
                idle_since = monotonic()
            elif self._hurry.is_set() or monotonic() - idle_since > CLOSE_AFTER:
                return
            conn.until(monotonic() + (max(ASK_AFTER, self._recipe.timeout) if asked else ASK_AFTER))
            try:
                reply = conn.read_response(disconnect_on_error=False)
            except TimeoutError:
                if asked:
                    raise ConnectionError("it does not answer") from None
                conn.until(monotonic() + self._recipe.timeout)
                conn.send_packed_command([PING], check_health=False)
                asked = True
                continue
            asked = False
            if reply[0] == b"message":
                self._heard(reply[2].decode("ascii", "replace"))

    def _heard(self, token: str) -> None:
        bell = self._bells.get(token)
        if bell is not None:
            bell.ring()
        # Another store of this process may have the same channel, and hear the same.
        elif process_of(token) == process_id() and not any(token in ear._bells for ear in list(_ears)):
            self._stray(token)

    def _connect(self) -> Any:
        """Raises: ResponseError if we may not listen, or may not tell others."""
        channel = self._channel()
        # A connection that subscribes has no other replies: of RESP 2 as well, which is simpler to read.
        conn = self._recipe.connection(monotonic() + self._recipe.timeout, protocol=2)
        self._conn = conn  # whatever happens from here on, it is closed
        conn.connect()
        commands = [
            pack(b"PUBLISH", channel, b""),
            pack(b"PUBSUB", b"NUMSUB", channel),
            PING,
            pack(b"SUBSCRIBE", channel),
        ]
        conn.send_packed_command(commands, check_health=False)
        refused: ResponseError | None = None
        for _ in commands:
            try:
                conn.read_response(disconnect_on_error=False)
            except ResponseError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        self.connects += 1
        return conn

    def _shut(self, conn: Any) -> None:
        """Whoever reads from it reads no more."""
        if conn is not None:
            with contextlib.suppress(OSError, AttributeError):
                conn.bounded_socket.shutdown(2)


_ears: weakref.WeakSet[Ear] = weakref.WeakSet()
