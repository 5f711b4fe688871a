"""What the views themselves count: one line per entry and exit in a file, so that it holds across processes and threads.

Times are CLOCK_MONOTONIC, which all processes of a machine share. An entry is stamped after the slot was taken and an exit
before it is given back, so the most ever inside is never more than the limiter admitted.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic_ns


@dataclass
class Reading:
    admitted: int = 0
    inside: int = 0
    most: int = 0


def _write(name: str, step: str) -> None:
    path = os.environ.get("TEST_GAUGE_FILE")
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, f"{monotonic_ns()} {step} {name}\n".encode())
        finally:
            os.close(fd)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Count somebody in for the length of the block."""
    _write(name, "+")
    try:
        yield
    finally:
        _write(name, "-")


def read(path: str) -> dict[str, Reading]:
    """Replay the file. An exit and an entry at one stamp: the exit first, as nothing tells their order."""
    readings: defaultdict[str, Reading] = defaultdict(Reading)
    with open(path) as lines:
        events = sorted((int(stamp), step == "+", name) for stamp, step, name in (line.split() for line in lines))
    for _, enters, name in events:
        reading = readings[name]
        if enters:
            reading.admitted += 1
            reading.inside += 1
            reading.most = max(reading.most, reading.inside)
        else:
            reading.inside -= 1
    return readings
