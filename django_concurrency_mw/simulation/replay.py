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
from typing import Any

from ..policies import Policy
from ..steps import lease_seconds
from .matching import refused
from .slots import Slots
from .stamps import SECOND

#: start, number, duration, slots
Arrival = tuple[int, int, int, tuple[int, ...]]
_FOREVER = 2**62


class Rules:
    """What the policies say, by slot, for every replay."""

    def __init__(self, policies: Sequence[Policy], slots: Slots) -> None:
        self.policies, self.slots = policies, slots
        self.costs = [policy.cost if isinstance(policy.cost, int) else 1 for policy in policies]
        #: By slot: its policy, and the most that may be in flight when a request comes. Lists: quicker than arrays.
        self.policy_of = slots.policies.tolist()
        self.rooms = [limit - self.costs[policy] for policy, limit in zip(slots.policies, slots.limits, strict=True)]
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
        self.peaks = array("i", bytes(4 * len(rules.slots))) if peaks else None
        #: Slot -> in flight as the log was.
        self._asked = [0] * len(rules.slots)
        #: Slot -> how many of those would not be in flight, as they were not let in.
        self._away: dict[int, int] = {}
        #: By policy: in flight as the log was, the most of that, the most on one key of who was let in, and requests.
        self._totals, self._most, self._admitted, self._requests = ([0] * len(rules.policies) for _ in range(4))
        #: When it is over, its slots, and those of them that it does not hold.
        self._ends: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        #: By policy, in the present window: the peak on one key, and how many would be rejected.
        self._tops, self._overs = ([0] * len(rules.policies) for _ in range(2))
        #: When the present window is over.
        self._until = -_FOREVER

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """The next ones, in order."""
        ends, asked, away, totals, until = self._ends, self._asked, self._away, self._totals, self._until
        policy_of, rooms, costs = self._rules.policy_of, self._rules.rooms, self._rules.costs
        peaks, least_cap = self.peaks, self._rules.least_cap
        requests, most, admitted, tops = self._requests, self._most, self._admitted, self._tops
        for start, _, length, slots in arrivals:
            while ends and ends[0][0] <= start:
                _, over, without = heappop(ends)
                for slot in over:
                    policy = policy_of[slot]
                    cost = costs[policy]
                    totals[policy] -= cost
                    asked[slot] -= cost
                if without:
                    self._forget(without)
            if start >= until:
                until = self._turn(start)
            without = ()
            for slot in slots:
                # Most slots have room even for those who were turned away.
                if slot < 0 or ((count := asked[slot]) > rooms[slot] and count - away.get(slot, 0) > rooms[slot]):
                    got = self._decide(slots)
                    slots = tuple([slot for slot in slots if slot >= 0])
                    without = tuple([slot for slot in slots if slot not in got])
                    for slot in without:
                        away[slot] = away.get(slot, 0) + costs[policy_of[slot]]
                    break
            for slot in slots:
                policy = policy_of[slot]
                cost = costs[policy]
                requests[policy] += 1
                total = totals[policy] = totals[policy] + cost
                if total > most[policy]:
                    most[policy] = total
                count = asked[slot] = asked[slot] + cost
                if count > tops[policy]:
                    tops[policy] = count
                if peaks is not None and count > peaks[slot]:
                    peaks[slot] = count
                if count > admitted[policy] and (held := count - away.get(slot, 0)) > admitted[policy]:
                    admitted[policy] = held
            if length <= least_cap:
                heappush(ends, (start + length, slots, without))
            else:
                self._push_capped(start, length, slots, without)

    def finish(self) -> None:
        """All arrivals were there."""
        self._turn(None)
        for policy, found in enumerate(self.figures):
            found.peak = max((peak for _, peak in found.windows.values()), default=0)
            found.total, found.admitted = self._most[policy], self._admitted[policy]
            found.requests += self._requests[policy]

    def _turn(self, start: int | None) -> int:
        """The window is over; the one of this arrival begins. When that is over."""
        at = (self._until - self._origin) // self._window - 1
        for policy, (found, over, top) in enumerate(zip(self.figures, self._overs, self._tops, strict=True)):
            if over or top:
                found.windows[at] = [over, top]
            self._overs[policy] = self._tops[policy] = 0
        if start is not None:
            self._until = start - (start - self._origin) % self._window + self._window
        return self._until

    def _forget(self, without: tuple[int, ...]) -> None:
        """The time is over of somebody who was not let into these slots."""
        for slot in without:
            left = self._away[slot] - self._rules.costs[self._rules.policy_of[slot]]
            if left:
                self._away[slot] = left
            else:
                del self._away[slot]

    def _decide(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """Not all of them are free: those that the request comes to hold all the same."""
        rules, asked, away = self._rules, self._asked, self._away
        policy_of, limits, costs, blocks = rules.policy_of, rules.slots.limits, rules.costs, rules.blocks
        missing = [slot for slot in slots if slot < 0]
        if missing:
            return self._reject(missing)
        full = [slot for slot in slots if asked[slot] - away.get(slot, 0) > rules.rooms[slot]]
        refusing = [slot for slot in full if blocks[policy_of[slot]]]
        if refusing:
            # What can never be let in is known before any store is asked.
            hopeless = [slot for slot in refusing if 0 < limits[slot] < costs[policy_of[slot]]]
            return self._reject(hopeless or refusing)
        self._count(full)  # shadow policies'
        return tuple([slot for slot in slots if slot not in full])

    def _reject(self, slots: Sequence[int]) -> tuple[int, ...]:
        self.rejected += 1
        self._count(slots)
        return ()

    def _count(self, slots: Sequence[int]) -> None:
        for slot in slots:
            policy = refused(slot) if slot < 0 else self._rules.policy_of[slot]
            found = self.figures[policy]
            found.over += 1
            self._overs[policy] += 1
            if slot < 0:
                found.requests += 1
            else:
                found.keys[slot] += 1

    def _push_capped(self, start: int, length: int, slots: tuple[int, ...], without: tuple[int, ...]) -> None:
        """Each slot with its own end: some are over before the request is."""
        for slot in slots:
            over = start + min(length, self._rules.caps[self._rules.policy_of[slot]])
            heappush(self._ends, (over, (slot,), (slot,) if slot in without else ()))


def exactly(arrivals: Iterable[Sequence[Any]], replay: Replay, step: Callable[[int], object]) -> None:
    """Replay what has exact stamps: lists of arrivals, in order."""
    for together in arrivals:
        replay.run(together)
        step(len(together))
    replay.finish()
