"""The table: cells, what takes and frees them, and the look for what the dead and the lapsed have left.

Whoever calls anything here holds the table's lock. What is in the way of an exception or a kill at any point: a cell is
written whole before its state says that it is in use, and freed by its state before anything else; DIRTY stands while the
index does not say the same as states and cells, and goes only when all is done. What nobody owns, as it was handed over, is
freed by its lease's end only, never because a process is dead.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Mapping
from time import monotonic_ns
from typing import Final, TypeVar

from ...exceptions import BackendError
from ...outcomes import Slot
from .index import Index
from .layout import (
    ASKED,
    CELL,
    EVICTED,
    FREE,
    HELD,
    MOST,
    NOBODY,
    PATH_ROOM,
    QUEUED,
    TOKEN_ROOM,
    WEIGHT_MASK,
    Cell,
    Header,
    Layout,
    Named,
    fitted,
    unpack_text,
)
from .locking import any_alive

#: The number of one who is none of the table's processes, and owns nothing.
VISITOR: Final = -1
#: A refusal looks for the lapsed and the dead at most this often, by all processes together (ns).
SWEEP_EVERY: Final = 20_000_000


class TableFull(BackendError):
    """Every cell is in use. That fails this call alone: what has its cells goes on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, whole=False)


K = TypeVar("K")
#: Where a holder stands, as long as the cell has this ticket: (cell, ticket).
Place = tuple[int, int]
#: A holder as its cell names it: the semaphore's two words, the token.
HolderName = tuple[int, int, str]
#: A semaphore by its two words.
Name = tuple[int, int]
#: See `Table.parts`.
Parts = tuple["memoryview[int]", mmap.mmap, int, int, int, int, int]
#: A cell that is to be written: semaphore, slot, ttl in ns.
Wanted = tuple[Named, Slot, int]

# What every take and give reads and writes, as names of this module, which are looked up faster than those of a class.
_DIRTY, _LAST, _HINT, _HIGH = Header.DIRTY, Header.TICKET, Header.HINT, Header.HIGH
_LO, _TICKET, _OWNER, _EXPIRES = Cell.LO, Cell.TICKET, Cell.OWNER, Cell.EXPIRES
_IN_LINES: Final = Header.WAITING
_CELL, _CELL_SIZE = Cell.WORDS, CELL.size
_pack = CELL.pack_into


