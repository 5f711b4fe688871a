"""The index: of each semaphore the total and the line, made from states and cells, and made anew where it may not say the same.

Whoever calls anything here holds the table's lock. DIRTY stands while something is changed; whoever finds it rebuilds.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

from ...exceptions import BackendError
from .layout import ASKED, HELD, QUEUED, WEIGHT_MASK, Cell, Entry, Header, Layout

# What every take and give reads and writes, as names of this module, which are looked up faster than those of a class.
_LO, _OWNER, _CELL, _ENTRY = Cell.LO, Cell.OWNER, Cell.WORDS, Entry.WORDS
_TOTAL, _WAITING = Entry.TOTAL, Entry.WAITING
assert Entry.LO == Cell.LO
_EMPTY: Final = memoryview(bytes(Entry.WORDS * 8)).cast("Q")


class Index:
    """Of the file that is mapped."""

    __slots__ = ("_cells", "_index", "_index_end", "_mask", "layout", "map", "states_at", "words")

    def __init__(self, mapped: mmap.mmap, layout: Layout) -> None:
        self.map, self.layout = mapped, layout
        self.words: memoryview[int] = memoryview(mapped).cast("Q")
        self.states_at = layout.states_at
        self._cells, self._index, self._mask = layout.cells_word, layout.index_word, layout.entries - 1
        self._index_end = layout.index_word + layout.entries * _ENTRY

    def word(self, cell: int) -> int:
        """The first one of the cell."""
        return self._cells + cell * _CELL

    def total(self, hi: int, lo: int) -> int:
        """What is in flight of a semaphore, by weight."""
        words = self.words
        at = self._index + (hi & self._mask) * _ENTRY
        found = words[at]
        if found == hi and words[at + _LO] == lo:
            return words[at + _TOTAL]
        return words[self.entry(hi, lo) + _TOTAL] if found else 0

    def entry(self, hi: int, lo: int) -> int:
        """The word at which the entry of this semaphore is, or is to be."""
        words, start, mask = self.words, self._index, self._mask
        home = hi & mask
        at = start + home * _ENTRY
        found = words[at]
        if not found or (found == hi and words[at + _LO] == lo):
            return at
        for number in range(home + 1, home + mask):
            at = start + (number & mask) * _ENTRY
            found = words[at]
            if not found or (found == hi and words[at + _LO] == lo):
                return at
        raise self.damaged()

    def count(self, cell: int, sign: int) -> int:
        """Add a cell's weight to its semaphore, or take it off. Returns the total. An entry that counts nobody goes."""
        words, at = self.words, self._cells + cell * _CELL
        hi, lo = words[at], words[at + _LO]
        entry = self._index + (hi & self._mask) * _ENTRY
        found = words[entry]
        if found != hi or words[entry + _LO] != lo:
            if found:  # another one's: look further
                entry = self.entry(hi, lo)
                found = words[entry]
            if not found:
                words[entry + _LO] = lo
                words[entry] = hi
        total = words[entry + _TOTAL] + sign * (words[at + _OWNER] & WEIGHT_MASK)
        if total < 0:
            raise self.damaged()
        words[entry + _TOTAL] = total
        if not total and not words[entry + _WAITING]:
            behind = entry + _ENTRY
            if words[behind if behind < self._index_end else self._index]:
                self._remove(entry)
            else:  # nobody stands behind it, and all its other words are 0
                words[entry] = 0
                words[entry + _LO] = 0
        return total

    def enqueue(self, cell: int) -> None:
        """Its line ends with this cell, which is in none."""
        words, at = self.words, self._cells + cell * Cell.WORDS
        entry = self.entry(words[at], words[at + Cell.LO])
        if not words[entry]:
            words[entry + Entry.LO] = words[at + Cell.LO]
            words[entry] = words[at]
        tail = words[entry + Entry.TAIL]
        words[at + Cell.NEXT], words[at + Cell.PREVIOUS], number = 0, tail, 1
        if tail:
            before = self._cells + (tail - 1) * Cell.WORDS
            words[before + Cell.NEXT], number = cell + 1, words[before + Cell.NUMBER] + 1
        else:
            words[entry + Entry.HEAD] = cell + 1
        words[at + Cell.NUMBER] = number
        words[entry + Entry.TAIL] = cell + 1
        words[entry + Entry.WAITING] += 1
        words[Header.WAITING] += 1

    def unlink(self, cell: int) -> None:
        """It stands in its line no more. An entry for which nobody waits, and that counts nobody, goes."""
        words, cells, at = self.words, self._cells, self._cells + cell * Cell.WORDS
        entry = self.entry(words[at], words[at + Cell.LO])
        before, behind = words[at + Cell.PREVIOUS], words[at + Cell.NEXT]
        to_it = cells + (before - 1) * Cell.WORDS + Cell.NEXT if before else entry + Entry.HEAD
        back_to_it = cells + (behind - 1) * Cell.WORDS + Cell.PREVIOUS if behind else entry + Entry.TAIL
        if words[to_it] != cell + 1 or words[back_to_it] != cell + 1:
            raise self.damaged()
        words[to_it], words[back_to_it] = behind, before
        words[entry + Entry.WAITING] -= 1
        words[Header.WAITING] -= 1
        if not words[entry + Entry.WAITING] and not words[entry + Entry.TOTAL]:
            self._remove(entry)

    def _remove(self, entry: int) -> None:
        """Empty an entry, and move those up that stand behind it only because it was in their way (Knuth 6.4, R)."""
        words, start, mask = self.words, self._index, self._mask
        hole, width = (entry - start) // _ENTRY, _ENTRY
        for number in range(hole + 1, hole + mask):
            at = start + (number & mask) * width
            home = words[at]
            if not home:
                break
            if (number - (home & mask)) & mask >= (number - hole) & mask:
                to = start + (hole & mask) * width
                words[to : to + width] = words[at : at + width]
                hole = number
        else:
            raise self.damaged()
        to = start + (hole & mask) * width
        words[to : to + width] = _EMPTY

    def damaged(self) -> BackendError:
        """What to raise where it cannot be right."""
        self.words[Header.DIRTY] = 1
        return BackendError("the host store's index was damaged; the next call makes it anew", whole=False)

    def rebuild(self) -> None:
        """Make all that is not the truth from what is."""
        words, layout = self.words, self.layout
        words[Header.DIRTY] = 1
        self.map[layout.index_at : layout.size] = bytes(layout.size - layout.index_at)
        words[Header.HIGH], words[Header.HINT], words[Header.WAITING] = layout.cells, 0, 0
        used = self._used()
        self._take_back_half_a_grant(used)
        queued = []
        for cell in used:
            state = self.map[self.states_at + cell]
            if state == HELD:
                self.count(cell, 1)
            elif state == QUEUED:
                queued.append(cell)
        queued.sort(key=lambda cell: words[self._cells + cell * Cell.WORDS + Cell.TURN])
        for cell in queued:
            self.enqueue(cell)
        words[Header.HIGH] = used[-1] + 1 if used else 0
        words[Header.REBUILT] += 1
        words[Header.DIRTY] = 0

    def _take_back_half_a_grant(self, used: Sequence[int]) -> None:
        """One who waited was just given its slots, of which some are held and others are not: it waits on."""
        words, states, at = self.words, self.map[self.states_at : self.states_at + self.layout.cells], self._cells
        waiting = {words[at + cell * Cell.WORDS + Cell.TICKET] for cell in used if states[cell] in (QUEUED, ASKED)}
        for cell in used:
            if states[cell] == HELD and words[at + cell * Cell.WORDS + Cell.TICKET] in waiting:
                stood = words[at + cell * Cell.WORDS + Cell.TURN]
                self.map[self.states_at + cell] = QUEUED if stood else ASKED

    def _used(self) -> list[int]:
        states = self.map[self.states_at : self.states_at + self.words[Header.HIGH]]
        return [cell for cell, state in enumerate(states) if state]
