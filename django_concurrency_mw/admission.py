"""Admission: a request's way to its slots, which nearly always is a single take that has all of them.

That way needs no steps: what to ask for is read off the request, and the reply says that all is held. Whatever else it may
say is for the limiter's steps, which go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import limiter, peaks, signals
from .drivers import arun, atake, run, take
from .outcomes import Asked, Slot, StoreFailed, Taken, TakeReply, Verdict, all_held
from .steps import Begun, expected
from .tokens import new_token

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from .conf import Config
    from .effects import Steps
    from .lease import Lease
    from .policies import Policy

Policies = tuple["Policy", ...]
Keywords = Mapping[str, Any]


#: A store, the slots that it is asked for, what they are for, and since when (monotonic seconds).
Asking = tuple[Any, tuple[Slot, ...], tuple[Asked, ...], float]


def admit(
    request: HttpRequest, lease: Lease, policies: Policies, kwargs: Keywords, config: Config
) -> HttpResponseBase | None:
    """`limiter.admit`, in a thread."""
    begun = None
    asking = _begin(request, lease, policies, config) if lease.is_new else None
    if asking is not None:
        store, slots, asked, began = asking
        if store.failure is None:  # `take` by hand, here and below: this is all that most requests do
            try:
                reply = store.take(slots)
            except Exception as error:
                reply = StoreFailed(error)
        else:
            reply = take(store, slots)
        if _has_all(asking, reply, request, lease):
            if signals.slot_acquired.receivers:
                run(_announce(asked, request))
            return None
        begun = Begun(store, slots, asked, reply, began)
    return run(limiter.admit(request, lease, policies, kwargs, config, begun))


async def aadmit(
    request: HttpRequest, lease: Lease, policies: Policies, kwargs: Keywords, config: Config
) -> HttpResponseBase | None:
    """`limiter.admit`, on an event loop."""
    begun = None
    asking = _begin(request, lease, policies, config) if lease.is_new else None
    if asking is not None:
        store, slots, asked, began = asking
        if store.never_waits:
            reply = take(store, slots)
        elif store.cancel_safe and store.failure is None:
            try:
                reply = await store.atake(slots)
            except Exception as error:
                reply = StoreFailed(error)
        else:
            reply = await atake(store, slots)
        if _has_all(asking, reply, request, lease):
            if signals.slot_acquired.receivers:
                await arun(_announce(asked, request))
            return None
        begun = Begun(store, slots, asked, reply, began)
    return await arun(limiter.admit(request, lease, policies, kwargs, config, begun))


def _begin(request: HttpRequest, lease: Lease, policies: Policies, config: Config) -> Asking | None:
    """What to ask for, where that can be seen at once; the lease may hold it from now on."""
    plan = config.plans.get(policies) or config.plan(policies)
    asked = plan.asked(request)
    if asked is None:
        return None
    store = config.stores.get(plan.backend)
    if store is None or (plan.waits and not store.supports_wait):
        store, *_ = [limiter.store_of(policy, config) for policy in policies]
    lease.tells = plan.tells
    now = monotonic()
    if len(asked) > 1:
        return store, expected(store, asked, lease, new_token(), request.path), asked, now
    entry = asked[0]
    slots = (entry.slot(new_token(), request.path),)
    lease.expect_one(store, entry.policy, slots, now)
    return store, slots, asked, now


def _has_all(asking: Asking, reply: TakeReply | StoreFailed, request: HttpRequest, lease: Lease) -> bool:
    """Was everything had at once, and is there nothing more to it? If not, nothing was decided."""
    store, slots, asked, began = asking
    if type(reply) is not Taken:
        limiter.note(store, slots, reply, began)
        return False
    counts = reply.in_flight
    if len(counts) > 1 or counts[0] > peaks.most_seen.get(id(store), peaks.NOTHING).get(slots[0].policy, 0):
        peaks.seen(store, slots, counts)
    told = asked, counts
    if False in reply.held or not lease.confirm_at_once(slots, told):
        return False
    request.concurrency = all_held(told, lease)  # type: ignore[attr-defined]  # ours to set
    return True


def _announce(asked: Sequence[Asked], request: HttpRequest) -> Steps[None]:
    return limiter.announce(request, asked, Verdict(request.concurrency))  # type: ignore[attr-defined]  # just set
