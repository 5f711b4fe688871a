"""What decorators limit: the policies of `@concurrency_limit` as people see them, in the checks and in the command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import getclosurevars
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from . import conf
from .backends import BaseBackend
from .decorators import limits
from .exceptions import ConfigurationError
from .limiter import store_of
from .naming import outermost_first
from .policies import Policy
from .routes import class_of, innermost, routes
from .steps import lease_seconds


@dataclass(frozen=True, slots=True)
class Decorated:
    """A decorator on a view: its policy, and the method or action that it is about, None where that is all of them."""

    policy: Policy
    method: str | None = None


def decorated(view: Any, config: conf.Config) -> list[Decorated]:
    """The decorators on a view of the URL configuration, outermost first: its own, then those of single methods.

    Raises: ImproperlyConfigured for one that names what is not there.
    """
    inner, cls = innermost(view), class_of(view)
    if cls is None:
        return [Decorated(guard.policy(config)) for guard in outermost_first(view).values()]
    on_dispatch: dict[str, Policy] = {}
    for base in cls.__mro__:  # each calls that of the next
        for mark, policy in _on_method(cls, "dispatch", vars(base).get("dispatch"), config).items():
            on_dispatch.setdefault(mark, policy)
    outside = [guard.policy(config) for mark, guard in outermost_first(view).items() if mark not in on_dispatch]
    found = [Decorated(policy) for policy in (*outside, *on_dispatch.values())]
    # A ViewSet's methods are made of its actions, for each request.
    actions = getattr(inner, "actions", None) or {name: name for name in getattr(cls, "http_method_names", ())}
    for method, name in actions.items():
        function = getattr(cls, name, None)
        on_method = [*_on_method(cls, name, function, config).values()]
        on_method += [guard.policy(config) for guard in outermost_first(_below_api_view(function)).values()]
        found += [Decorated(policy, method.upper()) for policy in on_method]
    return found


def _below_api_view(function: Any) -> Any:
    """The function that Django REST framework's @api_view made a method of; it does not say so itself."""
    if getattr(function, "__qualname__", "") != "api_view.<locals>.decorator.<locals>.handler":
        return None
    return getclosurevars(function).nonlocals.get("func")


def _on_method(cls: type, name: str, function: Any, config: conf.Config) -> dict[str, Policy]:
    """The policies of the decorators on one method, each under its mark, outermost first."""
    marked = outermost_first(function)
    return {
        mark: guard.policy_on(cls, name, len(marked) - position, config)
        for position, (mark, guard) in enumerate(marked.items())
    }


def all_decorators(config: conf.Config) -> Iterable[Policy | ImproperlyConfigured]:
    """The policy of each `concurrency_limit` that has been imported and is alive, or what is wrong with it."""
    try:
        _import_urls()
    except ConfigurationError as error:
        yield error
    # The real name is known only with the view; this one stands for it, and must not be a policy's of the table.
    name = "view"
    while config.table.get(name) is not None:
        name += "_"
    for limit in sorted(limits, key=lambda limit: limit.place):
        try:
            yield limit.policy(name, config)
        except ImproperlyConfigured as error:
            yield error


def policies_in_use(config: conf.Config) -> dict[str, list[Policy]]:
    """Name -> policies, of the table and of the decorators in the URL configuration, under the names that requests use.

    Several decorators may share a name, each with a limit and a lease of its own; the table's policy comes first. A decorator
    that is wrong is left out: the checks say so.
    """
    found = {policy.name: [policy] for policy in config.table}
    for route in routes():
        try:
            on_view = decorated(route.view, config)
        except ImproperlyConfigured:
            continue
        for one in on_view:
            known = found.setdefault(one.policy.name, [])
            if one.policy not in known:
                known.append(one.policy)
    return found


def leases(policies: Mapping[str, Sequence[Policy]]) -> dict[str, float | None]:
    """Name -> how long a slot is good for without a renewal, in seconds; None where those who share the name differ."""
    found = {name: {lease_seconds(policy) for policy in known} for name, known in policies.items()}
    return {name: seconds.pop() if len(seconds) == 1 else None for name, seconds in found.items()}


def stores_in_use(config: conf.Config) -> Iterator[BaseBackend | Exception]:
    """The stores that policies and decorators use, each once, or why one cannot be used."""
    seen: set[int] = set()
    decorators = (made for made in all_decorators(config) if isinstance(made, Policy))
    for policy in (*config.table, *decorators):
        try:
            store = store_of(policy, config)
        except Exception as error:  # a store of the project's may fail in any way
            yield error
            continue
        if id(store) not in seen:
            seen.add(id(store))
            yield store


def _import_urls() -> None:
    """Decorators are known once their module is imported."""
    from django.urls import get_resolver

    if getattr(settings, "ROOT_URLCONF", None):
        _ = get_resolver().url_patterns
