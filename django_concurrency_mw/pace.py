"""The pace of the lines: how long it takes until the next one's turn, as waiters of this process have seen it; by policy."""

from __future__ import annotations

import math
import random
import weakref

from .policies import Policy

#: How much the latest sight counts against all before it.
WEIGHT = 0.3
#: Seconds that are told at most.
LONGEST = 120
#: What is told is spread upwards by so much, and by a second at least, or everybody would come back at once.
SPREAD = 0.5

#: Of the policies that there are.
_seconds: weakref.WeakKeyDictionary[Policy, float] = weakref.WeakKeyDictionary()


def seen(policy: Policy, turns: int, seconds: float) -> None:
    """Within so many seconds a waiter came forward by so many places; the first turn is the slot itself. By none: the next
    turn takes longer than that."""
    known = _seconds.get(policy)
    if turns <= 0:
        _seconds[policy] = seconds if known is None else max(known, seconds)
    else:
        latest = seconds / turns
        _seconds[policy] = latest if known is None else known + WEIGHT * (latest - known)


def retry_after(policy: Policy, turns: int) -> int | None:
    """Whole seconds until it is worth coming back, for one who stood behind so many turns; None where nothing was seen."""
    each = _seconds.get(policy)
    if each is None:
        return None
    soonest = math.ceil(min(each * turns, LONGEST / (1 + SPREAD))) or 1
    return random.randint(soonest, max(soonest + 1, math.floor(soonest * (1 + SPREAD))))
