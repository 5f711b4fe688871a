"""Sorting what does not fit into memory: sorted runs in a temporary directory, merged while they are read."""

from __future__ import annotations

import marshal
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

#: Records that are in memory at once, before they are written as a run.
RUN = 40_000
#: Records that are read of a run at once.
CHUNK = 250
#: Runs that are open at once; where there are more they are merged into a longer one first.
MOST_RUNS = 64

Record = tuple[Any, ...]
_LENGTH = Struct("Q")


@dataclass(frozen=True, slots=True)
class _Run:
    """A file of sorted records; `first` is the least of them."""

    path: Path
    first: Record


class Sorter:
    """Give it records (tuples of numbers, texts and tuples, no two alike), then read them in order."""

    def __init__(self, directory: Path, run: int = RUN) -> None:
        self._directory, self._run = directory, run
        self._records: list[Record] = []
        #: By how often their records have been merged.
        self._levels: list[list[_Run]] = []
        self._written = 0

    def add(self, record: Record) -> None:
        records = self._records
        records.append(record)
        if len(records) >= self._run:
            self._spill()

    @property
    def runs(self) -> int:
        """How many have been written."""
        return self._written

    def __iter__(self) -> Iterator[Record]:
        """All of them in order. Once."""
        return chain.from_iterable(self.lists())

    def lists(self) -> Iterator[list[Record]]:
        """All of them in order, many at a time. Once."""
        if not self._written:
            self._records.sort()
            yield self._records
            return
        self._spill()
        yield from _merged([run for level in self._levels for run in level])

    def _spill(self) -> None:
        if not self._records:
            return
        self._records.sort()
        self._keep(self._write([self._records]), 0)
        self._records = []

    def _keep(self, run: _Run, level: int) -> None:
        if level == len(self._levels):
            self._levels.append([])
        runs = self._levels[level]
        runs.append(run)
        if len(runs) == MOST_RUNS:
            merged = self._write(_merged(runs))
            for one in runs:
                one.path.unlink()
            self._levels[level] = []
            self._keep(merged, level + 1)

    def _write(self, lists: Iterable[list[Record]]) -> _Run:
        path = self._directory / f"run-{self._written}"
        self._written += 1
        first: Record | None = None
        with path.open("wb") as file:
            for records in lists:
                first = records[0] if first is None else first
                for at in range(0, len(records), CHUNK):
                    _put(records[at : at + CHUNK], file)
        assert first is not None
        return _Run(path, first)


class _Open:
    """A run that is being read: the records at hand, and how many of them have been taken."""

    __slots__ = ("_chunks", "at", "records")

    def __init__(self, run: _Run) -> None:
        self._chunks = _read(run.path)
        self.records: list[Record] = next(self._chunks)
        self.at = 0

    def take(self, bound: Record) -> list[Record]:
        """Those at hand up to this one. Where that is all, the next ones are at hand, or none are left."""
        records, at = self.records, self.at
        self.at = bisect_right(records, bound, at)
        if self.at == len(records):
            self.records, self.at = next(self._chunks, []), 0
            return records[at:] if at else records
        return records[at : self.at]


def _merged(runs: Sequence[_Run]) -> Iterator[list[Record]]:
    """The records of these runs in order. A run is opened when its first record is next, so where the records came nearly in
    order few are open at once."""
    waiting = sorted(runs, key=lambda run: run.first, reverse=True)
    opened: list[_Open] = []
    while waiting or opened:
        if not opened:
            opened.append(_Open(waiting.pop()))
        bound = min([run.records[-1] for run in opened])
        while waiting and waiting[-1].first <= bound:
            opened.append(_Open(waiting.pop()))
            bound = min(bound, opened[-1].records[-1])
        # Whatever is not at hand comes after the bound, and one run at least has all that it has at hand before it.
        together = [run.take(bound) for run in opened]
        opened = [run for run in opened if run.records]
        if len(together) == 1:
            yield together[0]
        else:
            yield sorted(chain.from_iterable(together))


def _put(chunk: list[Record], file: BinaryIO) -> None:
    data = marshal.dumps(chunk, 2)  # without references: to look for them takes longer
    file.write(_LENGTH.pack(len(data)))
    file.write(data)


def _read(path: Path) -> Iterator[list[Record]]:
    with path.open("rb") as file:
        while length := file.read(_LENGTH.size):
            yield marshal.loads(file.read(*_LENGTH.unpack(length)))  # our own, of this very run
