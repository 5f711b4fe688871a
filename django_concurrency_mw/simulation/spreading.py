"""Spreading: whole seconds to instants within them, in several ways at once.

A log whose stamp is the end is written in the order of the ends, so of the lines of one second the n-th ends n-th: their
instants are drawn at random and given out in order. Where the stamp is the start, the order of the lines says nothing about
the starts. Lines of the same second that another log has, or the same one much later, have an order of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import repeat
from struct import Struct
from typing import Any

from .stamps import SECOND

#: Independent draws.
SEEDS = 9
#: How many come together where they come in batches, as the parts of a page do.
BATCH = 3
#: The ways of spreading: the draws, evenly over the second, in batches, and all at once.
WAYS = SEEDS + 3
EVENLY, BATCHES, AT_ONCE = SEEDS, SEEDS + 1, SEEDS + 2
#: Seconds that are open at once: several processes of a server may write past each other.
OPEN = 3

Record = tuple[Any, ...]
_OFFSETS = Struct(f"{WAYS}I")
offsets = _OFFSETS.unpack


class Spreader:
    """Records of whole seconds; each comes back with its offsets in microseconds (see `offsets`) as its last part."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._draws = [random.Random(seed) for seed in range(SEEDS)]
        self._open: dict[int, list[Record]] = {}

    def add(self, second: int, record: Record) -> Iterator[Record]:
        """Returns those whose second is over: which was opened first, as a log of several that were joined may go back."""
        lines = self._open.get(second)
        if lines is None:
            lines = self._open[second] = []
            lines.append(record)
            if len(self._open) > OPEN:
                return self._close(next(iter(self._open)))
        else:
            lines.append(record)
        return iter(())

    def rest(self) -> Iterator[Record]:
        """The log is over."""
        for second in sorted(self._open):
            yield from self._close(second)

    def _close(self, second: int) -> Iterator[Record]:
        lines = self._open.pop(second)
        count = len(lines)
        columns: list[Any] = []
        for draw in self._draws:
            column = [int(draw.random() * SECOND) for _ in range(count)]
            if self._ordered:
                column.sort()
            columns.append(column)
        evenly = [(2 * rank + 1) * SECOND // (2 * count) for rank in range(count)]
        draw = self._draws[0]
        batches = sorted(int(draw.random() * SECOND) for _ in range(0, count, BATCH))
        in_batches = [batches[rank // BATCH] for rank in range(count)]
        for record, *instants in zip(lines, *columns, evenly, in_batches, repeat(SECOND // 2), strict=False):
            yield (*record, _OFFSETS.pack(*instants))
