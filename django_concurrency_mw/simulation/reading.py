"""Reading: the lines of logs to arrivals, one at a time, and what is wrong with lines that cannot be read."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

from ..exceptions import shown
from .formats import FormatError, Layout
from .matching import Matcher
from .spreading import Spreader
from .stamps import SECOND, duration, microseconds, upstream

#: Lines by which a log is recognised.
SAMPLE = 100
#: Broken lines whose places are told, and how many there may be whatever the length of the log; beyond it, one in a hundred.
TOLD, FEW, ONE_IN = 5, 10, 100
#: Characters of an error that are told: it may repeat all that stands in the log.
LONGEST_WHY = 120
#: Lines between two looks at the progress.
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
    before = 0
    for source in sources:
        told = partial(_tell, progress, before)
        _read(source, layout, matcher, arrivals, spreader, assumed, counted, told)
        before += source.size
        if spreader is not None:  # the next log may be of the same seconds, or of earlier ones
            for record in spreader.rest():
                arrivals.add(record)
    _check(counted, at_end=True)
    return counted


def _tell(progress: Callable[[int], None] | None, before: int, here: int) -> None:
    if progress is not None:
        progress(before + here)


def _read(
    source: Source,
    layout: Layout,
    matcher: Matcher,
    arrivals: Keeps,
    spreader: Spreader | None,
    assumed: float | None,
    counted: Counted,
    progress: Callable[[int], object],
) -> None:
    parse, ask, add = layout.parser(matcher.further), matcher.ask, arrivals.add
    unit, served_unit, from_start = layout.unit, layout.served_unit, layout.stamp == "start"
    otherwise = None if assumed is None else round(assumed * SECOND)
    first, last = counted.first, counted.last
    for number, line in enumerate(source.lines(), 1):
        if not number % STEP:
            progress(source.position())
            _check(counted, at_end=False)
        raw = parse(line)
        if raw is None:
            if line.strip():
                counted.lines += 1
                _broken(
                    counted, source, number, f"not a line of the format {layout.format.name}: {shown(line.strip())}"
                )
            continue
        counted.lines += 1
        stamp, method, target, ip, took, served, status, further = raw
        try:
            at = microseconds(stamp)
            # What the site itself took, where the log knows it; it began when nginx had the request.
            whole = None if took is None or took == "-" else duration(took, unit)
            own = None if served is None else upstream(served, served_unit)
        except (ValueError, TypeError, OverflowError) as error:
            _broken(counted, source, number, f"a stamp or a duration that is none: {str(error)[:LONGEST_WHY]}")
            continue
        length = own if own is not None else whole
        if length is None:
            length = otherwise
            counted.assumed += 1
            if length is None:
                _broken(counted, source, number, "no duration; say --assume-duration SECONDS for such lines")
                continue
        if ip is not None and not isinstance(ip, str):
            _broken(
                counted, source, number, f"an address that is no text: {shown(ip)}; --field ip=NAME says where it is"
            )
            continue
        start = at if from_start else at - max(length, whole or 0)
        if start < first:
            first = start
        if at > last:
            last = at
        if not isinstance(target, str) or not isinstance(method, str):
            counted.no_request += 1
            continue
        counted.requests += 1
        slots = ask(method, target, ip, further)
        if not slots:
            counted.no_view += slots is None
            continue
        counted.limited += 1
        if status == "429" or status == 429:  # JSON has anything here, and not all of it can be hashed
            counted.turned_away += 1
        if spreader is None:
            add((start, counted.limited, length, slots))
        else:
            for record in spreader.add(at, (start, counted.limited, length, slots)):
                add(record)
    counted.first, counted.last = first, last


def _broken(counted: Counted, source: Source, number: int, message: str) -> None:
    counted.broken += 1
    if len(counted.places) < TOLD:
        counted.places.append(f"{source.name}:{number}: {message}")


def _check(counted: Counted, *, at_end: bool) -> None:
    if counted.broken <= FEW or counted.broken * ONE_IN <= counted.lines:
        return
    if at_end or counted.lines > 1_000:
        raise FormatError(
            f"{counted.broken:,} of {counted.lines:,} lines cannot be read, which is more than a few "
            f"(1 in {ONE_IN}). The first:\n" + "\n".join(f"    {place}" for place in counted.places)
        )
