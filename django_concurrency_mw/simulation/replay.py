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
from .matching import refused
from .slots import Slots
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
        nothing = bytes(4 * len(rules.slots))
        #: Slot -> its peak, where that is asked for.
        self.peaks = array("i", nothing) if peaks else None
        #: Slot -> in flight: as the log was, and of those who were let in.
        self._asked, self._held = array("i", nothing), array("i", nothing)
        #: By policy: in flight as the log was, the most of that, the most on one key of who was let in, and requests.
        self._totals, self._most, self._admitted, self._requests = ([0] * len(rules.policies) for _ in range(4))
        self._ends: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        #: By policy: what the present window's entry will be, and when the window is over.
        self._now = [[0, 0] for _ in rules.policies]
        self._until = -_FOREVER

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """The next ones, in order."""
        ends, asked, held, totals = self._ends, self._asked, self._held, self._totals
        policy_of, limits, costs = self._rules.slots.policies, self._rules.slots.limits, self._rules.costs
        peaks, least_cap = self.peaks, self._rules.least_cap
        requests, most, admitted = self._requests, self._most, self._admitted
        for start, _, end, slots in arrivals:
            while ends and ends[0][0] <= start:
                _, were_asked, were_held = heappop(ends)
                for slot in were_asked:
                    policy = policy_of[slot]
                    totals[policy] -= costs[policy]
                    asked[slot] -= costs[policy]
                for slot in were_held:
                    held[slot] -= costs[policy_of[slot]]
            if start >= self._until:
                self._turn(start)
            now = self._now
            for slot in slots:
                if slot < 0 or held[slot] + costs[policy_of[slot]] > limits[slot]:
                    got = self._decide(slots)
                    slots = tuple([slot for slot in slots if slot >= 0])
                    break
            else:
                got = slots
            for slot in got:
                policy = policy_of[slot]
                count = held[slot] = held[slot] + costs[policy]
                if count > admitted[policy]:
                    admitted[policy] = count
            for slot in slots:
                policy = policy_of[slot]
                cost = costs[policy]
                requests[policy] += 1
                total = totals[policy] = totals[policy] + cost
                if total > most[policy]:
                    most[policy] = total
                count = asked[slot] = asked[slot] + cost
                if count > now[policy][1]:
                    now[policy][1] = count
                if peaks is not None and count > peaks[slot]:
                    peaks[slot] = count
            if end - start <= least_cap:
                heappush(ends, (end, slots, got))
            else:
                self._push_capped(start, end, slots, got)

    def finish(self) -> None:
        """All arrivals were there."""
        self._turn(None)
        for policy, found in enumerate(self.figures):
            found.peak = max((peak for _, peak in found.windows.values()), default=0)
            found.total, found.admitted = self._most[policy], self._admitted[policy]
            found.requests += self._requests[policy]

    def _turn(self, start: int | None) -> None:
        """The window is over; the one of this arrival begins."""
        at = (self._until - self._origin) // self._window - 1
        for found, now in zip(self.figures, self._now, strict=True):
            if now[0] or now[1]:
                found.windows[at] = now
        self._now = [[0, 0] for _ in self.figures]
        if start is not None:
            self._until = start - (start - self._origin) % self._window + self._window

    def _decide(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """Not all of them are free: those that the request comes to hold all the same."""
        rules, held = self._rules, self._held
        policy_of, limits, costs, blocks = rules.slots.policies, rules.slots.limits, rules.costs, rules.blocks
        missing = [slot for slot in slots if slot < 0]
        if missing:
            return self._reject(missing)
        full = [slot for slot in slots if held[slot] + costs[policy_of[slot]] > limits[slot]]
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
            policy = refused(slot) if slot < 0 else self._rules.slots.policies[slot]
            found = self.figures[policy]
            found.over += 1
            self._now[policy][0] += 1
            if slot < 0:
                found.requests += 1
            else:
                found.keys[slot] += 1

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
    replay.finish()
