"""The pace of the lines: how long it takes until the next one's turn, as waiters of this process have seen it; by policy."""

from __future__ import annotations

import math
import random

#: How much the latest sight counts against all before it.
WEIGHT = 0.3
#: Seconds that are told at most.
LONGEST = 120
#: What is told is spread upwards by so much at most, or everybody would come back at once.
SPREAD = 0.5

_seconds: dict[str, float] = {}


def seen(policy: str, turns: int, seconds: float) -> None:
    """Within so many seconds a waiter came forward by so many places; the first turn is the slot itself."""
    if turns > 0:
        latest = seconds / turns
        known = _seconds.get(policy)
        _seconds[policy] = latest if known is None else known + WEIGHT * (latest - known)


def retry_after(policy: str, turns: int) -> int | None:
    """Whole seconds until it is worth coming back, for one who stood behind so many turns; None where nothing was seen."""
    each = _seconds.get(policy)
    if each is None:
        return None
    return max(1, min(LONGEST, math.ceil(each * turns * (1 + SPREAD * random.random()))))


def forget() -> None:
    """Nothing was seen."""
    _seconds.clear()
