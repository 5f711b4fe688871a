"""The lease: what one request holds, renewed while it lives and given back exactly once, whoever asks first.

A slot is written in before it is asked for, so that whatever cuts the take short leaves nothing that nobody knows. Giving
back takes the slots out first (list.pop is atomic), so that two threads that end one request never give a slot twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import signals
from .drivers import arun, run
from .keeper import keeper
from .outcomes import PolicyResult, Slot, StoreFailed
from .policies import Policy
from .steps import Give, Notify, Steps

if TYPE_CHECKING:
    from django.http import HttpRequest

logger = logging.getLogger("django_concurrency_mw")

#: A lease is renewed when this part of its ttl has passed, so that two renewals may fail before it ends.
RENEW_AFTER = 1 / 3
#: Seconds after which a renewal that failed is tried again, at most; a short lease is tried sooner.
RENEW_AGAIN = 1.0
NEVER = float("inf")
#: Serialises the counting of `Lease.stand_in`, which looks at all leases of the process.
_counting = threading.Lock()


def _forked() -> None:
    global _counting
    _counting = threading.Lock()  # a thread that is not in the child may have held it


os.register_at_fork(after_in_child=_forked)


class Held:
    """One slot in a lease. Times are monotonic seconds; `local`: counted by this process alone, its store having failed."""

    __slots__ = ("announced", "confirmed", "due", "ends", "local", "policy", "since", "slot", "store")

    def __init__(self, store: Any, policy: Policy, slot: Slot, local: bool = False) -> None:
        self.store, self.policy, self.slot, self.local = store, policy, slot, local
        self.confirmed = local
        #: `slot_acquired` was sent, so `slot_released` will be.
        self.announced = False
        self.since = monotonic()
        self.ends = self.since + slot.ttl
        #: When its lease wants to be renewed.
        self.due = self.since + slot.ttl * RENEW_AFTER if policy.renew and not local else NEVER


class Lease:
    """What one request holds. Takes add to it, its owner releases it; a release in a forked child does nothing."""

    __slots__ = ("__weakref__", "_epoch", "_held", "_request", "fields", "results", "sharers")

    def __init__(self, request: HttpRequest | None = None) -> None:
        self._held: list[Held] = []
        self._epoch = keeper.epoch
        self._request: Callable[[], HttpRequest | None] = _nobody if request is None else weakref.ref(request)
        #: Decorators that share in owning it; 0 where a middleware does.
        self.sharers = 0
        #: (policy, limit, remaining) of each blocking policy that was asked, for the RateLimit header fields.
        self.fields: tuple[tuple[str, int, int], ...] = ()
        #: What each semaphore has said to this request; the first word stands.
        self.results: dict[tuple[str, bytes], PolicyResult] = {}

    def __bool__(self) -> bool:
        """Is there anything to give back?"""
        return bool(self._held)

    # -- for the steps (see steps.Ledger) ---------------------------------------------------------------------

    def expect(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> None:
        """These slots may be held from now on."""
        held = [Held(store, policy, slot) for policy, slot in zip(policies, slots, strict=True)]
        self._held += held
        keeper.watch(self, min(one.due for one in held))

    def confirm(self, asked: Sequence[Slot], got: Sequence[Slot]) -> None:
        """Of what one take asked for, these are held and the others are not."""
        for held in self._of(asked):
            if any(slot is held.slot for slot in got):
                held.confirmed = True
            else:
                self._strike(held)
        if not self._held:
            keeper.forget(self)

    def doubt(self, asked: Sequence[Slot]) -> None:
        """The take failed: its slots may be held, so they are given back until the store answers or their lease ends."""
        doubtful = self._of(asked)
        for held in doubtful:
            self._strike(held)
        if not self._held:
            keeper.forget(self)
        _give_later(doubtful)

    def _of(self, slots: Sequence[Slot]) -> list[Held]:
        return [held for held in list(self._held) if any(slot is held.slot for slot in slots)]

    def _strike(self, held: Held) -> None:
        # It is gone already where another thread ended the request meanwhile, and gave it back.
        with contextlib.suppress(ValueError):
            self._held.remove(held)

    def stand_in(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> tuple[bool, tuple[int, ...]]:
        """The store failed: count what this process itself holds there, in the store and in its stead."""
        with _counting:
            counts = {slot.semaphore: 0 for slot in slots}
            for held in _all_held():
                if held.confirmed and held.store is store and held.slot.semaphore in counts:
                    counts[held.slot.semaphore] += 1
            if any(counts[slot.semaphore] >= slot.limit for slot in slots):
                return False, tuple(counts[slot.semaphore] for slot in slots)
            self._held += [Held(store, policy, slot, local=True) for policy, slot in zip(policies, slots, strict=True)]
            keeper.watch(self, NEVER)
            return True, tuple(counts[slot.semaphore] + 1 for slot in slots)

    # -- giving back --------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Give everything back from a thread (or an event loop, where the store's call is short). Never raises."""
        if self._held:
            run(self.steps_to_give())

    async def arelease(self) -> None:
        """Give everything back on an event loop. Never raises but for a cancel."""
        if self._held:
            await arun(self.steps_to_give())

    def announce(self, token: str) -> None:
        """What this acquisition holds is told of, now and when it is given back."""
        for held in list(self._held):
            held.announced = held.announced or held.slot.token == token

    def steps_to_give(self, token: str | None = None) -> Steps[None]:
        """Give everything back, or what one acquisition took, by its token."""
        groups = _by_store(self._pop(token))
        if token is None:
            self.results.clear()
        if not self._held:
            keeper.forget(self)
        if self._epoch is not keeper.epoch:
            return
        while groups:
            store, group = groups[0]
            slots = tuple(held.slot for held in group if not held.local)
            try:
                reply: Sequence[bool] | StoreFailed = ()
                if slots:
                    reply = yield from Give(store, slots)
                yield from self._given(store, group, slots, reply)
            except BaseException:  # cancelled half way: nobody has these slots any more but us
                for _, rest in groups:
                    _give_later(rest)
                raise
            del groups[0]

    def _given(
        self, store: Any, group: Sequence[Held], slots: Sequence[Slot], reply: Sequence[bool] | StoreFailed
    ) -> Steps[None]:
        now = monotonic()
        if isinstance(reply, StoreFailed):
            logger.warning("a release failed, it will be tried again until its lease ends: %s", reply.error)
            _give_later(group)
            reply = [True] * len(slots)
        still = iter(reply)
        for held in group:
            was_held = True if held.local else next(still)
            if not held.confirmed:
                continue
            if not was_held:
                _warn_late(held.policy, now - held.since)
            if held.announced and signals.slot_released.has_listeners(Policy):
                yield from Notify(
                    signals.slot_released,
                    {
                        "sender": Policy,
                        "request": self._request(),
                        "policy": held.policy,
                        "key": held.slot.key.text,
                        "limit": held.slot.limit,
                        "held": was_held,
                    },
                )

    def _pop(self, token: str | None) -> list[Held]:
        taken: list[Held] = []
        if token is not None:
            for held in [held for held in list(self._held) if held.slot.token == token]:
                try:
                    self._held.remove(held)
                except ValueError:  # another thread gives back too
                    continue
                taken.append(held)
            return taken
        while self._held:
            try:
                taken.append(self._held.pop())
            except IndexError:  # another thread gives back too
                break
        return taken

    # -- for the keeper -----------------------------------------------------------------------------------------

    def renew(self, now: float) -> float:
        """Renew what is due. Returns when to ask again (monotonic seconds)."""
        due = [held for held in list(self._held) if held.due <= now and held.confirmed]
        for store, group in _by_store(due):
            self._renew(store, group, now)
        return min((held.due if held.due > now else now + RENEW_AGAIN for held in list(self._held)), default=NEVER)

    def _renew(self, store: Any, group: Sequence[Held], now: float) -> None:
        wanted = []
        for held in group:
            last = NEVER if held.policy.max_age is None else held.since + held.policy.max_age
            if held.ends < last:
                wanted.append((held, min(held.policy.ttl, last - now)))
            elif now < last:  # its lease ends then as it stands
                held.due = last
            else:
                held.due = NEVER
                _warn_max_age(held.policy.name, held.policy.max_age)
        if not wanted:
            return
        try:
            reply = tuple(store.renew([(held.slot, seconds) for held, seconds in wanted]))
            if len(reply) != len(wanted):
                raise ValueError(f"{len(reply)} answers to {len(wanted)} renewals")
        except Exception as error:
            logger.warning("a renewal failed, it will be tried again: %r", error)
            for held, _ in wanted:
                held.due = now + min(RENEW_AGAIN, held.policy.ttl * RENEW_AFTER / 2)
            return
        for (held, seconds), still in zip(wanted, reply, strict=True):
            held.ends = now + seconds if still else held.ends
            held.due = now + seconds * RENEW_AFTER if still else NEVER


