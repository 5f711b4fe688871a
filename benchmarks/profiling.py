"""Where the time of one cell goes: its calls under cProfile, without what a bare view's request does."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import process_time

from .room import Cell, Room, work_of

ROOT = str(Path(__file__).resolve().parent.parent)
#: Which are shown beside a cell.
BESIDE = ("bare", "raw2")
Own = dict[str, tuple[float, float]]
Stats = Mapping[
    tuple[str, int, str], tuple[int, int, float, float, Mapping[tuple[str, int, str], tuple[int, int, float, float]]]
]


def report(room: Room, cells: Mapping[str, Cell], name: str, redis: Sequence[int], calls: int, lines: int = 40) -> str:
    """Microseconds per call, most first: what the cell spends more than the bare one, by module and by function.

    Above it what it takes without the profiler, here and in Redis (processes). A module has what it calls of Python's own
    built-in functions in it. cProfile makes each call dearer by half a microsecond or more, so many small functions look worse
    than they are. Of threads it sees only who starts them.
    """
    said = []
    for each in dict.fromkeys([*BESIDE, name]):
        if each in cells:
            here, there = (
                _least(room, cells[each], calls, clock) for clock in (work_of(()), work_of(redis, own=False))
            )
            said.append(f"{each}: {here:.1f} us of work here, {there:.1f} us in Redis")
    mine = _profiled(room, cells[name], calls)
    bare = _profiled(room, cells["bare"], calls) if "bare" in cells and name not in (*BESIDE, "store") else None
    said.append(f"{name}, under the profiler{', without what a bare view does' if bare else ''}:")
    for spent_by, most in ((_by_module, 20), (_by_function, lines)):
        less = spent_by(bare, calls) if bare else {}
        more = {where: _without(spent, less.get(where, (0.0, 0.0))) for where, spent in spent_by(mine, calls).items()}
        ranked = sorted(more.items(), key=lambda item: -item[1][0])[:most]
        said += [f"{'us':>8}{'calls':>8}"]
        said += [f"{us:8.2f}{times:8.2f}  {where}" for where, (us, times) in ranked if us > 0.05]
    return "\n".join(said)


def _least(room: Room, cell: Cell, calls: int, clock: Callable[[], float]) -> float:
    room.clock = clock
    room.run(cell, calls // 20)
    return min(room.run(cell, calls // 20) for _ in range(20)) * 1e6


def _profiled(room: Room, cell: Cell, calls: int) -> Stats:
    profile = cProfile.Profile(process_time)  # not what the machine does meanwhile
    room.clock = process_time
    room.run(cell, calls // 10)
    room.clock = _switch(profile)
    room.run(cell, calls)
    found: Stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return found


def _by_function(stats: Stats, calls: int) -> Own:
    found: Own = {}
    for (file, line, function), (_, times, own, _, _) in stats.items():
        if "_lsprof" not in function:
            where = f"{function} ({_short(file)}:{line})" if line else function
            found[where] = (own * 1e6 / calls, times / calls)
    return found


def _by_module(stats: Stats, calls: int) -> Own:
    """Without a count of built-in calls."""
    found: Own = {}

    def add(file: str, own: float, times: float) -> None:
        us, before = found.get(_short(file), (0.0, 0.0))
        found[_short(file)] = (us + own * 1e6 / calls, before + times / calls)

    for (file, _, _), (_, times, own, _, callers) in stats.items():
        if file != "~":
            add(file, own, times)
            continue
        for (caller, _, _), (_, _, its_own, _) in callers.items():
            add(caller, its_own, 0)
    return found


def _switch(profile: cProfile.Profile) -> Callable[[], float]:
    """A clock that is read at the beginning and at the end of what is timed."""
    turns = iter((profile.enable, profile.disable))

    def clock() -> float:
        next(turns)()
        return 0.0

    return clock


def _without(spent: tuple[float, float], bare: tuple[float, float]) -> tuple[float, float]:
    return spent[0] - bare[0], spent[1] - bare[1]


def _short(file: str) -> str:
    return file.removeprefix(ROOT + "/").rpartition("site-packages/")[2]
