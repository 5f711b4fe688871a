"""What the checks have in common: the configuration they look at, its stores and policies, and how names are listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from django.conf import settings

from .. import conf
from ..backends import BaseBackend
from ..decorated import all_decorators, stores_in_use
from ..exceptions import ConfigurationError
from ..keyspec import is_dotted_path
from ..policies import Policy

#: Names that a message lists.
LISTED = 5


def configuration() -> conf.Config | None:
    """The configuration; None where E001 has the word."""
    try:
        return conf.current()
    except ConfigurationError:
        return None


def stores(config: conf.Config) -> list[BaseBackend]:
    """Those that policies and decorators use; about others E002 has the word."""
    return [store for store in stores_in_use(config) if isinstance(store, BaseBackend)]


def policies(config: conf.Config) -> Iterator[Policy]:
    """Those of the table and those of decorators; about a decorator that is wrong E004 has the word."""
    yield from config.table
    yield from (made for made in all_decorators(config) if isinstance(made, Policy))


def who(policy: Policy, config: conf.Config) -> str:
    """What a message calls a policy: a decorator is known by its place alone."""
    return f"{policy.place}: policy {policy.name}" if config.table.get(policy.name) is policy else policy.place


def asks_for_user(policy: Policy) -> bool:
    """Does a request's user decide where this policy applies, or what it counts by?"""
    words = isinstance(policy.when, str) and not is_dotted_path(policy.when)
    return policy.key.needs_user or words or bool(policy.except_users)


def asks_for_session(policy: Policy) -> bool:
    """Does it count by a request's session, or by what is in it?"""
    return policy.key.needs_session


def own_setting(name: str, default: Any = None) -> Any:
    """A key of CONCURRENCY_LIMIT as it was written."""
    return (getattr(settings, conf.SETTING, None) or {}).get(name, default)


def backends_are_set() -> bool:
    return bool(own_setting("BACKENDS"))


def listed(names: Iterable[str]) -> str:
    """Names, each once, the first few of many."""
    known = list(dict.fromkeys(names))
    return ", ".join(known[:LISTED]) + (f" and {len(known) - LISTED} more" if len(known) > LISTED else "")
