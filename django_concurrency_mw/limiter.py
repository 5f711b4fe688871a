"""The limiter: from a request and its policies to slots in its lease, or to the answer that turns it away.

One generator for both halves: which policies apply, what their keys are, the take, the signals, the rejection's response.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.http.response import HttpResponseBase

from . import health, peaks, rejection, signals
from .backends import BaseBackend, get_backend
from .conf import Config
from .effects import Give, Notify, Queue, Steps, Take
from .keys import Resolver
from .lease import Lease
from .outcomes import (
    NOT_LIMITED,
    Asked,
    Concurrency,
    Full,
    KeyMissing,
    PolicyResult,
    Reason,
    Slot,
    StoreFailed,
    Taken,
    Verdict,
)
from .policies import Policy
from .steps import Begun, above_limit, acquire, full_at_once, refused_at_once
from .tokens import new_token

if TYPE_CHECKING:
    from django.http import HttpRequest

logger = logging.getLogger("django_concurrency_mw")

#: Where a request keeps its lease. The middleware puts None there first; where the name is absent, nobody owns a lease yet.
LEASE = "_concurrency_lease"

#: On a request, true once its middleware has ended it; _CUT_SHORT where nobody waits for its answer any more.
_ENDED = "_concurrency_ended"
_CUT_SHORT = "cut short"
_ABSENT: Any = object()

#: On a view: the table's overridable policies are left to its decorator, or out.
MARK = "_concurrency_limit_marked"


def begin(request: HttpRequest) -> None:
    """The middleware owns whatever lease this request comes to have."""
    request.concurrency = NOT_LIMITED  # type: ignore[attr-defined]  # ours to set
    request._concurrency_lease = None  # type: ignore[attr-defined]  # LEASE; setattr would take longer


def join(request: HttpRequest) -> tuple[Lease, bool]:
    """The request's lease, and whether the caller shares in owning it: where no middleware does, the last one out of those
    who joined ends it (see `leave`). They may be nested, or beside each other on an event loop."""
    lease: Lease | None = getattr(request, LEASE, _ABSENT)
    if lease is None:  # the middleware's, and the first to be needed
        lease = request._concurrency_lease = Lease(request)  # type: ignore[attr-defined]  # LEASE
        if not getattr(request, _ENDED, False) or vars(request).pop(LEASE, None) is None:
            return lease, False
        # The middleware has ended it, perhaps at this very moment, and did not see the lease.
        if getattr(request, _ENDED) is _CUT_SHORT:
            lease.give_up()
        lease.sharers = 1
        # Others may share in it; and where the request comes by the middleware once more, that ends it.
        request._concurrency_lease = lease  # type: ignore[attr-defined]
        return lease, True
    if lease is _ABSENT:
        lease = request._concurrency_lease = Lease(request)  # type: ignore[attr-defined]
        lease.sharers = 1
        return lease, True
    lease.sharers += lease.sharers > 0
    return lease, lease.sharers > 0


def leave(request: HttpRequest, lease: Lease) -> bool:
    """Does the caller, who shares in owning the lease, have to end it now? Then the request has none any more."""
    lease.sharers = left = lease.sharers - 1
    if left:
        return False
    attributes = request.__dict__
    if attributes.get(LEASE) is lease:
        del attributes[LEASE]
    return True


def end(request: HttpRequest) -> Lease | None:
    """The middleware's request is cut short: the lease that it has to end, None where nothing was taken."""
    # Before the lease is looked for: a thread that still runs a view may just make one.
    request._concurrency_ended = _CUT_SHORT  # type: ignore[attr-defined]  # _ENDED
    if getattr(request, LEASE, None) is None:  # whoever makes one from now on sees that it has ended
        return None
    lease: Lease | None = request.__dict__.pop(LEASE, None)
    return lease


def policies_of(request: HttpRequest, view: Any, config: Config) -> tuple[Policy, ...]:
    """The table's policies for this view, without those that a mark on the view replaces."""
    match = request.resolver_match
    if match is None or not config.enabled:
        return ()
    policies = config.table.match(match.view_name, request.method or "")
    if policies and getattr(view, MARK, False):
        return tuple(policy for policy in policies if not policy.overridable)
    return policies


def is_replaced(policy: Policy, view: Any) -> bool:
    """Does a mark on the view leave this policy of the table to a decorator, or out?"""
    return policy.overridable and bool(getattr(view, MARK, False))


