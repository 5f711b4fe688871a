"""The formats: one row for each kind of access log, and what the first lines of a log say about its kind.

A row says whether the stamp is the start of a request or its end, and how fine it is. Where two rows could be meant that differ
in this, nothing is guessed: the person has to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ..exceptions import did_you_mean, shown
from .stamps import UNITS

Kind = Literal["start", "end"]

#: What a line says: stamp, method, target, address, duration, the server's own duration, status, and further values.
Raw = tuple[Any, ...]
Parser = Callable[[str], "Raw | None"]


class FormatError(Exception):
    """The log cannot be read in this way; the message has the cure."""


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of log. `unit` is that of its duration; `line` is what to write to get it, and `whole` that its stamps are
    whole seconds (None: the first lines tell)."""

    name: str
    what: str
    stamp: Kind
    unit: str
    whole: bool | None
    line: str


_NGINX = (
    'log_format timed \'$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent '
    '"$http_referer" "$http_user_agent" $request_time $upstream_response_time'
)
_GUNICORN = '--access-logformat \'%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s "%(f)s" "%(a)s" '
_APACHE = (
    'LogFormat "%a %l %u [%{%d/%b/%Y:%H:%M:%S}t.%{usec_frac}t %{%z}t] \\"%r\\" %>s %b \\"%{Referer}i\\" '
    '\\"%{User-Agent}i\\" %D" timed'
)

#: In the order in which they are listed.
FORMATS: Final[Mapping[str, Format]] = {
    row.name: row
    for row in (
        Format("nginx", "nginx: combined, $request_time", "end", "s", True, f"{_NGINX} $msec';"),
        Format("nginx-msec", "nginx: combined, $request_time, $msec", "end", "s", False, f"{_NGINX} $msec';"),
        Format("gunicorn", "gunicorn: its own format, %(L)s", "end", "s", True, f"{_GUNICORN}%(L)s'"),
        Format("gunicorn-us", "gunicorn: its own format, %(D)s", "end", "us", True, f"{_GUNICORN}%(L)s'"),
        Format("gunicorn-ms", "gunicorn: its own format, %(M)s", "end", "ms", True, f"{_GUNICORN}%(L)s'"),
        Format("apache", "Apache: combined, %D", "start", "us", None, _APACHE),
        Format(
            "json",
            "one JSON object a line",
            "end",
            "",
            None,
            'log_format timed escape=json \'{"msec":$msec,"request_time":$request_time,'
            '"upstream_response_time":"$upstream_response_time","remote_addr":"$remote_addr",'
            '"request_method":"$request_method","request_uri":"$request_uri","status":$status}\';',
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the person said of the log. `fields`: our name -> the log's."""

    format: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None
    stamp: Kind | None = None
    assumed: float | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How the lines of one log are read. `available`: which of our fields they have; units in microseconds.

    `parser` is called with the further fields that are needed, and the parser that it makes gives them in that order.
    """

    format: Format
    stamp: Kind
    whole: bool
    unit: float
    #: Of the upstream's time.
    served_unit: float
    available: frozenset[str]
    parser: Callable[[Sequence[str]], Parser]


#: Our own fields that every policy may need, and those of which a log has many: `header.X-Api-Key`.
PLAIN_FIELDS: Final = ("time", "duration", "upstream", "method", "path", "ip", "status", "user", "session", "host")
#: Names that an error message lists.
MOST_LISTED: Final = 40
_PLAIN = re.compile(r"[\w.$@-]{1,80}")
_NAMED_FIELDS = re.compile(r"(?:header\.[\w-]+|user(?:\.\w+)+|session\.[\w-]+)")


def parse_field(text: str) -> tuple[str, str]:
    """`user=NAME` as (our field, the log's name). Raises: FormatError."""
    name, equals, source = text.partition("=")
    if not equals or not source:
        raise FormatError(f"--field {shown(text)}: expected OURS=THEIRS, such as user=uid or header.X-Api-Key=api_key")
    if name not in PLAIN_FIELDS and not _NAMED_FIELDS.fullmatch(name):
        raise FormatError(
            f"--field {shown(text)}: unknown field {shown(name)}{did_you_mean(name, PLAIN_FIELDS)}; there are "
            f"{', '.join(PLAIN_FIELDS)}, header.NAME, user.NAME and session.NAME"
        )
    return canonical(name), source


def canonical(name: str) -> str:
    """One spelling for a field: a header's name has no case."""
    return name.lower().replace("_", "-") if name.startswith("header.") else name


def listed(names: Iterable[str]) -> str:
    """The names that a log has, for an error message: what is no plain word may be anything."""
    names = list(names)
    few = ", ".join(name if _PLAIN.fullmatch(name) else shown(name) for name in names[:MOST_LISTED])
    return few if len(names) <= MOST_LISTED else f"{few} and {len(names) - MOST_LISTED:,} more"


def unit_of(name: str, said: str | None) -> str | None:
    """The unit of a duration: as the person says, else as its name does."""
    if said is not None:
        return said
    if name.rpartition(".")[2] in _IN_SECONDS:
        return "s"
    ending = re.search(r"(?:_|\b|(?<=[a-z]))(ms|us|ns|s|sec|seconds|millis|micros|msec|usec|Ms|Us|Ns)$", name)
    if ending is None or (ending[1] == "s" and not name.endswith("_s")):
        return None
    return {"sec": "s", "seconds": "s", "millis": "ms", "micros": "us", "msec": "ms", "usec": "us"}.get(
        ending[1], ending[1].lower()
    )


_IN_SECONDS = frozenset({"request_time", "upstream_response_time", "rt", "urt"})


def without_duration(place: str, formats: Sequence[Format]) -> FormatError:
    """A line that has no duration, and the line that lets the server write one."""
    lines = "\n".join(f"    {row.line}" for row in formats)
    what = "this line" if len(formats) == 1 else "the line of your server"
    return FormatError(
        f"{place}: no duration, so when the request began is unknown. Add {what} to its configuration, or say "
        f"--assume-duration SECONDS:\n{lines}"
    )


def unit_in_microseconds(name: str, said: str | None, place: str) -> float:
    """Of a duration of the log's that has this name. Raises: FormatError where nothing tells."""
    unit = unit_of(name, said)
    if unit is None:
        raise FormatError(f"{place}: is {shown(name)} in seconds or in milliseconds? Say --unit {'|'.join(UNITS)}")
    return UNITS[unit]


def recognise(sample: Sequence[tuple[str, str]], wanted: Wanted) -> Layout:
    """How to read a log that begins with these lines, each with its place. Raises: FormatError."""
    from . import json_lines, text_lines

    if not sample:
        raise FormatError("the log is empty")
    if wanted.format == "json" or (wanted.format is None and sample[0][1].lstrip().startswith("{")):
        return json_lines.layout(sample, wanted)
    return text_lines.layout(sample, wanted)
