"""Access: how a call gets at the table.

A call locks out the other threads of this process, then the other processes, works for some microseconds and lets go. It never
waits inside: one that finds the table locked goes out, naps and comes again, a thread by sleeping, a coroutine on its loop. So
nobody hangs on a process that stands still inside, and an event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import Any, Final, TypeVar

from ...exceptions import BackendError
from ...keeper import keeper
from . import bells
from .layout import Header, Layout
from .lines import serve
from .locking import EXCLUSIVE, UNLOCK, lock, try_lock, unlock
from .opening import is_at, open_file, open_table
from .table import Table

A = TypeVar("A")
R = TypeVar("R")
#: What is done with the table: (table, argument, monotonic ns) -> reply.
Work = Callable[[Table, A, int], R]

#: Seconds that a call may wait for the table's lock.
TIMEOUT: Final = 0.25
#: Seconds between two tries of a thread: at first, and at most.
NAP, LONGEST_NAP = 0.000_02, 0.001
#: A coroutine lets its loop turn so often before it naps.
TURNS: Final = 3
#: Seconds between two tries of the keeper to carry out what was put aside.
LATE_AGAIN: Final = 0.25
#: Is the file still there? It is looked at this often (ns).
LOOK_EVERY: Final = 1_000_000_000


class _Not(Enum):
    """Why a call was not carried out."""

    NOW = "somebody else is inside"


#: As names of this module, which every call looks up faster than those of a class.
_NOT_NOW: Final = _Not.NOW
_DIRTY: Final = Header.DIRTY
_outbox: Final = bells.outbox


class Inside(BackendError):
    """A call inside another one of the same thread: from a signal handler, or from a garbage collection."""


class StaysLocked(BackendError):
    """The table's lock was waited for, and was not free."""

    @classmethod
    def of(cls, path: Path) -> StaysLocked:
        return cls(f"{path} stayed locked for {TIMEOUT} s: a process stands still inside, or the machine is very busy")


