"""Reading: the lines of logs to arrivals, one at a time, and what is wrong with lines that cannot be read."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

from ..exceptions import shown
from .formats import FormatError, Layout
from .matching import Matcher
from .spreading import Spreader
from .stamps import SECOND, Remembered, duration, microseconds, upstream

#: Lines by which a log is recognised.
SAMPLE = 100
#: Broken lines whose places are told, and how many there may be whatever the length of the log; beyond it, one in a hundred.
TOLD, FEW, ONE_IN = 5, 10, 100
#: Characters of an error that are told: it may repeat all that stands in the log.
LONGEST_WHY = 120
#: Lines that are taken together, before a look at the progress.
STEP = 5_000


class Keeps(Protocol):
    """Where arrivals go."""

    def add(self, record: tuple[Any, ...]) -> None: ...


class Source:
    """One log: a file, a compressed one, or `-` for what comes in. `position` and `size` are bytes of the file."""

    def __init__(self, path: str) -> None:
        self.name = "<stdin>" if path == "-" else os.path.basename(path)
        try:
            self._file: Any = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115  # closed by `close`
            self.size = 0 if path == "-" else os.fstat(self._file.fileno()).st_size
            start = self._file.peek(2)[:2] if hasattr(self._file, "peek") else b""
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
        inner = gzip.GzipFile(fileobj=self._file) if start == b"\x1f\x8b" else self._file
        self._text = io.TextIOWrapper(inner, encoding="utf-8", errors="backslashreplace", newline="\n")
        self._lines: Iterator[str] = iter(self._text)

    def position(self) -> int:
        """How much of the file has been read."""
        return int(self._file.tell()) if self.size else 0

    def sample(self) -> list[tuple[str, str]]:
        """The first lines, each with its place."""
        head = list(islice(self.lines(), SAMPLE))
        self._lines = chain(head, self._lines)
        found = [(f"{self.name}:{number}", line.rstrip("\r\n")) for number, line in enumerate(head, 1) if line.strip()]
        if found and "\x00" in found[0][1]:
            raise FormatError(f"{self.name}: not a text file")
        return found

    def lines(self) -> Iterator[str]:
        try:
            for line in self._lines:  # noqa: UP028  # `yield from` would close the file at the end of the first look
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{self.name}: cannot be read to its end: {error}") from error

    def close(self) -> None:
        if self.name != "<stdin>":
            self._text.close()
            self._file.close()


@dataclass(slots=True)
class Counted:
    """What was read. `first` and `last` are microseconds since the epoch: the span of the log."""

    lines: int = 0
    requests: int = 0
    #: Lines whose request line is none: nothing of Django's saw these.
    no_request: int = 0
    #: Requests whose path leads to no view.
    no_view: int = 0
    #: Requests that a policy applies to.
    limited: int = 0
    #: Those of them that were turned away when the log was written.
    turned_away: int = 0
    #: Requests with the assumed duration.
    assumed: int = 0
    broken: int = 0
    places: list[str] = field(default_factory=list)
    first: int = 2**62
    last: int = 0


def read(
    sources: Sequence[Source],
    layout: Layout,
    matcher: Matcher,
    arrivals: Keeps,
    assumed: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Counted:
    """All lines of the logs into `arrivals`: (start, number, duration, slots), where stamps are whole seconds with offsets.

    `assumed` is in seconds; `progress` is told the bytes. Raises: FormatError where more than a few lines are broken.
    """
    counted = Counted()
    spreader = Spreader(ordered=layout.stamp == "end") if layout.whole else None
    reader = _Reader(layout, matcher, arrivals, spreader, assumed, counted)
    before = 0
    for source in sources:
        lines = source.lines()
        number = 0
        while together := list(islice(lines, STEP)):
            reader.take(source.name, number, together)
            number += len(together)
            if progress is not None:
                progress(before + source.position())
            _check(counted, at_end=False)
        before += source.size
        if spreader is not None:  # the next log may be of the same seconds, or of earlier ones
            for record in spreader.rest():
                arrivals.add(record)
    _check(counted, at_end=True)
    return counted


class _Reader:
    """What is made of lines: many are taken at a time, so that what is the same for all of them is looked up seldom."""

    def __init__(
        self,
        layout: Layout,
        matcher: Matcher,
        arrivals: Keeps,
        spreader: Spreader | None,
        assumed: float | None,
        counted: Counted,
    ) -> None:
        self._layout, self._counted = layout, counted
        self._parse, self._ask = layout.parser(matcher.further), matcher.ask
        self._arrivals, self._spreader = arrivals, spreader
        self._assumed = None if assumed is None else round(assumed * SECOND)
        self._durations, self._upstreams = (
            Remembered(duration, layout.unit),
            Remembered(upstream, layout.served_unit),
        )

    def take(self, name: str, number: int, lines: Sequence[str]) -> None:
        """The next lines of the log of that name; `number` of it have been before them."""
        parse, ask, add, spreader = self._parse, self._ask, self._arrivals.add, self._spreader
        durations, upstreams, from_start = self._durations, self._upstreams, self._layout.stamp == "start"
        counted = self._counted
        first, last, requests, limited = counted.first, counted.last, counted.requests, counted.limited
        for line in lines:
            number += 1
            raw = parse(line)
            if raw is None:
                self._not_a_line(name, number, line)
                continue
            stamp, method, target, ip, took, served, status, *further = raw
            try:
                at = microseconds(stamp)
                # What the site itself took, where the log knows it; it began when nginx had the request.
                whole = None if took is None or took == "-" else durations[took]
                own = None if served is None else upstreams[served]
            except (ValueError, TypeError, OverflowError) as error:
                _broken(counted, name, number, f"a stamp or a duration that is none: {str(error)[:LONGEST_WHY]}")
                continue
            length = own if own is not None else whole
            if length is None:
                length = self._assumed
                counted.assumed += 1
                if length is None:
                    _broken(counted, name, number, "no duration; say --assume-duration SECONDS for such lines")
                    continue
            if ip is not None and not isinstance(ip, str):
                why = f"an address that is no text: {shown(ip)}; --field ip=NAME says where it is"
                _broken(counted, name, number, why)
                continue
            if from_start:
                start = at
            elif whole is None or whole < length:
                start = at - length
            else:
                start = at - whole
            if start < first:
                first = start
            if at > last:
                last = at
            if not isinstance(target, str) or not isinstance(method, str):
                counted.no_request += 1
                continue
            requests += 1
            slots = ask(method, target, ip, further)
            if not slots:
                counted.no_view += slots is None
                continue
            limited += 1
            if status == "429" or status == 429:  # JSON has anything here, and not all of it can be hashed
                counted.turned_away += 1
            if spreader is None:
                add((start, limited, length, slots))
            else:
                for record in spreader.add(at, (start, limited, length, slots)):
                    add(record)
        counted.lines += len(lines)
        counted.first, counted.last, counted.requests, counted.limited = first, last, requests, limited

    def _not_a_line(self, name: str, number: int, line: str) -> None:
        if line.strip():
            what = f"not a line of the format {self._layout.format.name}: {shown(line.strip())}"
            _broken(self._counted, name, number, what)
        else:
            self._counted.lines -= 1  # an empty one is none


def _broken(counted: Counted, name: str, number: int, message: str) -> None:
    counted.broken += 1
    if len(counted.places) < TOLD:
        counted.places.append(f"{name}:{number}: {message}")


def _check(counted: Counted, *, at_end: bool) -> None:
    if counted.broken <= FEW or counted.broken * ONE_IN <= counted.lines:
        return
    if at_end or counted.lines > 1_000:
        raise FormatError(
            f"{counted.broken:,} of {counted.lines:,} lines cannot be read, which is more than a few "
            f"(1 in {ONE_IN}). The first:\n" + "\n".join(f"    {place}" for place in counted.places)
        )
