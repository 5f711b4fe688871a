"""Text lines: the combined format, which nginx, gunicorn and Apache share, and what a server writes behind it.

What stands behind it is found out from the first lines (`0.123`, `rt=0.123`, `uid="42"`); from then on a line is one match of
one regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..exceptions import did_you_mean, shown
from .formats import (
    FORMATS,
    Format,
    FormatError,
    Layout,
    Parser,
    Raw,
    Wanted,
    listed,
    unit_in_microseconds,
    without_duration,
)
from .stamps import UNITS, microseconds

_QUOTED = r'[^"\\]*+(?:\\.[^"\\]*+)*+'
_BARE = r"[-\d.]++(?:(?:,| :) [-\d.]+)+|[^\s\"]*"
#: Groups: address, user, stamp, method, target, status, referer, agent.
_COMBINED = (
    r"(\S++) \S++ ([^\[]*) \[([^\]]++)\] "
    rf'"(?:([!-~]+) ([^\s"\\]*+(?:\\.[^\s"\\]*+)*+) HTTP/[0-9.]+|{_QUOTED})" '
    rf'(\d{{3}}|-) \S+(?: "({_QUOTED})" "({_QUOTED})")?'
)
#: The same where nothing is tried twice: of a line that does not fit, every way to divide a run of spaces would be.
_BARE_ONCE = r"(?>[-\d.]++(?:(?:,| :) [-\d.]++)++(?=\s|$)|[^\s\"]*+)"
_BEGINNING = re.compile(_COMBINED)
_TOKEN = re.compile(rf'\s+(?:([A-Za-z_][\w.$-]*)=)?(?:"({_QUOTED})"|({_BARE}))(?=\s|$)')
_MILLISECONDS = re.compile(r"\d+\.\d{3}")
_MICROSECONDS = re.compile(r"\d+\.\d{6}")
_EPOCH = re.compile(r"\d{9,11}\.\d{3}")
_TRIED = re.compile(r"[-\d.]+(?:(?:,| :) [-\d.]+)*")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}

#: Values behind the combined format: each is compared with all before it, and is a part of the regular expression.
MOST_VALUES = 100

#: What values behind the combined format are called; the short ones are what people write.
_CALLED = {"rt": "request_time", "urt": "upstream_response_time"}
#: Our names for the log's own ones. Who logged in by HTTP's own means is not the site's user.
_OWN = {
    "ip": "remote_addr",
    "header.referer": "http_referer",
    "header.user-agent": "http_user_agent",
    "host": "host",
}
_GROUPS = {"remote_addr": 0, "remote_user": 1, "http_referer": 6, "http_user_agent": 7}
_FIRST_OF_TAIL = 8
#: Behind what every parser gives.
_FIRST_FURTHER = 7

_USUAL_TEXT = r'[^"\\]*+'
#: Neither a comma nor a colon, which may part the times of several servers.
_USUAL_VALUE = r"[0-9A-Za-z._/-]++"
#: The groups of the combined format as they mostly look, each with what stands before and behind it.
_USUAL: Final = (
    ("", r"[!-~]++", r" [!-~]++ "),
    ("", r"[!-Z\\-~]++", r" \["),
    ("", r"[^\]]++", r"\] "),
    ('"', r"[!-~]++", " "),
    ("", r"[!#-\[\]-~]*+", r' HTTP/[0-9.]++" '),
    ("", r"[0-9]{3}", r" [!-~]++ "),
    ('"', _USUAL_TEXT, '" '),
    ('"', _USUAL_TEXT, '"'),
)


@dataclass(frozen=True, slots=True)
class _Token:
    """One value behind the combined format: `name` as it is called, `written` before its `=`."""

    name: str
    written: str
    quoted: bool
    value: str


def layout(sample: Sequence[tuple[str, str]], wanted: Wanted) -> Layout:
    """How to read a log that begins with these lines. Raises: FormatError."""
    readable = [(place, line, found) for place, line in sample if (found := _BEGINNING.match(line))]
    if not readable:
        raise FormatError(
            f"{sample[0][0]}: not a line of any format known: {shown(sample[0][1])}. Known are "
            f"{', '.join(f'{row.name} ({row.what})' for row in FORMATS.values())}"
        )
    place, line, beginning = readable[0]
    tokens = _tail(place, line[beginning.end() :])
    stamp = beginning[3]
    row = FORMATS[wanted.format] if wanted.format else None
    duration = wanted.fields.get("duration") or _duration(tokens, row, place)
    names = {token.name: number for number, token in enumerate(tokens, _FIRST_OF_TAIL)} | _GROUPS
    for ours, theirs in wanted.fields.items():
        if ours in ("time", "method", "path", "status"):
            raise FormatError(
                f"--field {ours}={theirs}: a text log has this in its own place; --field is for the others"
            )
        if theirs not in names:
            raise FormatError(
                f"{place}: has no value called {shown(theirs)}, which --field {ours}={theirs} names"
                f"{did_you_mean(theirs, names)}. There are {listed(names)}; write others behind it as name=value"
            )
    upstream = wanted.fields.get("upstream", "upstream_response_time")
    row = row or _kind(duration, tokens, stamp, wanted, place)
    if wanted.format == "nginx-msec" and "msec" not in names and not _EPOCH.fullmatch(stamp):
        raise FormatError(f"{place}: --format nginx-msec, but the line has no $msec; add it, or say --format nginx")
    unit = 1.0
    if duration is not None:
        by_name = wanted.unit is not None or "duration" in wanted.fields
        unit = unit_in_microseconds(duration, wanted.unit, place) if by_name else UNITS[row.unit]
    elif wanted.assumed is None and upstream not in names:
        every = [FORMATS["nginx"], FORMATS["gunicorn"], FORMATS["apache"]]
        raise without_duration(place, [row] if wanted.format else every)
    moments = names.get("msec", 2)
    try:
        whole = microseconds(stamp if moments == 2 else tokens[moments - _FIRST_OF_TAIL].value) % 1_000_000 == 0
    except ValueError as error:
        raise FormatError(f"{place}: the stamp {shown(stamp)} is none that is known") from error
    whole = whole and moments == 2 and not re.search(r":\d\d[.,]\d|^\d+\.\d", stamp)
    sources = {ours: names[theirs] for ours, theirs in (_OWN | dict(wanted.fields)).items() if theirs in names}
    took, served = names.get(duration or "", -1), names.get(upstream, -1)
    regex = re.compile(_COMBINED + "".join(map(_pattern, tokens)) + r"\s*$")
    served_unit = unit_in_microseconds(upstream, None, place) if served >= 0 else unit

    def parser(further: Sequence[str]) -> Parser:
        places = [moments, 3, 4, sources["ip"], took, served, 5, *(sources[name] for name in further)]
        full = _parser(regex, places)
        return full if further or beginning[7] is None else _quick_parser(tokens, places, full)

    return Layout(row, wanted.stamp or row.stamp, whole, unit, served_unit, frozenset(sources), parser)


def _parser(regex: re.Pattern[str], places: Sequence[int]) -> Parser:
    """Any line: the groups at these places, None for a place below 0."""
    match = regex.match
    first = places[:_FIRST_FURTHER]
    further = places[_FIRST_FURTHER:]

    def parse(line: str) -> Raw | None:
        found = match(line)
        if found is None:
            return None
        groups = found.groups()
        moment, method, target, *others = [groups[place] if place >= 0 else None for place in first]
        if target is not None and "\\" in target:
            target = _as_percent(target)
        return moment, method, target, *others, *[_value(groups[place]) for place in further]

    return parse


def _quick_parser(tokens: Sequence[_Token], places: Sequence[int], full: Parser) -> Parser:
    """The usual lines: of their groups only those at these places are taken out. Lines that are none of these go to `full`.

    Each part matches less than that of the full expression, and what it matches ends where the full one would end it too: so
    what both match has the same groups.
    """
    parts = [*_USUAL, *map(_usual, tokens)]
    pattern = "".join(
        f"{before}({'' if place in places else '?:'}{part}){behind}"
        for place, (before, part, behind) in enumerate(parts)
    )
    order = [place for place in range(len(parts)) if place in places]
    # The last group is that of what the log does not have.
    match = re.compile(rf"{pattern}\s*$((?!))?").match
    groups = [order.index(place) + 1 if place >= 0 else len(order) + 1 for place in places]

    def parse(line: str) -> Raw | None:
        found = match(line)
        return full(line) if found is None else found.group(*groups)

    return parse


def _tail(place: str, text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise FormatError(f"{place}: cannot read {shown(text[at:])} behind the combined format")
        if len(tokens) == MOST_VALUES:
            raise FormatError(f"{place}: more than {MOST_VALUES} values behind the combined format, so it is none")
        at, written, quoted = found.end(), found[1] or "", found[2] is not None
        name = _CALLED.get(written, written) or _role(found[2] if quoted else found[3], quoted, tokens)
        tokens.append(_Token(name, written, quoted, found[2] if quoted else found[3]))
    return tokens


def _role(value: str, quoted: bool, before: Sequence[_Token]) -> str:
    """What a value without a name is, by its looks; else its place: tail1."""
    known = {token.name for token in before}
    if not quoted and _EPOCH.fullmatch(value) and "msec" not in known:
        return "msec"
    if not quoted and _MILLISECONDS.fullmatch(value) and "request_time" not in known:
        return "request_time"
    if "request_time" in known and "upstream_response_time" not in known and _TRIED.fullmatch(value):
        return "upstream_response_time"
    if not quoted and _MICROSECONDS.fullmatch(value) and "L" not in known:
        return "L"
    if not quoted and value.isdecimal() and "D" not in known:
        return "D"
    return f"tail{len(before) + 1}"


def _duration(tokens: Sequence[_Token], row: Format | None, place: str) -> str | None:
    """The name of the duration, among the values behind the combined format."""
    names = [token.name for token in tokens]
    order: tuple[str, ...] = ("request_time", "L", "D")
    if row is not None and row.unit in ("us", "ms"):
        order = ("D",)
    elif row is not None:
        order = ("request_time", "L")
    return next((name for name in order if name in names), None)


def _kind(duration: str | None, tokens: Sequence[_Token], stamp: str, wanted: Wanted, place: str) -> Format:
    names = {token.name for token in tokens}
    if duration == "L":
        return FORMATS["gunicorn"]
    if duration == "D" and "duration" not in wanted.fields and wanted.assumed is None:
        raise FormatError(
            f"{place}: a whole number behind the combined format may be Apache's %D (microseconds, the stamp is the start) or "
            "gunicorn's %(D)s (microseconds) or %(M)s (milliseconds, the stamp is the end). Say --format apache, "
            "gunicorn-us or gunicorn-ms"
        )
    return FORMATS["nginx-msec" if "msec" in names or re.fullmatch(r"\d+\.\d+", stamp) else "nginx"]


def _pattern(token: _Token) -> str:
    before = rf"\s++{re.escape(token.written)}{'=' if token.written else ''}"
    return f'{before}"({_QUOTED})"' if token.quoted else f"{before}({_BARE_ONCE})"


def _usual(token: _Token) -> tuple[str, str, str]:
    before = f" {re.escape(token.written)}{'=' if token.written else ''}"
    return (f'{before}"', _USUAL_TEXT, '"') if token.quoted else (before, _USUAL_VALUE, "")


def _value(text: str | None) -> str | None:
    """A further value: None where the server had none."""
    if text is None or text in ("-", ""):
        return None
    return unescaped(text) if "\\" in text else text


def unescaped(text: str) -> str:
    """What nginx, gunicorn or Apache wrote with a backslash, as WSGI has it: a character for each byte."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _LETTERS.get(found[2], found[2]), text)


def _as_percent(text: str) -> str:
    """The same inside a URL, where a byte is written with a per cent sign."""
    return _ESCAPE.sub(lambda found: f"%{found[1] or f'{ord(_LETTERS.get(found[2], found[2])):02X}'}", text)
