"""What the tests know of the host store's file on their own: is what can be made from the cells what they say?"""

from __future__ import annotations

from collections import Counter

from django_concurrency_mw.backends.host.layout import (
    CELL,
    FREE,
    HELD,
    QUEUED,
    WEIGHT_MASK,
    Cell,
    Entry,
    Header,
    unpack_text,
)
from django_concurrency_mw.backends.host.table import Table


def held_by_state(table: Table) -> dict[int, int]:
    """state -> cells, without the free ones."""
    states = bytes(table.map[table.states_at : table.states_at + table.layout.cells])
    return {state: number for state, number in Counter(states).items() if state != FREE}


def tokens_there(table: Table, policy: str) -> set[str]:
    """Who has a cell of this policy that is held, the dead too."""
    plan = table.layout
    states = bytes(table.map[table.states_at : table.states_at + plan.cells])
    texts = [
        unpack_text(table.map, plan.cells_at + cell * CELL.size) for cell, state in enumerate(states) if state == HELD
    ]
    return {token for name, _, token, _ in texts if name == policy}


def consistent(table: Table) -> list[str]:
    """What is wrong with the table, nobody being inside and nobody dirty."""
    words, plan, wrong = table.words, table.layout, []
    states = bytes(table.map[table.states_at : table.states_at + plan.cells])
    totals: Counter[tuple[int, int]] = Counter()
    for cell, state in enumerate(states):
        at = plan.cells_word + cell * Cell.WORDS
        if state == HELD:
            totals[words[at], words[at + Cell.LO]] += words[at + Cell.OWNER] & WEIGHT_MASK
        elif state == QUEUED:
            totals[words[at], words[at + Cell.LO]] += 0
    standing: list[int] = []
    found: dict[tuple[int, int], int] = {}
    for number in range(plan.entries):
        at = plan.index_word + number * Entry.WORDS
        if words[at]:
            name = (words[at], words[at + Entry.LO])
            if name in found:
                wrong.append(f"two entries of {name}")
            found[name] = words[at + Entry.TOTAL]
            if table.entry(*name) != at:
                wrong.append(f"the entry of {name} cannot be found")
            line = line_of(table, at)
            standing += line
            if words[at + Entry.WAITING] != len(line) or words[at + Entry.TAIL] != (line[-1] + 1 if line else 0):
                wrong.append(f"the line of {name} is longer or shorter than it says")
            whole = [words[table.word(cell) + Cell.TURN] for cell in line]
            if whole != sorted(whole) or any(
                words[table.word(cell) + Cell.PREVIOUS] != (before + 1 if before is not None else 0)
                or (words[table.word(cell)], words[table.word(cell) + Cell.LO]) != name
                for before, cell in zip([None, *line], line, strict=False)
            ):
                wrong.append(f"the line of {name} is in disorder")
        elif any(words[at : at + Entry.WORDS]):
            wrong.append("an empty entry is not empty")
    if found != dict(totals):
        wrong.append(f"the index says {found}, the cells {dict(totals)}")
    if sorted(standing) != [cell for cell, state in enumerate(states) if state == QUEUED]:
        wrong.append("a cell that waits stands in no line, or another one does")
    if words[Header.WAITING] != len(standing):
        wrong.append("WAITING is not how many stand in lines")
    used = [cell for cell, state in enumerate(states) if state != FREE]
    if words[Header.HIGH] < (used[-1] + 1 if used else 0):
        wrong.append("HIGH is below a cell in use")
    if FREE in states[: words[Header.HINT]]:
        wrong.append("HINT is above a free cell")
    if words[Header.DIRTY]:
        wrong.append("it is dirty")
    return wrong


def line_of(table: Table, entry: int) -> list[int]:
    """The cells of this entry's line, as each names the next."""
    line: list[int] = []
    following = table.words[entry + Entry.HEAD]
    while following and len(line) <= table.layout.cells:
        line.append(following - 1)
        following = table.words[table.word(following - 1) + Cell.NEXT]
    return line
