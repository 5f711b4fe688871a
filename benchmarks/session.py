"""One run: which comparisons are timed how, and what is done with their results."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from time import perf_counter
from typing import Any

from . import profiling, report, tables
from .load import tool
from .room import Effort, Room, on_cores, work_of
from .rows import Comparison, comparisons

QUICK, WHOLE = Effort(7, 6, 0.003), Effort(25, 8, 0.004)


class Session:
    """What the command line asks for."""

    def __init__(self, options: argparse.Namespace, core: set[int], server: Any) -> None:
        self.options, self.core, self.server = options, core, server
        self.quick: bool = options.quick
        usual = QUICK if self.quick else WHOLE
        self.effort = Effort(options.rounds or usual.rounds, usual.slices, options.slice or usual.seconds)
        from django.conf import settings

        has_host = "host" in settings.CONCURRENCY_LIMIT["BACKENDS"]
        self.comparisons = comparisons("" if server is None else server.url, has_host)
        self.found: list[report.Result] = []
        self.seconds: dict[str, dict[str, list[float]]] = {}

    def run(self) -> int:
        """The exit status."""
        if self.options.list:
            for one in self.comparisons:
                print(one.id, *(f"  {row.id}: {row.what}" for row in one.rows), sep="\n")
            return 0
        if self.options.profile:
            return self._profile(self.options.profile)
        about = report.machine("" if self.server is None else self.server.version)
        print(report.heading(about), flush=True)
        print(report.table([]), flush=True)
        self._time("one", self.core, self.comparisons)
        if not self.quick:
            # A hundred threads that are not held together by one core take minutes to say nothing new.
            free = [one for one in self.comparisons if one.needs_redis and one.id != "redis-threads-100"]
            self._time("free", os.sched_getaffinity(0), free)
            self._serve()
        document = report.document(about, self.found, self.seconds)
        if self.options.json:
            self.options.json.write_text(json.dumps(document, indent=1) + "\n")
        if self.options.svg:
            from .plot import draw

            draw(document, self.options.svg)
        missed = [one for one in self.found if one.met is False]
        with_target = [one for one in self.found if one.target is not None]
        print(f"{len(with_target) - len(missed)} of {len(with_target)} rows with a target met it")
        return 0

    def _time(self, cores: str, which: set[int], wanted: list[Comparison]) -> None:
        others = [] if self.server is None else [self.server.process.pid]
        with on_cores(which, others):
            for one in self._chosen(wanted):
                room = Room(self.effort, work_of(others) if len(which) == 1 and not self.options.wall else perf_counter)
                try:
                    cells = dict(one.cells())
                    rows = one.rows_for(cells, self.quick)
                    used = {name for row in rows for name in (*row.top, *row.bottom)}
                    seconds = room.compare({name: cell for name, cell in cells.items() if name in used})
                finally:
                    room.close()
                    tables.restore()
                self.seconds[f"{one.id}, {cores}"] = seconds
                for result in report.results(one, seconds, cores, self.quick):
                    self.found.append(result)
                    print(report.line(result), flush=True)

    def _serve(self) -> None:
        if self.server is None or self.options.no_servers:
            return
        from .servers import SERVERS, kept

        for name in filter(lambda name: self._is_wanted(name.split()[0]), SERVERS):
            print(f"{name}, asked by {tool()}:", flush=True)
            found, figures = kept(name, "redis", max(1, min(9, self.effort.rounds)), self.server.process.pid)
            self.seconds |= {f"{name}, requests per {per}": rows for per, rows in figures.items()}
            for result in found:
                self.found.append(result)
                print(report.line(result), flush=True)

    def _profile(self, wanted: str) -> int:
        """`wanted`: a comparison, or one and behind a slash the beginning of one of its cells."""
        comparison, _, cell = wanted.partition("/")
        one = next((one for one in self.comparisons if one.id == comparison), None)
        if one is None:
            print(f"no comparison {comparison!r}; known are {', '.join(one.id for one in self.comparisons)}")
            return 2
        others = [] if self.server is None else [self.server.process.pid]
        with on_cores(self.core, others):
            cells, room = one.cells(), Room(self.effort)
            for name in cells:
                if name.startswith(cell) and (cell or name not in ("bare", "raw2", "empty", "peer")):
                    print(profiling.report(room, cells, name, others, 1000), end="\n\n", flush=True)
            room.close()
        return 0

    def _chosen(self, wanted: list[Comparison]) -> Iterator[Comparison]:
        for one in wanted:
            if self.quick and not any(row.quick for row in one.rows):
                continue
            if self._is_wanted(one.id):
                yield one

    def _is_wanted(self, name: str) -> bool:
        return not self.options.only or any(fnmatchcase(name, pattern) for pattern in self.options.only)
