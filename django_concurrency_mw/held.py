"""One slot that a request holds: since when, until when by the last word of its store, and when it wants to be renewed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .outcomes import Slot
from .policies import Policy

#: A lease is renewed when this part of its ttl has passed, so that two renewals may fail before it ends.
RENEW_AFTER = 1 / 3
NEVER = float("inf")


class Held:
    """One slot in a lease. Times are monotonic seconds, read before the store was asked, so never later than its own."""

    #: The store said that it is held. Until then nobody counts it.
    confirmed = False
    #: Counted by this process alone, as its store failed.
    local = False
    #: The store may count it all the same: it did not say.
    maybe = False
    #: When the store was heard to count it; until then it does not.
    registered = NEVER
    #: The store says that it is gone: lapsed, or taken away.
    lost = False
    #: It is somebody else's now, so it is not given back.
    handed = False
    #: The store is just asked to count it again.
    restoring = False
    #: `slot_acquired` was sent, so `slot_released` will be.
    announced = False
    #: When it wants to be renewed, or registered.
    due = NEVER
    #: The token of the take that a stand-in stands for: it has one of its own, as that take is undone.
    instead_of: str | None = None

    def __init__(self, store: Any, policy: Policy, slot: Slot, now: float) -> None:
        """`now`: monotonic seconds."""
        self.store, self.policy, self.slot, self.since = store, policy, slot, now
        self.ends = now + slot.ttl
        if policy.renew:
            self.due = now + slot.ttl * RENEW_AFTER

    @property
    def acquisition(self) -> str:
        """The token of the take that asked for it."""
        return self.instead_of or self.slot.token

    @property
    def in_store(self) -> bool:
        """May the store count it? Then it is to be given back there."""
        return not self.local or self.maybe

    @property
    def last(self) -> float:
        """No renewal goes beyond this."""
        longest = NEVER if self.policy.max_age is None else self.policy.max_age
        return self.since + (longest if self.policy.renew else min(self.policy.ttl, longest))

    def extended(self, now: float, seconds: float) -> None:
        """It is held for so long from `now`."""
        self.ends = now + seconds
        self.due = now + seconds * RENEW_AFTER if self.policy.renew else NEVER


class Holder(Protocol):
    """A lease, as those see it who renew."""

    def holdings(self) -> Sequence[Held]:
        """What it may hold now."""

    def holds(self, held: Held) -> bool:
        """Is it still there, or was it given back?"""

    def add(self, held: Sequence[Held]) -> None:
        """It holds these too, from now on."""


def by_store(held: Sequence[Held]) -> list[tuple[Any, list[Held]]]:
    """In the order of first sight."""
    groups: dict[int, tuple[Any, list[Held]]] = {}
    for one in held:
        groups.setdefault(id(one.store), (one.store, []))[1].append(one)
    return list(groups.values())
