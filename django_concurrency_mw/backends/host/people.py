"""What people are told of the table: who holds what, and how many there are. Changes nothing.

All of it looks at every cell in use, so as little as may be is done while the table is locked: cells are copied there, in one
piece, and read afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from socket import gethostname
from typing import NamedTuple

from ..base import Holder
from .layout import CELL, NOBODY, PROCESSES, WEIGHT_MASK, Cell, unpack_text
from .table import Table


class Copy(NamedTuple):
    """All cells up to the last one in use, which of them are held, each process's pid by its number, and the moment of the copy
    (monotonic ns)."""

    raw: bytes
    held: Sequence[int]
    pids: Sequence[int]
    now: int


def copy(table: Table, _: None, now: int) -> Copy:
    """Of all that is held."""
    plan, held = table.layout, table.living(now)
    cells = table.map[plan.cells_at : plan.cells_at + (max(held, default=-1) + 1) * CELL.size]
    pids = table.words[plan.processes_word : plan.processes_word + 4 * PROCESSES : 4].tolist()
    return Copy(cells, held, pids, now)


def holders(copied: Copy) -> list[Holder]:
    """The same as people see it. Without the table."""
    host, found = gethostname(), []
    words = memoryview(copied.raw).cast("Q")
    for cell in copied.held:
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
