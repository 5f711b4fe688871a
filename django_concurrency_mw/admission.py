"""Admission: a request's way to its slots, which nearly always is a single take that has all of them.

That way needs no steps: what to ask for is read off the request, and the reply says that all is held. Whatever else it may
say is for the limiter's steps, which go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import limiter, peaks, signals
from .drivers import arun, atake, run, take
from .outcomes import Taken, Verdict, all_held
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


def admit(
    request: HttpRequest, lease: Lease, policies: Policies, kwargs: Keywords, config: Config
) -> HttpResponseBase | None:
    """`limiter.admit`, in a thread."""
    begun = _begin(request, lease, policies, config)
    if begun is not None:
        begun.reply = take(begun)
        if _has_all(begun, request, lease):
            if signals.slot_acquired.receivers:
                run(_announce(begun, request))
            return None
    return run(limiter.admit(request, lease, policies, kwargs, config, begun))


async def aadmit(
    request: HttpRequest, lease: Lease, policies: Policies, kwargs: Keywords, config: Config
) -> HttpResponseBase | None:
    """`limiter.admit`, on an event loop."""
    begun = _begin(request, lease, policies, config)
    if begun is not None:
        begun.reply = take(begun) if begun.store.never_waits else await atake(begun)
        if _has_all(begun, request, lease):
            if signals.slot_acquired.receivers:
                await arun(_announce(begun, request))
            return None
    return await arun(limiter.admit(request, lease, policies, kwargs, config, begun))


def _begin(request: HttpRequest, lease: Lease, policies: Policies, config: Config) -> Begun | None:
    """What to ask for, where that can be seen at once; the lease may hold it from now on."""
    if not lease.is_new:
        return None
    plan = config.plans.get(policies) or config.plan(policies)
    asked = plan.asked(request)
    if asked is None:
        return None
    store = config.stores.get(plan.backend)
    if store is None or (plan.waits and not store.supports_wait):
        store, *_ = [limiter.store_of(policy, config) for policy in policies]
    slots = expected(store, asked, lease, new_token(), request.path)
    return Begun(store, slots, asked, monotonic())


def _has_all(begun: Begun, request: HttpRequest, lease: Lease) -> bool:
    """Was everything had at once, and is there nothing more to it? If not, nothing was decided."""
    reply, slots = begun.reply, begun.slots
    if type(reply) is not Taken:
        limiter.note(begun, reply, begun.began)
        return False
    peaks.seen(begun.store, slots, reply.in_flight)
    if False in reply.held:
        return False
    if not lease.confirm_at_once(slots, begun.asked, reply.in_flight):
        return False
    request.concurrency = all_held(begun.asked, reply.in_flight, lease)  # type: ignore[attr-defined]  # ours to set
    return True


def _announce(begun: Begun, request: HttpRequest) -> Steps[None]:
    return limiter.announce(request, begun.asked, Verdict(request.concurrency))  # type: ignore[attr-defined]  # just set