def admit(
    request: HttpRequest,
    lease: Lease,
    policies: Sequence[Policy],
    kwargs: Mapping[str, Any],
    config: Config,
    begun: Begun | None = None,
) -> Steps[HttpResponseBase | None]:
    """Take a slot of each policy that applies, into the lease. None, or the answer that turns the request away.

    `kwargs` are the view's. `begun`: a take that did not have all of them at once. Raises what the project's callables raise,
    and ImproperlyConfigured for a store that cannot limit; whoever owns the lease gives back then.
    """
    if begun is not None and not signals.request_rejected.receivers and (entry := full_at_once(begun)) is not None:
        verdict: Verdict | None = yield from _refuse(request, lease, begun, entry)
    else:
        verdict = yield from decide(request, lease, policies, kwargs, config, begun)
    if verdict is None or verdict.rejected_by is None:
        return None
    # What this request asked further out, in the middleware or in another decorator, belongs to the lists too.
    return (yield from rejection.respond(request, verdict, lease.fields + verdict.fields, config.headers))


def _refuse(request: HttpRequest, lease: Lease, begun: Begun, entry: Asked) -> Steps[Verdict]:
    """`decide`, of one that is full at once: the same, but for all that it would look at to find that out."""
    reply: Any = begun.reply
    if not lease.confirm(begun.slots, ()):  # nobody holds them; but what gave them back the take may have overtaken
        yield from Give(begun.store, begun.slots)
    verdict = refused_at_once(entry, reply.in_flight[0])
    request.concurrency = verdict.concurrency  # type: ignore[attr-defined]  # ours to set
    rejection.log(entry.policy, entry.key.text, "full")
    return verdict


def decide(
    request: HttpRequest,
    lease: Lease,
    policies: Sequence[Policy],
    kwargs: Mapping[str, Any],
    config: Config,
    begun: Begun | None = None,
) -> Steps[Verdict | None]:
    """`admit` without an answer, for those who have their own. None where no policy applies."""
    stores = {policy.backend: store_of(policy, config) for policy in policies}
    lease.tells = config.headers == "always"
    asking: Sequence[Asked | KeyMissing]
    if begun is not None:
        asking, token = begun.asked, begun.slots[0].token
    else:
        asking = yield from Resolver(request, kwargs, config.trusted, config.client_header).resolve(policies)
        token = new_token()
        if not asking:
            return None
    # Another decorator may have been told meanwhile what was not known when the take was begun.
    known, fresh = _known(lease, asking) if begun is None else ({}, [*asking])
    threads, private_loop = _threads(request, config), _is_of_a_thread(request)
    verdict = yield from _watched(
        acquire(fresh, stores, lease, token, request.path, config.on_backend_error, threads, private_loop, begun)
    )
    if verdict.rejected_by is not None:
        yield from lease.steps_to_give(token)
    if known:
        verdict = _with_known(verdict, asking, known, lease)
    request.concurrency = verdict.concurrency  # type: ignore[attr-defined]  # ours to set
    if verdict.rejected_by is None:
        _remember(lease, fresh, verdict)
        lease.announce(token)
    yield from announce(request, fresh, verdict)
    return verdict


def admit_outside(entry: Asked, lease: Lease, config: Config) -> Steps[Verdict]:
    """Take a slot outside a request. Whoever owns the lease gives back what a rejected or interrupted take may have left."""
    token, stores = new_token(), {entry.policy.backend: store_of(entry.policy, config)}
    verdict = yield from _watched(
        acquire([entry], stores, lease, token, "", config.on_backend_error, config.max_sync_waiters)
    )
    if verdict.rejected_by is None:
        lease.announce(token)
    yield from announce(None, [entry], verdict)
    return verdict


def _threads(request: HttpRequest, config: Config) -> int | None:
    """How many may wait; nobody where one thread serves all, as nobody could give a slot back meanwhile."""
    return config.max_sync_waiters if request.META.get("wsgi.multithread", True) else None


def _is_of_a_thread(request: HttpRequest) -> bool:
    """Does a thread of a WSGI server answer it, also where the view is a coroutine? (`wsgi.multithread` is in those of ASGI
    too.)"""
    return "wsgi.version" in request.META


def conclude(request: HttpRequest, response: object, lease: Lease) -> None:
    """The request has its response: adds the RateLimit fields where HEADERS says `always`. Gives back if it cannot."""
    try:
        if lease.tells and lease.fields and isinstance(response, HttpResponseBase):
            rejection.add_fields_where_private(request, response, lease.fields)
    except BaseException:
        lease.release()
        raise


