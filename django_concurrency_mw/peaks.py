"""Peaks: the most that takes saw in flight, per store and policy, until the store has noted it for people.

A request only compares. What is more than anything before is kept under a lock, and the first of a window asks the keeper to
pass all of it on to the store, NOTE_EVERY seconds later or at the exit of the process. A note that fails is kept for the next
one. A note also tells the store who this process is, so it is repeated as long as the process holds anything there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, Final

from . import afresh
from .backends.base import PROBE, BaseBackend
from .keeper import keeper
from .outcomes import Slot

logger = logging.getLogger("django_concurrency_mw")

#: Seconds from the first take of a window to its note.
NOTE_EVERY = 2.0
#: Seconds between two notes of a process that only holds; less than half of what a store keeps of a process.
STILL_HERE_EVERY = 240.0

NOTHING: Final[Mapping[str, int]] = {}


def seen(store: BaseBackend, slots: Sequence[Slot], in_flight: Sequence[int]) -> None:
    """A take's reply: this much is in flight on the semaphore of each slot. Never raises, never waits for a store."""
    most = most_seen.get(id(store), NOTHING)
    for slot, count in zip(slots, in_flight):  # noqa: B905  # strict is slow
        if count > most.get(slot.policy, 0):
            _keep(store, slot.policy, count)


def held(store: BaseBackend) -> None:
    """This process holds something there that it did not take: who it is is to be noted all the same."""
    _keep(store, "", 0)


def _keep(store: BaseBackend, policy: str, count: int) -> None:
    if policy == PROBE:
        return
    number = id(store)
    with _changing:
        most = most_seen.get(number)  # it may be a later window than the caller's
        if most is None:
            # The call first: whatever comes in between, no window is left without one.
            _call_later(NOTE_EVERY, partial(_note, number))
            if number not in _stores:
                _stores[number] = weakref.ref(store, partial(_gone, number))
            most = most_seen[number] = {}
        if count > most.get(policy, 0):
            most[policy] = count


def _note(number: int) -> None:
    """In the keeper's thread, or at exit: pass a window on. A store that fails is not asked, and one that does is not blamed:
    its requests will notice."""
    with _changing:
        store, most = _store(number), most_seen.get(number)
        if store is None or most is None:
            return
        if store.failure is not None:
            _call_later(NOTE_EVERY, partial(_note, number))
            return
        del most_seen[number]
    try:
        store.note(most)
    except BaseException as error:  # whatever a store raises: the thread is the keeper's
        logger.debug("backend %s: peaks could not be noted yet: %r", store.config.alias, error)
        held(store)
        for policy, count in most.items():
            _keep(store, policy, count)
        return
    with _changing:
        watched = number in _noted
        _noted[number] = monotonic()
    if not watched:
        _call_later(STILL_HERE_EVERY, partial(_still_here, number))


def _still_here(number: int) -> None:
    """In the keeper's thread: what is held for long belongs to a process that is known. Ends when nothing is held."""
    store, now = _store(number), monotonic()
    leases: list[Any] = keeper.live()
    if store is None or not any(one.store is store for lease in leases for one in lease.holdings()):
        _noted.pop(number, None)
        return
    left = _noted.get(number, 0.0) + STILL_HERE_EVERY - now
    if left <= 0:
        held(store)
        left = STILL_HERE_EVERY
    _call_later(left, partial(_still_here, number))


def _call_later(seconds: float, call: Any) -> None:
    with contextlib.suppress(RuntimeError):  # there is no room for the keeper's thread: it is done at exit then
        keeper.at(seconds, call)


def _store(number: int) -> BaseBackend | None:
    known = _stores.get(number)
    return None if known is None else known()


def _gone(number: int, _: object) -> None:
    """From a garbage collection, wherever that is: without a lock. No other store can have its number before."""
    for known in (most_seen, _stores, _noted):
        known.pop(number, None)


#: By the id of a store, which must not be kept alive: a look-up by a weak reference would cost more than all the rest.
most_seen: dict[int, dict[str, int]] = {}
_stores: dict[int, weakref.ref[BaseBackend]] = {}
#: When a store that is looked after was told last.
_noted: dict[int, float] = {}
#: An RLock: a garbage collection inside may end a stream, whose own code may take a slot.
_changing: Any = threading.RLock()


def _forked() -> None:
    """What the parent saw it notes itself; and its keeper's calls are not made in the child."""
    global _changing
    _changing = threading.RLock()
    most_seen.clear()
    _stores.clear()
    _noted.clear()


afresh.begin_with(_forked)
