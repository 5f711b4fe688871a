"""What people are told of the table: who holds what and who waits for it, and how many there are. Changes nothing.

All of it looks at every cell in use, so as little as may be is done while the table is locked: cells are copied there, in one
piece, and read afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from socket import gethostname
from typing import NamedTuple

from ..base import Holder, Waiter
from .layout import CELL, NOBODY, PROCESSES, WEIGHT_MASK, Cell, unpack_text
from .table import Table


class Copy(NamedTuple):
    """All cells up to the last one that is asked about, which of them these are, each process's pid by its number, and the
    moment of the copy (monotonic ns)."""

    raw: bytes
    cells: Sequence[int]
    pids: Sequence[int]
    now: int


def copy(table: Table, state: int, now: int) -> Copy:
    """Of all that is in this state."""
    plan, cells = table.layout, table.living(now, state=state)
    raw = table.map[plan.cells_at : plan.cells_at + (max(cells, default=-1) + 1) * CELL.size]
    pids = table.words[plan.processes_word : plan.processes_word + 4 * PROCESSES : 4].tolist()
    return Copy(raw, cells, pids, now)


def holders(copied: Copy) -> list[Holder]:
    """The same as people see it. Without the table."""
    host, found = gethostname(), []
    words = memoryview(copied.raw).cast("Q")
    for cell in copied.cells:
        at = cell * Cell.WORDS
        policy, key, token, path = unpack_text(copied.raw, cell * CELL.size)
        age, left = (copied.now - words[at + Cell.SINCE]) / 1e9, (words[at + Cell.EXPIRES] - copied.now) / 1e9
        owner, cost, ttl = (
            words[at + Cell.OWNER] >> 32,
            words[at + Cell.OWNER] & WEIGHT_MASK,
            words[at + Cell.TTL] / 1e9,
        )
        pid = None if owner == NOBODY else copied.pids[owner]
        found.append(Holder(policy, key, token, age, left, path, pid, cost, host, ttl))
    return found


def waiters(copied: Copy) -> list[Waiter]:
    """Each line in its order. Without the table."""
    host, found, places = gethostname(), [], Counter[tuple[int, int]]()
    words = memoryview(copied.raw).cast("Q")
    for cell in sorted(copied.cells, key=lambda cell: words[cell * Cell.WORDS + Cell.TURN]):
        at = cell * Cell.WORDS
        line = (words[at], words[at + Cell.LO])
        places[line] += 1
        policy, key, token, path = unpack_text(copied.raw, cell * CELL.size)
        age, owner = (copied.now - words[at + Cell.SINCE]) / 1e9, words[at + Cell.OWNER]
        cost = owner & WEIGHT_MASK
        found.append(Waiter(policy, key, token, places[line], age, path, copied.pids[owner >> 32], cost, host))
    return found


def counts(table: Table, wanted: Collection[tuple[int, int]], now: int) -> dict[tuple[int, int], int]:
    """What is in flight of these semaphores, by weight, once everybody has gone who is lapsed or dead."""
    found = dict.fromkeys(wanted, 0)
    words, start = table.words, table.layout.cells_word
    for cell in table.living(now, {hi for hi, _ in wanted}):
        at = start + cell * Cell.WORDS
        name = (words[at], words[at + Cell.LO])
        if name in found:
            found[name] += words[at + Cell.OWNER] & WEIGHT_MASK
    return found