class Access:
    """The one opened file of a store. Opens it with the first call, and again when it is not there any more. What a call has
    freed goes to those who wait for it while the table is still locked; they are told afterwards.

    `saved(former, now)` reads what is to be kept of a table that is not there any more, `moved(that, table, now)` puts it into
    the new one, which is locked meanwhile; for the first table that is nothing.
    """

    def __init__(
        self,
        where: Callable[[], Path],
        layout: Layout,
        saved: Callable[[Table, int], Sequence[Any]],
        moved: Callable[[Sequence[Any], Table, int], None],
    ) -> None:
        self._fd = self._former_fd = -1
        self._where, self._layout = where, layout
        self._saved, self._moved = saved, moved
        self.forget()

    def forget(self) -> None:
        """Let go of everything. In a forked child: the locks are the parent's, and end with its own descriptor only."""
        fds = (self._fd, self._former_fd)
        self._fd = self._former_fd = -1
        self._mutex = threading.RLock()  # a thread that is not in the child may have held it
        self._inside = False
        self._table: Table | None = None
        #: The table of a file that is not there any more, and its descriptor if that is still ours: while we live there,
        #: nobody takes what we hold for that of a dead process.
        self._former: Table | None = None
        self._path = Path()
        self._looked = 0
        #: Put aside, to be done by the next call before its own work.
        self._late: deque[tuple[Work[Any, object], Any]] = deque()
        #: The keeper will see to that, should no call come.
        self._kept = False
        for fd in fds:
            _close(fd)

    @property
    def takes_part(self) -> bool:
        """Is this process one of the table's, or of one that was replaced?"""
        return self._table is not None or self._former is not None

    def __del__(self) -> None:
        """A store that nobody has any more must not keep what it held alive."""
        _close(self._fd)
        _close(self._former_fd)

    def call(self, work: Work[A, R], argument: A) -> R:
        """In a thread. Raises: BackendError; Inside."""
        try:
            reply = self._attempt(work, argument, True)
            if reply is _NOT_NOW:
                end, nap = monotonic() + TIMEOUT, NAP
                while reply is _NOT_NOW:
                    if monotonic() > end:
                        raise StaysLocked.of(self._path)
                    time.sleep(nap)
                    nap = min(nap * 1.5, LONGEST_NAP)
                    reply = self._attempt(work, argument, True)
        finally:
            if self._late:
                self._carry_out_late()
            if _outbox:
                bells.ring()
        return reply

    async def acall(self, work: Work[A, R], argument: A) -> R:
        """On an event loop, which goes on while the table is locked. A cancel comes before the work is done, or not at all."""
        try:
            reply = self._attempt(work, argument, False)
            if reply is _NOT_NOW:
                end, turns = monotonic() + TIMEOUT, 0
                while reply is _NOT_NOW:
                    if self._table is None:
                        await asyncio.to_thread(self.call, _nothing, None)
                    elif monotonic() > end:
                        raise StaysLocked.of(self._path)
                    else:
                        await asyncio.sleep(0 if turns < TURNS else LONGEST_NAP)
                    turns += 1
                    reply = self._attempt(work, argument, False)
        finally:
            if self._late:
                self._carry_out_late()
            if _outbox:
                bells.ring()
        return reply

    def put_aside(self, work: Work[A, object], argument: A) -> None:
        """This is done when the call is done inside which we are."""
        self._late.append((work, argument))

    def at_once(self, work: Work[A, object], argument: A) -> None:
        """Without any waiting: where the table is locked it is done by the keeper, or by a call that comes before it."""
        self._late.append((work, argument))
        try:
            for _ in range(TURNS):
                if self._late:
                    self._carry_out_late()
        finally:  # the process may make no other call, and must not end without it
            if self._late and not self._kept:
                self._keep(0)

    def _keep(self, seconds: float) -> None:
        self._kept = True
        with contextlib.suppress(RuntimeError):  # there is no room for its thread: it is done at exit then
            keeper.at(seconds, self._wait_for_late)

    def _wait_for_late(self) -> None:
        """In the keeper's thread, or at the exit of the process: nobody else waits meanwhile."""
        again = LATE_AGAIN
        try:
            if self._late:  # else there may be no file to open any more
                self.call(_nothing, None)
        except StaysLocked:
            if keeper.exiting:  # what is not due before the exit's time is over is not tried any more
                again = 0
        except BackendError:
            pass
        finally:
            self._kept = False
            if self._late:  # or added since
                self._keep(again)

    def _attempt(self, work: Work[A, R], argument: A, opens: bool) -> R | _Not:
        """Carry it out, if the table is free. `opens`: also if the file has to be opened first, which takes milliseconds.

        An exception may come from anywhere at any moment: a signal handler's, or that of a worker that is told to end. What
        is locked is let go by what comes first in a `finally`, where no handler can come before it; the RLock's own `with`
        is one such place.
        """
        with self._mutex:
            if self._inside:
                raise Inside("a call of the host store inside another one of the same thread", whole=False)
            try:
                self._inside = True
                now = monotonic_ns()
                if self._table is None or now - self._looked > LOOK_EVERY:
                    if self._table is not None:
                        self._look(self._table, now)
                    if self._table is None:
                        if not opens:
                            return _NOT_NOW
                        self._open_file()
                try:
                    if lock(self._fd, EXCLUSIVE) and not try_lock(self._fd):
                        return _NOT_NOW
                except OSError as error:
                    self._cannot_lock(error)
                    return _NOT_NOW
                table = self._table
                if table is None:
                    table = self._open_table(now)
                    if table is None:
                        return _NOT_NOW
                if table.words[_DIRTY]:  # whoever was inside last died there, or was thrown out
                    table.rebuild()
                if self._late:
                    self._do_late(table, now)
                reply = work(table, argument, now)
                if table.due:
                    serve(table, now)
                return reply
            finally:
                self._inside = False
                try:  # noqa: SIM105  # suppress() is a call, and a handler could come before it has begun
                    unlock(self._fd, UNLOCK)
                except (OSError, ValueError):  # it is closed, or -1
                    pass

    # Callers hold the mutex from here on.

    def _cannot_lock(self, error: OSError) -> None:
        if error.errno != errno.EBADF:
            raise BackendError(f"{self._path}: {error.strerror}") from error
        self._lose()  # somebody has closed it
        self._fd = -1

    def _open_file(self) -> None:
        fd, self._fd = self._fd, -1
        _close(fd)  # of a try to open it that failed half way
        self._path = self._where()
        self._fd = open_file(self._path)

    def _open_table(self, now: int) -> Table | None:
        """What was opened is locked now. None: it is not the file any more."""
        if not is_at(self._path, self._fd):
            return None
        # First, as it may be the same file once more, in which a new process begins by clearing up behind the old one.
        saved = () if self._former is None else self._saved(self._former, now)
        table = open_table(self._fd, self._path, self._layout)
        if self._former is not None:  # its lock may have been lost with its descriptor, and two were inside at once
            table.rebuild()
        self._moved(saved, table, now)
        self._table, self._former, self._looked = table, None, now
        fd, self._former_fd = self._former_fd, -1
        _close(fd)
        return table

    def _look(self, table: Table, now: int) -> None:
        """Is our file still there, and as we left it? It may have been removed, replaced, or closed behind our back."""
        self._looked = now
        ours, size = False, 0
        with contextlib.suppress(OSError):
            found = os.fstat(self._fd)
            ours, size = (found.st_dev, found.st_ino) == table.identity, found.st_size
        if ours and size >= table.layout.size and is_at(self._path, self._fd):
            return
        self._lose()
        fd, self._fd = self._fd, -1
        if ours and size < table.layout.size:  # cut short: reading there would be a SIGBUS
            self._former = None
            _close(fd)
        elif ours:
            self._former_fd = fd

    def _lose(self) -> None:
        if self._table is not None:
            self._former, self._table = self._table, None

    def _do_late(self, table: Table, now: int) -> None:
        while self._late:
            work, argument = self._late[0]
            work(table, argument, now)
            self._late.popleft()

    def _carry_out_late(self) -> None:
        """Where it does not work now, it is done with the next call."""
        with contextlib.suppress(BackendError):
            self._attempt(_nothing, None, False)
        if _outbox:
            bells.ring()


def _nothing(table: Table, argument: None, now: int) -> None:
    """Only what every call does."""


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
