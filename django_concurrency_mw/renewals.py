"""Renewals: in the keeper's thread, the leases of all requests that live long, in one call per store.

It heals by evidence. A holder that its store does not know any more was lost by the store if its last confirmed lease cannot
have ended yet and nobody took it away: it is counted again. Any other is gone for good. What this process let in while the
store was away is counted in the store from then on, too.

A request may end while its renewal is under way. The renewal itself never brings a holder back, so it may come late; a
`restore` may not, and it is followed by one more release of whatever was given back meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from . import health, notices, peaks
from .backends.base import RESTORE_WITHIN, Restore
from .held import NEVER, Held, Holder, by_store
from .keeper import keeper

logger = logging.getLogger("django_concurrency_mw")

#: Seconds after which a renewal that failed is tried again, at most; a short lease is tried sooner.
RENEW_AGAIN = 1.0
#: This part of a ttl sooner is soon enough to be renewed together with others.
EARLY = 0.03
Pair = tuple[Holder, Held]


def renew(leases: Iterable[Holder], now: float, *, back: Any = None) -> float:
    """Renew what is due. Returns when to look again (monotonic seconds), infinite where never.

    A store that fails is left alone; `back` is one that is known to work again.
    """
    known = [(lease, held) for lease in leases for held in lease.holdings()]
    due = min((held.due for _, held in known if held.confirmed), default=NEVER)
    unsure = min((max(held.due, now + _soon(held)) for _, held in known if not held.confirmed), default=NEVER)
    if due > now:
        return min(due, unsure)
    # What is due soon is renewed along with what is due now, in the same call.
    pairs = [pair for pair in known if pair[1].confirmed and pair[1].due - pair[1].policy.ttl * EARLY <= now]
    late = {id(held) for _, held in pairs}
    due = min((held.due for _, held in known if held.confirmed and id(held) not in late), default=NEVER)
    holders = {id(held): lease for lease, held in pairs}
    for store, group in by_store([held for _, held in pairs]):
        try:
            if store.failure is None or store is back:
                _renew(store, [(holders[id(held)], held) for held in group], now)
            else:
                _again(group, now)
        except Exception:
            logger.exception("leases could not be renewed, it will be tried again")
    for _, held in pairs:
        due = min(due, held.due if held.due > now else now + _soon(held))
    return min(due, unsure)


def recount(store: Any) -> None:
    """The store is back: see at once what it still knows."""
    with keeper.at_work():
        leases: list[Any] = keeper.live()
        now = monotonic()
        ending: list[Pair] = []
        for lease in leases:
            for held in lease.holdings():
                if held.store is not store or not held.confirmed or held.lost:
                    continue
                if held.local or held.ends < held.last:
                    held.due = now
                elif held.ends > now:  # not to be renewed any more, but still to be counted
                    ending.append((lease, held))
        if ending:
            _restore(store, ending)
        due = renew(leases, now, back=store)
    keeper.look_at(due)


def _renew(store: Any, pairs: Sequence[Pair], now: float) -> None:
    asked, missing = [], []
    for lease, held in pairs:
        if held.local:
            missing.append((lease, held))
        elif held.ends < held.last:
            asked.append((lease, held))
        elif now < held.last:  # its lease ends then as it stands
            held.due = held.last
        else:
            held.due = NEVER
            notices.max_age(held.policy)
    if asked:
        wanted = [(held.slot, _seconds(held, now)) for _, held in asked]
        try:
            reply = tuple(store.renew(wanted))
            if len(reply) != len(wanted):
                raise ValueError(f"{len(reply)} answers to {len(wanted)} renewals")
        except BaseException as error:  # whatever a store raises: the thread is the keeper's
            logger.warning("a renewal failed, it will be tried again: %r", error)
            _again([held for _, held in pairs], now)
            health.failed(store, error, now)
            return
        for (lease, held), (_, seconds), still in zip(asked, wanted, reply, strict=True):
            if still:
                held.extended(now, seconds)
            else:
                missing.append((lease, held))
    if missing:
        _restore(store, missing)


def _restore(store: Any, pairs: Sequence[Pair]) -> None:
    for _, held in pairs:
        held.restoring = True  # before it is seen whether it was given back or handed over
    try:
        _count_again(store, pairs)
    finally:
        for _, held in pairs:
            held.restoring = False


def _count_again(store: Any, pairs: Sequence[Pair]) -> None:
    now = monotonic()
    wanted: list[tuple[Pair, Restore]] = []
    for lease, held in pairs:
        if not lease.holds(held):
            held.due = NEVER
        elif not held.local and held.ends <= now:
            _gone(held)
        elif held.last <= now:  # counted here alone until its end
            held.due = NEVER
        else:
            until = NEVER if held.local else held.ends
            wanted.append(((lease, held), Restore(held.slot, _seconds(held, now), until)))
    if not wanted:
        return
    asked = [pair for pair, _ in wanted]
    try:
        reply = tuple(store.restore([restore for _, restore in wanted]))
        if len(reply) != len(wanted):
            raise ValueError(f"{len(reply)} answers to {len(wanted)} holders")
    except BaseException as error:
        logger.warning("holders could not be counted again yet, it will be tried again: %r", error)
        for (_, held), restore in wanted:
            if held.local:
                held.maybe, held.ends = True, max(held.ends, now + restore.seconds)
        _again([held for _, held in asked], now)
        health.failed(store, error, now)
        # It may still be carried out; after this it cannot.
        keeper.at(RESTORE_WITHIN, partial(_give_what_ended, store, asked))
        return
    if True in reply:
        peaks.held(store)
    lost = 0
    for ((_, held), restore), back in zip(wanted, reply, strict=True):
        if back:
            lost += not held.local
            if held.local:
                held.registered = monotonic()
            held.local = held.maybe = False
            held.extended(now, restore.seconds)
        elif held.local:
            held.due = NEVER  # the store cannot count it
        else:
            _gone(held)
    if lost:
        logger.warning(
            "backend %s had lost %d holders that still run; they are counted again", store.config.alias, lost
        )
    _give_what_ended(store, [pair for pair, back in zip(asked, reply, strict=True) if back])


def _give_what_ended(store: Any, pairs: Sequence[Pair]) -> None:
    """Who was given back while it was brought back is given back behind that."""
    ended = [held for lease, held in pairs if not lease.holds(held) and not held.handed]
    if not ended:
        return
    slots = [held.slot for held in ended]
    try:
        store.give(slots)
    except Exception:
        keeper.give_later(store, slots, max(held.ends for held in ended))


def _gone(held: Held) -> None:
    held.lost, held.due, now = True, NEVER, monotonic()
    notices.lost(held.policy, now - held.since, max(0.0, now - held.ends))


def _again(group: Iterable[Held], now: float) -> None:
    for held in group:
        held.due = now + _soon(held)


def _soon(held: Held) -> float:
    return min(RENEW_AGAIN, held.policy.ttl / 6)


def _seconds(held: Held, now: float) -> float:
    return min(held.slot.ttl if not held.policy.renew else held.policy.ttl, held.last - now)