def store_of(policy: Policy, config: Config) -> BaseBackend:
    """The policy's store. Raises: ImproperlyConfigured for an unknown name or a store that cannot limit."""
    store = config.stores.get(policy.backend)
    if store is None:
        store = config.stores[policy.backend] = get_backend(policy.backend, config.backends)
    if policy.wait and not store.supports_wait:
        raise ImproperlyConfigured(
            f"policy {policy.name}: wait: the backend {policy.backend!r} cannot let requests wait (supports_wait is False); "
            "remove it, or use another backend"
        )
    return store


def _watched(steps: Steps[Verdict]) -> Steps[Verdict]:
    """The same steps; what their takes say of a store's health, and of what is in flight there, is noted."""
    try:
        effect = next(steps)
        while True:
            began = monotonic()
            try:
                reply = yield effect
            except BaseException as error:
                effect = steps.throw(error)
            else:
                if type(effect) is Take or type(effect) is Queue:
                    note(effect.store, effect.slots, reply, began)
                effect = steps.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # a generator's return value is untyped here


def note(store: BaseBackend, slots: Sequence[Slot], reply: Any, began: float) -> None:
    """What a reply says of its store's health, and of what is in flight there. `began`: when it was asked."""
    kind = type(reply)
    if kind is Taken or kind is Full:
        peaks.seen(store, slots, reply.in_flight)
    elif kind is StoreFailed and reply.sent:
        health.failed(store, reply.error, began)


Known = dict[str, PolicyResult]


def _known(lease: Lease, asking: Sequence[Asked | KeyMissing]) -> tuple[Known, list[Asked | KeyMissing]]:
    """What this request holds already: one slot per policy and key, the first take stands."""
    if not lease.results:
        return {}, list(asking)
    known: Known = {}
    fresh: list[Asked | KeyMissing] = []
    for entry in asking:
        result = lease.results.get((entry.policy.name, entry.key.digest)) if isinstance(entry, Asked) else None
        if result is None or (entry.policy.block and result.state not in ("held", "local")):
            fresh.append(entry)  # what a shadow policy let pass is no slot
        else:
            known[entry.policy.name] = result
    return known, fresh


def _with_known(verdict: Verdict, asking: Sequence[Asked | KeyMissing], known: Known, lease: Lease) -> Verdict:
    found = {result.policy: result for result in verdict.concurrency.policies} | known
    concurrency = Concurrency(
        True,
        tuple(found[entry.policy.name] for entry in asking),
        verdict.concurrency.rejection,
        verdict.concurrency.waited,
        lease,
    )
    return Verdict(concurrency, verdict.rejected_by, verdict.fields)


def _remember(lease: Lease, fresh: Sequence[Asked | KeyMissing], verdict: Verdict) -> None:
    found = {result.policy: result for result in verdict.concurrency.policies}
    lease.is_new = False  # where no store was asked, too: what it was told is not to be told anew
    for entry in fresh:
        if isinstance(entry, Asked):
            lease.results[(entry.policy.name, entry.key.digest)] = found[entry.policy.name]
    lease.fields += verdict.fields


def announce(request: HttpRequest | None, fresh: Sequence[Asked | KeyMissing], verdict: Verdict) -> Steps[None]:
    """Send the signals of an acquisition, and log what was turned away."""
    acquired = signals.slot_acquired.receivers and signals.slot_acquired.has_listeners(Policy)
    rejected = signals.request_rejected.receivers and signals.request_rejected.has_listeners(Policy)
    found = {result.policy: result for result in verdict.concurrency.policies}
    refusal = verdict.concurrency.rejection
    for entry in fresh:
        result = found[entry.policy.name]
        about = {
            "sender": Policy,
            "request": request,
            "policy": entry.policy,
            "key": result.key,
            "in_flight": result.in_flight,
            "limit": result.limit,
        }
        if refusal is not None:
            if entry.policy.name in refusal.violated:
                rejection.log(entry.policy, result.key, refusal.reason)
                if rejected:
                    yield from Notify(signals.request_rejected, {**about, "reason": refusal.reason, "shadow": False})
        elif result.state in ("held", "local"):
            if acquired:
                yield from Notify(signals.slot_acquired, {**about, "waited": verdict.concurrency.waited})
        elif result.state == "over":
            reason: Reason = "cost_above_limit" if isinstance(entry, Asked) and above_limit(entry) else "full"
            rejection.log(entry.policy, result.key, reason)
            if rejected:
                yield from Notify(signals.request_rejected, {**about, "reason": reason, "shadow": True})
