"""Redis from threads: a stack of connections; a release is sent at once, and its reply read by the connection's next user.

A call takes a connection for one round trip only, so the stack grows to the number of calls under way at once, not to the
number of threads. deque.append and deque.pop are atomic.

`Line.owed` is what a connection still has to answer, in order; each entry is what must be sent again if the connection dies
first. After a time-out the connection is kept, and the release goes out behind the acquire on it: that order is safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from redis.exceptions import (
    ConnectionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from .connecting import Recipe, is_final
from .leftovers import Leftovers
from .wire import RENEW, TAKE, pack

#: Seconds after which an idle connection's owed replies are heard, and after which it is closed.
HEAR_AFTER, CLOSE_AFTER = 1.0, 60.0
#: Connections that one call may use up, within its deadline, before the store counts as failing.
TRIES = 100


class Line:
    """One connection. `client` is its id at the server, `used` the monotonic second of its last use."""

    __slots__ = ("client", "conn", "late", "owed", "used")

    def __init__(self, conn: Any) -> None:
        self.conn = conn
        self.owed: deque[tuple[Sequence[bytes], int]] = deque()
        self.late = 0
        self.client: int | None = None
        self.used = monotonic()

    def send(self, packed: bytes) -> None:
        self.conn.send_packed_command([packed], check_health=False)

    def read(self) -> Any:
        """One reply; an error of the server's is returned. Raises: ConnectionError, TimeoutError."""
        try:
            return self.conn.read_response(disconnect_on_error=False)
        except ReadOnlyError as error:  # a master that was demoted: ask again where the master is
            raise ConnectionError(str(error)) from error
        except ResponseError as error:
            return error

    def hear(self, entries: int) -> int:
        """Read the replies of so many owed entries. Returns how many were errors."""
        errors = 0
        for _ in range(entries):
            releases, replies = self.owed[0]
            while replies > 1:
                errors += isinstance(self.read(), Exception)
                replies -= 1
                self.owed[0] = (releases, replies)
            errors += isinstance(self.read(), Exception)
            self.owed.popleft()
        return errors


