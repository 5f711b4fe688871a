"""A gauge that does not take the limiter's word: the views count themselves in and out.

Each entry and each exit appends one line, `name +1 stamp` or `name -1 stamp`, to the file that EXAMPLE_GAUGE_FILE names,
in a single write, so it counts across threads and processes. Stamps are CLOCK_MONOTONIC in nanoseconds, which all processes
of a machine share. Without the variable it does nothing.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns


@dataclass(slots=True)
class Reading:
    """How many came in, how many were inside at once at most, and how many have not left."""

    admitted: int = 0
    most: int = 0
    inside: int = 0


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Count somebody in for the length of the block: in a view, sync or async, or in the generator of a stream."""
    _write(name, "+1")
    try:
        yield
    finally:
        _write(name, "-1")


def read(path: str | Path) -> dict[str, Reading]:
    """Replay the file in the order of its stamps, an exit before an entry of the same stamp; a missing file is empty."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return {}
    steps = [(int(stamp), int(change), name) for name, change, stamp in (line.rsplit(" ", 2) for line in lines)]
    readings: defaultdict[str, Reading] = defaultdict(Reading)
    for _stamp, change, name in sorted(steps):
        reading = readings[name]
        reading.inside += change
        reading.admitted += change > 0
        reading.most = max(reading.most, reading.inside)
    return dict(readings)


def _write(name: str, change: str) -> None:
    path = os.environ.get("EXAMPLE_GAUGE_FILE")
    if not path:
        return
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{name} {change} {monotonic_ns()}\n".encode())
    finally:
        os.close(file)
