"""The layout: what stands where in the file, how large it is, and how a cell is packed.

    header      512 words           the words named in `Header`
    processes   1,024 x 4 words     pid, since when; which numbers are taken is told by locks, not by this
    peaks       1,024 x 128 bytes   name of a policy (hash and text), the most that were in flight on one of its keys
    states      1 byte per cell     FREE, HELD, QUEUED, EVICTED or ASKED: writing it is what takes or gives a slot
    cells       448 bytes each      16 words and room for text: one holder or waiter
    index       64 bytes each       two entries per cell: totals and queue of each semaphore, made from states and cells

One who waits has a cell for each slot it asks for: QUEUED where it stands in line, ASKED where it does not. They have one
ticket, and each names the next of them, in a ring. Neither counts.

A cell counts by its weight. Its owner is a process's number, or NOBODY: it was handed over, and lives to the end of its lease.

States and cells are the truth. All else can be made from them. Words are native, 64 bits and aligned. A program that lays out
anything differently must have another `VERSION`, which is part of the file's name.
"""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

VERSION: Final = 1
#: The first word of the file.
MAGIC: Final = int.from_bytes(b"inflight", "little")
WORD: Final = 8

PROCESSES: Final = 1024
#: The owner of a cell that was handed over and is claimed by nobody yet: no process's number, so no lock tells that it died.
NOBODY: Final = PROCESSES
DEFAULT_CELLS, FEWEST_CELLS, MOST_CELLS = 16_384, 64, 1_048_576

# States of a cell.
FREE, HELD, QUEUED, EVICTED, ASKED = range(5)


class Header:
    """Words of the header."""

    MAGIC, VERSION, CELLS = 0, 1, 2
    #: When the table was wiped (monotonic ns): a table that has another one than before is not the same any more.
    WIPED = 3
    #: Somebody is changing the index, or died or was thrown out while doing so: it has to be made anew.
    DIRTY = 4
    #: The number of the last take. It begins at WIPED, so no number comes twice in one file.
    TICKET = 5
    #: When somebody last looked for lapsed holders and dead processes (monotonic ns).
    SWEPT = 6
    #: No cell below this one is free; no cell from the other one on is in use.
    HINT, HIGH = 7, 8
    #: Cells that are QUEUED.
    WAITING = 9
    #: How often the index was made anew, and how many slots were taken from the dead and the lapsed. For people.
    REBUILT, RECLAIMED = 10, 11
    #: Which run of the machine the table was wiped in, or 0 where that is not known (see `opening`).
    BOOT = 12


class Cell:
    """Words of a cell."""

    #: The semaphore, see `semaphore`; `HI` is never 0.
    HI, LO = 0, 1
    #: Of the take that wrote it: whoever remembers a cell knows by this whether it is still his.
    TICKET = 2
    #: The process's number (or NOBODY) in the upper half, the weight in the lower.
    OWNER = 3
    #: Monotonic ns.
    SINCE, EXPIRES = 4, 5
    #: The limit that the caller applied, and its ttl in ns. For a waiter: what it asks for.
    LIMIT, TTL = 6, 7
    #: For waiters: the next cell of the same line plus 1, and whom to wake (0: nobody can be).
    NEXT, WAKE = 8, 9
    #: The cell before it in the line plus 1; the next cell of the same waiter plus 1; the number by which it joined the line
    #: and by which lines are made anew (one of the takes'; 0: it stands in none); the number of its place, one more than that
    #: of the one before it was; whether it waits for this slot (0) or takes it along where one is free (1). One word is free.
    PREVIOUS, SIBLING, TURN, NUMBER, ALONG = 10, 11, 12, 13, 14

    WORDS = 56


class Entry:
    """Words of an entry of the index. An entry with `HI` 0 is empty; `HEAD` and `TAIL` are cells plus 1. Two are free."""

    HI, LO, TOTAL, WAITING, HEAD, TAIL = range(6)

    WORDS = 8


class Peak:
    """Words of a peak, which is empty where `HI` is 0 and has text from `TEXT` on. It stands at `HI` modulo PEAKS or behind."""

    HI, LO, MOST, TEXT = range(4)

    WORDS = 16


PEAKS: Final = 1024
#: Bytes of text in a peak.
NAME_ROOM: Final = (Peak.WORDS - Peak.TEXT) * WORD
#: Hex digits of the hash that tell apart names that were cut.
TOLD_BY: Final = 12

