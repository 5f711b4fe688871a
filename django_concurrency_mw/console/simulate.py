"""Simulate: what a table of policies would have done with the requests of an access log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser

from ..exceptions import shown
from ..loader import load_policies
from ..policies import PolicyTable
from ..simulation.formats import FORMATS, FormatError, Wanted, parse_field
from ..simulation.running import Options, Progress, simulate
from ..simulation.stamps import LONGEST, SECOND, UNITS
from .config import configuration
from .output import Output

HELP = "replay an access log against the policies: peaks, would-be rejections, when and for which keys"

#: Characters of the longest bar.
WIDTH = 40
#: Bars of one chart; of more windows only those with rejections are shown, and not more than these.
MOST_BARS = 80
#: Seconds: stamps are no finer.
SHORTEST_WINDOW = 0.001
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_SHARE = re.compile(r"[Pp]?(\d{1,2}(?:\.\d+)?|100)")


def add_arguments(parser: CommandParser) -> None:
    """Its options."""
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="access logs of one format, also gzip'd; - reads what comes in"
    )
    parser.add_argument("--policies", metavar="FILE", help="a policy file to try; default: the site's own policies")
    parser.add_argument(
        "--window", metavar="10m", help="the width of the intervals of the chart; default: about 60 of them"
    )
    parser.add_argument(
        "--suggest", metavar="P99", help="propose limits under which so many of 100 keys would never have been rejected"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: as the first lines look")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="where the log has something: user=uid, header.X-Api-Key=api_key, duration=took_ms; again for each",
    )
    parser.add_argument("--unit", choices=UNITS, help="of the duration, where its name does not say")
    parser.add_argument(
        "--stamp", choices=("start", "end"), help="what the log's time is, where its format does not say"
    )
    parser.add_argument("--assume-duration", metavar="SECONDS", help="of requests whose duration the log lacks")


def run(options: Mapping[str, Any], out: Output) -> int:
    """Exit code 0: here is the report."""
    try:
        asked = Options(
            Wanted(
                options["format"],
                dict(map(parse_field, options["field"])),
                options["unit"],
                options["stamp"],
                _seconds("--assume-duration", options["assume_duration"]),
            ),
            _seconds("--window", options["window"]),
            _share(options["suggest"]),
        )
        if asked.window is not None and asked.window < SHORTEST_WINDOW:
            raise FormatError(f"--window: expected at least a millisecond, got {shown(options['window'])}")
        with _progress() as progress:
            document = simulate(options["logs"], _table(options["policies"]), asked, progress)
    except FormatError as error:
        raise CommandError(str(error)) from error
    if out.json:
        out.document(document)
    else:
        _tell(document, out)
    return 0


def _table(path: str | None) -> PolicyTable:
    if path is None:
        return configuration().table
    try:
        return load_policies(path)
    except ImproperlyConfigured as error:
        raise CommandError(str(error)) from error


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    found = _DURATION.fullmatch(str(text))
    if found is None:
        raise FormatError(f"{option}: expected seconds such as 90, or text such as 10m, got {shown(text)}")
    seconds = float(found[1]) * _SECONDS[found[2] or "s"]
    if seconds * SECOND > LONGEST:
        raise FormatError(f"{option}: expected at most 30 years, got {shown(text)}")
    return seconds


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    found = _SHARE.fullmatch(text)
    if found is None:
        raise FormatError(f"--suggest: expected a share of the keys such as P99 or P99.9, got {shown(text)}")
    return float(found[1]) / 100


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr, where somebody looks."""
    try:
        from rich.console import Console
        from rich.progress import Progress as Bars
    except ImportError:
        yield _silent
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _silent
        return
    tasks: dict[str, Any] = {}
    with Bars(console=console, transient=True) as bars:

        def tell(what: str, done: int, whole: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=whole or None)
            bars.update(tasks[what], completed=done)

        yield tell


def _silent(what: str, done: int, whole: int) -> None:
    """Nobody looks."""


def _tell(document: Mapping[str, Any], out: Output) -> None:
    for line in _about(document["log"]):
        out.line(line)
    if document["policies"]:
        _tell_policies(document, out)
    for entry in document["policies"]:
        if entry["rejected"]["high"]:
            _tell_rejections(entry, document, out)
    if document["not_replayable"]:
        rows = [(entry["policy"], "; ".join(entry["missing"])) for entry in document["not_replayable"]]
        out.line()
        out.line("not replayable, so left out as if they were not there:", "bold")
        out.table(("policy", "what is missing"), rows)