def _nobody() -> None:
    return None


def _all_held() -> Iterator[Held]:
    for lease in keeper.live():
        if isinstance(lease, Lease):
            yield from list(lease._held)


def _give_later(group: Sequence[Held]) -> None:
    """Leave these to the keeper."""
    for store, some in _by_store([held for held in group if not held.local]):
        keeper.give_later(store, [held.slot for held in some], max(held.ends for held in some))


def _by_store(taken: Sequence[Held]) -> list[tuple[Any, list[Held]]]:
    groups: dict[int, tuple[Any, list[Held]]] = {}
    for held in taken:
        groups.setdefault(id(held.store), (held.store, []))[1].append(held)
    return list(groups.values())


@lru_cache(maxsize=1024)
def _once(policy: str, what: str) -> list[bool]:
    return [True]


def _first_time(policy: str, what: str) -> bool:
    """Once per process and policy."""
    flag = _once(policy, what)
    try:
        return flag.pop()
    except IndexError:
        return False


def _warn_late(policy: Policy, age: float) -> None:
    if not _first_time(policy.name, "late"):
        return
    if not policy.renew:
        cure = "Raise `ttl` above the longest request, or let it be renewed (`renew: true`)."
    elif policy.max_age is not None and age >= policy.max_age:
        cure = "It was older than `max_age`: raise that, or look for the request that hangs."
    else:
        cure = (
            "The process may have been stopped for longer than the ttl, or an operator took the slot away: raise `ttl`."
        )
    logger.warning(
        "policy %s: a request gave its slot back after %.1f s, when its lease (ttl %g s) had ended and somebody else may have "
        "had the slot. %s (Said once per process and policy.)",
        policy.name,
        age,
        policy.ttl,
        cure,
    )


def _warn_max_age(policy: str, max_age: float | None) -> None:
    if _first_time(policy, "max_age"):
        logger.warning(
            "policy %s: a request holds its slot for max_age (%s s); the slot is not renewed any more and will be given to "
            "somebody else. Raise `max_age` where requests may live as long, or look for the one that hangs. (Said once per "
            "process and policy.)",
            policy,
            max_age,
        )