WEIGHT_MASK: Final = 0xFFFF_FFFF
#: The largest number that a word takes.
MOST: Final = 2**64 - 1

#: Bytes of text in a cell. A token is 33 bytes at most. Names and keys of people's own are rarely longer than the rest, and
#: with the words they fill seven cache lines.
TOKEN_ROOM, POLICY_ROOM, KEY_ROOM, PATH_ROOM = 40, 64, 104, 112
#: A whole cell: the words up to the ttl, the others 0, the token, policy and key (see `named`), the path.
CELL: Final = struct.Struct(f"@8Q64x{TOKEN_ROOM}s{POLICY_ROOM + KEY_ROOM}s{PATH_ROOM}s")
assert CELL.size == Cell.WORDS * WORD
_TEXTS: Final = struct.Struct(f"128x{TOKEN_ROOM}s{POLICY_ROOM}s{KEY_ROOM}s{PATH_ROOM}s")


class Layout:
    """Where the parts begin, for a number of cells (a power of two). In bytes; `*_word` in words."""

    __slots__ = (
        "cells",
        "cells_at",
        "cells_word",
        "entries",
        "index_at",
        "index_word",
        "peaks_at",
        "peaks_word",
        "processes_word",
        "size",
        "states_at",
    )

    def __init__(self, cells: int) -> None:
        self.cells, self.entries = cells, 2 * cells
        self.processes_word = 512
        self.peaks_at = 4096 + PROCESSES * 32
        self.states_at = self.peaks_at + PEAKS * Peak.WORDS * WORD
        self.cells_at = self.states_at + cells
        self.index_at = self.cells_at + cells * CELL.size
        self.size = self.index_at + self.entries * Entry.WORDS * WORD
        self.cells_word, self.index_word = self.cells_at // WORD, self.index_at // WORD
        self.peaks_word = self.peaks_at // WORD


def rounded(slots: int) -> int:
    """The power of two that is not less."""
    return 1 << (slots - 1).bit_length()


def semaphore(policy: str, digest: bytes) -> tuple[int, int]:
    """The name of a semaphore in the table: two words, the first never 0.

    The length goes before the policy's name, so that no two pairs read alike.
    """
    name = policy.encode("utf-8", "surrogatepass")
    whole = blake2b(len(name).to_bytes(4, "little") + name + digest, digest_size=16).digest()
    return int.from_bytes(whole[:8], "little") or 1, int.from_bytes(whole[8:], "little")


#: A semaphore's two words, and its policy and key as they stand in a cell.
Named = tuple[int, int, bytes]


@lru_cache(2048)
def named(policy: str, digest: bytes, text: str) -> Named:
    """What a cell says of its semaphore; `text` is the key for people."""
    texts = fitted(policy, POLICY_ROOM).ljust(POLICY_ROOM, b"\0") + fitted(text, KEY_ROOM).ljust(KEY_ROOM, b"\0")
    return (*semaphore(policy, digest), texts)


def peak_name(policy: str) -> tuple[int, int, bytes]:
    """What stands in the place of a policy's peak: two words of hash, the first never 0, and its name; a name that is too long
    is cut, and ends with `~` and digits of the hash."""
    name = policy.encode("utf-8", "surrogatepass")
    whole = blake2b(name, digest_size=16, person=b"peak").digest()
    text = fitted(policy, NAME_ROOM)
    if len(name) > NAME_ROOM:
        text = fitted(policy, NAME_ROOM - TOLD_BY - 1) + b"~" + whole.hex()[:TOLD_BY].encode()
    return int.from_bytes(whole[:8], "little") or 1, int.from_bytes(whole[8:], "little"), text


def fitted(text: str, room: int) -> bytes:
    """The text in UTF-8, cut between two characters where there is no room for more."""
    raw = text.encode("utf-8", "backslashreplace")
    return raw if len(raw) <= room else raw[:room].decode("utf-8", "ignore").encode()


def readable(raw: bytes) -> str:
    """What `fitted` has made."""
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def is_nobodys(raw: bytes) -> bool:
    """Is this the content of a cell that was handed over?"""
    return int.from_bytes(raw[Cell.OWNER * WORD : (Cell.OWNER + 1) * WORD], sys.byteorder) >> 32 == NOBODY


def unpack_text(raw: Any, at: int) -> tuple[str, str, str, str]:
    """The policy, the key, the token and the path in the cell at the byte `at`."""
    token, policy, key, path = map(readable, _TEXTS.unpack_from(raw, at))
    return policy, key, token, path
