"""What is ours in the table: where this process holds and waits, and what a take, a wait, a release and a renewal mean there.

All of it is done with the table locked: (table, argument, monotonic ns) -> reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from ...bells import Bell
from ...outcomes import Full, LineFull, Queued, QueueReply, Slot, Taken, TakeReply
from ..base import PLACE_FOR, Restore, age_of
from . import bells, lines, watch
from .alone import Alone, Known
from .layout import (
    EVICTED,
    FREE,
    HELD,
    QUEUED,
    TOKEN_ROOM,
    Header,
    Named,
    fitted,
    is_nobodys,
    named,
    readable,
    semaphore,
)
from .table import HolderName, Place, Table, TableFull, Wanted

#: One of them with the state and the content of its cell.
Saved = tuple[Known, int, bytes]

#: What the table says of slots that are asked for: of each one the total of its semaphore, and whether it may be held; what is
#: to be written for that; and the cells to be freed before, which are of the same tokens: those by which it waited or was
#: evicted, and lapsed ones that nobody has swept yet.
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


class Ours(Alone):
    """The cells of this process's holders and waiters, by whom they are."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start empty, as in a forked child: the parent's holders are not ours."""
        self.places: dict[Known, Place] = {}
        self.watch = watch.Watch()
        #: So many are looked through when more are handed over.
        self.tidy_from = TIDY_FROM

    def _take_any(self, table: Table, slots: Sequence[Slot], now: int) -> TakeReply:
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
            for slot, fit in zip(slots, answer[1], strict=True):
                name = semaphore(*slot.semaphore)
                if not fit and lines.waiting(table, name):
                    table.due[name] = None
            changed |= lines.serve(table, now)
        return self._ask(table, slots, now) if changed else answer

    def queue(self, table: Table, asked: tuple[Sequence[Slot], Sequence[int | None], Bell], now: int) -> QueueReply:
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
        place = self.places[slots[0].token, slots[0].policy, slots[0].key.digest]
        can_be_woken = bells.number_of(bell)
        again = self.watch.asks_again(table, place, ahead, now) if can_be_woken else watch.ASK_OFTEN
        return Queued(full, totals, ahead, again)

    def _is_line_full(self, table: Table, slot: Slot, room: int) -> bool:
        place = self.places.get((slot.token, slot.policy, slot.key.digest))
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
        places = {known: place for known in wanted if (place := self.places.get(known)) and table.waits(place)}
        if len(places) < len(wanted) or len({ticket for _, ticket in places.values()}) > 1:
            self._leave(table, slots)  # it has lost some of its places, or is half in and half out
            places = _write(table, wanted, now)
            lines.tie(table, [cell for cell, _ in places.values()], list(blocks.values()))
            self.places.update(places)
        cells = [cell for cell, _ in places.values()]
        stands = list(in_line.values())
        lines.stand(table, cells, stands, bells.number_of(bell), now + STANDS_FOR)
        stood = [cell for cell, in_one in zip(cells, stands, strict=True) if in_one]
        if isinstance(bell, bells.HostBell):
            bell.stands(table.map, [table.states_at + cell for cell in stood])
        return max([lines.ahead(table, cell) for cell in stood])

    def _leave(self, table: Table, slots: Sequence[Slot]) -> None:
        """These are neither waited for nor held."""
        self.give(table, slots, 0)

    def _ask(self, table: Table, slots: Sequence[Slot], now: int) -> Answer:
        """See `Answer`."""
        places = self.places
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
            if place and until > now:  # asked again: its lease begins again
                fit = True
                table.extend(place, now + int(slot.ttl * 1e9))
            else:
                if place and (until or table.state(place)):
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
        if len(self.places) > 2 * table.layout.cells:
            self._forget_gone(table)
        # Known before they count: whatever comes in between, giving back finds them.
        self.places.update(places)
        return table.commit(places.values())

    def _forget_gone(self, table: Table) -> None:
        self.places = {one: place for one, place in self.places.items() if table.state(place) != FREE}

    def _give_any(self, table: Table, slots: Sequence[Slot], now: int) -> list[bool]:
        places = self.places
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
                if place and table.state(place):  # it waits, or was evicted
                    cells[place[0]] = known
                else:
                    places.pop(known, None)
        if cells:
            table.drop(cells)
            for known in cells.values():  # after that: whoever is thrown out before it gives back once more
                places.pop(known, None)
        return given

    def renew(self, table: Table, slots: Sequence[tuple[Slot, float]], now: int) -> list[bool]:
        held = []
        for slot, seconds in slots:
            place = self.places.get((slot.token, slot.policy, slot.key.digest))
            still = place is not None and table.held_until(place) > now
            if place is not None and still:
                table.extend(place, now + int(seconds * 1e9))
            held.append(still)
        return held

    def detach(self, table: Table, slots: Sequence[Slot], now: int) -> None:
        """Their places stay known, as they may be given back here all the same, until others have claimed them."""
        for slot in slots:
            place = self.places.get((slot.token, slot.policy, slot.key.digest))
            if place and table.held_until(place):
                table.disown(place)
        if len(self.places) > self.tidy_from:
            self._forget_gone(table)
            self.tidy_from = max(TIDY_FROM, 2 * len(self.places))

    def claim(self, table: Table, slots: Sequence[tuple[Slot, Slot]], now: int) -> bool:
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
        self.places.update(places)
        # For a moment both are counted, never none: killed in between, we leave the old ones, and ours go with us.
        table.commit(places.values())
        table.drop([cell for cell, _ in olds.values()])
        for old, _ in slots:
            self.places.pop((old.token, old.policy, old.key.digest), None)
        return True

    def _adopt(self, table: Table, slots: Sequence[Slot], now: int) -> None:
        """What was handed over, and is held on here without a claim, as that failed, must not be counted a second time."""
        wanted = {}
        for slot in slots:
            known = (slot.token, slot.policy, slot.key.digest)
            if known not in self.places:
                wanted[_holder_name(*known)] = known
        if wanted:
            for name, place in table.find(wanted, now).items():
                self.places[wanted[name]] = place
                table.own(place)

    def restore(self, table: Table, holders: Sequence[Restore], now: int) -> list[bool]:
        held = []
        self._adopt(table, [holder.slot for holder in holders], now)
        for slot, seconds, until in holders:
            known = (slot.token, slot.policy, slot.key.digest)
            place, ttl = self.places.get(known), int(seconds * 1e9)
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

    def saved(self, table: Table, now: int) -> list[Saved]:
        """What we hold in this table, or were evicted from."""
        return [
            (one, state, table.raw(place))
            for one, place in self.places.items()
            if (state := table.state(place)) in (HELD, EVICTED) and table.expires(place) > now
        ]

    def moved(self, saved: Sequence[Saved], table: Table, now: int) -> None:
        """There is another table, or one for the first time: what we held before is held in this one from now on."""
        known: dict[Known, Place] = {}
        # Nobody's are still there where the file is the same once more.
        there = table.find({_holder_name(*one) for one, _, raw in saved if is_nobodys(raw)}, now)
        for one, state, raw in saved:
            found = there.get(_holder_name(*one)) if there else None
            known[one] = found or table.write_raw(raw)
            if not found:
                table.commit([known[one]], state)
        self.places = known


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
