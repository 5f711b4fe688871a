"""Stand-ins: what this process holds in a store's stead while that fails, so that a cap is kept there all the same.

Whoever takes one counts what all leases of the process hold; and of a take and a stand-in at the same time one sees the other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import afresh
from .held import Held, Holder
from .keeper import keeper
from .outcomes import Slot
from .tokens import new_token

if TYPE_CHECKING:
    from .policies import Policy

#: Seconds after which a stand-in is registered with its store, if that works again by then.
REGISTER_AFTER = 0.1
#: Seconds for which a take may be under way that does not know of one that has been registered.
KNOWN_AFTER = 60.0
#: Serialises the counting of `stand_in`, which looks at all leases of the process. An RLock: a garbage collection inside may
#: end a stream, whose own code may come back here.
_counting = threading.RLock()
#: id -> what this process holds in a store's stead, and whose it is; those that are over are dropped at the next look.
known: dict[int, tuple[Holder, Held]] = {}
#: Not empty while somebody counts. Who finds that with the lock held is inside a count, by a garbage collection: nothing is
#: dropped then, as what has just been put there may not be in its lease yet.
being_counted: list[bool] = []


def _forked() -> None:
    global _counting
    _counting = threading.RLock()  # a thread that is not in the child may have held it
    known.clear()
    being_counted.clear()


afresh.begin_with(_forked)


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    being_counted.append(True)
    try:
        yield
    finally:
        being_counted.pop()


def uncounted(lease: Holder, store: Any, slots: Sequence[Slot]) -> tuple[int, ...]:
    """How many of each semaphore this process holds in the store's stead, which the store does not count; empty where there is
    none. Asked after the lease has confirmed what it has of these slots."""
    if not known and not being_counted:
        return ()
    with _counting:
        if not being_counted:
            _prune()
        asked = {
            held.slot.semaphore: held.since for held in lease.holdings() if any(slot is held.slot for slot in slots)
        }
        standing = [
            held.slot
            for _, held in known.values()
            if held.store is store and (held.local or held.registered >= asked.get(held.slot.semaphore, 0.0))
        ]
        if not standing:
            return ()
        return tuple(sum(one.cost for one in standing if one.semaphore == slot.semaphore) for slot in slots)


def stand_in(
    lease: Holder, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]
) -> tuple[bool, tuple[int, ...]]:
    """The store failed: this process's own count decides, of what it holds there and in its stead. Does the lease hold all of
    it from now on, or nothing? With the counts."""
    with _counting, _marked():
        if len(being_counted) == 1:
            _prune()
        counts = {slot.semaphore: 0 for slot in slots}
        for held in _all_held():
            if held.confirmed and held.store is store and held.slot.semaphore in counts:
                counts[held.slot.semaphore] += held.slot.cost
        if any(counts[slot.semaphore] + slot.cost > slot.limit for slot in slots):
            return False, tuple(counts[slot.semaphore] for slot in slots)
        new = [_instead(store, policy, slot) for policy, slot in zip(policies, slots, strict=True)]
        known.update((id(held), (lease, held)) for held in new)
        lease.add(new)
        return True, tuple(counts[slot.semaphore] + slot.cost for slot in slots)


def _instead(store: Any, policy: Policy, slot: Slot) -> Held:
    """Counted here in the store's stead. Its token is another one, as the take that failed is still to be undone."""
    held = Held(store, policy, replace(slot, token=new_token(), memo=[]), monotonic())
    held.instead_of = slot.token
    held.confirmed = held.local = True
    held.due = held.since + REGISTER_AFTER
    return held


def _prune() -> None:
    """Forget who has ended, and who has been registered for longer than any take is under way."""
    for number, (lease, held) in list(known.items()):
        if not lease.holds(held) or held.registered < monotonic() - KNOWN_AFTER:
            known.pop(number, None)


def _all_held() -> Iterator[Held]:
    leases: list[Any] = keeper.live()
    for lease in leases:
        yield from lease.holdings()
