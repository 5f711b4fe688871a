"""The peaks in the table: how many were in flight at most, for people. No take and no release looks at them.

Whoever calls anything here holds the table's lock. A process may be killed between any two steps: a peak is there when its
first word says so, which is written last; and one that stands there twice, as a reset was cut short, counts as the higher.
"""

from __future__ import annotations

from collections.abc import Mapping

from .layout import NAME_ROOM, PEAKS, WORD, Peak, peak_name, readable
from .table import Table


def note(table: Table, peaks: Mapping[str, int], now: int) -> None:
    """Each is raised to this. One for which there is no room is left out: there are as many places as anybody has policies."""
    words = table.words
    for policy, most in peaks.items():
        hi, lo, text = peak_name(policy)
        at = _place(table, hi, lo)
        if at is None:
            continue
        if not words[at]:
            byte = (at + Peak.TEXT) * WORD
            table.map[byte : byte + NAME_ROOM] = text.ljust(NAME_ROOM, b"\0")
            words[at + Peak.LO], words[at + Peak.MOST] = lo, most
            words[at] = hi
        elif words[at + Peak.MOST] < most:
            words[at + Peak.MOST] = most


def peaks(table: Table, _: None, now: int) -> dict[str, int]:
    """Policy -> the most."""
    found: dict[str, int] = {}
    start = table.layout.peaks_word
    for number, hi in enumerate(table.words[start : start + PEAKS * Peak.WORDS : Peak.WORDS].tolist()):
        if hi:
            at = start + number * Peak.WORDS
            byte = (at + Peak.TEXT) * WORD
            name = readable(table.map[byte : byte + NAME_ROOM])
            found[name] = max(found.get(name, 0), table.words[at + Peak.MOST])
    return found


def reset(table: Table, _: None, now: int) -> None:
    """None was in flight."""
    at, end = table.layout.peaks_at, table.layout.states_at
    table.map[at:end] = bytes(end - at)


def _place(table: Table, hi: int, lo: int) -> int | None:
    """The word at which this peak is, or is to be; None where all places are others'."""
    for number in range(hi, hi + PEAKS):
        at = table.layout.peaks_word + number % PEAKS * Peak.WORDS
        if not table.words[at] or (table.words[at], table.words[at + Peak.LO]) == (hi, lo):
            return at
    return None
