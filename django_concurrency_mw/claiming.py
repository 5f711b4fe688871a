"""The claim: takes over slots that were handed over, for a thread, a task or another process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

from django.core.exceptions import ImproperlyConfigured

from . import health, peaks
from .backends import BaseBackend
from .backends.base import age_of
from .conf import Config
from .effects import Claim, Steps
from .exceptions import ConcurrencyLimitExceeded, SlotLost
from .handover import HandedOver
from .lease import Lease
from .limiter import store_of
from .outcomes import Concurrency, PolicyResult, Rejection, Slot, State, StoreFailed
from .policies import Policy
from .steps import RETRY_AFTER, failed, lease_seconds
from .tokens import new_token


def claim(handed: HandedOver, lease: Lease, config: Config) -> Steps[Concurrency]:
    """Take over what was handed over. Where its store fails, and nobody says `deny`, it is held on as it stands.

    Raises: SlotLost; ConcurrencyLimitExceeded under `deny`; ImproperlyConfigured for slots of another process in a store that
    only its own process sees. Whoever owns the lease gives back then.
    """
    # A shadow policy's slots by themselves, and last: where they have ended the block runs all the same.
    pairs: dict[tuple[bool, int], tuple[BaseBackend, list[tuple[Policy, Slot, Slot]]]] = {}
    for policy, old in handed.slots:
        store = store_of(policy, config)
        if store.one_process and not handed.here:
            raise ImproperlyConfigured(
                f"policy {policy.name}: the slots were taken in another process, and its store counts in one process only; "
                f"use 'host' or 'redis' as {store.config.place}['BACKEND']"
            )
        new = _as_new(policy, old)
        pairs.setdefault((not policy.block, id(store)), (store, []))[1].append((policy, old, new))
    results: list[PolicyResult] = []
    for _, (store, group) in sorted(pairs.items(), key=lambda pair: pair[0][0]):
        results += yield from _claim_there(store, group, lease, config)
    return Concurrency(bool(results), tuple(results), _lease=lease)


def _as_new(policy: Policy, old: Slot) -> Slot:
    """The same holder by another token, with what is left of its time. Raises: SlotLost where nothing is."""
    age = age_of(old)
    most = policy.max_age if policy.renew else lease_seconds(policy)
    left = policy.ttl if most is None else min(policy.ttl, most - age)
    if left <= 0:
        raise SlotLost(f"policy {policy.name}: its time has ended {-left:.1f} s ago")
    return replace(old, token=new_token(), ttl=left, memo=[])


def _claim_there(
    store: BaseBackend, group: Sequence[tuple[Policy, Slot, Slot]], lease: Lease, config: Config
) -> Steps[list[PolicyResult]]:
    policies, old, new = zip(*group, strict=True)
    lease.expect(store, policies, new)
    began = monotonic()
    reply = yield from Claim(store, tuple(zip(old, new, strict=True)))
    if isinstance(reply, StoreFailed):
        if reply.sent:
            health.failed(store, reply.error, began)
        failed(lease, new, reply)
        denied = [one for one in policies if one.block and (one.on_backend_error or config.on_backend_error) == "deny"]
        if denied:
            raise ConcurrencyLimitExceeded(_unavailable(group, denied))
        lease.expect(store, policies, old)
        lease.claimed(old, unsure=True)
    elif reply:
        lease.claimed(new)
        peaks.held(store)
    else:
        lease.confirm(new, ())
        if policies[0].block:
            names = ", ".join(policy.name for policy in policies)
            raise SlotLost(f"policy {names}: the lease has ended, or somebody else has claimed it")
    state: State = "unprotected" if isinstance(reply, StoreFailed) else "held" if reply else "over"
    return [PolicyResult(policy.name, slot.key.text, state, None, slot.told_limit) for policy, slot, _ in group]


def _unavailable(group: Sequence[tuple[Policy, Slot, Slot]], denied: Sequence[Policy]) -> Rejection:
    first, slot = next((policy, slot) for policy, slot, _ in group if policy is denied[0])
    return Rejection(
        policy=first.name,
        key=slot.key.text,
        reason="backend_unavailable",
        limit=slot.told_limit,
        in_flight=None,
        retry_after=random.randint(*RETRY_AFTER),
        status=503,
        violated=tuple(policy.name for policy in denied),
    )
