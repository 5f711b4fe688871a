"""The keeper: the one background thread of a process, for everything that must happen while no request looks.

It renews the leases of requests that live long, retries releases that failed, and gives back the slots of responses that
nobody finished. It starts with the first lease that may need it, once per process; a forked child starts its own and
forgets its parent's leases, which are not its to renew or to give back.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic
from typing import Any, Protocol

from . import afresh
from .outcomes import Slot

logger = logging.getLogger("django_concurrency_mw")

#: Seconds between two tries to give back what could not be given back.
RETRY_EVERY = 0.25
#: Seconds that a process's exit may be held up for slots that cannot be given back.
FLUSH_FOR = 2.0
#: Slots of one store that are given back by one call.
RETRY_AT_ONCE = 500
#: Seconds of those that the stores have for what they are still asked, and between two looks whether they have said it.
SETTLE_FOR, TURN = 0.5, 0.005
_FOREVER = float("inf")


class Kept(Protocol):
    """What the keeper knows of a lease."""

    def __bool__(self) -> bool:
        """Is there anything to give back?"""

    def release(self) -> None:
        """Give everything back."""

    @property
    def is_asking(self) -> bool:
        """Does a store still have to say what it holds? What is given back meanwhile is given back once more after that."""


#: Renews what is due of the leases, at this monotonic second; and says when to look again, infinite where never.
Renew = Callable[[Sequence[Any], float], float]


@dataclass(frozen=True, slots=True)
class _Owed:
    """Slots that could not be given back, and the monotonic second at which their lease ends by itself."""

    store: Any
    slots: tuple[Slot, ...]
    until: float


class Keeper:
    """Live leases and owed releases of this process."""

    def __init__(self) -> None:
        self._renew: Renew = lambda leases, now: _FOREVER
        self._forked()
        afresh.begin_with(self._forked)
        atexit.register(self.flush)

    def _forked(self) -> None:
        #: Another object in every process: a lease that was made under another epoch is a parent's.
        self.epoch = object()
        #: Those that have not ended, by their id: see `watch` and `forget`.
        self.leases: dict[int, Kept] = {}
        self._inbox: queue.SimpleQueue[Kept | None] = queue.SimpleQueue()
        self._owed: deque[_Owed] = deque()
        #: When the thread looks at renewals (monotonic seconds).
        self.wakes_at = _FOREVER
        self._thread: threading.Thread | None = None
        #: RLocks: a garbage collection inside may end an abandoned stream, whose release comes back here.
        self._starting = threading.RLock()
        #: Held by whoever does the keeper's work.
        self._working = threading.RLock()
        self._exiting = False
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def renew_with(self, renew: Renew) -> None:
        """How leases are renewed."""
        self._renew = renew

    # -- for leases ---------------------------------------------------------------------------------------------

    def watch(self, lease: Kept, due: float) -> None:
        """Keep this lease from now on, and look after its renewal at `due` (monotonic seconds)."""
        self.leases[id(lease)] = lease
        if due < self.wakes_at:
            self._wake_at(due)

    def look_at(self, due: float) -> None:
        """Look after renewals at `due`, if not before (monotonic seconds)."""
        if due < self.wakes_at:
            self._wake_at(due)

    def forget(self, lease: Kept) -> None:
        """It has ended."""
        self.leases.pop(id(lease), None)

    def live(self) -> list[Kept]:
        """The leases of this process that have not ended."""
        return list(self.leases.values())

    def abandon(self, lease: Kept) -> None:
        """Its response is gone; give back what nobody has. Safe inside a garbage collection: only puts it into a queue."""
        if lease:
            self._inbox.put(lease)

    def ready(self) -> None:
        """Make sure that the thread runs, for whoever will call `abandon` from where no thread can be started."""
        if (self._thread is None or not self._thread.is_alive()) and not self._exiting:
            self._start()

    def give_later(self, store: Any, slots: Sequence[Slot], until: float) -> None:
        """Try to give these back until it works or their lease has ended (`until`, monotonic seconds)."""
        self._owed.append(_Owed(store, tuple(slots), until))
        self._wake_at(monotonic() + RETRY_EVERY)

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it in the keeper's thread, so many seconds from now."""
        due = monotonic() + seconds
        with self._starting:
            heappush(self._calls, (due, next(self._numbers), call))
        self._wake_at(due)

    def cancel(self, call: Callable[[], None]) -> None:
        """Do not make this call, which `at` was told of."""
        with self._starting:
            self._calls = [entry for entry in self._calls if entry[2] != call]
            heapify(self._calls)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What the keeper does, done by another thread: not at the same time."""
        with self._working:
            yield

    @property
    def exiting(self) -> bool:
        """The process ends: what is not tried now is not tried any more."""
        return self._exiting

    def flush(self) -> None:
        """Give back all that this process still holds, at its exit; for FLUSH_FOR seconds at most."""
        end = monotonic() + FLUSH_FOR
        self._exiting = True  # no thread is started any more, and what the keeper has to do is done here
        if not self._give_all(end):
            logger.warning("not all slots could be given back at exit; they end with their leases")
            return
        # What the thread is just doing would end with the process.
        if self._working.acquire(timeout=max(0.0, end - monotonic())):
            try:
                self._retry(monotonic())
                self._call_due(_FOREVER, end)
                while self._calls and self._calls[0][0] <= monotonic() < end:  # what those have left to do at once
                    self._call_due(monotonic(), end)
            finally:
                self._working.release()

    def _give_all(self, end: float) -> bool:
        """Give back what is held, and let those who are just asking a store hear it: other threads, or greenlets, which go on
        as long as this process does. False: it took too long."""
        settled = min(end, monotonic() + SETTLE_FOR)
        asking: list[Kept] = []
        while True:
            leases = self.live()
            asking += [lease for lease in leases if lease.is_asking]
            for lease in leases:
                if monotonic() > end:
                    return False
                try:
                    lease.release()
                except Exception:
                    logger.exception("a slot could not be given back at exit; it ends with its lease")
            if not asking or monotonic() > settled:
                return True
            asking = [lease for lease in asking if lease.is_asking]
            time.sleep(TURN)  # also where nobody asks any more: whoever has just heard gives back

    # -- the thread ---------------------------------------------------------------------------------------------

    def _wake_at(self, due: float) -> None:
        with self._starting:
            if due < self.wakes_at:
                self.wakes_at = due
                self._inbox.put(None)
        self.ready()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, args=(self._inbox,), name="concurrency-keeper", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self, inbox: queue.SimpleQueue[Kept | None]) -> None:
        while True:
            left = self.wakes_at - monotonic()
            try:
                abandoned = inbox.get(timeout=None if left == _FOREVER else max(0.0, left))
            except queue.Empty:
                abandoned = None
            try:
                with self._working:
                    if abandoned is not None:
                        abandoned.release()
                    now = monotonic()
                    if now >= self.wakes_at:
                        self._look(now)
            except BaseException:  # whatever a store raises: without this thread no lease is renewed any more
                logger.exception("the keeper goes on after an error")

    def _look(self, now: float) -> None:
        self.wakes_at = _FOREVER
        due = now + RETRY_EVERY
        try:
            # Renewals first: a store that is away must not let the leases of the others lapse.
            due = self._renew(self.live(), now)
            self._call_due(now)
            self._retry(now)
        finally:
            if self._owed:
                due = min(due, monotonic() + RETRY_EVERY)
            with self._starting:
                if self._calls:
                    due = min(due, self._calls[0][0])
                self.wakes_at = min(self.wakes_at, due)

    def _call_due(self, now: float, end: float = _FOREVER) -> None:
        """Make the calls that are due; none begins after `end`."""
        for call in self._due_calls(now):
            if monotonic() > end:
                return
            try:
                call()
            except BaseException:
                logger.exception("the keeper goes on after an error")

    def _due_calls(self, now: float) -> list[Callable[[], None]]:
        calls = []
        with self._starting:
            while self._calls and self._calls[0][0] <= now:
                calls.append(heappop(self._calls)[2])
        return calls

    def _retry(self, now: float) -> None:
        """Give back what is owed, in few calls; a store that fails is not asked again before the next time."""
        by_store: dict[int, list[_Owed]] = {}
        for _ in range(len(self._owed)):
            debt = self._owed.popleft()
            if debt.until > now:
                by_store.setdefault(id(debt.store), []).append(debt)
        for debts in by_store.values():
            while debts:
                some, debts = debts[:RETRY_AT_ONCE], debts[RETRY_AT_ONCE:]
                try:
                    some[0].store.give(tuple(slot for debt in some for slot in debt.slots))
                except BaseException:
                    self._owed.extend(some + debts)
                    break


keeper = Keeper()
