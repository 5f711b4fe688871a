"""The results: as a table to read, and as JSON for the docs' plot and whoever wants to compare."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import django

from . import peer
from .room import Ratio, Seconds, added, ratio
from .rows import Comparison, Row

#: Of the rows' names in the table.
WIDTH = 84


@dataclass(frozen=True)
class Result:
    """One row of one run. `target` is None where there is none; `at_least` where more is better."""

    id: str
    what: str
    cores: str
    ratio: Ratio
    target: float | None
    added: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio.value >= self.target if self.at_least else self.ratio.value <= self.target


def results(comparison: Comparison, seconds: Seconds, cores: str, quick: bool) -> list[Result]:
    """The rows of a comparison that was timed."""
    return [_result(row, seconds, cores) for row in comparison.rows_for(seconds, quick)]


def _result(row: Row, seconds: Seconds, cores: str) -> Result:
    more = statistics.median(added(seconds, row.top))
    target = row.at_most if cores == "one" else None  # free, it depends on what else the machine does
    return Result(row.id, row.what, cores, ratio(seconds, row.top, row.bottom), target, more)


def machine(redis_version: str) -> dict[str, Any]:
    """What it ran on."""
    try:
        import redis

        client = f"redis-py {redis.__version__} {'with' if redis.utils.HIREDIS_AVAILABLE else 'without'} hiredis"
    except ImportError:
        client = "no redis-py"
    return {
        "python": sys.version.split()[0],
        "django": django.get_version(),
        "redis": redis_version or "none",
        "client": client,
        "peer": f"django-smart-ratelimit {peer.VERSION or 'not installed'}",
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def heading(about: dict[str, Any]) -> str:
    return (
        f"Python {about['python']}, Django {about['django']}, Redis {about['redis']}, {about['client']}, {about['peer']}; "
        f"{about['cores']} cores, {about['processor']}"
    )


def table(found: Iterable[Result]) -> str:
    """Aligned lines. The spread is the quartiles of the rounds."""
    lines = [f"{'':{WIDTH}}{'cores':>7}{'added':>10}{'ratio':>8}{'spread':>14}{'target':>8}"]
    return "\n".join([*lines, *map(line, found)])


def line(result: Result) -> str:
    added = "" if result.added is None else f"{result.added * 1e6:.1f} us"
    spread = f"{result.ratio.low:.2f}..{result.ratio.high:.2f}"
    target = "" if result.target is None else f"{'>=' if result.at_least else '<='}{result.target:.2f}"
    verdict = {None: "", True: "  met", False: "  MISSED"}[result.met]
    return f"{result.what:{WIDTH}}{result.cores:>7}{added:>10}{result.ratio.value:8.2f}{spread:>14}{target:>8}{verdict}"


def document(
    about: dict[str, Any], found: Sequence[Result], cells: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """All of it, for JSON: seconds per call of each cell in each round, too."""
    return {
        "machine": about,
        "rows": [
            {
                "id": one.id,
                "what": one.what,
                "cores": one.cores,
                "ratio": one.ratio.value,
                "low": one.ratio.low,
                "high": one.ratio.high,
                "target": one.target,
                "at_least": one.at_least,
                "added_seconds": one.added,
                "met": one.met,
            }
            for one in found
        ],
        "seconds_per_call": cells,
    }
