"""The table of the checks: one row for each id, from which the app registers them and the documentation is made.

An id is never used again, nor for something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django.core.checks import CheckMessage

from .deployment import check_addresses, check_deployed_memory, check_deployed_prefix, check_deployed_store
from .drf import check_api_views
from .middleware import check_identity, check_middleware, check_order
from .policies import check_keys, check_leases, check_nobody
from .settings import check_decorators, check_policies, check_settings
from .stores import check_caches, check_default_store, check_same_count, check_stores, check_waiting
from .urls import check_health, check_patterns, check_second_names, check_waits


@dataclass(frozen=True, slots=True)
class Check:
    """One id: what it says in one line, and the function that finds it; `deploy`: with `check --deploy` only."""

    id: str
    meaning: str
    function: Callable[..., Sequence[CheckMessage]]
    deploy: bool = False

    @property
    def full_id(self) -> str:
        """As SILENCED_SYSTEM_CHECKS takes it."""
        return f"django_concurrency_mw.{self.id}"

    @property
    def anchor(self) -> str:
        """Its place on the page of the checks: `check-w011`."""
        return f"check-{self.id.lower()}"


def _deploy(id: str, meaning: str, function: Callable[..., Any]) -> Check:
    return Check(id, meaning, function, deploy=True)


CHECKS: tuple[Check, ...] = (
    Check("E001", "CONCURRENCY_LIMIT or its policy file is wrong.", check_settings),
    Check("E002", "A policy or a decorator names a store that cannot be used.", check_policies),
    Check("E003", "A dotted path of a policy or a decorator cannot be imported.", check_policies),
    Check("E004", "A decorator names what it must not, or what is not there.", check_decorators),
    Check("E005", "A store answers, but will not do what is asked until somebody changes something.", check_stores),
    Check("W001", "There are policies, but ConcurrencyLimitMiddleware is not in MIDDLEWARE.", check_middleware),
    Check("W002", "ConcurrencyLimitMiddleware is in MIDDLEWARE more than once.", check_middleware),
    _deploy("W003", "A limit by address may see only a proxy's address.", check_addresses),
    Check("W004", "A policy needs the user on a view of Django REST framework that hides it.", check_api_views),
    Check("W005", "Whether an overridden get_throttles() returns our throttle cannot be seen.", check_api_views),
    Check("W006", "A store cannot be reached now.", check_stores),
    Check("W007", "A Redis does not tell a connection who it is, so a lost one cannot be fenced off.", check_stores),
    Check("W008", "The store by default is 'memory', which counts in each process.", check_default_store),
    _deploy("W009", "The store by default is 'host', which counts on one machine.", check_deployed_store),
    _deploy("W010", "The store 'host' has a name that another site may have.", check_deployed_store),
    Check("W011", "A pattern of url_names or exclude matches no URL.", check_patterns),
    Check("W012", "A pattern with a wildcard limits what looks like a health check.", check_health),
    Check("W013", "ConcurrencyLimitMiddleware stands above a middleware that rejects requests.", check_order),
    Check("W014", "A policy needs the user or the session, and no middleware provides it.", check_identity),
    _deploy("W015", "The store 'memory' is in use: each worker process counts by itself.", check_deployed_memory),
    _deploy("W016", "A Redis store has the default KEY_PREFIX, which another site may have.", check_deployed_prefix),
    Check("W017", "Two aliases of BACKENDS are one and the same count.", check_same_count),
    Check("W018", "A Redis may evict keys when its memory is full, and held slots with them.", check_stores),
    Check("W019", "A Redis cache has a store's database, which its cache.clear() empties.", check_caches),
    Check("W020", "A ttl is too short for its lease to be renewed in time.", check_leases),
    Check("W021", "A policy counts by the session, which signed_cookies does not identify.", check_keys),
    Check("W022", "A header with an underscore in its name, which servers drop.", check_keys),
    Check("W023", "A view is reachable under another name, outside its policy.", check_second_names),
    Check("W024", "A wait has no effect, as its requests ask several stores.", check_waits),
    Check("W025", "A Redis does not let those who wait be told that it is their turn.", check_waiting),
    Check("W026", "The user of a Redis lacks rights that requests can do without.", check_stores),
    Check("I001", "A policy admits nobody.", check_nobody),
)


def registered() -> dict[Callable[..., Sequence[CheckMessage]], bool]:
    """The functions to register, each once, and whether with `--deploy` only."""
    return {row.function: row.deploy for row in CHECKS}
