"""Occupancy: what operators see of the stores, holder by holder and policy by policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .backends import BaseBackend
from .backends.base import Holder, Waiter
from .exceptions import BackendError
from .held import RENEW_AFTER
from .keys import limits_of, make_key, masked, written
from .policies import Policy

#: Seconds that a renewal may come late, by load and by rounding, before its holder is marked.
LATE: Final = 0.5
#: Characters of a key's text that every store keeps.
SHORTEST_CUT: Final = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One holder, and what is to be said of it.

    `overran`: it is older than its ttl and still renewed, a request that takes long. `not_renewed`: a renewal is missing, or
    the policy says `renew: false`; it ends when its lease does.
    """

    backend: str
    holder: Holder
    overran: bool
    not_renewed: bool

    @property
    def marks(self) -> tuple[str, ...]:
        """In words."""
        words = (("overran", self.overran), ("not renewed", self.not_renewed))
        return tuple(word for word, is_so in words if is_so)


@dataclass(frozen=True, slots=True)
class Use:
    """What is held of one policy: in all, how much of each key, on the busiest one, and which keys have no room.

    `limit` is None where it is never full, text where a callable says it. `peak` is the most on one key since the last reset,
    None where no take has been noted yet. `waiting` is how many stand in its lines. Counts are sums of costs; `in_flight` and
    `waiting` are None where the store could not be asked.
    """

    policy: Policy
    limit: int | str | None
    in_flight: int | None
    by_key: Mapping[str, int]
    peak: int | None
    full: tuple[str, ...]
    waiting: int | None = None

    @property
    def busiest(self) -> int:
        """On one key."""
        return max(self.by_key.values(), default=0)


def rows(store: BaseBackend, leases: Mapping[str, float | None]) -> list[Row]:
    """What there is to say of each holder of a store. `leases`: the seconds that a slot of a policy is good for without a
    renewal, None where its users differ. Raises: BackendError, NotImplementedError."""
    return [_row(store.config.alias, holder, leases.get(holder.policy)) for holder in store.snapshot()]


def line(store: BaseBackend) -> list[tuple[str, Waiter]]:
    """Who waits in a store, beside its alias, each line in its order. Raises: BackendError."""
    return [(store.config.alias, waiter) for waiter in store.waiters()]


def _row(alias: str, holder: Holder, lease: float | None) -> Row:
    ttl = lease if holder.ttl is None else holder.ttl
    if ttl is None:
        return Row(alias, holder, False, False)
    # Whoever is renewed has always more of his lease left than this.
    late = holder.lease_left < ttl * (1 - RENEW_AFTER) - LATE
    return Row(alias, holder, holder.age > ttl and not late, late)


def is_key(text: str, holder: Holder | Waiter, policy: Policy | None) -> bool:
    """Is this their key, written as `per_key` has it, or masked? Stores cut long texts: those are told by their
    beginning."""
    if text == masked(holder.key):
        return True
    keys = (make_key(text),) if policy is None else (*written(policy, text), make_key(text))
    texts = [key.text.replace("\n", " ") for key in keys]  # as one store keeps them
    held = holder.key.replace("\n", " ")
    return any(one == held or (len(held) >= SHORTEST_CUT and one.startswith(held)) for one in texts)


def uses(
    policies: Iterable[Policy], store_of: Callable[[Policy], BaseBackend]
) -> tuple[list[Use], dict[str, Exception]]:
    """What is held of each policy now, and why a store could not be asked, by its alias; each store is asked once."""
    seen: dict[int, tuple[dict[str, dict[str, int]], Mapping[str, int], Counter[str]] | None] = {}
    failed: dict[str, Exception] = {}
    found = []
    for policy in policies:
        store = store_of(policy)
        if id(store) not in seen:
            try:
                waiting = Counter(waiter.policy for waiter in store.waiters())
                seen[id(store)] = (_by_policy(store.snapshot()), store.peaks(), waiting)
            except (BackendError, NotImplementedError) as error:
                seen[id(store)] = None
                failed[store.config.alias] = error
        known = seen[id(store)]
        if known is None:
            found.append(Use(policy, _told(policy), None, {}, None, ()))
            continue
        held, peaks, waiting = known
        peak = peaks.get(store.peak_name(policy.name))
        found.append(_use(policy, held.get(policy.name, {}), peak, waiting[policy.name]))
    return found, failed


def _by_policy(holders: Iterable[Holder]) -> dict[str, dict[str, int]]:
    """Policy -> key -> what is in flight, by cost."""
    found: dict[str, dict[str, int]] = {}
    for holder in holders:
        by_key = found.setdefault(holder.policy, {})
        by_key[holder.key] = by_key.get(holder.key, 0) + holder.cost
    return found


def _told(policy: Policy) -> int | str | None:
    limit = policy.max_concurrent
    return limit if limit is None or isinstance(limit, int) else named(limit)


def _use(policy: Policy, by_key: Mapping[str, int], peak: int | None, waiting: int) -> Use:
    full = tuple(sorted(key for key, count in by_key.items() if _is_full(policy, key, count)))
    in_flight = sum(by_key.values())
    if peak is not None:  # what is held now has not been noted yet, perhaps
        peak = max(peak, *by_key.values(), 0)
    elif by_key:
        peak = max(by_key.values())
    return Use(policy, _told(policy), in_flight, by_key, peak, full, waiting)


def _is_full(policy: Policy, key: str, count: int) -> bool:
    own = limits_of(policy)
    digest = make_key(key).digest
    limit = own.get(digest, policy.max_concurrent)
    cost = policy.cost if isinstance(policy.cost, int) else 1
    return isinstance(limit, int) and count + cost > limit


def named(function: object) -> str:
    """A callable, or its dotted path, for people."""
    if isinstance(function, str):
        return function
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
