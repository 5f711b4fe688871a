"""The timing room: runs what is compared in turn, round by round, and keeps the seconds per call of every round.

All of them in one process, close to each other in time, so that whatever slows the machine down slows all of them down. In a
round each has a few short slices in turn (A B C A B C), of which the fastest counts: in it the machine did little else.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import statistics
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import CLOCK_PROCESS_CPUTIME_ID, clock_gettime, perf_counter, sleep
from typing import Any

#: So many calls of what is timed, in a thread and on an event loop.
Work = Callable[[int], None]
Awork = Callable[[int], Awaitable[None]]

Seconds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Cell:
    """Something that is timed: work that takes how many calls to make, in one of three ways; so many of them at once."""

    work: Callable[[int], Any]
    way: str = "sync"  # or "async", "threads"
    at_once: int = 1
    #: Done before each slice, and not timed.
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class Effort:
    """How long it takes: rounds, slices in each, and seconds that a slice is to last."""

    rounds: int
    slices: int
    seconds: float


class Room:
    """One event loop, one crowd of threads: for all cells, as in a process that serves requests."""

    def __init__(self, effort: Effort, clock: Callable[[], float] = perf_counter) -> None:
        self.effort, self.clock = effort, clock
        self._runner = asyncio.Runner()
        self._threads = ThreadPoolExecutor(100)

    def close(self) -> None:
        self._threads.shutdown()
        self._runner.close()

    def compare(self, cells: Mapping[str, Cell]) -> dict[str, list[float]]:
        """Seconds per call of each cell, one for each round."""
        calls = {name: self._enough(cell) for name, cell in cells.items()}
        gc.collect()
        gc.freeze()  # what is there before is not the requests' own
        found: dict[str, list[float]] = {name: [] for name in cells}
        for _ in range(self.effort.rounds):
            best = dict.fromkeys(cells, float("inf"))
            for _ in range(self.effort.slices):
                for name, cell in cells.items():
                    self.run(cell, calls[name] // 4)  # warms up what the one before has pushed out of the caches
                    best[name] = min(best[name], self.run(cell, calls[name]))
            for name, seconds in best.items():
                found[name].append(seconds)
        gc.unfreeze()
        return found

    def run(self, cell: Cell, calls: int) -> float:
        """Seconds per call, `calls` shared out among those who are there at once."""
        each = max(1, calls // cell.at_once)
        if cell.before is not None:
            cell.before()
        if cell.way == "async":
            return self._runner.run(_on_the_loop(cell, each, self.clock))
        if cell.way == "threads":
            return self._in_threads(cell, each)
        start = self.clock()
        cell.work(each)
        return (self.clock() - start) / each

    def _in_threads(self, cell: Cell, each: int) -> float:
        ready = threading.Barrier(cell.at_once + 1)

        def one() -> None:
            ready.wait()
            cell.work(each)

        crowd = [self._threads.submit(one) for _ in range(cell.at_once)]
        start = self.clock()
        ready.wait()
        for each_one in crowd:
            each_one.result()
        return (self.clock() - start) / (each * cell.at_once)

    def _enough(self, cell: Cell) -> int:
        """How many calls last a slice."""
        calls = 2 * cell.at_once
        self.run(cell, calls)  # connections are made, scripts loaded
        while True:
            seconds = self.run(cell, calls) * calls
            if seconds >= self.effort.seconds / 3:
                return max(2 * cell.at_once, round(calls * self.effort.seconds / seconds))
            calls *= 2


async def _on_the_loop(cell: Cell, each: int, clock: Callable[[], float]) -> float:
    if cell.at_once == 1:
        start = clock()
        await cell.work(each)
        return (clock() - start) / each
    crowd: list[Coroutine[Any, Any, None]] = [cell.work(each) for _ in range(cell.at_once)]
    start = clock()
    await asyncio.gather(*crowd)
    return (clock() - start) / (each * cell.at_once)


@dataclass(frozen=True)
class Ratio:
    """The median and the quartiles of the rounds' own ratios: what was timed in one round met the same weather."""

    value: float
    low: float
    high: float


Pair = tuple[str, str | None]


def ratio(seconds: Seconds, top: Pair, bottom: Pair) -> Ratio:
    """What the first of a pair takes more than its second (or in all, where that is None), by the same of another pair."""
    over, under = added(seconds, top), added(seconds, bottom)
    rounds = sorted(a / b for a, b in zip(over, under, strict=True) if b) or [float("nan")]
    quarter = len(rounds) // 4
    return Ratio(statistics.median(rounds), rounds[quarter], rounds[-1 - quarter])


def added(seconds: Seconds, pair: Pair) -> list[float]:
    """Seconds per call in each round that the first takes more than the second, or in all."""
    first, second = pair
    if second is None:
        return list(seconds[first])
    return [a - b for a, b in zip(seconds[first], seconds[second], strict=True)]


def work_of(processes: Sequence[int], *, own: bool = True) -> Callable[[], float]:
    """A clock that goes on while this process or one of the others has a core: not while the machine does something else.

    Where all of them share one core and nothing waits, it shows what a wall clock would on a machine with nothing else to do.
    """
    clocks = [(~process << 3) | 2 for process in processes]  # as clock_getcpuclockid(3) makes them
    clocks += [CLOCK_PROCESS_CPUTIME_ID] if own else []

    def seconds() -> float:
        return sum([clock_gettime(clock) for clock in clocks])

    return seconds


@contextlib.contextmanager
def on_cores(cores: set[int], others: Sequence[int] = ()) -> Iterator[None]:
    """All threads of this process, and other processes, stay on these cores."""
    before = os.sched_getaffinity(0)
    _stay(cores, others)
    try:
        yield
    finally:
        _stay(before, others)


def idlest_core() -> int:
    """Of those that this process may use, the one that has had least to do just now."""
    cores = sorted(os.sched_getaffinity(0))
    before = _idle()
    sleep(0.2)
    after = _idle()
    return max(cores, key=lambda core: after.get(core, 0) - before.get(core, 0))


def _idle() -> dict[int, int]:
    """Core -> ticks without work."""
    with open("/proc/stat", encoding="ascii") as lines:
        fields = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
    return {int(name[3:]): int(idle) for name, _user, _nice, _system, idle, *_ in fields}


def _stay(cores: set[int], others: Sequence[int]) -> None:
    for task in [*map(int, os.listdir("/proc/self/task")), *others]:
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(task, cores)
