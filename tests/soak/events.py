"""What the views of the soak's site write down: who came in and who left, with which slots, and by whose word.

One line per slot: `stamp pid request +units policy state`, or `-units`. Stamps are CLOCK_MONOTONIC, which all processes of a
machine share. An entry is written after the slot was taken and an exit before it is given back, so that there are never more
inside here than the limiter admitted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from time import monotonic_ns

_numbers = count()


@dataclass(frozen=True)
class Event:
    at: float
    pid: int
    request: str
    #: Slots; negative: it has left.
    units: int
    policy: str
    #: held, local, unprotected, or none where no limit was applied.
    state: str


@cache
def _opened(path: str, pid: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _write(path: str, request: str, sign: int, slots: Mapping[str, tuple[int, str]]) -> None:
    stamp, pid = monotonic_ns(), os.getpid()
    lines = [f"{stamp} {pid} {request} {sign * units:+d} {name} {state}\n" for name, (units, state) in slots.items()]
    os.write(_opened(path, pid), "".join(lines).encode())


@contextmanager
def inside(path: str, slots: Mapping[str, tuple[int, str]]) -> Iterator[None]:
    """Policy -> units and state, for the length of the block."""
    request = f"{os.getpid()}-{next(_numbers)}"
    _write(path, request, 1, slots)
    try:
        yield
    finally:
        _write(path, request, -1, slots)


def read(path: Path) -> list[Event]:
    """In their order. An exit and an entry at one stamp: the exit first, as nothing tells their order."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        stamp, pid, request, units, policy, state = line.split()
        found.append(Event(int(stamp) / 1e9, int(pid), request, int(units), policy, state))
    return sorted(found, key=lambda event: (event.at, event.units))
