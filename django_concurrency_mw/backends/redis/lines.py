"""Redis from threads: a stack of connections; a release is sent at once, and its reply read by the connection's next user.

A call takes a connection for one round trip only, so the stack grows to the number of calls under way at once, not to the
number of threads. deque.append and deque.pop are atomic.

After a time-out the connection is kept, and the release goes out behind the acquire on it: that order is safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, sleep
from typing import Any

from redis.exceptions import ConnectionError, NoScriptError, RedisError, ResponseError, TimeoutError

from .connecting import Recipe
from .detour import Detour
from .errors import is_demoted, is_final
from .greeting import Greeting
from .leftovers import Client, Leftovers, Release, Work
from .line import Line, Undo, nothing
from .redirects import Ask, Moved, Node, tries_again

#: Seconds after which an idle connection's owed replies are heard, and after which it is closed.
HEAR_AFTER, CLOSE_AFTER = 1.0, 60.0
#: Connections that one call may use up, within its deadline, before the store counts as failing.
TRIES = 100
#: Connections that may turn out to be to a demoted master, before the store counts as failing.
DEMOTED_TRIES = 3
#: Seconds until a command whose keys are at two nodes is tried again.
PAUSE = 0.01
#: Replies that a connection may owe before the older half is heard.
MOST_OWED = 64


class _Refused(RedisError):
    """The server is there, but could not carry out what was left over."""


class Lines:
    """The stack of one store. `connects` counts new connections; `opened` is called for each, `astray` when one was lost or its
    server was not the one to ask: what others owe may be the same."""

    def __init__(
        self,
        recipe: Recipe,
        leftovers: Leftovers,
        opened: Callable[[], None],
        astray: Callable[[], None] = lambda: None,
    ) -> None:
        self._recipe, self._leftovers, self._opened, self._astray = recipe, leftovers, opened, astray
        self._detour = Detour(self._open_there, leftovers.fence)
        self.forget()

    def forget(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._free: deque[Line] = deque()
        self.connects = 0
        self._detour.forget()

    def __len__(self) -> int:
        return len(self._free)

    def call(self, packed: bytes, undo: Undo, whole: Callable[[], bytes]) -> Any:
        """One round trip. `undo` are the releases that take it back, `whole` makes the command that needs no script loaded.

        Raises: RedisError, OSError. What was taken by a command whose reply did not come is released.
        """
        deadline = monotonic() + self._recipe.timeout
        refused: ResponseError | None = None
        while True:
            try:
                return self._call(packed, undo, whole, deadline)
            except ResponseError as error:
                # What takes nothing can be asked in parts, or later.
                if undo is nothing or not tries_again(error) or monotonic() + PAUSE > deadline:
                    raise
                refused = error
            except TimeoutError as error:
                if refused is None:
                    raise
                raise refused from error  # which is why there was no time left
            sleep(PAUSE)

    def _call(self, packed: bytes, undo: Undo, whole: Callable[[], bytes], deadline: float) -> Any:
        try:
            line: Line | None = self._free.pop()
        except IndexError:
            line = None
        lost: Client | None = None
        sent = False
        for tries_left in range(TRIES - 1, -1, -1):
            # A connection may have died while it was idle, or be killed at any moment. Every command may be sent twice.
            again = tries_left > 0 and monotonic() < deadline
            try:
                if line is None:
                    line = self._connect(deadline, instead_of=lost)
                return self._ask(line, packed, undo, whole, deadline)
            except ConnectionError as error:
                if line is not None:
                    lost, sent = line.client, True
                    self._astray()
                demoted = is_demoted(error.__cause__) and tries_left < TRIES - DEMOTED_TRIES
                if not again or demoted or is_final(error):
                    if sent:  # and may have been carried out
                        self._leftovers.add(undo())
                    raise
                line = None
            except BaseException:
                if sent and line is None:  # what was sent before may have been carried out, and nobody can be asked now
                    self._leftovers.add(undo())
                raise
        raise AssertionError("the last try returns or raises")

    def tell(self, releases: Sequence[Release]) -> None:
        """Send releases; without a connection at hand they are left over, for somebody who has time to make one."""
        entry: tuple[Undo, int] = (lambda: releases, len(releases))
        now = monotonic()
        try:
            line = self._free.pop()
        except IndexError:
            self._leftovers.add(releases)
            return
        try:
            line.socket.deadline = now + self._recipe.timeout
            if len(line.owed) >= MOST_OWED:  # nobody calls on this connection; the older replies have come long ago
                line.hear(len(line.owed) // 2, self._leftovers, self._detour)
            line.owed.append(entry)
            line.send(releases[0].packed if len(releases) == 1 else _together(releases))
        except BaseException as error:
            if entry not in line.owed:
                self._leftovers.add(releases)
            self._lost(line, error)
            if not isinstance(error, (RedisError, OSError)):
                raise
            return
        line.used = now
        self._free.append(line)

    def deliver(self) -> None:
        """Carry out what is left over, on a new connection. Raises: RedisError, OSError."""
        while self._leftovers:
            line, refused = self._open(monotonic() + self._recipe.timeout)
            if refused:
                line.conn.disconnect()
                raise _Refused(f"{len(refused)} releases could not be carried out yet")
            self._free.append(line)

    def hear_all(self) -> None:
        """Hear at once what idle connections owe: releases may have been refused, or lost, that nobody has looked at yet."""
        deadline = monotonic() + self._recipe.timeout
        for line in reversed(list(self._free)):
            try:
                self._free.remove(line)
            except ValueError:  # in use: it is heard
                continue
            try:
                line.until(deadline)
                line.hear(len(line.owed), self._leftovers, self._detour)
            except BaseException as error:
                self._lost(line, error)
                if not isinstance(error, (RedisError, OSError)):
                    raise
            else:
                self._free.appendleft(line)

    def refresh(self) -> None:
        """Something failed: close what was not used a moment ago, as it may be dead, and connect anew, which is the next to be
        used. Raises: RedisError, OSError."""
        now = monotonic()
        for line in [line for line in list(self._free) if line.used < now - self._recipe.timeout]:
            try:
                self._free.remove(line)
            except ValueError:  # in use again
                continue
            self._lost(line)
        try:
            line = self._connect(now + self._recipe.timeout)
        except Moved:  # where to was said
            line = self._connect(now + self._recipe.timeout)
        self._free.append(line)

    @property
    def have_to_leave(self) -> bool:
        """Does an idle connection go where nobody is to be asked any more?"""
        return any(self._recipe.where.is_former(line.conn) for line in list(self._free))

    def leave(self) -> None:
        """Close idle connections to where nobody is to be asked any more; those in use follow when they are idle."""
        for line in [line for line in list(self._free) if self._recipe.where.is_former(line.conn)]:
            try:
                self._free.remove(line)
            except ValueError:  # in use again
                continue
            self._lost(line)

    def close(self) -> None:
        """Hear what is owed and close the connections that are not in use."""
        for line in list(self._free):
            line.used = 0.0
        self.tend()
        self._detour.tend(float("inf"))
        while self._free:  # it did not answer, and the others had to wait for it
            try:
                self._lost(self._free.popleft())
            except IndexError:
                break

    def tend(self) -> None:
        """Hear what idle connections owe, and close those that are not needed any more."""
        now = monotonic()
        self._detour.tend(now - CLOSE_AFTER)
        deadline = now + self._recipe.timeout  # one for all of them: renewals wait in this thread
        tended: list[Line] = []
        try:
            while True:
                try:
                    line = self._free.popleft()  # the one that has been idle for longest
                except IndexError:
                    break
                if line.used > now - HEAR_AFTER:
                    self._free.appendleft(line)
                    break
                try:
                    line.until(deadline)
                    line.hear(len(line.owed), self._leftovers, self._detour)
                except TimeoutError:
                    line.late += 1
                    if line.late > 1:
                        self._lost(line)
                    else:
                        tended.append(line)  # in order still, only slow
                    break
                except BaseException as error:
                    self._lost(line, error)
                    if not isinstance(error, (RedisError, OSError)):
                        raise
                    continue
                if line.used > now - CLOSE_AFTER:
                    tended.append(line)
                else:
                    line.conn.disconnect()
        finally:
            self._free.extendleft(reversed(tended))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        line: Line,
        packed: bytes,
        undo: Undo,
        whole: Callable[[], bytes],
        deadline: float,
    ) -> Any:
        """One try. On a ConnectionError the undo is the caller's to leave over: whoever picked it up while the caller asks
        again could take back what that takes."""
        sent = False
        try:
            line.socket.deadline = deadline
            line.owed.append((undo, 1))  # until the reply is read, this is what a lost connection leaves to do
            line.send(packed)
            sent = True
            reply = line.read_all(self._leftovers, self._detour)
        except TimeoutError:
            if sent:
                self._late(line, undo)
            else:
                self._lost(line)
            raise
        except BaseException as error:  # the connection is lost, or we were interrupted half way through a reply
            if isinstance(error, ConnectionError):
                line.owed.pop()
            self._lost(line, error)
            raise
        line.owed.clear()
        line.late = 0
        line.used = monotonic()
        self._free.append(line)
        if type(reply) is int:
            return reply
        if isinstance(reply, NoScriptError):
            return self._call(whole(), undo, whole, deadline)
        if isinstance(reply, Ask):
            reply = self._ask_there(reply, packed, undo, whole, deadline)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _ask_there(self, ask: Ask, packed: bytes, undo: Undo, whole: Callable[[], bytes], deadline: float) -> Any:
        """The reply of the node that the slot is moving to. Raises: RedisError, OSError; then it is not asked again."""
        self._astray()
        try:
            (reply,) = self._detour.call(ask, [packed], deadline)
            if isinstance(reply, NoScriptError):
                (reply,) = self._detour.call(ask, [whole()], deadline)
        except BaseException as error:
            self._leftovers.add(undo())
            if isinstance(error, ConnectionError):  # not of the connection that this is the answer of
                raise ask from error
            raise
        return reply

    def _late(self, line: Line, undo: Undo) -> None:
        """No reply in time: the connection is in order all the same. The release goes behind the acquire."""
        line.late += 1
        if line.late > 1:
            self._lost(line)
            return
        try:
            releases = undo()
            if releases:
                line.until(monotonic() + self._recipe.timeout)
                line.owed.append((lambda: releases, len(releases)))
                line.send(_together(releases))
        except BaseException as error:
            self._lost(line)
            if not isinstance(error, (RedisError, OSError)):
                raise
        else:
            self._free.appendleft(line)

    def _lost(self, line: Line, error: BaseException | None = None) -> None:
        self._recipe.gave_up(line.conn, error)
        self._leftovers.fence(line.client)
        for undo, _ in line.owed:
            self._leftovers.add(undo())
        line.owed.clear()
        line.conn.disconnect()

    def _connect(self, deadline: float, *, instead_of: Client | None = None) -> Line:
        """A new connection for a call, which has no time to see what the server could not carry out."""
        line, refused = self._open(deadline, instead_of=instead_of)
        if refused:
            self._leftovers.remind()
        return line

    def _open(self, deadline: float, *, instead_of: Client | None = None) -> tuple[Line, list[Release]]:
        """A new connection, greeted; and the releases that could not be carried out with it, which stay left over."""
        work = self._leftovers.pick_up()
        conn: Any = None
        try:
            conn = self._recipe.connection(deadline)
            conn.connect()
            line = Line(conn)
            greeting = Greeting(work, instead_of)
            line.send(greeting.packed)
            replies = [line.read() for _ in range(greeting.replies)]
            line.client, refused = greeting.heard(replies)
            if refused:
                answers = replies[len(replies) - len(work.releases) :]
                refused = self._detour.carry_out(work.releases, answers, deadline)
        except BaseException as error:
            self._leftovers.put_back(work)
            self._leftovers.remind()
            if conn is not None:
                self._recipe.gave_up(conn, error)
                conn.disconnect()
            raise
        self._leftovers.put_behind(refused)
        self.connects += 1
        self._opened()
        return line, refused

    def _open_there(self, there: Node, deadline: float, lost: Sequence[Client]) -> Line:
        """For the detour."""
        conn = self._recipe.connection(deadline, there)
        try:
            conn.connect()
            line = Line(conn)
            greeting = Greeting(Work(list(lost), []))
            line.send(greeting.packed)
            line.client, _ = greeting.heard([line.read() for _ in range(greeting.replies)])
        except BaseException:
            conn.disconnect()
            raise
        return line


def _together(releases: Sequence[Release]) -> bytes:
    return b"".join([release.packed for release in releases])
