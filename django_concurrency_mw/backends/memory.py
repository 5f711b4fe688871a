"""The memory store: semaphores of one process, for all its threads and event loops.

Nothing is kept but what is in flight: a semaphore without holders is no entry. Every call is a few dictionary operations
under one lock and never waits for anything else, so the asyncio half calls the same functions on the loop.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import ClassVar

from django.core.exceptions import ImproperlyConfigured

from .. import afresh
from ..bells import Bell
from ..exceptions import BackendError
from ..outcomes import Full, LineFull, Queued, QueueReply, Slot, Taken, TakeReply
from .base import ASK_AGAIN, ASK_AGAIN_AFTER, BackendConfig, BaseBackend, Holder, Restore, Waiter, age_of
from .lines import Lines
from .semaphore import Held, Semaphore

#: Characters of key and path text that a holder keeps for people.
TEXT_LIMIT = 200
#: A dictionary that once was this large is made anew when it is nearly empty: Python's own never shrink.
SHRINK_FROM = 4096


class _Entrance:
    """The store's lock. Entering tells whether we are alone inside.

    A garbage collection may run in the middle of a call and end an abandoned stream, whose own code gives its slot back: in
    the thread that holds the lock, which must then neither wait for itself nor change what it is just working on.
    """

    __slots__ = ("depth", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0

    def __enter__(self) -> bool:
        self.lock.acquire()
        self.depth += 1
        return self.depth == 1

    def __exit__(self, *exception: object) -> None:
        self.depth -= 1
        self.lock.release()


class MemoryBackend(BaseBackend):
    """Counts in this process only: four worker processes let in four times the limit."""

    supports_semaphores: ClassVar[bool] = True
    supports_wait: ClassVar[bool] = True
    is_local: ClassVar[bool] = True
    cancel_safe: ClassVar[bool] = True
    one_process: ClassVar[bool] = True

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        if config.options:
            raise ImproperlyConfigured(
                f"{config.place}['OPTIONS']: the memory store has no options, "
                f"got {', '.join(sorted(map(repr, config.options)))}"
            )
        if type(self) is MemoryBackend:  # a subclass may do anything
            self.never_waits = self.gives_on_loop = True
        self._forget()
        _stores.add(self)

    def _forget(self) -> None:
        """Start empty: in a forked child the parent's holders are not ours, and its lock may be held by a dead thread."""
        self._lock = _Entrance()
        #: Given back by a garbage collection inside one of our own calls; dropped when that call is done.
        self._late: deque[Slot] = deque()
        self._semaphores: dict[tuple[str, bytes], Semaphore] = {}
        self._most = 0
        self._lines = Lines()
        #: token -> the end of the lease that an operator cut short (monotonic seconds).
        self._evicted: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        entrance = self._lock
        with entrance.lock:  # by hand, and in one piece, as `give`: every request comes by
            if entrance.depth:
                raise BackendError("a take inside another one, from a garbage collection", whole=False)
            try:
                entrance.depth = 1
                if self._late:
                    self._drop_late()
                now = monotonic()
                reply = None if len(slots) != 1 or self._lines.waiting else self._take_one(slots[0], now)
                if reply is None:
                    reply = self._take_all(slots, now)
                if self._late:
                    self._drop_late()
                return reply
            finally:
                entrance.depth = 0

    def _take_one(self, slot: Slot, now: float) -> TakeReply | None:
        """Nobody waits for anything. None: it takes a closer look."""
        name, token, count = (slot.policy, slot.key.digest), slot.token, slot.cost
        known = self._semaphores
        semaphore = known.get(name)
        if semaphore is None:
            if count > slot.limit:
                return None
            semaphore = known[name] = Semaphore()
            if len(known) > self._most:
                self._most = len(known)
        else:
            count += semaphore.total()
            if count > slot.limit or token in semaphore:
                return None
        ends = now + slot.ttl
        if slot.cost == 1:
            semaphore[token] = Held(slot, now, ends)
        else:
            semaphore.add(token, Held(slot, now, ends))
        if ends < semaphore.earliest:
            semaphore.earliest = ends
        return _ALONE[count] if count < len(_ALONE) else Taken((True,), (count,))

    def _take_all(self, slots: Sequence[Slot], now: float) -> TakeReply:
        held = self._fit(slots, now)
        full = [slot.block and not fits for slot, fits in zip(slots, held, strict=True)]
        if True in full:
            return Full(tuple(full), self._counted(slots))
        for slot, fits in zip(slots, held, strict=True):
            if fits:
                self._hold(slot, now, now + slot.ttl)
        return Taken(tuple(held), self._counted(slots))

    async def atake(self, slots: Sequence[Slot]) -> TakeReply:
        return self.take(slots)

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        now = monotonic()
        with self._lock as alone:
            if not alone:
                raise BackendError("a wait inside another call, from a garbage collection", whole=False)
            self._drop_late()
            reply = self._queue(slots, most, bell, now)
            self._drop_late()
        return reply

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        return self.queue(slots, most, bell)

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        entrance = self._lock
        with entrance.lock:
            if entrance.depth:
                self._late.extend(slots)
                return [True] * len(slots)
            try:
                entrance.depth = 1
                if len(slots) != 1 or self._lines.waiting:
                    given = self._drop([(slot.semaphore, slot.token) for slot in slots])
                else:
                    slot = slots[0]
                    given = [self._free((slot.policy, slot.key.digest), slot.token)]
                if self._late:
                    self._drop_late()
                return given
            finally:
                entrance.depth = 0

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return self.give(slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        now = monotonic()
        with self._lock:
            self._drop_late()
            return [self._renew(slot, now, now + seconds) for slot, seconds in slots]

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        now = monotonic()
        with self._lock:
            self._drop_late()
            return [self._restore(holder, now) for holder in holders]

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bool:
        now = monotonic()
        with self._lock as alone:
            if not alone:
                raise BackendError("a claim inside another call, from a garbage collection", whole=False)
            self._drop_late()
            held = {(old.semaphore, old.token) for old, _ in slots if self._is_held(old, now)}
            if len(held) < len(slots):
                return False
            for old, new in slots:  # the new one first: for a moment both are counted, never none
                self._hold(new, now - age_of(new), now + new.ttl)
                self._drop([(old.semaphore, old.token)])
            self._drop_late()
        return True

    def evict(self, token: str) -> bool:
        with self._lock:
            now = monotonic()
            self._evicted = {known: ends for known, ends in self._evicted.items() if ends > now}
            held = [name for name, semaphore in self._semaphores.items() if token in semaphore]
            for name in held:
                self._evicted[token] = max(self._evicted.get(token, 0.0), self._semaphores[name][token].ends)
            self._drop([(name, token) for name in held])
        return bool(held)

    def waiters(self) -> Sequence[Waiter]:
        now, pid, host = monotonic(), os.getpid(), socket.gethostname()
        with self._lock:
            return [
                Waiter(
                    slot.policy,
                    slot.key.text[:TEXT_LIMIT],
                    slot.token,
                    place,
                    now - waiting.since,
                    slot.path[:TEXT_LIMIT],
                    pid,
                    slot.cost,
                    host,
                )
                for name, place, waiting in self._lines.places(now)
                for slot in waiting.slots
                if slot.semaphore == name
            ]

    def snapshot(self) -> Sequence[Holder]:
        now, pid, host = monotonic(), os.getpid(), socket.gethostname()
        with self._lock:
            self._drop_late()
            return [
                Holder(
                    policy,
                    held.slot.key.text[:TEXT_LIMIT],
                    token,
                    now - held.since,
                    held.ends - now,
                    held.slot.path[:TEXT_LIMIT],
                    pid,
                    held.cost,
                    host,
                    held.slot.ttl,
                )
                for (policy, _), semaphore in self._semaphores.items()
                for token, held in semaphore.items()
                if held.ends > now
            ]

    def counts(self, slots: Sequence[Slot]) -> Sequence[int]:
        now = monotonic()
        with self._lock as alone:
            if alone:
                self._drop_late()
            found = [self._semaphores.get(slot.semaphore) for slot in slots]
            return [0 if semaphore is None else semaphore.counted(now) for semaphore in found]

    def note(self, peaks: Mapping[str, int]) -> None:
        with self._lock:
            for policy, most in peaks.items():
                self._peaks[policy] = max(most, self._peaks.get(policy, 0))

    def peaks(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._peaks)

    def reset_peaks(self) -> None:
        with self._lock:
            self._peaks = {}

    # Callers hold the lock from here on.

    def _drop_late(self) -> None:
        while (
            self._late and self._lock.depth == 1
        ):  # who asks inside another call, such as a receiver, leaves them to that
            late = list(self._late)
            self._drop([(slot.semaphore, slot.token) for slot in late])
            for _ in late:  # only now: an exception may come from anywhere, and to drop twice is to drop once
                self._late.popleft()

    def _fit(self, slots: Sequence[Slot], now: float) -> list[bool]:
        """Which of them may be held, or are. Those who stand before are let in first, so that it is one moment for all."""
        if self._lines:
            self._grant([slot.semaphore for slot in slots], now)
        return [self._fits(slot, now) for slot in slots]

    def _fits(self, slot: Slot, now: float) -> bool:
        if self._lines and not self._lines.is_turn_of(slot.token, slot.semaphore) and not self._is_theirs(slot):
            return False
        semaphore = self._semaphores.get(slot.semaphore)
        if semaphore is None:
            return slot.cost <= slot.limit
        room = slot.limit - slot.cost
        if semaphore.total() <= room or slot.token in semaphore:
            return True
        semaphore.drop_lapsed(now)
        if not semaphore:
            del self._semaphores[slot.semaphore]
            if self._most > SHRINK_FROM:
                self._shrink()
        return semaphore.total() <= room

    def _is_theirs(self, slot: Slot) -> bool:
        semaphore = self._semaphores.get(slot.semaphore)
        return semaphore is not None and slot.token in semaphore

    def _queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell, now: float) -> QueueReply:
        token, lines = slots[0].token, self._lines
        held = self._fit(slots, now)
        full = tuple([slot.block and not fits for slot, fits in zip(slots, held, strict=True)])
        names = [slot.semaphore for slot, is_full in zip(slots, full, strict=True) if is_full]
        reply: QueueReply
        if not names:
            left = lines.leave(token)
            for slot, fits in zip(slots, held, strict=True):
                if fits:
                    self._hold(slot, now, now + slot.ttl)
            self._grant(left, now)
            return Taken(tuple(held), self._counted(slots))
        # It may have been let in before, and have asked too late for one of them: who does not hold all holds none.
        given = [slot.semaphore for slot in slots if self._is_theirs(slot)]
        for name in given:
            self._free(name, token)
        rooms = [room for room, is_full in zip(most, full, strict=True) if is_full]
        if None in rooms:
            self._grant([*given, *lines.leave(token)], now)
            reply = Full(full, self._counted(slots))
        elif any(
            lines.length(name, but=token) >= room for name, room in zip(names, rooms, strict=True) if room is not None
        ):
            self._grant([*given, *lines.leave(token)], now)
            reply = LineFull(full, self._counted(slots))
        else:
            self._grant([*given, *lines.stand(slots, names, bell, now)], now)
            reply = Queued(full, self._counted(slots), lines.ahead(token), self._ask_again(token, names, now))
        return reply

    def _ask_again(self, token: str, names: Sequence[tuple[str, bytes]], now: float) -> float:
        """Nobody tells when a lease ends: the first in the line has to look."""
        ends = [
            semaphore.earliest - now
            for name in names
            if self._lines.is_turn_of(token, name) and (semaphore := self._semaphores.get(name)) is not None
        ]
        return max(ASK_AGAIN_AFTER, min([ASK_AGAIN, *ends]))

    def _grant(self, names: Iterable[tuple[str, bytes]], now: float) -> None:
        """Something may have become free there: to those who are next."""
        lines = self._lines
        due = deque(names)
        while due and lines:
            name = due.popleft()
            while (first := lines.first(name)) is not None:
                if first.until <= now:  # it has not asked for long
                    due.extend(lines.leave(first.token))
                    continue
                fits = [self._fits(slot, now) for slot in first.slots]
                if all(fit or not slot.block for slot, fit in zip(first.slots, fits, strict=True)):
                    due.extend(lines.leave(first.token))
                    for slot, fit in zip(first.slots, fits, strict=True):
                        if fit:
                            self._hold(slot, now, now + slot.ttl)
                elif any(slot.semaphore == name and not fit for slot, fit in zip(first.slots, fits, strict=True)):
                    break
                else:  # it must not keep free what it cannot take: it stands in another line, or asks for its place there
                    lines.leave_one(first.token, name)
                first.bell.ring()

    def _counted(self, slots: Sequence[Slot]) -> tuple[int, ...]:
        return tuple([self._count(slot.semaphore) for slot in slots])

    def _count(self, name: tuple[str, bytes]) -> int:
        semaphore = self._semaphores.get(name)
        return 0 if semaphore is None else semaphore.total()

    def _hold(self, slot: Slot, since: float, ends: float) -> None:
        semaphore = self._semaphores.get(slot.semaphore)
        if semaphore is None:
            semaphore = self._semaphores[slot.semaphore] = Semaphore()
            self._most = max(self._most, len(self._semaphores))
        held = semaphore.get(slot.token)
        if held is None:
            semaphore.add(slot.token, Held(slot, since, ends))
        else:  # asked again: its lease begins again, also a lapsed one
            held.ends = ends
        semaphore.earliest = min(semaphore.earliest, ends)

    def _drop(self, holders: Sequence[tuple[tuple[str, bytes], str]]) -> list[bool]:
        """These go. All that they held is free before anybody is let in: the first of two lines is to get both."""
        if not self._lines:
            return [self._free(name, token) for name, token in holders]
        left = [name for _, token in holders for name in self._lines.leave(token)]
        held = [self._free(name, token) for name, token in holders]
        self._grant([*[name for name, _ in holders], *left], monotonic())
        return held

    def _free(self, name: tuple[str, bytes], token: str) -> bool:
        semaphore = self._semaphores.get(name)
        if semaphore is None:
            return False
        held = semaphore.get(token)
        if held is not None and held.cost == 1:
            del semaphore[token]
        elif held is not None:
            semaphore.remove(token)
        if not semaphore:  # also where its take was cut short
            del self._semaphores[name]
            if self._most > SHRINK_FROM:
                self._shrink()
        return held is not None and held.ends > monotonic()

    def _shrink(self) -> None:
        if len(self._semaphores) < self._most // 8:
            self._semaphores = dict(self._semaphores)
            self._most = len(self._semaphores)

    def _is_held(self, slot: Slot, now: float) -> bool:
        semaphore = self._semaphores.get(slot.semaphore)
        held = None if semaphore is None else semaphore.get(slot.token)
        return held is not None and held.ends > now

    def _renew(self, slot: Slot, now: float, ends: float) -> bool:
        semaphore = self._semaphores.get(slot.semaphore)
        held = None if semaphore is None else semaphore.get(slot.token)
        if semaphore is None or held is None or held.ends <= now:
            return False
        held.ends = ends
        semaphore.earliest = min(semaphore.earliest, ends)
        return True

    def _restore(self, holder: Restore, now: float) -> bool:
        semaphore = self._semaphores.get(holder.slot.semaphore)
        if semaphore is not None and holder.slot.token in semaphore:
            return self._renew(holder.slot, now, now + holder.seconds)
        if now >= holder.until or self._evicted.get(holder.slot.token, 0.0) > now:
            return False
        self._hold(holder.slot, now, now + holder.seconds)
        return True


#: What a take of one slot is told, by the count.
_ALONE = tuple(Taken((True,), (count,)) for count in range(256))


_stores: weakref.WeakSet[MemoryBackend] = weakref.WeakSet()


def _forget_all(stores: Iterable[MemoryBackend] = _stores) -> None:
    for store in list(stores):
        store._forget()


afresh.begin_with(_forget_all)