class Lines:
    """The stack of one store. `connects` and `errors` count new connections and replies to releases that were errors."""

    def __init__(self, recipe: Recipe, leftovers: Leftovers) -> None:
        self._recipe, self._leftovers = recipe, leftovers
        self.forget()

    def forget(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._free: deque[Line] = deque()
        self.connects = self.errors = 0

    def __len__(self) -> int:
        return len(self._free)

    def call(self, packed: bytes, undo: Sequence[bytes], whole: Callable[[], bytes]) -> Any:
        """One round trip. `undo` are the releases that take it back, `whole` makes the command that needs no script loaded.

        Raises: RedisError, OSError. What was taken by a command whose reply did not come is released.
        """
        deadline = monotonic() + self._recipe.timeout
        try:
            line: Line | None = self._free.pop()
        except IndexError:
            line = None
        lost: int | None = None
        for tries_left in range(TRIES - 1, -1, -1):
            # A connection may have died while it was idle, or be killed at any moment. Every command may be sent twice.
            again = tries_left > 0 and monotonic() < deadline
            try:
                if line is None:
                    line = self._connect(deadline, instead_of=lost)
                return self._ask(line, packed, undo, whole, deadline)
            except ConnectionError as error:
                if line is not None:
                    lost = line.client
                if not again or is_final(error):
                    if lost is not None:  # something was sent, and may have been carried out
                        self._leftovers.add(undo)
                    raise
                line = None
        raise AssertionError("the last try returns or raises")

    def tell(self, releases: Sequence[bytes]) -> None:
        """Send releases; without a connection at hand they are left over, for somebody who has time to make one."""
        try:
            line = self._free.pop()
        except IndexError:
            self._leftovers.add(releases)
            return
        try:
            line.owed.append((releases, len(releases)))
            line.conn.until(monotonic() + self._recipe.timeout)
            line.send(b"".join(releases))
        except BaseException as error:
            self._lost(line)
            if not isinstance(error, (RedisError, OSError)):
                raise
            return
        line.used = monotonic()
        self._free.append(line)

    def deliver(self) -> None:
        """Carry out what is left over, on a new connection. Raises: RedisError, OSError."""
        while self._leftovers:
            self._free.append(self._connect(monotonic() + self._recipe.timeout))

    def close(self) -> None:
        """Hear what is owed and close the connections that are not in use."""
        for line in list(self._free):
            line.used = 0.0
        self.tend()

    def tend(self) -> None:
        """Hear what idle connections owe, and close those that are not needed any more."""
        now = monotonic()
        tended: list[Line] = []
        while True:
            try:
                line = self._free.popleft()  # the one that has been idle for longest
            except IndexError:
                break
            if line.used > now - HEAR_AFTER:
                self._free.appendleft(line)
                break
            try:
                line.conn.until(monotonic() + self._recipe.timeout)
                self.errors += line.hear(len(line.owed))
            except (RedisError, OSError):
                self._lost(line)
                continue
            if line.used > now - CLOSE_AFTER:
                tended.append(line)
            else:
                line.conn.disconnect()
        self._free.extendleft(reversed(tended))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        line: Line,
        packed: bytes,
        undo: Sequence[bytes],
        whole: Callable[[], bytes],
        deadline: float,
    ) -> Any:
        """One try. On a ConnectionError the undo is the caller's to leave over: whoever picked it up while the caller asks
        again could take back what that takes."""
        sent = False
        try:
            line.conn.until(deadline)
            owed = len(line.owed)
            line.owed.append((undo, 1))  # until the reply is read, this is what a lost connection leaves to do
            line.send(packed)
            sent = True
            self.errors += line.hear(owed)
            reply = line.read()
        except TimeoutError:
            if sent:
                self._late(line, undo)
            else:
                self._lost(line)
            raise
        except BaseException as error:  # the connection is lost, or we were interrupted half way through a reply
            if isinstance(error, ConnectionError):
                line.owed.pop()
            self._lost(line)
            raise
        line.owed.clear()
        line.late = 0
        line.used = monotonic()
        self._free.append(line)
        if isinstance(reply, NoScriptError):
            return self.call(whole(), undo, whole)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _late(self, line: Line, undo: Sequence[bytes]) -> None:
        """No reply in time: the connection is in order all the same. The release goes behind the acquire."""
        line.late += 1
        if line.late > 1:
            self._lost(line)
            return
        try:
            line.conn.until(monotonic() + self._recipe.timeout)
            line.owed.append((undo, len(undo)))
            line.send(b"".join(undo))
        except BaseException as error:
            self._lost(line)
            if not isinstance(error, (RedisError, OSError)):
                raise
        else:
            self._free.appendleft(line)

    def _lost(self, line: Line) -> None:
        self._leftovers.fence(line.client)
        for releases, _ in line.owed:
            self._leftovers.add(releases)
        line.owed.clear()
        line.conn.disconnect()

    def _connect(self, deadline: float, *, instead_of: int | None = None) -> Line:
        """A new connection, greeted: scripts loaded, lost ones fenced off (`instead_of` for one), left-over releases
        carried out."""
        conn: Any = self._recipe.class_(**self._recipe.keywords)  # redis-py is untyped here
        conn.deadline = deadline
        line = Line(conn)
        work = self._leftovers.pick_up()
        try:
            conn.connect()
            greeting = [pack(b"CLIENT", b"ID"), TAKE.load, RENEW.load]
            lost = work.clients if instead_of is None else [*work.clients, instead_of]
            greeting += [pack(b"CLIENT", b"KILL", b"ID", b"%d" % client) for client in lost]
            greeting += [release for release, _ in work.releases]
            line.send(b"".join(greeting))
            client = line.read()
            line.client = client if isinstance(client, int) else None  # some ACL users may not ask
            for _ in greeting[1:]:
                line.read()
        except BaseException:
            self._leftovers.put_back(work)
            conn.disconnect()
            raise
        self.connects += 1
        line.used = monotonic()
        return line
