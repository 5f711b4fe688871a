"""The lines in the table: who waits for which semaphore, who is next, and how it is given what has become free.

Whoever calls anything here holds the table's lock. One who waits has a cell for each slot it asks for, so whoever gives back
sees all that it needs, and gives it all or nothing. Killed half way: where some cells of a waiter are held and others not, it
waits again when the index is made anew; a waiter of whom some cells are gone is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from .bells import outbox
from .layout import ASKED, FREE, HELD, QUEUED, WEIGHT_MASK, Cell, Entry, Header
from .table import Name, Table


def waiting(table: Table, name: Name) -> int:
    """How many stand in its line."""
    entry = table.entry(*name)
    return table.words[entry + Entry.WAITING] if table.words[entry] else 0


def is_turn(table: Table, name: Name, cell: int) -> bool:
    """Does nobody stand there, or this cell before all others?"""
    return _first(table, name) in (0, cell + 1)


def ahead(table: Table, cell: int) -> int:
    """How many have joined before this one since the first that still stands in its line."""
    words, at = table.words, table.word(cell)
    first = _first(table, (words[at], words[at + Cell.LO]))
    return words[at + Cell.NUMBER] - words[table.word(first - 1) + Cell.NUMBER] if first else 0


def tie(table: Table, cells: Sequence[int], blocks: Sequence[bool]) -> None:
    """These cells, which are just written, are one waiter's. `blocks`: for which slots it waits."""
    words = table.words
    for cell, behind, block in zip(cells, [*cells[1:], cells[0]], blocks, strict=True):
        at = table.word(cell)
        words[at + Cell.SIBLING], words[at + Cell.ALONG] = behind + 1, not block


def stand(table: Table, cells: Sequence[int], in_line: Sequence[bool], wake: int, until: int) -> None:
    """All cells of one waiter, in rising order where they are just written: it stands in these lines, at its place or at the
    end, and in no other; until then (monotonic ns), unless it asks again."""
    words, mapped, states_at = table.words, table.map, table.states_at
    for cell in cells:
        at = table.word(cell)
        words[at + Cell.WAKE], words[at + Cell.EXPIRES] = wake, until
    new = mapped[states_at + cells[-1]] == FREE
    words[Header.DIRTY] = 1
    for cell, stands in zip(cells, in_line, strict=True):
        state = mapped[states_at + cell]
        if stands and state != QUEUED:
            words[table.word(cell) + Cell.TURN] = words[Header.TICKET] = words[Header.TICKET] + 1
            mapped[states_at + cell] = QUEUED
            table.enqueue(cell)
        elif not stands and state == QUEUED:
            step_out(table, cell)
        elif state == FREE:
            mapped[states_at + cell] = ASKED
    if new:
        table.reaches(cells[-1])
    words[Header.DIRTY] = 0


def step_out(table: Table, cell: int) -> None:
    """Its waiter stands in this line no more. It leaves DIRTY as it is."""
    at = table.word(cell)
    table.map[table.states_at + cell] = ASKED
    table.words[at + Cell.TURN] = 0
    table.unlink(cell)
    table.due[table.words[at], table.words[at + Cell.LO]] = None


def serve(table: Table, now: int) -> bool:
    """Who is next gets what is free, in all lines that are due. Has any of them moved?"""
    due, moved = table.due, False
    while due:
        name = next(iter(due))
        while (first := _first(table, name)) and _settled(table, first - 1, now):
            moved = True
        due.pop(name, None)
    return moved


def _settled(table: Table, cell: int, now: int) -> bool:
    """The first in a line has got what it asks for, or leaves it. False: it waits for what is not free yet."""
    words, at = table.words, table.word(cell)
    if table.map[table.states_at + cell] != QUEUED:
        raise table.damaged()
    cells = _waiter(table, cell)
    if not cells or words[at + Cell.EXPIRES] <= now:
        table.drop(cells or [cell])
        return True
    fits = [_fits(table, one) for one in cells]
    if not fits[0]:  # dead or not: a look for the dead finds it as soon as anybody asks again
        return False
    if table.dead((words[at + Cell.OWNER] >> 32,)):
        table.drop(cells)
        return True
    if all(fits) or all(fit or words[table.word(one) + Cell.ALONG] for one, fit in zip(cells, fits, strict=True)):
        _grant(table, cells, fits, now)
    else:  # it must not keep free what it cannot take: it stands in another line, or asks for its place there
        words[Header.DIRTY] = 1
        step_out(table, cell)
        words[Header.DIRTY] = 0
    outbox.append(words[at + Cell.WAKE])
    return True


def _waiter(table: Table, cell: int) -> list[int]:
    """All its cells, this one first; none where some of them are gone."""
    words, at, found = table.words, table.word(cell), [cell]
    one, ticket = words[at + Cell.SIBLING] - 1, words[at + Cell.TICKET]
    while one != cell:
        if one < 0 or len(found) > table.layout.cells or not table.waits((one, ticket)):
            return []
        found.append(one)
        one = words[table.word(one) + Cell.SIBLING] - 1
    return found


def _fits(table: Table, cell: int) -> bool:
    """Is there room for it, and nobody before it?"""
    words, at = table.words, table.word(cell)
    entry = table.entry(words[at], words[at + Cell.LO])
    room = words[at + Cell.LIMIT] - (words[at + Cell.OWNER] & WEIGHT_MASK)
    return words[entry + Entry.TOTAL] <= room and words[entry + Entry.HEAD] in (0, cell + 1)


def _grant(table: Table, cells: Sequence[int], fits: Sequence[bool], now: int) -> None:
    """It holds what fits, and does not wait any more. Of the states those that say HELD come first: whoever finds some of them
    and others that wait knows that this was cut short."""
    words, mapped, states_at = table.words, table.map, table.states_at
    words[Header.DIRTY] = 1
    held = [cell for cell, fit in zip(cells, fits, strict=True) if fit]
    stood = [cell for cell in cells if mapped[states_at + cell] == QUEUED]
    for cell in held:
        at = table.word(cell)
        words[at + Cell.SINCE], words[at + Cell.EXPIRES] = now, now + words[at + Cell.TTL]
        mapped[states_at + cell] = HELD
    for cell in held:
        table.count(cell, 1)
    for cell in stood:
        table.unlink(cell)
        if cell != cells[0]:  # that one's line is looked at now
            table.due[words[table.word(cell)], words[table.word(cell) + Cell.LO]] = None
    if len(held) < len(cells):  # it stays dirty up to the end of that
        table.drop([cell for cell, fit in zip(cells, fits, strict=True) if not fit])
    else:
        words[Header.DIRTY] = 0


def _first(table: Table, name: Name) -> int:
    """The first cell of the line plus 1; 0 where nobody stands."""
    return table.words[table.entry(*name) + Entry.HEAD]