class Table(Index):
    """One opened file, for the process that has this `number` there."""

    __slots__ = ("due", "fd", "identity", "number", "parts")

    def __init__(self, fd: int, mapped: mmap.mmap, layout: Layout, number: int, identity: tuple[int, int]) -> None:
        super().__init__(mapped, layout)
        self.fd, self.number, self.identity = fd, number, identity
        #: Of these semaphores something may have become free for those who wait; in the order of a dict. It stands over the
        #: call, should that be cut short; and that we are killed is found out by those who wait.
        self.due: dict[Name, None] = {}
        #: What every take and give of one slot needs, to be had by one look: words; map; where the states begin, and where
        #: they end and the cells begin, in bytes; where the index begins, in words, and the mask of its entries;
        #: and how many places one process may remember before it looks which are over.
        self.parts: Parts = (
            self.words,
            mapped,
            layout.states_at,
            layout.cells_at,
            layout.index_word,
            layout.entries - 1,
            2 * layout.cells,
        )

    # -- reading ----------------------------------------------------------------------------------------------------

    def state(self, place: Place) -> int:
        """Of the cell, if it still is this holder's; else FREE."""
        cell, ticket = place
        if self.words[self._cells + cell * _CELL + _TICKET] != ticket:
            return FREE
        return self.map[self.states_at + cell]

    def waits(self, place: Place) -> bool:
        """Does its cell say that it waits?"""
        return self.state(place) in (QUEUED, ASKED)

    def expires(self, place: Place) -> int:
        """When the lease ends (monotonic ns)."""
        return self.words[self._cells + place[0] * _CELL + _EXPIRES]

    def held_until(self, place: Place) -> int:
        """When the lease ends; 0 where this holder does not hold it any more."""
        cell, ticket = place
        words, at = self.words, self._cells + cell * _CELL
        if words[at + _TICKET] == ticket and self.map[self.states_at + cell] == HELD:
            return words[at + _EXPIRES]
        return 0

    def raw(self, place: Place) -> bytes:
        """The content of the cell."""
        at = self.layout.cells_at + place[0] * CELL.size
        return self.map[at : at + CELL.size]

    def living(self, now: int, semaphores: Collection[int] | None = None, state: int = HELD) -> list[int]:
        """The cells that are held, or in that state, by leases and processes that have not ended; of all semaphores, or of
        those whose names begin with one of these words."""
        start, end = self._cells, self._cells + self.words[Header.HIGH] * Cell.WORDS
        used = self._used()
        if semaphores is not None:
            starts = self.words[start : end : Cell.WORDS].tolist()
            used = [cell for cell in used if starts[cell] in semaphores]
        owners = [owner >> 32 for owner in self.words[start + Cell.OWNER : end : Cell.WORDS].tolist()]
        ends = self.words[start + Cell.EXPIRES : end : Cell.WORDS].tolist()
        held = [cell for cell in used if self.map[self.states_at + cell] == state and ends[cell] > now]
        dead = self.dead({owners[cell] for cell in held})
        return [cell for cell in held if owners[cell] not in dead]

    def dead(self, numbers: Collection[int]) -> set[int]:
        """Which of these owners are processes that have ended."""
        others = set(numbers) - {self.number, NOBODY}
        return {number for number in others if not any_alive(self.fd, number)}

    def find(self, wanted: Collection[HolderName], now: int) -> dict[HolderName, Place]:
        """Where these are held, whoever owns them. Looks at every cell in use."""
        found: dict[HolderName, Place] = {}
        firsts = {hi for hi, _, _ in wanted}
        starts = self.words[self._cells : self._cells + self.words[Header.HIGH] * Cell.WORDS : Cell.WORDS].tolist()
        for cell in [cell for cell in self._used() if starts[cell] in firsts]:
            at = self._cells + cell * Cell.WORDS
            token = unpack_text(self.map, self.layout.cells_at + cell * CELL.size)[2]
            name, place = (starts[cell], self.words[at + Cell.LO], token), (cell, self.words[at + Cell.TICKET])
            if name in wanted and self.held_until(place) > now:
                found[name] = place
        return found

    # -- changing ---------------------------------------------------------------------------------------------------

    def write(self, wanted: Mapping[K, Wanted], now: int) -> dict[K, Place]:
        """Cells for these, in rising order, which nobody counts until `commit`. Raises: TableFull."""
        words, mapped, layout, states_at = self.words, self.map, self.layout, self.states_at
        ticket = words[_LAST] = words[_LAST] + 1
        owner = self.number << 32
        cells_at, at, end = layout.cells_at, states_at + words[_HINT], states_at + layout.cells
        token = path = None
        raw_token = raw_path = b""
        places: dict[K, Place] = {}
        for one, ((hi, lo, texts), slot, ttl) in wanted.items():
            found = mapped.find(b"\0", at, end)
            if found < 0:
                raise TableFull(
                    f"all {layout.cells} cells of the host store's table are in use; more in flight at once need a larger "
                    "`slots` in its OPTIONS"
                )
            cell, at, limit = found - states_at, found + 1, slot.limit
            if slot.token is not token or slot.path is not path:  # one request has one of each
                token, path = slot.token, slot.path
                raw_token, raw_path = fitted(token, TOKEN_ROOM), fitted(path, PATH_ROOM)
            if not 0 <= limit <= MOST:
                limit = MOST if limit > 0 else 0
            # Not one store but many, as nobody reads a cell that is FREE.
            where, ends = cells_at + cell * _CELL_SIZE, now + ttl
            weighs = owner | slot.cost
            _pack(mapped, where, hi, lo, ticket, weighs, now, ends, limit, ttl, raw_token, texts, raw_path)
            places[one] = (cell, ticket)
        return places

    def write_raw(self, raw: bytes) -> Place:
        """A cell with the content of one of another file, ours or nobody's. Not counted until `commit`. Raises: TableFull."""
        found = self.map.find(b"\0", self.states_at + self.words[Header.HINT], self.states_at + self.layout.cells)
        if found < 0:
            raise TableFull("the host store's table has no room for the holders of a file that was removed")
        cell = found - self.states_at
        at, word = self.layout.cells_at + cell * CELL.size, self._cells + cell * Cell.WORDS
        self.map[at : at + CELL.size] = raw
        ticket = self.words[Header.TICKET] = self.words[Header.TICKET] + 1
        self.words[word + Cell.TICKET] = ticket
        if self.words[word + Cell.OWNER] >> 32 != NOBODY:
            self.words[word + Cell.OWNER] = self.number << 32 | self.words[word + Cell.OWNER] & WEIGHT_MASK
        return (cell, ticket)

    def backdate(self, place: Place, since: int) -> None:
        """It is held since then (monotonic ns), which may be before the machine was started."""
        self.words[self._cells + place[0] * _CELL + Cell.SINCE] = max(0, since)

    def disown(self, place: Place) -> None:
        """The cell is nobody's from now on, and lives to the end of its lease."""
        self._belongs(place, NOBODY)

    def own(self, place: Place) -> None:
        """The cell is this process's from now on, and dies with it."""
        self._belongs(place, self.number)

    def _belongs(self, place: Place, owner: int) -> None:
        at = self._cells + place[0] * _CELL + _OWNER
        self.words[at] = owner << 32 | self.words[at] & WEIGHT_MASK

    def commit(self, places: Iterable[Place], state: int = HELD) -> list[int]:
        """From now on these cells, which were written last, are in use. Returns the totals of those that are held."""
        words, mapped, states_at, cell = self.words, self.map, self.states_at, -1
        totals = []
        words[_DIRTY] = 1
        for cell, _ in places:
            mapped[states_at + cell] = state
            if state == HELD:
                totals.append(self.count(cell, 1))
        # Cells are taken from the lowest free one on, so all below the last of these are in use.
        words[_HINT] = cell + 1
        if cell >= words[_HIGH]:
            words[_HIGH] = cell + 1
        words[_DIRTY] = 0
        return totals

    def reaches(self, cell: int) -> None:
        """This one was the last of those that were written last, as in `commit`."""
        self.words[_HINT] = cell + 1
        self.words[_HIGH] = max(self.words[_HIGH], cell + 1)

    def extend(self, place: Place, expires: int) -> None:
        """The lease ends then (monotonic ns)."""
        self.words[self._cells + place[0] * _CELL + _EXPIRES] = expires

    def drop(self, cells: Collection[int]) -> None:
        """Free these cells, whatever they are."""
        if not cells:
            return
        words, mapped, states_at = self.words, self.map, self.states_at
        words[_DIRTY] = 1
        if words[_IN_LINES]:
            for cell in cells:
                self._is_due(cell)
        for cell in cells:
            state = mapped[states_at + cell]
            # Before anything else: from here on the slot is free, whatever comes.
            mapped[states_at + cell] = FREE
            if state == HELD:
                self.count(cell, -1)
            elif state == QUEUED:
                self.unlink(cell)
            if cell < words[_HINT]:
                words[_HINT] = cell
        words[_DIRTY] = 0

    def _is_due(self, cell: int) -> None:
        """Something of its semaphore is about to become free."""
        at = self._cells + cell * _CELL
        self.due[self.words[at], self.words[at + _LO]] = None

    def evict(self, token: str) -> int:
        """Take away what this token holds. All know of it by the cells, which stay until they are given back or lapse."""
        evicted = 0
        for cell in self._used():
            if self.map[self.states_at + cell] != HELD:
                continue
            if unpack_text(self.map, self.layout.cells_at + cell * CELL.size)[2] == token:
                self.words[Header.DIRTY] = 1
                self._is_due(cell)
                self.map[self.states_at + cell] = EVICTED
                self.count(cell, -1)
                self.words[Header.DIRTY] = 0
                evicted += 1
        return evicted

    def drop_of(self, number: int) -> None:
        """Free what an earlier process with this number has left."""
        at = self._cells + Cell.OWNER
        self.drop([cell for cell in self._used() if self.words[at + cell * Cell.WORDS] >> 32 == number])

    def drop_owned(self, now: int) -> None:
        """Free everything but what was handed over and is not lapsed: every process is dead."""
        at, expires = self._cells + Cell.OWNER, self._cells + Cell.EXPIRES
        self.rebuild()  # nothing of the index is believed, as whoever died last may have died inside
        self.drop(
            [
                cell
                for cell in self._used()
                if self.words[at + cell * Cell.WORDS] >> 32 != NOBODY or self.words[expires + cell * Cell.WORDS] <= now
            ]
        )

    def sweep(self, now: int, *, force: bool = False) -> bool:
        """Free what is lapsed and what the dead held, unless somebody has just looked. Was there anything?"""
        words = self.words
        if not force and 0 <= now - words[Header.SWEPT] < SWEEP_EVERY:
            return False
        words[Header.SWEPT] = now
        used = self._used()
        words[Header.HIGH] = high = used[-1] + 1 if used else 0
        start, end = self._cells, self._cells + high * Cell.WORDS
        owners = [owner >> 32 for owner in words[start + Cell.OWNER : end : Cell.WORDS].tolist()]
        ends = words[start + Cell.EXPIRES : end : Cell.WORDS].tolist()
        dead = self.dead({owners[cell] for cell in used})
        gone = [cell for cell in used if ends[cell] <= now or owners[cell] in dead]
        self.drop(gone)
        words[Header.RECLAIMED] += len(gone)
        return bool(gone)


def wipe(words: memoryview[int], mapped: mmap.mmap, layout: Layout) -> None:
    """Nobody is in flight. The first words stay, as by them the file is known for ours whenever this is cut short."""
    mapped[16 : layout.cells_at] = bytes(layout.cells_at - 16)
    mapped[layout.index_at : layout.size] = bytes(layout.size - layout.index_at)
    now = monotonic_ns()
    words[Header.CELLS], words[Header.WIPED], words[Header.TICKET] = layout.cells, now, now
