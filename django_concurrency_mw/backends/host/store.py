"""The host store: what a take, a release and a renewal mean, on a table that all processes of this machine share."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured

from ...bells import Bell
from ...exceptions import PermanentBackendError, did_you_mean, shown
from ...outcomes import Full, LineFull, Queued, QueueReply, Slot, Taken, TakeReply
from ..base import (
    PLACE_FOR,
    BackendConfig,
    BaseBackend,
    Holder,
    Restore,
    Waiter,
    age_of,
    check_message,
    has_host,
    worker_suffix,
)
from . import bells, lines, noted, people
from .access import Access, Inside
from .layout import (
    DEFAULT_CELLS,
    EVICTED,
    FEWEST_CELLS,
    FREE,
    HELD,
    MOST_CELLS,
    QUEUED,
    TOKEN_ROOM,
    Header,
    Layout,
    Named,
    fitted,
    is_nobodys,
    named,
    peak_name,
    readable,
    rounded,
    semaphore,
)
from .opening import default_path, vet_file_system
from .table import VISITOR, HolderName, Place, Table, TableFull, Wanted
from .visiting import visit

A = TypeVar("A")
R = TypeVar("R")

#: One holder of one semaphore: token, policy, digest.
Known = tuple[str, str, bytes]
#: One of them with the state and the content of its cell.
Saved = tuple[Known, int, bytes]

#: What the table says of slots that are asked for: of each one the total of its semaphore, and whether it may be held; what is
#: to be written for that; and the cells to be freed before, which are of the same tokens: those by which it waited, and lapsed
#: ones that nobody has swept yet.
Answer = tuple[list[int], list[bool], dict[Known, Wanted], list[int]]

#: How long one who does not ask again keeps its places (ns).
STANDS_FOR: Final = int(PLACE_FOR * 1e9)
#: The cell of one who has none.
NOWHERE: Final = -1
_IN_LINES: Final = Header.WAITING

#: What was handed over is claimed elsewhere, and not given back here: from so many places on it is looked which are over.
TIDY_FROM = 1024

#: Replies that are much alike, and take longer to make than to find.
_taken, _full = lru_cache(1024)(Taken), lru_cache(1024)(Full)


class HostBackend(BaseBackend):
    """`OPTIONS`: `path`, a file; `slots`, how many may be in flight in all, rounded up to a power of two (16,384)."""

    supports_semaphores: ClassVar[bool] = True
    supports_wait: ClassVar[bool] = True
    is_local: ClassVar[bool] = True
    #: A take has no point at which it could be cancelled but those at which nothing is taken.
    cancel_safe: ClassVar[bool] = True

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        place = config.place
        if not has_host():
            raise ImproperlyConfigured(
                f"{place}['BACKEND']: the host store needs 64-bit Linux, and this is {sys.platform}; use 'memory' or 'redis'"
            )
        self._given_path, slots = _options(config.options, f"{place}['OPTIONS']")
        #: Where our holders stand in the table.
        self._known: dict[Known, Place] = {}
        #: So many known ones are looked through when more are handed over.
        self._tidy_from = TIDY_FROM
        self._layout = Layout(slots)
        self._access = Access(self._where, self._layout, self._saved, self._moved)
        _stores.add(self)

    def _forget(self) -> None:
        """Start empty, as in a forked child: the parent's holders are not ours."""
        self._known = {}
        self._access.forget()

    # -- the interface ----------------------------------------------------------------------------------------------

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        return self._access.call(self._take, slots)

    def bell(self) -> Bell:
        return bells.bell()

    def abell(self) -> Bell:
        return bells.abell()

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        return self._access.call(self._queue, (slots, most, bell))

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        try:
            return self._access.call(self._give, slots)
        except Inside:
            self._access.put_aside(self._give, slots)
            return [True] * len(slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        return self._access.call(self._renew, slots)

    def detach(self, slots: Sequence[Slot]) -> None:
        self._access.at_once(self._detach, slots)

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bool:
        return self._access.call(self._claim, slots)

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        return self._access.call(self._restore, holders)

    def evict(self, token: str) -> bool:
        return bool(self._visit(lambda table, token, now: table.evict(token), token))

    def snapshot(self) -> Sequence[Holder]:
        def copied_by_one_of_us(table: Table, state: int, now: int) -> people.Copy:
            if table.number != VISITOR:
                table.sweep(now, force=True)
                lines.serve(table, now)
            return people.copy(table, state, now)

        copied = self._visit(copied_by_one_of_us, HELD)
        return [] if copied is None else people.holders(copied)

    def waiters(self) -> Sequence[Waiter]:
        copied = self._visit(people.copy, QUEUED)
        return [] if copied is None else people.waiters(copied)

    def blind_spot(self) -> str:
        if self._access.takes_part or os.path.lexists(self._where()):
            return ""
        return f"no process of this user and this settings module has used it yet: there is no {self._where()}"

    def counts(self, slots: Sequence[Slot]) -> Sequence[int]:
        names = [semaphore(*slot.semaphore) for slot in slots]
        counts = self._visit(people.counts, names) or {}
        return [counts.get(name, 0) for name in names]

    def note(self, peaks: Mapping[str, int]) -> None:
        self._access.call(noted.note, peaks)

    def peaks(self) -> Mapping[str, int]:
        return self._visit(noted.peaks, None) or {}

    def peak_name(self, policy: str) -> str:
        return readable(peak_name(policy)[2])

    def reset_peaks(self) -> None:
        self._visit(noted.reset, None)

    async def atake(self, slots: Sequence[Slot]) -> TakeReply:
        return await self._access.acall(self._take, slots)

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        return await self._access.acall(self._queue, (slots, most, bell))

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        try:
            return await self._access.acall(self._give, slots)
        except Inside:
            self._access.put_aside(self._give, slots)
            return [True] * len(slots)

    def count_place(self) -> Hashable:
        return str(self._where())

    def check(self) -> Sequence[CheckMessage]:
        """Tries a file that is there; one that is not is left for the first request to make."""
        try:
            path = self._where()
            if os.path.lexists(path):
                self.probe()
                return []
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermanentBackendError(
                    f"{path} cannot be made",
                    cure="let this user write in its directory, or name another file in `path`",
                )
            vet_file_system(path, path.parent.stat())
        except Exception as error:
            return [check_message(self, error, "Until it works ON_BACKEND_ERROR decides about each request.")]
        return []

    def close(self) -> None:
        """Let go of the file. What is still held here ends as if the process had died."""
        self._forget()

    def _visit(self, work: Callable[[Table, A, int], R], argument: A) -> R | None:
        """For people, whose process need not be one of the table's. None: nothing is there."""
        if self._access.takes_part:
            return self._access.call(work, argument)
        return visit(self._where(), self._layout, work, argument)

    def _where(self) -> Path:
        return self._given_path or default_path(self.config.key_prefix)

    # -- what is done there -----------------------------------------------------------------------------------------

    def _take(self, table: Table, slots: Sequence[Slot], now: int) -> TakeReply:
        answer = self._ask(table, slots, now)
        if False in answer[1]:
            answer = self._ask_again(table, slots, answer, now)
            full = _blocked(slots, answer[1])
            if True in full:
                return _full(full, tuple(answer[0]))
        return self._take_all(table, slots, answer, now)

    def _take_all(self, table: Table, slots: Sequence[Slot], answer: Answer, now: int) -> Taken:
        """All that fits, which every blocking one does."""
        totals, fits, new, over = answer
        if new:
            totals = self._hold(table, new, over, now)
            if len(totals) != len(slots):  # some were held before, or do not fit
                totals = self._ask(table, slots, now)[0]
        elif over:
            table.drop(over)
        return _taken(tuple(fits), tuple(totals))

    def _ask_again(self, table: Table, slots: Sequence[Slot], answer: Answer, now: int) -> Answer:
        """Some do not fit: is there anybody dead or lapsed? And those who wait for these may not need what is free, or whoever
        freed it died before they had it."""
        changed = table.sweep(now)
        if table.words[_IN_LINES]:
            table.due.extend(
                [semaphore(*slot.semaphore) for slot, fit in zip(slots, answer[1], strict=True) if not fit]
            )
            changed = True
            lines.serve(table, now)
        return self._ask(table, slots, now) if changed else answer

    def _queue(self, table: Table, asked: tuple[Sequence[Slot], Sequence[int | None], Bell], now: int) -> QueueReply:
        slots, most, bell = asked
        answer = self._ask(table, slots, now)
        if False in answer[1]:
            answer = self._ask_again(table, slots, answer, now)
        full = _blocked(slots, answer[1])
        if True not in full:
            return self._take_all(table, slots, answer, now)
        totals = tuple(answer[0])
        rooms = [room for room, is_full in zip(most, full, strict=True) if is_full]
        if None in rooms:
            self._leave(table, slots)
            return _full(full, totals)
        for slot, room, is_full in zip(slots, most, full, strict=True):
            if is_full and room is not None and self._is_line_full(table, slot, room):
                self._leave(table, slots)
                return LineFull(full, totals)
        ahead = self._stand(table, slots, full, bell, now)
        return Queued(full, totals, ahead, lines.ask_again(table, ahead, bells.number_of(bell)))

    def _is_line_full(self, table: Table, slot: Slot, room: int) -> bool:
        place = self._known.get((slot.token, slot.policy, slot.key.digest))
        stands = place is not None and table.state(place) == QUEUED
        return not stands and lines.waiting(table, semaphore(*slot.semaphore)) >= room

    def _stand(self, table: Table, slots: Sequence[Slot], full: Sequence[bool], bell: Bell, now: int) -> int:
        """In the lines of those that are full, and no other. Returns how many are before it in the longest."""
        wanted: dict[Known, Wanted] = {}
        in_line: dict[Known, bool] = {}
        blocks: dict[Known, bool] = {}
        for slot, is_full in zip(slots, full, strict=True):
            known = (slot.token, slot.policy, slot.key.digest)
            wanted[known] = (named(slot.policy, slot.key.digest, slot.key.text), slot, int(slot.ttl * 1e9))
            in_line[known] = is_full or in_line.get(known, False)
            blocks[known] = slot.block or blocks.get(known, False)
        places = {known: place for known in wanted if (place := self._known.get(known)) and table.waits(place)}
        if len(places) < len(wanted) or len({ticket for _, ticket in places.values()}) > 1:
            self._leave(table, slots)  # it has lost some of its places, or is half in and half out
            places = _write(table, wanted, now)
            lines.tie(table, [cell for cell, _ in places.values()], list(blocks.values()))
            self._known.update(places)
        cells = [cell for cell, _ in places.values()]
        stands = list(in_line.values())
        lines.stand(table, cells, stands, bells.number_of(bell), now + STANDS_FOR)
        stood = [cell for cell, in_one in zip(cells, stands, strict=True) if in_one]
        if isinstance(bell, bells.HostBell):
            bell.stands(table.map, [table.states_at + cell for cell in stood])
        return max([lines.ahead(table, cell) for cell in stood])

    def _leave(self, table: Table, slots: Sequence[Slot]) -> None:
        """These are neither waited for nor held."""
        self._give(table, slots, 0)

    def _ask(self, table: Table, slots: Sequence[Slot], now: int) -> Answer:
        """See `Answer`."""
        places = self._known
        totals: list[int] = []
        fits: list[bool] = []
        new: dict[Known, Wanted] = {}
        ahead: dict[Named, int] = {}
        over: list[int] = []
        in_lines = table.words[_IN_LINES]
        for slot in slots:
            policy, key, cost = slot.policy, slot.key, slot.cost
            digest = key.digest
            known, name = (slot.token, policy, digest), named(policy, digest, key.text)
            total = table.total(name[0], name[1])
            room, place = slot.limit - cost, places.get(known)
            fit = total <= room
            until = table.held_until(place) if place else 0
            if until > now:
                fit = True
            else:
                if place and (until or table.waits(place)):
                    over.append(place[0])
                if in_lines and fit:  # nobody overtakes who waits
                    fit = lines.is_turn(table, name[:2], place[0] if place else NOWHERE)
                if fit and not ((before := ahead.get(name, 0)) and known in new):
                    fit = total + before <= room  # what stands before it in this very take counts, too
                    if fit:
                        new[known] = (name, slot, int(slot.ttl * 1e9))
                        ahead[name] = before + cost
            totals.append(total)
            fits.append(fit)
        return totals, fits, new, over

    def _hold(self, table: Table, new: Mapping[Known, Wanted], over: Sequence[int], now: int) -> list[int]:
        """Returns the totals."""
        if over:
            table.drop(over)
        places = _write(table, new, now)
        if len(self._known) > 2 * table.layout.cells:
            self._forget_gone(table)
        # Known before they count: whatever comes in between, giving back finds them.
        self._known.update(places)
        return table.commit(places.values())

    def _forget_gone(self, table: Table) -> None:
        self._known = {one: place for one, place in self._known.items() if table.state(place) != FREE}

    def _give(self, table: Table, slots: Sequence[Slot], now: int) -> list[bool]:
        places = self._known
        given: list[bool] = []
        cells: dict[int, Known] = {}
        for slot in slots:
            known = (slot.token, slot.policy, slot.key.digest)
            place = places.get(known)
            until = table.held_until(place) if place else 0
            if place and until:
                given.append(until > now and place[0] not in cells)
                cells[place[0]] = known
            else:
                given.append(False)
                if place and table.waits(place):
                    cells[place[0]] = known
                else:
                    places.pop(known, None)
        if cells:
            table.drop(cells)
            for known in cells.values():  # after that: whoever is thrown out before it gives back once more
                places.pop(known, None)
        return given

    def _renew(self, table: Table, slots: Sequence[tuple[Slot, float]], now: int) -> list[bool]:
        held = []
        for slot, seconds in slots:
            place = self._known.get((slot.token, slot.policy, slot.key.digest))
            still = place is not None and table.held_until(place) > now
            if place is not None and still:
                table.extend(place, now + int(seconds * 1e9))
            held.append(still)
        return held

    def _detach(self, table: Table, slots: Sequence[Slot], now: int) -> None:
        """Their places stay known, as they may be given back here all the same, until others have claimed them."""
        for slot in slots:
            place = self._known.get((slot.token, slot.policy, slot.key.digest))
            if place and table.held_until(place):
                table.disown(place)
        if len(self._known) > self._tidy_from:
            self._forget_gone(table)
            self._tidy_from = max(TIDY_FROM, 2 * len(self._known))

    def _claim(self, table: Table, slots: Sequence[tuple[Slot, Slot]], now: int) -> bool:
        olds = table.find({_holder_name(old.token, old.policy, old.key.digest) for old, _ in slots}, now)
        if len(olds) < len(slots):
            return False
        new: dict[Known, Wanted] = {
            (one.token, one.policy, one.key.digest): (
                named(one.policy, one.key.digest, one.key.text),
                one,
                int(one.ttl * 1e9),
            )
            for _, one in slots
        }
        places = _write(table, new, now)
        if not all(table.held_until(place) for place in olds.values()):
            return False  # they were a dead process's, and went when room was looked for
        for place, (_, one) in zip(places.values(), slots, strict=True):
            table.backdate(place, now - int(age_of(one) * 1e9))
        self._known.update(places)
        # For a moment both are counted, never none: killed in between, we leave the old ones, and ours go with us.
        table.commit(places.values())
        table.drop([cell for cell, _ in olds.values()])
        for old, _ in slots:
            self._known.pop((old.token, old.policy, old.key.digest), None)
        return True

    def _adopt(self, table: Table, slots: Sequence[Slot], now: int) -> None:
        """What was handed over, and is held on here without a claim, as that failed, must not be counted a second time."""
        wanted = {}
        for slot in slots:
            known = (slot.token, slot.policy, slot.key.digest)
            if known not in self._known:
                wanted[_holder_name(*known)] = known
        if wanted:
            for name, place in table.find(wanted, now).items():
                self._known[wanted[name]] = place
                table.own(place)

    def _restore(self, table: Table, holders: Sequence[Restore], now: int) -> list[bool]:
        held = []
        self._adopt(table, [holder.slot for holder in holders], now)
        for slot, seconds, until in holders:
            known = (slot.token, slot.policy, slot.key.digest)
            place, ttl = self._known.get(known), int(seconds * 1e9)
            state = FREE if place is None else table.state(place)
            if place is not None and state == HELD:
                back = table.held_until(place) > now
                if back:
                    table.extend(place, now + ttl)
            else:
                back = state == FREE and now < until * 1e9
                if back:
                    name = named(slot.policy, slot.key.digest, slot.key.text)
                    self._hold(table, {known: (name, slot, ttl)}, (), now)
            held.append(back)
        return held

    def _saved(self, table: Table, now: int) -> list[Saved]:
        """What we hold in this table, or were evicted from."""
        return [
            (one, state, table.raw(place))
            for one, place in self._known.items()
            if (state := table.state(place)) in (HELD, EVICTED) and table.expires(place) > now
        ]

    def _moved(self, saved: Sequence[Saved], table: Table, now: int) -> None:
        """There is another table, or one for the first time: what we held before is held in this one from now on."""
        known: dict[Known, Place] = {}
        # Nobody's are still there where the file is the same once more.
        there = table.find({_holder_name(*one) for one, _, raw in saved if is_nobodys(raw)}, now)
        for one, state, raw in saved:
            found = there.get(_holder_name(*one)) if there else None
            known[one] = found or table.write_raw(raw)
            if not found:
                table.commit([known[one]], state)
        self._known = known


def _holder_name(token: str, policy: str, digest: bytes) -> HolderName:
    return (*semaphore(policy, digest), readable(fitted(token, TOKEN_ROOM)))


def _blocked(slots: Sequence[Slot], fits: Sequence[bool]) -> tuple[bool, ...]:
    """Which of them are in the way of a take."""
    return tuple([slot.block and not fit for slot, fit in zip(slots, fits)])  # noqa: B905  # strict is slow


def _write(table: Table, new: Mapping[Known, Wanted], now: int) -> dict[Known, Place]:
    """Cells for these, not counted yet. Raises: TableFull."""
    try:
        return table.write(new, now)
    except TableFull:
        if not table.sweep(now, force=True):
            raise
        return table.write(new, now)


def _options(options: Mapping[str, Any], place: str) -> tuple[Path | None, int]:
    for name in options:
        if name not in ("path", "slots"):
            raise ImproperlyConfigured(
                f"{place}: unknown option {shown(name)}; the host store has 'path' and 'slots'"
                + did_you_mean(str(name), ("path", "slots"))
            )
    path, slots = options.get("path"), options.get("slots", DEFAULT_CELLS)
    if path is not None and (not isinstance(path, str | os.PathLike) or not os.path.isabs(path)):
        raise ImproperlyConfigured(f"{place}['path']: expected the absolute path of a file, got {shown(path)}")
    if not isinstance(slots, int) or isinstance(slots, bool) or not FEWEST_CELLS <= slots <= MOST_CELLS:
        raise ImproperlyConfigured(
            f"{place}['slots']: expected an integer from {FEWEST_CELLS} to {MOST_CELLS}, got {shown(slots)}"
        )
    return None if path is None else Path(f"{Path(path)}{worker_suffix()}"), rounded(slots)


_stores: weakref.WeakSet[HostBackend] = weakref.WeakSet()


def _forget_all() -> None:
    for store in list(_stores):
        store._forget()


os.register_at_fork(after_in_child=_forget_all)
