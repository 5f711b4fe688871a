"""Replies as they come off the wire: those of whole numbers, which nearly all are, are read here, all others by redis-py."""

from __future__ import annotations

from typing import Final

#: What a reply begins with.
NUMBER, ARRAY = b":*"
#: Followed by as many bytes, or as many replies, as their first line says; of others the first line is all.
_OF_BYTES: Final = frozenset(b"$!=")
_OF_REPLIES: Final = {ord("*"): 1, ord("~"): 1, ord(">"): 1, ord("%"): 2, ord("|"): 2}


def numbers(data: bytes) -> tuple[list[int | list[int]], int]:
    """The replies that the data begins with, up to the first that is not whole or none of numbers, and where that begins.
    Faster than one by one. Raises: ValueError for what no server says."""
    lines = data.split(b"\r\n")
    whole = len(lines) - 1  # behind the last end of a line there is none yet
    found: list[int | list[int]] = []
    at = 0
    while at < whole:
        line = lines[at]
        kind = line[:1]
        if kind == b":":
            found.append(int(line[1:]))
            at += 1
            continue
        if kind != b"*":
            break
        count = int(line[1:])
        behind = at + 1 + count
        if count < 0 or behind > whole:
            break
        each = [int(line[1:]) for line in lines[at + 1 : behind] if line[:1] == b":"]
        if len(each) < count:
            break
        found.append(each)
        at = behind
    return found, len(data) - len(lines[whole]) if at == whole else sum(map(len, lines[:at])) + 2 * at


def reply(data: bytes, at: int) -> tuple[int | list[int] | None, int]:
    """The reply that begins at `at`, and where it ends. None: one of something else than numbers. An end of -1: it is not
    whole yet. Raises: ValueError for what no server says."""
    stop = data.find(b"\r\n", at)
    if stop < 0:
        return None, -1
    kind = data[at]
    if kind == NUMBER:
        return int(data[at + 1 : stop]), stop + 2
    if kind == ARRAY and data[at + 1] != 45:  # no null of RESP 2
        return _array(data, stop + 2, int(data[at + 1 : stop]))
    return None, _end(data, at, stop)


def _array(data: bytes, at: int, count: int) -> tuple[list[int] | None, int]:
    found: list[int] = []
    for _ in range(count):
        value, at = reply(data, at)
        if at < 0:
            return None, -1
        if type(value) is int:
            found.append(value)
    return (found if len(found) == count else None), at


def _end(data: bytes, at: int, stop: int) -> int:
    """Where a reply ends whose first line ends at `stop`; -1 where that is not here yet."""
    kind, end = data[at], stop + 2
    if kind in _OF_BYTES:
        length = int(data[at + 1 : stop])
        end += length + 2 if length >= 0 else 0
        return end if end <= len(data) else -1
    replies = _OF_REPLIES[kind] * max(0, int(data[at + 1 : stop])) if kind in _OF_REPLIES else 0
    for _ in range(replies + (kind == ord("|"))):  # such a one is told of the reply that follows
        _, end = reply(data, end)
        if end < 0:
            return -1
    return end
