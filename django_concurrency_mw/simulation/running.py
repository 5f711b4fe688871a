"""Running: a simulation from the logs to the document that the command prints."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..policies import PolicyTable
from . import report
from .formats import FormatError, Layout, Wanted, recognise
from .matching import Matcher
from .reading import Counted, Source, read
from .replay import Replay, Rules, exactly
from .slots import Slots
from .sorting import RUN, Sorter
from .spread_replay import in_all_ways
from .spreading import WAYS
from .stamps import SECOND, readable

#: Told what is being done, how much of it is done, and how much there is (0: unknown).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for. `window` is in seconds; `share` is of the keys whose peaks suggested limits should cover."""

    wanted: Wanted
    window: float | None = None
    share: float | None = None
    run: int = RUN


def simulate(paths: Sequence[str], table: PolicyTable, options: Options, progress: Progress) -> dict[str, Any]:
    """The report on these logs. Raises: FormatError."""
    sources: list[Source] = []
    try:
        for path in paths:
            sources.append(Source(path))
        layout = recognise(sources[0].sample(), options.wanted)
        with _without_collecting(), tempfile.TemporaryDirectory(prefix="concurrency-simulate-") as directory:
            return _simulate(sources, layout, table, options, Path(directory), progress)
    finally:
        for source in sources:
            source.close()


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Millions of tuples are made, and no cycles: to look for those again and again would take a third longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _simulate(
    sources: Sequence[Source],
    layout: Layout,
    table: PolicyTable,
    options: Options,
    directory: Path,
    progress: Progress,
) -> dict[str, Any]:
    slots = Slots(directory)
    try:
        matcher = Matcher(table, layout.available, slots)
        arrivals = Sorter(directory, options.run)
        size = sum(source.size for source in sources)
        counted = read(
            sources, layout, matcher, arrivals, options.wanted.assumed, lambda done: progress("reading", done, size)
        )
        span = max(1, counted.last - counted.first) if counted.lines > counted.broken else 1
        window = report.default_window(span) if options.window is None else round(options.window * SECOND)
        if span // window > report.MOST_WINDOWS:
            raise FormatError(
                f"--window: the log has {span // window:,} of these; choose one of {span / report.MOST_WINDOWS / SECOND:.0f}s "
                "or longer"
            )
        origin = counted.first // window * window
        rules = Rules(matcher.policies, slots)
        ways = WAYS if layout.whole else 1
        replays = [Replay(rules, window, origin, peaks=options.share is not None) for _ in range(ways)]
        _replay(arrivals, replays, layout.whole, counted.limited, progress)
        return {
            "log": _log(sources, layout, counted, options.wanted),
            "window_seconds": window / SECOND,
            "requests": counted.limited,
            "rejected": report.figure([replay.rejected for replay in replays], counted.limited),
            "policies": report.policies(matcher.policies, replays, slots, window, origin, options.share),
            "not_replayable": [asdict(entry) for entry in matcher.left_out],
        }
    finally:
        slots.close()


def _replay(arrivals: Sorter, replays: Sequence[Replay], spread: bool, total: int, progress: Progress) -> None:
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        progress("replaying", done, total)

    if spread:
        in_all_ways(arrivals, replays, step)
    else:
        exactly(arrivals.lists(), replays[0], step)


def _log(sources: Sequence[Source], layout: Layout, counted: Counted, wanted: Wanted) -> dict[str, Any]:
    empty = counted.last == 0
    return {
        "files": [os.path.basename(source.name) for source in sources],
        "format": layout.format.name,
        "stamp": layout.stamp,
        "whole_seconds": layout.whole,
        "first": None if empty else readable(counted.first),
        "last": None if empty else readable(counted.last),
        "lines": counted.lines,
        "requests": counted.requests,
        "requests_without_a_view": counted.no_view,
        "lines_without_a_request": counted.no_request,
        "already_turned_away": counted.turned_away,
        "assumed_durations": counted.assumed if wanted.assumed is not None else 0,
        "broken_lines": counted.broken,
        "first_broken": counted.places,
    }