def _about(log: Mapping[str, Any]) -> Iterator[str]:
    whole = log["whole_seconds"]
    yield (
        f"{', '.join(log['files'])}: {log['format']}, the stamp is the {log['stamp']} of a request"
        + (", in whole seconds: each figure is the median and the range of spreading them" if whole else "")
    )
    yield (
        f"{log['first']} to {log['last']}: {log['lines']:,} lines, {log['requests']:,} requests, "
        f"{log['requests_without_a_view']:,} of them to no view"
    )
    if log["lines_without_a_request"]:
        yield f"{log['lines_without_a_request']:,} lines have no request in them"
    if log["already_turned_away"]:
        yield (
            f"{log['already_turned_away']:,} of the requests with a policy were answered 429 when the log was written: how "
            "long they would have run is not known, so the true figures are higher"
        )
    if log["assumed_durations"]:
        yield f"{log['assumed_durations']:,} requests have the assumed duration"
    if log["broken_lines"]:
        yield f"{log['broken_lines']:,} lines cannot be read and are left out. The first:"
        yield from (f"    {place}" for place in log["first_broken"])


def _tell_policies(document: Mapping[str, Any], out: Output) -> None:
    whole = document["log"]["whole_seconds"]
    shares = [100 * entry["suggested"]["share"] for entry in document["policies"] if entry.get("suggested")]
    columns = ["policy", ">limit", ">requests", ">peak", ">in total", ">rejected"]
    columns += [">at once"] if whole else []
    columns += [f">P{shares[0]:g}"] if shares else []
    rows = []
    for entry in document["policies"]:
        row = [
            f"{entry['policy']}{' (shadow)' if entry['shadow'] else ''}",
            _limit(entry["limit"]),
            f"{entry['requests']:,}",
            *(_figure(entry[name]) for name in ("peak", "peak_in_total", "rejected")),
        ]
        if whole:
            together = entry["if_each_second_came_at_once"]
            row.append(f"{together['peak']:,}, {together['rejected']:,}")
        if shares:
            row.append(_figure(entry["suggested"]["limit"]) if entry["suggested"] else "-")
        rows.append(row)
    out.table(columns, rows)
    out.line(
        "peak, in total: in flight on one key, and on all of them, as the log has it. rejected: what these limits would do"
    )
    if whole:
        out.line("at once: peak and rejected, if the requests of each second had come all at once")
    if shares:
        out.line(
            f"P{shares[0]:g}: the smallest limit under which {shares[0]:g} of 100 keys would never have been rejected"
        )
    out.line(
        f"{_figure(document['rejected'])} of {document['requests']:,} requests with a policy would have been rejected"
    )
    waiting = [entry["policy"] for entry in document["policies"] if entry["wait"] and entry["rejected"]["high"]]
    if waiting:
        out.line(
            f"Waiting is not replayed: of those, some would have been let in after a wait in line ({', '.join(waiting)})"
        )


def _tell_rejections(entry: Mapping[str, Any], document: Mapping[str, Any], out: Output) -> None:
    out.line()
    out.line(f"{entry['policy']}: would-be rejections, {_width(document['window_seconds'])} a line", "bold")
    windows = entry["windows"]
    hit = [number for number, window in enumerate(windows) if window["rejected"]["high"]]
    bars = windows[hit[0] : hit[-1] + 1]
    if len(bars) > MOST_BARS:
        bars = [windows[number] for number in hit]
    most = max(window["rejected"]["median"] for window in bars) or 1
    mark = "█" if out.console.is_terminal and (out.console.encoding or "").startswith("utf") else "#"
    for window in bars[:MOST_BARS]:
        length = -(-window["rejected"]["median"] * WIDTH // most)
        out.line(f"{window['start']} {mark * length:{WIDTH}} {_figure(window['rejected'])}".rstrip())
    if len(bars) > MOST_BARS:
        out.line(f"and {len(bars) - MOST_BARS:,} more; a longer --window has fewer")
    if entry["keys"]:
        rows = [(one["key"], _limit(one["limit"]), _figure(one["rejected"])) for one in entry["keys"]]
        out.table(("key", ">limit", ">rejected"), rows)


def _width(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:g}{unit}"
    return f"{seconds:g}s"


def _limit(limit: int | None) -> str:
    return "none" if limit is None else f"{limit:,}"


def _figure(figure: Mapping[str, int]) -> str:
    if figure["low"] == figure["high"]:
        return f"{figure['median']:,}"
    return f"{figure['median']:,} ({figure['low']:,}-{figure['high']:,})"
