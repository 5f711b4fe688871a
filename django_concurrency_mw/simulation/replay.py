"""The replay: the limiter's own rules on the arrivals of a log, in the order in which they began.

At equal stamps ends come before starts. The blocking policies of a request are all or nothing, and what is turned away holds
nothing and frees its time; a shadow policy is asked only of what was let in. Beside it runs what the log says happened: every
request let in, which is where the peaks come from.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import islice
from typing import Any

from ..policies import Policy
from ..steps import lease_seconds
from .matching import Slots, refused
from .stamps import SECOND

#: start, number, end, slots
Arrival = tuple[int, int, int, tuple[int, ...]]
Record = tuple[Any, ...]
_FOREVER = 2**62
#: Records of an exact log that are replayed at once.
TOGETHER = 4096


class Rules:
    """What the policies say, by slot, for every replay."""

    def __init__(self, policies: Sequence[Policy], slots: Slots) -> None:
        self.policies, self.slots = policies, slots
        self.costs = [policy.cost if isinstance(policy.cost, int) else 1 for policy in policies]
        self.blocks = [policy.block for policy in policies]
        #: When a slot ends although its request lives, in microseconds after its start.
        self.caps = [_cap(policy) for policy in policies]
        self.least_cap = min(self.caps, default=_FOREVER)


def _cap(policy: Policy) -> int:
    if not policy.renew:
        return round(lease_seconds(policy) * SECOND)
    return _FOREVER if policy.max_age is None else round(policy.max_age * SECOND)


class Figures:
    """What one replay found of one policy. Peaks are those of the log as it was; `admitted` of those who were let in."""

    __slots__ = ("admitted", "keys", "over", "peak", "requests", "total", "windows")

    def __init__(self) -> None:
        self.requests = self.peak = self.total = self.admitted = self.over = 0
        #: Window -> [would be rejected, peak on one key].
        self.windows: dict[int, list[int]] = {}
        #: Slot -> would be rejected.
        self.keys: dict[int, int] = defaultdict(int)


class Replay:
    """One run over all arrivals. `window` is in microseconds, counted from `origin`."""

    def __init__(self, rules: Rules, window: int, origin: int, *, peaks: bool = False) -> None:
        self._rules, self._window, self._origin = rules, window, origin
        self.figures = [Figures() for _ in rules.policies]
        #: Requests that some policy would have rejected.
        self.rejected = 0
        #: Slot -> its peak, where that is asked for.
        self.peaks = array("I", bytes(4 * len(rules.slots))) if peaks else None
        self._asked: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._totals = [0] * len(rules.policies)
        self._ends: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """The next ones, in order."""
        rules, ends, asked, held, totals = self._rules, self._ends, self._asked, self._held, self._totals
        policy_of, costs, least_cap, peaks = rules.slots.policies, rules.costs, rules.least_cap, self.peaks
        window, origin, figures = self._window, self._origin, self.figures
        for start, _, end, slots in arrivals:
            while ends and ends[0][0] <= start:
                _, were_asked, were_held = heappop(ends)
                for slot in were_asked:
                    policy = policy_of[slot]
                    cost = costs[policy]
                    totals[policy] -= cost
                    left = asked[slot] - cost
                    if left:
                        asked[slot] = left
                    else:
                        del asked[slot]
                for slot in were_held:
                    left = held[slot] - costs[policy_of[slot]]
                    if left:
                        held[slot] = left
                    else:
                        del held[slot]
            at = (start - origin) // window
            got = self._admit(slots, at)
            if min(slots) < 0:
                slots = tuple([slot for slot in slots if slot >= 0])
            for slot in slots:
                policy = policy_of[slot]
                cost, found = costs[policy], figures[policy]
                found.requests += 1
                total = totals[policy] = totals[policy] + cost
                count = asked[slot] = asked.get(slot, 0) + cost
                if total > found.total:
                    found.total = total
                if count > found.peak:
                    found.peak = count
                if peaks is not None and count > peaks[slot]:
                    peaks[slot] = count
                seen = found.windows.get(at)
                if seen is None:
                    found.windows[at] = [0, count]
                elif count > seen[1]:
                    seen[1] = count
            if end - start <= least_cap:
                heappush(ends, (end, slots, got))
            else:
                self._push_capped(start, end, slots, got)

    def _admit(self, slots: tuple[int, ...], at: int) -> tuple[int, ...]:
        """Those that the request comes to hold."""
        rules, held = self._rules, self._held
        policy_of, limits, costs, blocks = rules.slots.policies, rules.slots.limits, rules.costs, rules.blocks
        if len(slots) == 1 and slots[0] >= 0:  # most are
            (slot,) = slots
            policy = policy_of[slot]
            count = held.get(slot, 0) + costs[policy]
            if count > limits[slot]:
                self._reject(slots, at, blocks[policy])
                return ()
            held[slot] = count
            if count > self.figures[policy].admitted:
                self.figures[policy].admitted = count
            return slots
        missing = [slot for slot in slots if slot < 0]
        if missing:
            self._reject(missing, at, True)
            return ()
        blocking = [slot for slot in slots if blocks[policy_of[slot]]]
        hopeless = [slot for slot in blocking if 0 < limits[slot] < costs[policy_of[slot]]]
        full = hopeless or [slot for slot in blocking if held.get(slot, 0) + costs[policy_of[slot]] > limits[slot]]
        if full:
            self._reject(full, at, True)
            return ()
        got, over = [], []
        for slot in slots:
            policy = policy_of[slot]
            count = held.get(slot, 0) + costs[policy]
            if count > limits[slot]:  # a shadow policy's
                over.append(slot)
                continue
            held[slot] = count
            got.append(slot)
            if count > self.figures[policy].admitted:
                self.figures[policy].admitted = count
        if over:
            self._reject(over, at, False)
        return tuple(got)

    def _reject(self, slots: Sequence[int], at: int, turned_away: bool) -> None:
        self.rejected += turned_away
        for slot in slots:
            found = self.figures[refused(slot) if slot < 0 else self._rules.slots.policies[slot]]
            found.over += 1
            if slot < 0:
                found.requests += 1
            else:
                found.keys[slot] += 1
            found.windows.setdefault(at, [0, 0])[0] += 1

    def _push_capped(self, start: int, end: int, slots: tuple[int, ...], got: tuple[int, ...]) -> None:
        """Each slot with its own end: some are over before the request is."""
        for slot in slots:
            ends = min(end, start + self._rules.caps[self._rules.slots.policies[slot]])
            heappush(self._ends, (ends, (slot,), (slot,) if slot in got else ()))


def exactly(records: Iterable[Record], replay: Replay, step: Callable[[int], object]) -> None:
    """Replay what has exact stamps."""
    records = iter(records)
    while together := list(islice(records, TOGETHER)):
        replay.run([(start, number, start + length, slots) for start, number, length, slots in together])
        step(len(together))
