"""The watch: how often those who wait in this process ask again, though nobody has woken them.

Nobody tells of a lease that ends, nor of a process that is killed. But one who asks looks for that in all lines, so it is
enough that one of each process asks every so often: each takes the next turn that nobody has. One who leaves gives its turn
back, for whoever asks next.

Whoever calls anything here holds the table's lock.
"""

from __future__ import annotations

from random import random
from typing import Final

from ..base import ASK_AGAIN
from .layout import Header
from .table import Place, Table

#: Between two turns (ns).
TURN: Final = 100_000_000
#: The turns of one process begin so much after those of another one (ns, modulo TURN).
APART: Final = 61_803_399
#: Seconds after which one asks again whom nobody can wake.
ASK_OFTEN: Final = 0.02
#: Seconds after which the first in its line asks at the latest (the second, twice that; and so on). Whoever was killed before
#: it had served this line is found out by nobody else, and nobody else finds what it was given where the datagram was lost.
FIRST_ASKS: Final = 0.25
#: From so many on that wait, in all lines together, they ask less often.
MANY: Final = 50
#: They ask by so much sooner, at random, so that not all of them ask in one turn.
SPREAD: Final = 0.2


class Watch:
    """Of this process, in one table."""

    __slots__ = ("turns",)

    def __init__(self) -> None:
        #: Who has which, by the number of the turn since the clock began.
        self.turns: dict[int, Place] = {}

    def asks_again(self, table: Table, place: Place, before: int, now: int) -> float:
        """In how many seconds one is to ask that waits there and has so many before it. All who ask in a turn do so together,
        which costs much less than one after the other; but no two processes at once."""
        now += table.number * APART % TURN
        crowd = max(1.0, table.words[Header.WAITING] / MANY)
        seconds = min(ASK_AGAIN, FIRST_ASKS * (before + 1) * crowd) * (1 - SPREAD * random())
        next_one = (now + TURN // 2) // TURN + 1  # a timer may be a little early
        latest = max(next_one, (now + int(seconds * 1e9)) // TURN)
        turns = {
            turn: one for turn, one in self.turns.items() if turn >= next_one and one != place and table.waits(one)
        }
        mine = next((turn for turn in range(next_one, latest) if turn not in turns), latest)
        turns.setdefault(mine, place)
        self.turns = turns
        return (mine * TURN - now) / 1e9
