"""Notices: what is wrong with a policy's numbers, as the requests of this process show; said once per process and policy."""

from __future__ import annotations

import logging
from functools import lru_cache

from .policies import Policy

logger = logging.getLogger("django_concurrency_mw")


def lost(policy: Policy, age: float, overrun: float) -> None:
    """A request runs without its slot: its lease ended `overrun` seconds ago, or somebody took it away. Times in seconds."""
    if not _first_time(policy.name, "lost"):
        return
    if not policy.renew:
        cure = "Raise `ttl` above the longest request, or let it be renewed (`renew: true`)."
    elif policy.max_age is not None and age >= policy.max_age:
        cure = "It was older than `max_age`: raise that, or look for the request that hangs."
    else:
        cure = (
            "An operator took the slot away, or the process was stopped, or its store away, for longer than the ttl: raise "
            "`ttl` where that is to be survived."
        )
    since = f", its lease ended {overrun:.1f} s ago" if overrun >= 0.05 else ""
    logger.warning(
        "policy %s: a request has run for %.1f s and its slot is lost (ttl %g s%s), so somebody else may "
        "have it. %s (Said once per process and policy.)",
        policy.name,
        age,
        policy.ttl,
        since,
        cure,
    )


def max_age(policy: Policy) -> None:
    """A request is so old that its lease is not renewed any more."""
    if _first_time(policy.name, "max_age"):
        logger.warning(
            "policy %s: a request holds its slot for max_age (%s s); the slot is not renewed any more and will be given to "
            "somebody else. Raise `max_age` where requests may live as long, or look for the one that hangs. (Said once per "
            "process and policy.)",
            policy.name,
            policy.max_age,
        )


@lru_cache(maxsize=1024)
def _once(policy: str, what: str) -> list[bool]:
    return [True]


def _first_time(policy: str, what: str) -> bool:
    flag = _once(policy, what)
    try:
        return flag.pop()
    except IndexError:
        return False


def forget() -> None:
    """Say everything again, for tests."""
    _once.cache_clear()
