"""JSON lines: one object a line, whose fields have names that people chose; the usual ones are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..exceptions import did_you_mean, shown
from .formats import (
    FORMATS,
    FormatError,
    Kind,
    Layout,
    Parser,
    Raw,
    Wanted,
    listed,
    unit_in_microseconds,
    without_duration,
)
from .stamps import SECOND, microseconds

#: Names by which fields are known without --field, best first. A dot goes into an object, as in Caddy's `request.uri`.
USUAL: Final[Mapping[str, tuple[str, ...]]] = {
    "time": (
        *("msec", "time_iso8601", "time", "timestamp", "ts", "@timestamp", "time_local", "datetime", "date"),
        *("started_at", "start_time", "start", "ended_at", "end_time"),
    ),
    "duration": (
        *("request_time", "duration", "duration_ms", "duration_us", "duration_ns", "duration_s", "took_ms", "took"),
        *("response_time", "response_time_ms", "elapsed", "elapsed_ms", "latency", "latency_ms", "time_taken_ms"),
    ),
    "upstream": ("upstream_response_time",),
    "method": ("method", "request_method", "request.method", "verb"),
    "path": ("request_uri", "path", "uri", "url", "request.uri", "request.path", "request_path", "request"),
    "ip": (
        *("remote_addr", "ip", "client_ip", "remote_ip", "clientip", "request.client_ip", "request.remote_ip"),
        *("remote_address", "client"),
    ),
    "status": ("status", "status_code", "response.status"),
    "host": ("host", "request.host"),
}
_STARTS = ("started_at", "start_time", "start", "started")

Get = Callable[[Any], Any]


def layout(sample: Sequence[tuple[str, str]], wanted: Wanted) -> Layout:
    """How to read a log that begins with these lines. Raises: FormatError."""
    place, first = _first(sample)
    names = dict(wanted.fields)
    for ours, usual in USUAL.items():
        found = next((name for name in usual if _usable(ours, _getter(name)(first))), None)
        if ours not in names and found is not None:
            names[ours] = found
    for ours, theirs in wanted.fields.items():
        if all(_getter(theirs)(record) is None and not _has(theirs, record) for record in _records(sample)):
            raise FormatError(
                f"{place}: no field {shown(theirs)}, which --field {ours}={theirs} names{did_you_mean(theirs, first)}. "
                f"There are {listed(first)}"
            )
    for ours in ("time", "path"):
        if ours not in names:
            raise FormatError(f"{place}: which field is the {ours}? Say --field {ours}=NAME. There are {listed(first)}")
    if "duration" not in names and "upstream" not in names and wanted.assumed is None:
        raise without_duration(place, [FORMATS["json"]])
    unit, served_unit = (
        unit_in_microseconds(names[ours], said, place) if ours in names else 1.0
        for ours, said in (("duration", wanted.unit), ("upstream", None))
    )
    get_time = _getter(names["time"])
    try:
        microseconds(get_time(first))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{place}: the stamp {shown(get_time(first))} is none that is known") from error
    fine = [_fraction(get_time(record)) for record in _records(sample)]
    starts: Kind = "start" if names["time"].rpartition(".")[2] in _STARTS else "end"

    def parser(further: Sequence[str]) -> Parser:
        return _parser(names, [_getter(names[name]) for name in further])

    return Layout(FORMATS["json"], wanted.stamp or starts, not any(fine), unit, served_unit, frozenset(names), parser)


def _parser(names: Mapping[str, str], further: Sequence[Get]) -> Parser:
    time, method, path, ip, took, served, status = (
        _getter(names[ours]) if ours in names else _nothing
        for ours in ("time", "method", "path", "ip", "duration", "upstream", "status")
    )

    def parse(line: str) -> Raw | None:
        record = _object(line)
        if record is None:
            return None
        verb, target = method(record), path(record)
        if isinstance(target, str) and " " in target:  # a whole request line
            verb, _, target = target.partition(" ")
            target = target.partition(" ")[0]
        return (
            time(record),
            verb,
            target,
            ip(record),
            took(record),
            served(record),
            status(record),
            *[_value(get(record)) for get in further],
        )

    return parse


def _object(line: str) -> dict[str, Any] | None:
    """None for what is no object, or is nested so deep that nobody reads it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _nothing(record: Any) -> None:
    return None


def _getter(name: str) -> Get:
    """The field of that name; failing this, the one that lies at that path. None where there is none."""
    first, dot, rest = name.partition(".")
    if not dot:
        return lambda record: record.get(name)
    deeper = _getter(rest)

    def get(record: Any) -> Any:
        found = record.get(name)
        if found is None and isinstance(inner := record.get(first), dict):
            return deeper(inner)
        return found

    return get


def _fraction(stamp: Any) -> int:
    """Of a second; 0 where it is no stamp: that line will be counted as broken."""
    try:
        return microseconds(stamp) % SECOND
    except (ValueError, TypeError):
        return 0


def _usable(ours: str, value: Any) -> bool:
    """What is called `client` may be an object that has the address in it: only the person knows where."""
    return isinstance(value, str) if ours == "ip" else value is not None


def _has(name: str, record: Mapping[str, Any]) -> bool:
    return name in record


def _value(value: Any) -> str | None:
    return None if value is None or value in ("", "-") else str(value)


def _records(sample: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [record for _, line in sample if (record := _object(line)) is not None]


def _first(sample: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    for place, line in sample:
        record = _object(line)
        if record is not None:
            return place, record
    raise FormatError(f"{sample[0][0]}: not a JSON object: {shown(sample[0][1])}")
