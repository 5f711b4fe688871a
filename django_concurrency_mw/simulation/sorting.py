"""Sorting what does not fit into memory: sorted runs in a temporary directory, merged while they are read."""

from __future__ import annotations

import heapq
import marshal
from collections.abc import Iterable, Iterator
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


class Sorter:
    """Give it records (tuples of numbers, texts and tuples), then read them in order."""

    def __init__(self, directory: Path, run: int = RUN) -> None:
        self._directory, self._run = directory, run
        self._records: list[Record] = []
        #: By how often their records have been merged.
        self._levels: list[list[Path]] = []
        self._written = 0

    def add(self, record: Record) -> None:
        self._records.append(record)
        if len(self._records) >= self._run:
            self._spill()

    @property
    def runs(self) -> int:
        """How many have been written."""
        return self._written

    def __iter__(self) -> Iterator[Record]:
        """All of them in order. Once."""
        if not self._written:
            self._records.sort()
            yield from self._records
            return
        self._spill()
        yield from heapq.merge(*(_read(path) for level in self._levels for path in level))

    def _spill(self) -> None:
        self._records.sort()
        self._keep(self._write(self._records), 0)
        self._records = []

    def _keep(self, path: Path, level: int) -> None:
        if level == len(self._levels):
            self._levels.append([])
        runs = self._levels[level]
        runs.append(path)
        if len(runs) == MOST_RUNS:
            merged = self._write(heapq.merge(*map(_read, runs)))
            for one in runs:
                one.unlink()
            self._levels[level] = []
            self._keep(merged, level + 1)

    def _write(self, records: Iterable[Record]) -> Path:
        path = self._directory / f"run-{self._written}"
        self._written += 1
        with path.open("wb") as file:
            chunk: list[Record] = []
            for record in records:
                chunk.append(record)
                if len(chunk) == CHUNK:
                    _put(chunk, file)
                    chunk = []
            _put(chunk, file)
        return path


def _put(chunk: list[Record], file: BinaryIO) -> None:
    data = marshal.dumps(chunk, 2)  # without references: to look for them takes longer
    file.write(_LENGTH.pack(len(data)))
    file.write(data)


def _read(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        while length := file.read(_LENGTH.size):
            yield from marshal.loads(file.read(*_LENGTH.unpack(length)))  # our own, of this very run
