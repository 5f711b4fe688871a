"""The spread replay: one pass over records of whole seconds, with a replay for each way of spreading them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .replay import Arrival, Replay
from .spreading import offsets
from .stamps import SECOND

#: Microseconds of the log that are looked at together.
STRETCH = SECOND


def in_all_ways(records: Iterable[tuple[Any, ...]], replays: Sequence[Replay], step: Callable[[int], object]) -> None:
    """Each replay has its own offsets; an offset is less than a second, so whoever begins a second later cannot overtake."""
    waiting: list[list[Arrival]] = [[] for _ in replays]
    together: list[tuple[Any, ...]] = []
    until = 0
    for record in records:
        if record[0] >= until:
            _advance(together, waiting, replays, record[0])
            step(len(together))
            together, until = [], record[0] + STRETCH
        together.append(record)
    _advance(together, waiting, replays, None)
    for replay in replays:
        replay.finish()
    step(len(together))


def _advance(
    together: Sequence[tuple[Any, ...]], waiting: list[list[Arrival]], replays: Sequence[Replay], before: int | None
) -> None:
    """Add these to what waits, and replay what nobody who comes later can precede."""
    columns = list(zip(*[offsets(record[4]) for record in together], strict=True)) or [()] * len(replays)
    for place, (replay, column) in enumerate(zip(replays, columns, strict=True)):
        arrivals = waiting[place]
        arrivals += [
            (start + offset, number, length, slots)
            for (start, number, length, slots, _), offset in zip(together, column, strict=True)
        ]
        arrivals.sort()
        ready = len(arrivals) if before is None else bisect_left(arrivals, (before,))
        replay.run(arrivals[:ready])
        del arrivals[:ready]
