"""Quick keys: those of the usual kinds of policy, straight from an address or a path, as `keys` makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..client import bucket, parse_address
from ..keys import limits_of, make_key, template_key
from ..keyspec import KeySpec, Part
from ..outcomes import Asked, Key
from ..policies import Policy

#: From the address and the view's keyword arguments. None: it takes a request to tell.
Quick = Callable[[str | None, Mapping[str, Any]], Key | None]
#: No address is written with more characters, so what is longer is looked at with care.
LONGEST = 64


def quick_key(policy: Policy) -> Quick | None:
    """How this policy's keys are made, where they need neither a request nor anything but a number as the limit."""
    if policy.when is not None or policy.except_ips or policy.except_users:
        return None
    if policy.key.kind == "ip":
        return _of_address
    parts = [part for part in policy.key.parts if isinstance(part, Part)]
    if policy.key.kind == "template" and parts and all(part.root == "kwargs" for part in parts):
        return _of_kwargs(policy.key, [part.path[0] for part in parts])
    return None


def asked_for(policy: Policy, key: Key) -> Asked:
    """With the limit that this key has, of a policy whose limits and cost are numbers."""
    limit = policy.max_concurrent
    if policy.per_key:
        limit = limits_of(policy).get(key.digest, limit)
    return Asked(policy, key, limit, policy.cost)  # type: ignore[arg-type]


def _of_address(ip: str | None, kwargs: Mapping[str, Any]) -> Key | None:
    address = parse_address(ip) if ip and len(ip) <= LONGEST else None
    return None if address is None else make_key(f"ip:{bucket(address)}")


def _of_kwargs(spec: KeySpec, names: list[str]) -> Quick:
    def key(ip: str | None, kwargs: Mapping[str, Any]) -> Key | None:
        values = [kwargs.get(name) for name in names]
        return template_key(spec, list(map(str, values))) if all(value is not None for value in values) else None

    return key
