"""Stamps and durations: the texts and numbers of a log, in whole microseconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..exceptions import shown

SECOND = 1_000_000
#: What a request may take; beyond it, a start may be in no year of the calendar.
LONGEST = 30 * 365 * 86_400 * SECOND
#: Durations that are.
REMEMBERED = 65_536
UNITS = {"s": 1_000_000.0, "ms": 1_000.0, "us": 1.0, "ns": 0.001}

_NAMES = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTHS = {name: number for number, name in enumerate(_NAMES, 1)}
_COMMON = re.compile(r"(\d\d)/([A-Z][a-z][a-z])/(\d{4}):(\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))? ([+-]\d\d):?(\d\d)")
_NUMBER = re.compile(r"(\d{1,19})(?:\.(\d+))?")
_SECONDS = re.compile(r"[0-9.]+")
#: A number is seconds, milliseconds, microseconds or nanoseconds since the epoch by its size: in all but one of them it would
#: be a time thousands of years away.
_MAGNITUDES = ((10**11, SECOND), (10**14, 1_000), (10**17, 1))


def microseconds(stamp: str | int | float) -> int:
    """Since the epoch. Raises: ValueError for what is no stamp. One without a zone is taken as UTC: only differences count."""
    if type(stamp) is str and len(stamp) == 14 and stamp[10] == ".":  # nginx's $msec, of which no two need be alike
        return int(stamp[:10] + stamp[11:]) * 1_000
    return _microseconds(stamp)


@lru_cache(maxsize=4096)
def _microseconds(stamp: str | int | float) -> int:
    if isinstance(stamp, (int, float)):
        stamp = format(stamp, "d") if isinstance(stamp, int) else repr(stamp)
    number = _NUMBER.fullmatch(stamp)
    if number:
        whole, fraction = int(number[1]), number[2] or ""
        for below, unit in _MAGNITUDES:
            if whole < below:
                return whole * unit + (int(fraction.ljust(6, "0")[:6]) * unit // SECOND if fraction else 0)
        return whole // 1_000
    common = _COMMON.fullmatch(stamp)
    if common:
        day, month, year, clock, fraction, hours, minutes = common.groups()
        if month not in _MONTHS:
            raise ValueError(f"no month is called {month}")
        stamp = f"{year}-{_MONTHS[month]:02}-{day}T{clock}.{(fraction or '0').ljust(6, '0')[:6]}{hours}:{minutes}"
    moment = datetime.fromisoformat(stamp.replace(",", "."))
    if moment.tzinfo is None:
        moment = datetime.fromisoformat(f"{moment.isoformat()}+00:00")
    if moment < _EPOCH:
        raise ValueError(f"{shown(stamp)} is before 1970")
    return (moment - _EPOCH) // _MICROSECOND


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MICROSECOND = datetime.resolution


def duration(value: str | int | float, unit: float) -> int:
    """A duration; `unit` is how many microseconds one is. Raises: ValueError."""
    took = round(float(value) * unit)
    if not 0 <= took <= LONGEST:
        raise ValueError(f"{shown(value)} is {'less than nothing' if took < 0 else 'longer than 30 years'}")
    return took


def upstream(value: str | int | float, unit: float) -> int | None:
    """nginx's times of all servers that were tried, `0.1, 0.2` or with ` : ` between, summed; None where none was: `-`."""
    if isinstance(value, (int, float)):
        return duration(value, unit)
    found = _SECONDS.findall(value)
    return sum(duration(one, unit) for one in found) if found else None


class Remembered(dict[Any, Any]):
    """`duration` or `upstream` of what is looked up, by what it was: logs say the same ones again and again."""

    def __init__(self, read: Callable[[Any, float], int | None], unit: float) -> None:
        self._read, self._unit = read, unit

    def __missing__(self, value: Any) -> int | None:
        if len(self) >= REMEMBERED:
            self.clear()
        found = self[value] = self._read(value, self._unit)
        return found


def readable(moment: int) -> str:
    """A moment for people and programs, in UTC."""
    at = datetime.fromtimestamp(moment // SECOND, _EPOCH.tzinfo)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
