"""Occupancy: what operators see of the stores, holder by holder and policy by policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .backends import BaseBackend
from .backends.base import Holder
from .held import RENEW_AFTER
from .keys import limits_of, make_key, written
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
    None where no take has been noted yet. Counts are sums of costs.
    """

    policy: Policy
    limit: int | str | None
    in_flight: int
    by_key: Mapping[str, int]
    peak: int | None
    full: tuple[str, ...]

    @property
    def busiest(self) -> int:
        """On one key."""
        return max(self.by_key.values(), default=0)


def rows(store: BaseBackend, policies: Mapping[str, Policy]) -> list[Row]:
    """What there is to say of each holder of a store. `policies` by name. Raises: BackendError, NotImplementedError."""
    return [_row(store.config.alias, holder, policies.get(holder.policy)) for holder in store.snapshot()]


def _row(alias: str, holder: Holder, policy: Policy | None) -> Row:
    ttl = holder.ttl if holder.ttl is not None or policy is None else policy.ttl
    if ttl is None:
        return Row(alias, holder, False, False)
    # Whoever is renewed has always more of his lease left than this.
    late = holder.lease_left < ttl * (1 - RENEW_AFTER) - LATE
    return Row(alias, holder, holder.age > ttl and not late, late)


def is_key(text: str, holder: Holder, policy: Policy | None) -> bool:
    """Is this the holder's key, written as `per_key` has it? Stores cut long texts: those are told by their beginning."""
    keys = (make_key(text),) if policy is None else (*written(policy, text), make_key(text))
    return any(
        key.text == holder.key or (len(holder.key) >= SHORTEST_CUT and key.text.startswith(holder.key)) for key in keys
    )


def uses(policies: Iterable[Policy], store_of: Callable[[Policy], BaseBackend]) -> list[Use]:
    """What is held of each policy now; each store is asked once. Raises: BackendError, NotImplementedError."""
    seen: dict[int, tuple[Sequence[Holder], Mapping[str, int]]] = {}
    found = []
    for policy in policies:
        store = store_of(policy)
        if id(store) not in seen:
            seen[id(store)] = (store.snapshot(), store.peaks())
        holders, peaks = seen[id(store)]
        by_key: dict[str, int] = {}
        for holder in holders:
            if holder.policy == policy.name:
                by_key[holder.key] = by_key.get(holder.key, 0) + holder.cost
        found.append(_use(policy, by_key, peaks.get(store.peak_name(policy.name))))
    return found


def _use(policy: Policy, by_key: Mapping[str, int], peak: int | None) -> Use:
    limit = policy.max_concurrent
    told = limit if limit is None or isinstance(limit, int) else named(limit)
    full = tuple(sorted(key for key, count in by_key.items() if _is_full(policy, key, count)))
    in_flight = sum(by_key.values())
    if peak is not None:  # what is held now has not been noted yet, perhaps
        peak = max(peak, *by_key.values(), 0)
    elif by_key:
        peak = max(by_key.values())
    return Use(policy, told, in_flight, by_key, peak, full)


def _is_full(policy: Policy, key: str, count: int) -> bool:
    own = limits_of(policy)
    digest = make_key(key).digest
    limit = own.get(digest, policy.max_concurrent)
    return isinstance(limit, int) and count >= limit


def named(function: object) -> str:
    """A callable, or its dotted path, for people."""
    if isinstance(function, str):
        return function
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
