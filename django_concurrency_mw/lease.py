"""The lease: what one request holds, renewed while it lives and given back exactly once, whoever asks first.

A slot is written in before it is asked for, so that whatever cuts the take short leaves nothing that nobody knows. Giving
back takes the slots out first (list.pop is atomic), so that two threads that end one request never give a slot twice.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

from . import afresh, health, notices, renewals, signals
from .backends.base import BaseBackend, age_of
from .bells import Bell
from .drivers import agive, arun, give, run
from .effects import Give, Notify, Steps
from .handover import pack
from .held import NEVER, RENEW_AFTER, Held, by_store
from .keeper import keeper
from .outcomes import Asked, LimitField, PolicyResult, Slot, StoreFailed, remaining
from .policies import Policy
from .tokens import new_token

if TYPE_CHECKING:
    from django.http import HttpRequest

logger = logging.getLogger("django_concurrency_mw")

#: Seconds after which a stand-in is registered with its store, if that works again by then.
REGISTER_AFTER = 0.1
#: Serialises the counting of `Lease.stand_in`, which looks at all leases of the process. An RLock: a garbage collection inside
#: may end a stream, whose own code may come back here.
_counting = threading.RLock()
#: id -> what this process holds in a store's stead; those that are over are dropped at the next look.
_stand_ins: dict[int, tuple[Lease, Held]] = {}
#: Not empty while somebody counts.
_standing_in: list[bool] = []


def _forked() -> None:
    global _counting
    _counting = threading.RLock()  # a thread that is not in the child may have held it
    _stand_ins.clear()
    _standing_in.clear()


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    _standing_in.append(True)
    try:
        yield
    finally:
        _standing_in.pop()


afresh.begin_with(_forked)
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
    #: Of what was taken at once: what was asked for, and the counts, until somebody wants to know.
    _at_once: tuple[Sequence[Asked], Sequence[int]] | None = None
    #: Since then all was given back: the semaphores may be asked again.
    _given_back = False

    def __init__(self, request: HttpRequest | None = None) -> None:
        self._held: list[Held] = []
        self._epoch = keeper.epoch
        self._request: Callable[[], HttpRequest | None] = _nobody if request is None else weakref.ref(request)
        self._fields: tuple[LimitField, ...] = ()
        self._results: dict[tuple[str, bytes], PolicyResult] | None = None

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
        if self._at_once is None:
            return
        asked, counts = self._at_once
        if not self._given_back:
            self._results = {
                (entry.policy.name, entry.key.digest): PolicyResult(
                    entry.policy.name, entry.key.text, "held", count, entry.limit
                )
                for entry, count in zip(asked, counts, strict=True)
            }
        self._fields = remaining(asked, counts)
        self._at_once = None  # last: another thread may ask, too

    # -- for the steps (see steps.Ledger) ---------------------------------------------------------------------

    def expect(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> None:
        """These slots, one for each policy, may be held from now on."""
        self.is_new = False
        self._asked = slots
        due = NEVER
        for policy, slot in zip(policies, slots):  # noqa: B905  # strict is slow
            held = Held(store, policy, slot)
            self._held.append(held)
            if held.due < due:
                due = held.due
        keeper.watch(self, due)

    def confirm_at_once(self, slots: Sequence[Slot], asked: Sequence[Asked], counts: Sequence[int]) -> bool:
        """All of these are held, and there is nothing more to it. False: there is, and nothing was decided."""
        known = list(self._held)
        if len(known) != len(slots):
            return False
        for one, slot in zip(known, slots):  # noqa: B905  # just compared
            if one.slot is not slot:
                return False
            one.confirmed = True
        if self.uncounted(known[0].store, slots):
            return False
        for one in known:
            one.announced = True
        self._asked = ()
        self._given_back = False
        self._at_once = (asked, counts)
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
        for bell in self._bells:
            bell.ring()

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
        """How many of each semaphore this process holds in the store's stead, which the store does not count; empty where
        there is none. Asked after `confirm`, so that of a take and a stand-in at the same time one sees the other."""
        if not _stand_ins and not _standing_in:
            return ()
        with _counting:
            _prune()
            asked = {held.slot.semaphore: held.since for held in self._of(slots)}
            standing = [
                held.slot
                for _, held in _stand_ins.values()
                if held.store is store and (held.local or held.registered >= asked.get(held.slot.semaphore, 0.0))
            ]
            if not standing:
                return ()
            return tuple(sum(one.cost for one in standing if one.semaphore == slot.semaphore) for slot in slots)

    def stand_in(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> tuple[bool, tuple[int, ...]]:
        """The store failed: count what this process itself holds there, in the store and in its stead."""
        with _counting, _marked():
            _prune()
            counts = {slot.semaphore: 0 for slot in slots}
            for held in _all_held():
                if held.confirmed and held.store is store and held.slot.semaphore in counts:
                    counts[held.slot.semaphore] += held.slot.cost
            if any(counts[slot.semaphore] + slot.cost > slot.limit for slot in slots):
                return False, tuple(counts[slot.semaphore] for slot in slots)
            new = [_instead(store, policy, slot) for policy, slot in zip(policies, slots, strict=True)]
            self._held += new
            _stand_ins.update((id(held), (self, held)) for held in new)
            keeper.watch(self, min(held.due for held in new))
            return True, tuple(counts[slot.semaphore] + slot.cost for slot in slots)

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
        if not self._held:
            return
        popped = self._pop(None)
        try:
            plain = self._in_plain(popped)
            if plain is None:
                run(self._steps(popped, all_of_it=True))
                return
            reply = give(plain)
        except BaseException:  # nobody has these slots any more but us
            self._give_later(popped)
            raise
        self._given_plainly(popped, reply)

    async def arelease(self) -> None:
        """Give everything back on an event loop. Never raises but for a cancel."""
        if not self._held:
            return
        popped = self._pop(None)
        try:
            plain = self._in_plain(popped)
            if plain is None:
                await arun(self._steps(popped, all_of_it=True))
                return
            reply = give(plain) if plain.store.never_waits else await agive(plain)
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
        yield from self._steps(self._pop(token), all_of_it=token is None)

    def _in_plain(self, popped: Sequence[Held]) -> Give | None:
        """The one effect that giving these back takes, as nearly always; None where it takes steps."""
        store = popped[0].store if popped else None
        if signals.slot_released.receivers or self._epoch is not keeper.epoch:
            return None
        slots = []
        for held in popped:
            if held.store is not store or held.local or not held.confirmed:
                return None
            slots.append(held.slot)
        if store is None:
            return None
        self._forget(all_of_it=True)
        return Give(store, tuple(slots))

    def _give_later(self, popped: Sequence[Held]) -> None:
        if self._epoch is keeper.epoch:  # they are not a parent's
            _give_later(popped)

    def _forget(self, *, all_of_it: bool) -> None:
        if all_of_it:
            self._results, self._given_back = None, True
            for bell in self._bells:  # who waits for what is given back waits for nothing
                bell.ring()
        if not self._held:
            keeper.forget(self)

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

    def _pop(self, token: str | None) -> list[Held]:
        taken: list[Held] = []
        if token is not None:
            for held in [held for held in list(self._held) if held.acquisition == token]:
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


def _instead(store: Any, policy: Policy, slot: Slot) -> Held:
    """Counted here in the store's stead. Its token is another one, as the take that failed is still to be undone."""
    held = Held(store, policy, slot)
    held.slot = replace(slot, token=new_token(), memo=[])
    held.confirmed = held.local = True
    held.due = held.since + REGISTER_AFTER
    return held


def _prune() -> None:
    """Forget who has ended, and who has been registered for longer than any take is under way."""
    for number, (lease, held) in list(_stand_ins.items()):
        if not lease.holds(held) or held.registered < monotonic() - 60:
            _stand_ins.pop(number, None)


def _nobody() -> None:
    return None


def _all_held() -> Iterator[Held]:
    for lease in keeper.live():
        if isinstance(lease, Lease):
            yield from list(lease._held)


def _give_later(group: Sequence[Held]) -> None:
    """Leave these to the keeper."""
    for store, some in by_store([held for held in group if held.in_store]):
        keeper.give_later(store, [held.slot for held in some], max(map(_may_end, some)))


def _may_end(held: Held) -> float:
    """When its lease ends, at the latest; of one that the store did not confirm, as if it had begun just now: it may have
    stood in line."""
    return held.ends if held.confirmed else monotonic() + held.slot.ttl
