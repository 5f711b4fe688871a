"""The policies against the URL configuration: what its patterns reach, and what they should and should not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django.core.checks import CheckMessage, Warning
from django.core.exceptions import ImproperlyConfigured

from .. import conf
from ..backends import get_backend
from ..coverage import covers_by_glob, second_names, unmatched_patterns
from ..decorated import Decorated, decorated
from ..limiter import is_replaced
from ..middleware import throttles_itself
from ..policies import STANDARD_METHODS, Policy
from ..routes import Route, routes
from .common import configuration, listed

#: A word of a view's name that says by itself that a machine asks whether the site lives.
HEALTH = frozenset(
    {"health", "healthz", "healthcheck", "heartbeat", "livez", "liveness", "readyz", "readiness", "pingz", "statusz"}
)
#: Words that say so only where no other word stands beside them: `order-status` is for people.
ALONE = frozenset({"alive", "live", "metrics", "ping", "ready", "startup", "status", "up"})
#: What may stand beside those.
BESIDE = frozenset({"api", "app", "check", "db", "probe", "server", "service", "site", "system", "view"})


def check_patterns(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W011: patterns that match no URL."""
    config = configuration()
    if config is None:
        return []
    return [
        Warning(
            f"{found.policy.place}: policy {found.policy.name}: {found.field}: {found.pattern!r} matches no URL"
            + (f"; did you mean {found.nearest!r}?" if found.nearest else "."),
            hint="A pattern is matched with the name of a URL and its namespaces, such as 'shop:order-list'; a URL without a "
            "name has the dotted path of its view. Where the site sets request.urlconf and the URL is there, silence this "
            "check.",
            id="django_concurrency_mw.W011",
        )
        for found in unmatched_patterns(config.table, routes())
    ]


def check_health(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W012: globs that reach a health check."""
    config = configuration()
    if config is None:
        return []
    known = [route for route in routes() if _is_for_machines(route.name)]
    messages: list[CheckMessage] = []
    for policy in filter(_may_reject_a_probe, config.table):
        reached = [
            route.name for route in known if covers_by_glob(policy, route.name) and not is_replaced(policy, route.view)
        ]
        if reached:
            messages.append(
                Warning(
                    f"{policy.place}: policy {policy.name} limits what looks like a health check, by a pattern with a "
                    f"wildcard: {listed(reached)}.",
                    hint="A load balancer whose probe is rejected takes the server out just when it is busy. Put the name "
                    "into `exclude`; or into `url_names` as it is, if it is to be limited.",
                    id="django_concurrency_mw.W012",
                )
            )
    return messages


def check_second_names(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W023: views that their policy does not cover under another name."""
    config = configuration()
    if config is None:
        return []
    ways: dict[Policy, list[str]] = defaultdict(list)
    for found in second_names(config.table, routes()):
        if not is_replaced(found.policy, found.outside.view):
            ways[found.policy].append(f"{found.outside.name} is the view of {found.covered.name}")
    return [
        Warning(
            f"{policy.place}: policy {policy.name} can be gone around, as the same view is reachable under a name that it "
            f"does not cover: {listed(names)}.",
            hint="Add that name to `url_names`; or to `exclude`, if it is not to be limited.",
            id="django_concurrency_mw.W023",
        )
        for policy, names in ways.items()
    ]


def check_waits(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W024: a wait that no request ever waits, as it asks several stores."""
    config = configuration()
    if config is None:
        return []
    methods = STANDARD_METHODS.union(*(policy.methods or () for policy in config.table))
    found: dict[Policy, tuple[dict[str, None], dict[str, None]]] = {}
    for route in routes():
        on_view = _on_view(route.view, config)
        for policy, other in _in_vain(route, on_view, methods, config):
            beside, where = found.setdefault(policy, ({}, {}))
            beside[other.name] = where[route.name] = None
    return [
        Warning(
            f"{policy.place}: policy {policy.name} has a `wait` without effect where a request also asks another "
            f"store, for {listed(beside)}: such a request never waits. Views: {listed(where)}.",
            hint="Whoever holds a slot of one store would keep it from others while it stands in line at another. Give "
            "policies that meet on one view the same `backend`; or remove `wait`.",
            id="django_concurrency_mw.W024",
        )
        for policy, (beside, where) in found.items()
    ]


def _on_view(view: Any, config: conf.Config) -> list[Decorated]:
    try:
        return decorated(view, config)
    except ImproperlyConfigured:  # about a decorator that is wrong another check has the word
        return []


def _in_vain(
    route: Route, on_view: Sequence[Decorated], methods: Iterable[str], config: conf.Config
) -> Iterator[tuple[Policy, Policy]]:
    """Who never waits on a view, each with one who asks another store, together with it or before."""
    for method in sorted(methods):
        asked: list[Policy] = []
        for together in _turns(route, on_view, method, config):
            asked += together
            for policy in together:
                if policy.wait:
                    yield from ((policy, other) for other in asked if _count_apart(policy, other, config))


def _turns(route: Route, on_view: Sequence[Decorated], method: str, config: conf.Config) -> Iterator[Sequence[Policy]]:
    """What a request asks together, one time after the other."""
    by_table = [policy for policy in config.table.match(route.name, method) if not is_replaced(policy, route.view)]
    own = [one for one in on_view if one.policy.methods is None or method in one.policy.methods]
    outer = [[one.policy] for one in own if one.method is None]
    inner = [[one.policy] for one in own if one.method == method or (one.method, method) == ("GET", "HEAD")]
    yield from (*outer, by_table, *inner) if throttles_itself(route.view) else (by_table, *outer, *inner)


def _count_apart(policy: Policy, other: Policy, config: conf.Config) -> bool:
    """Do they ask two stores? About one that cannot be used E002 has the word."""
    try:
        return get_backend(policy.backend, config.backends) is not get_backend(other.backend, config.backends)
    except Exception:  # a store of the project's may fail in any way
        return False


def _is_for_machines(name: str) -> bool:
    """Is the last part of this name such as `healthz`, `health-check`, `ready` or `LivenessProbe`?"""
    last = re.split(r"[:.]", name)[-1]
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", last)}
    return not words.isdisjoint(HEALTH) or (not words.isdisjoint(ALONE) and words <= ALONE | BESIDE)


def _may_reject_a_probe(policy: Policy) -> bool:
    """A probe is an anonymous GET or HEAD."""
    asked = policy.methods is None or not policy.methods.isdisjoint({"GET", "HEAD"})
    return asked and policy.block and policy.max_concurrent is not None and policy.when in (None, "anonymous")
