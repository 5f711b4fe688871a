"""The lease: what one request holds, renewed while it lives and given back exactly once, whoever asks first.

A slot is written in before it is asked for, so that whatever cuts the take short leaves nothing that nobody knows. Giving
back takes the slots out first (list.pop is atomic), so that two threads that end one request never give a slot twice.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

from . import health, notices, renewals, signals, stand_ins
from .backends.base import BaseBackend, age_of
from .bells import Bell
from .drivers import agive, arun, give_on_loop, run
from .effects import Give, Notify, Steps
from .handover import pack
from .held import RENEW_AFTER, Held, by_store
from .keeper import keeper
from .outcomes import Asked, LimitField, PolicyResult, Slot, StoreFailed, remaining
from .policies import Policy

if TYPE_CHECKING:
    from django.http import HttpRequest

logger = logging.getLogger("django_concurrency_mw")

#: What a store says of one slot that was held to this moment.
_ONE_GIVEN = (True,)


keeper.renew_with(renewals.renew)
health.before_recovery(renewals.recount)


class Lease:
    """What one request holds. Takes add to it, its owner releases it; a release in a forked child does nothing."""

    #: Nobody need wait for it any more.
    given_up = False
    #: Decorators that share in owning it; 0 where a middleware does.
    sharers = 0
    #: Nothing has been asked for it yet.
    is_new = True
    _bells: tuple[Bell, ...] = ()
    #: What a store is just being asked for, or waited for; empty where nothing is.
    _asked: Sequence[Slot] = ()
    #: What was asked for last, as it stands in the lease.
    _new: tuple[Held, ...] = ()
    #: Of what was taken at once: what was asked for, and the counts, until somebody wants to know.
    _at_once: tuple[Sequence[Asked], Sequence[int]] | None = None
    #: Since then all was given back: the semaphores may be asked again.
    _given_back = False
    #: HEADERS say `always`: the response is to have RateLimit fields.
    tells = False
    _fields: tuple[LimitField, ...] = ()
    _results: dict[tuple[str, bytes], PolicyResult] | None = None
    _request: Callable[[], HttpRequest | None] = staticmethod(lambda: None)

    def __init__(self, request: HttpRequest | None = None) -> None:
        self._held: list[Held] = []
        self._epoch = keeper.epoch
        if request is not None:
            self._request = weakref.ref(request)

    def __bool__(self) -> bool:
        """Is there anything to give back?"""
        return bool(self._held)

    @property
    def results(self) -> dict[tuple[str, bytes], PolicyResult]:
        """What each semaphore has said to this request; the first word stands."""
        self._tell()
        if self._results is None:
            self._results = {}
        return self._results

    @results.setter
    def results(self, results: dict[tuple[str, bytes], PolicyResult]) -> None:
        self._tell()
        self._results = results

    @property
    def fields(self) -> tuple[LimitField, ...]:
        """Of each blocking policy that was asked and has a limit."""
        self._tell()
        return self._fields

    @fields.setter
    def fields(self, fields: tuple[LimitField, ...]) -> None:
        self._tell()
        self._fields = fields

    def _tell(self) -> None:
        told = self._at_once
        if told is None:
            return
        asked, counts = told
        results = {
            (entry.policy.name, entry.key.digest): PolicyResult(
                entry.policy.name, entry.key.text, "held", count, entry.limit
            )
            for entry, count in zip(asked, counts, strict=True)
        }
        fields = remaining(asked, counts)
        if self._at_once is not told:  # another thread was first, and may have added to it
            return
        if not self._given_back:
            self._results = results
        self._fields = fields
        self._at_once = None  # last: another thread may ask, too

    # -- for the steps (see steps.Ledger) ---------------------------------------------------------------------

    def expect(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> None:
        """These slots, one for each policy, may be held from now on."""
        self.is_new = False
        self._asked = slots
        now = monotonic()
        self._new = tuple([Held(store, policy, slot, now) for policy, slot in zip(policies, slots, strict=True)])
        self._held += self._new
        keeper.watch(self, min([held.due for held in self._new]))

    def expect_one(self, store: Any, policy: Policy, slots: tuple[Slot], now: float) -> None:
        """`expect`, of one slot and at a time that is known (monotonic seconds), as nearly always."""
        self.is_new = False
        self._asked = slots
        held = Held(store, policy, slots[0], now)
        self._new = (held,)
        self._held.append(held)
        keeper.leases[id(self)] = self  # `keeper.watch` by hand
        if held.due < keeper.wakes_at:
            keeper.look_at(held.due)

    def confirm_at_once(self, slots: Sequence[Slot], told: tuple[Sequence[Asked], Sequence[int]]) -> bool:
        """All of these are held, and there is nothing more to it; `told` is what was asked for, and the counts. False: there is
        more, and nothing was decided."""
        new = self._new
        if self._asked is not slots or tuple(self._held) != new:  # somebody has taken more, or given back
            return False
        for one in new:
            one.confirmed = True
        if (stand_ins.known or stand_ins.being_counted) and self.uncounted(new[0].store, slots):
            return False
        for one in new:
            one.announced = True
        self._asked = ()
        self._given_back = False
        self._at_once = told
        return True

    def confirm(self, asked: Sequence[Slot], got: Sequence[Slot]) -> bool:
        """Of what one take asked for, these are held and the others are not. False: all was given back meanwhile, which the
        take may have overtaken."""
        known = self._of(asked)
        self._answered(asked)
        for held in known:
            if any(slot is held.slot for slot in got):
                held.confirmed = True
            else:
                self._strike(held)
        if not self._held:
            keeper.forget(self)
        return bool(known)

    def expects(self, slots: Sequence[Slot]) -> bool:
        """Has nobody given them back yet?"""
        return bool(self._of(slots))

    def holds_elsewhere(self, store: Any) -> bool:
        """Is something held, or in the course of being taken, in another store?"""
        return any(held.store is not store for held in list(self._held))

    def wake_by(self, bell: Bell) -> None:
        """This is to ring when it is given up, until it is closed."""
        self._bells += (bell,)
        bell.at_close(partial(self._sleeps_no_more, bell))

    def begin_anew(self, slots: Sequence[Slot], since: float) -> None:
        """They waited: their leases begin at `since` (monotonic seconds) at the earliest, and so does their age."""
        for held in self._of(slots):
            held.slot.waited += since - held.since
            held.since = since
            held.extended(since, held.slot.ttl)
            keeper.watch(self, held.due)

    def doubt(self, asked: Sequence[Slot]) -> None:
        """The take failed: its slots may be held, so they are given back until the store answers or their lease ends."""
        doubtful = self._of(asked)
        self._answered(asked)
        for held in doubtful:
            self._strike(held)
        if not self._held:
            keeper.forget(self)
        _give_later(doubtful)

    @property
    def is_asking(self) -> bool:
        """Does a store still have to say what it holds? What is given back meanwhile is given back once more after that."""
        return bool(self._asked)

    def _answered(self, asked: Sequence[Slot]) -> None:
        if asked is self._asked:
            self._asked = ()

    def give_up(self) -> None:
        """Nobody is there any more for whom it is worth waiting: who stands in line for it leaves."""
        self.given_up = True
        self._ring()

    def _sleeps_no_more(self, bell: Bell) -> None:
        self._bells = tuple([other for other in self._bells if other is not bell])

    def holdings(self) -> list[Held]:
        """What it may hold now."""
        return list(self._held)

    def holds(self, held: Held) -> bool:
        """Is it still there, or was it given back?"""
        return held in self._held

    def _of(self, slots: Sequence[Slot]) -> list[Held]:
        return [held for held in list(self._held) if any(slot is held.slot for slot in slots)]

    def _strike(self, held: Held) -> None:
        # It is gone already where another thread ended the request meanwhile, and gave it back.
        with contextlib.suppress(ValueError):
            self._held.remove(held)

    def uncounted(self, store: Any, slots: Sequence[Slot]) -> tuple[int, ...]:
        """See `stand_ins.uncounted`."""
        return stand_ins.uncounted(self, store, slots)

    def stand_in(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> tuple[bool, tuple[int, ...]]:
        """See `stand_ins.stand_in`."""
        return stand_ins.stand_in(self, store, policies, slots)

    def add(self, held: Sequence[Held]) -> None:
        """It holds these too, from now on."""
        self._held += held
        keeper.watch(self, min([one.due for one in held]))

    # -- handing over ---------------------------------------------------------------------------------------

    def claimed(self, slots: Sequence[Slot], *, unsure: bool = False) -> None:
        """These were handed over to it: they are as old as they were, and `slot_released` is sent for them.

        `unsure`: the store did not say so. How long their lease is still good for a renewal has to tell, at once.
        """
        self.confirm(slots, slots)
        for held in self._of(slots):
            held.since -= age_of(held.slot)
            held.announced = True
            if unsure and held.policy.renew:
                held.due = monotonic()
                held.ends = held.due + held.slot.ttl * RENEW_AFTER
                keeper.look_at(held.due)

    def hand_over(self) -> str:
        """See `Concurrency.hand_over`."""
        handed: list[Held] = []
        for held in list(self._held):
            if type(held.store).claim is BaseBackend.claim:
                raise ImproperlyConfigured(
                    f"policy {held.policy.name}: {type(held.store).__name__} cannot hand slots over; it has no claim()"
                )
        for held in list(self._held):
            # What is counted here alone, or known to be gone, is nothing that others could claim.
            if held.confirmed and not held.local and not held.lost:
                held.handed = True
                with contextlib.suppress(ValueError):  # another thread gives back
                    self._held.remove(held)
                    handed.append(held)
        if any(held.restoring for held in handed):  # or it would be counted again after somebody has claimed it
            with keeper.at_work():
                pass
        for store, group in by_store(handed):
            try:
                store.detach([held.slot for held in group])
            except Exception:
                logger.exception("slots that are handed over may end with this process")
        gone = {held.slot.semaphore for held in handed}
        self.results = {semaphore: result for semaphore, result in self.results.items() if semaphore not in gone}
        if not self._held:
            keeper.forget(self)
        return pack([(held.policy, held.slot) for held in handed])

    # -- giving back --------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Give everything back from a thread (or an event loop, where the store's call is short). Never raises."""
        popped = self._pop_all()
        if not popped:
            return
        try:
            slots = self._in_plain(popped)
            if slots is None:
                run(self._steps(popped, all_of_it=True))
                return
            try:
                reply: tuple[bool, ...] | StoreFailed = tuple(popped[0].store.give(slots))
            except Exception as error:
                reply = StoreFailed(error)
        except BaseException:  # nobody has these slots any more but us
            self._give_later(popped)
            raise
        if reply != _ONE_GIVEN or popped[0].lost or popped[0].ends < monotonic():
            self._given_plainly(popped, reply)

    async def arelease(self) -> None:
        """Give everything back on an event loop. Never raises but for a cancel."""
        rest = self.released()
        if rest is not None:
            await rest

    def released(self) -> Awaitable[None] | None:
        """Give everything back on an event loop: at once, where nothing has to be waited for, as mostly; else what is to be
        awaited for it. Never raises."""
        popped = self._pop_all()
        if not popped:
            return None
        try:
            slots, store = self._in_plain(popped), popped[0].store
            if slots is None or not store.gives_on_loop:
                return self._released(popped, slots)
            reply = give_on_loop(store, slots)
        except BaseException:
            self._give_later(popped)
            raise
        if reply != _ONE_GIVEN or popped[0].lost or popped[0].ends < monotonic():
            self._given_plainly(popped, reply)
        return None

    async def _released(self, popped: Sequence[Held], slots: Sequence[Slot] | None) -> None:
        try:
            if slots is None:
                await arun(self._steps(popped, all_of_it=True))
                return
            reply = await agive(popped[0].store, slots)
        except BaseException:
            self._give_later(popped)
            raise
        self._given_plainly(popped, reply)

    def announce(self, token: str) -> None:
        """What this acquisition holds is told of, now and when it is given back."""
        for held in list(self._held):
            held.announced = held.announced or held.acquisition == token

    def steps_to_give(self, token: str | None = None) -> Steps[None]:
        """Give everything back, or what one acquisition took, by its token."""
        yield from self._steps(self._pop_all() if token is None else self._pop(token), all_of_it=token is None)

    def _in_plain(self, popped: Sequence[Held]) -> Sequence[Slot] | None:
        """What their one store is to be given back, as nearly always; None where it takes steps."""
        if signals.slot_released.receivers or self._epoch is not keeper.epoch:
            return None
        store = popped[0].store
        slots = []
        for held in popped:
            if held.local or not held.confirmed or held.store is not store:
                return None
            slots.append(held.slot)
        self._results, self._given_back = None, True
        if self._bells:
            self._ring()
        if not self._held:
            keeper.leases.pop(id(self), None)  # `keeper.forget` by hand
        return slots

    def _give_later(self, popped: Sequence[Held]) -> None:
        if self._epoch is keeper.epoch:  # they are not a parent's
            _give_later(popped)

    def _forget(self, *, all_of_it: bool) -> None:
        if all_of_it:
            self._results, self._given_back = None, True
            self._ring()
        if not self._held:
            keeper.forget(self)

    def _ring(self) -> None:
        """Who waits for what is given back waits for nothing."""
        for bell in self._bells:
            bell.ring()

    def _steps(self, popped: Sequence[Held], *, all_of_it: bool) -> Steps[None]:
        groups = by_store(popped)
        self._forget(all_of_it=all_of_it)
        if self._epoch is not keeper.epoch:
            return
        while groups:
            store, group = groups[0]
            asked = [held for held in group if held.in_store]  # once: the keeper may register one at any moment
            try:
                reply: Sequence[bool] | StoreFailed = ()
                if asked:
                    reply = yield Give(store, tuple([held.slot for held in asked]))
                for one, was_held in self._given(group, asked, reply):
                    yield self._news(one, was_held)
            except BaseException:  # cancelled half way: nobody has these slots any more but us
                for _, rest in groups:
                    _give_later(rest)
                raise
            del groups[0]

    def _given_plainly(self, popped: Sequence[Held], reply: Sequence[bool] | StoreFailed) -> None:
        if not isinstance(reply, StoreFailed) and False not in reply:
            now = monotonic()
            for held in popped:
                if held.ends < now or held.lost:
                    break
            else:  # all were held to this moment
                return
        self._given(popped, popped, reply)

    def _given(
        self, group: Sequence[Held], asked: Sequence[Held], reply: Sequence[bool] | StoreFailed
    ) -> list[tuple[Held, bool]]:
        """These were given back. Those that `slot_released` is to be sent for, and whether they were held until now."""
        news: list[tuple[Held, bool]] = []
        now = monotonic()
        if isinstance(reply, StoreFailed):
            logger.warning("a release failed, it will be tried again until its lease ends: %s", reply.error)
            _give_later(asked)
            reply = [True] * len(asked)
        still = dict(zip(map(id, asked), reply, strict=True))
        for held in group:
            was_held = still.get(id(held), True)
            if not held.confirmed:
                continue
            if not held.local and (held.lost or held.ends < now):  # by our own reckoning: not every store can tell
                was_held = False
            if not was_held:
                notices.lost(held.policy, now - held.since, max(0.0, now - held.ends))
            if held.announced and signals.slot_released.receivers and signals.slot_released.has_listeners(Policy):
                news.append((held, was_held))
        return news

    def _news(self, held: Held, was_held: bool) -> Notify:
        return Notify(
            signals.slot_released,
            {
                "sender": Policy,
                "request": self._request(),
                "policy": held.policy,
                "key": held.slot.key.text,
                "limit": held.slot.told_limit,
                "held": was_held,
            },
        )

    def _pop(self, token: str) -> list[Held]:
        taken: list[Held] = []
        for held in [held for held in list(self._held) if held.acquisition == token]:
            try:
                self._held.remove(held)
            except ValueError:  # another thread gives back too
                continue
            taken.append(held)
        return taken

    def _pop_all(self) -> list[Held]:
        taken: list[Held] = []
        while self._held:
            try:
                taken.append(self._held.pop())
            except IndexError:  # another thread gives back too
                break
        return taken


def _give_later(group: Sequence[Held]) -> None:
    """Leave these to the keeper."""
    for store, some in by_store([held for held in group if held.in_store]):
        keeper.give_later(store, [held.slot for held in some], max(map(_may_end, some)))


def _may_end(held: Held) -> float:
    """When its lease ends, at the latest; of one that the store did not confirm, as if it had begun just now: it may have
    stood in line."""
    return held.ends if held.confirmed else monotonic() + held.slot.ttl
