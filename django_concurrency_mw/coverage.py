"""Coverage: the policy table against the URL configuration, which routes each policy reaches and which patterns reach none.

Pure functions over a table and `routes.routes()`, for the system checks and for `manage.py concurrency policies`. What they
say is about names alone: `methods`, `when` and decorators are the caller's to look at. A site that sets `request.urlconf`
has URLs that are in no such list.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import unwrap
from typing import Any, Literal

from .policies import Policy, PolicyTable, is_glob
from .routes import Route, class_of, innermost


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A pattern of a policy that matches the name of no route. `nearest` is the most alike name; None if none is."""

    policy: Policy
    field: Literal["url_names", "exclude"]
    pattern: str
    nearest: str | None


@dataclass(frozen=True, slots=True)
class SecondName:
    """A view that `policy` covers as `covered`, and that is also reachable as `outside`, which nothing alike covers."""

    policy: Policy
    covered: Route
    outside: Route


def covered_routes(table: PolicyTable, routes: Iterable[Route]) -> Mapping[Policy, tuple[Route, ...]]:
    """Of every policy of the table, in its order, the routes whose names it is given to, in theirs."""
    known = list(routes)
    return {policy: tuple([route for route in known if covers(policy, route.name)]) for policy in table}


def unmatched_patterns(table: PolicyTable, routes: Iterable[Route]) -> list[Unmatched]:
    """The patterns of `url_names` and `exclude` that match no route; none where there is no route at all."""
    names = list(dict.fromkeys(route.name for route in routes))
    if not names:
        return []
    return [
        Unmatched(policy, field, pattern, _nearest(pattern, names))
        for policy in table
        for field, patterns in _patterns(policy)
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def second_names(table: PolicyTable, routes: Iterable[Route]) -> list[SecondName]:
    """The ways around a policy: a view that it covers under one name, and nobody covers like that under another.

    One that the policy's own `exclude` names is meant. Another policy is alike if it limits the same clients as much: its key
    is the same, its limit no higher, and it is no shadow beside one that blocks. Of several names inside the policy `covered`
    is the first.
    """
    same: dict[object, list[Route]] = {}
    for route in routes:
        same.setdefault(view_identity(route.view), []).append(route)
    shared = [group for group in same.values() if len({route.name for route in group}) > 1]
    found: list[SecondName] = []
    for policy in table:
        for group in shared:
            inside = [route for route in group if covers(policy, route.name)]
            if not inside:
                continue
            outside = {route.name: route for route in group if not _is_meant(policy, route.name, table)}
            found += [SecondName(policy, inside[0], route) for route in outside.values()]
    return found


def covers(policy: Policy, name: str) -> bool:
    """Is the policy given to views of this name, whatever the method?"""
    return _matches(policy.url_names, name) and not _matches(policy.exclude, name)


def covers_by_glob(policy: Policy, name: str) -> bool:
    """Does it cover the name by wildcards only, so that perhaps nobody thought of this one?"""
    return covers(policy, name) and not any(fnmatchcase(name, each) for each in policy.url_names if not is_glob(each))


def view_identity(view: Any) -> Hashable:
    """What two routes have in common if they lead to one view: the function, or the class and what `as_view()` was given."""
    inner, cls = innermost(view), class_of(view)
    if cls is None:
        function = unwrap(inner)  # `cache_page(60)(view)` is the view
        return function if isinstance(function, Hashable) else id(function)
    given = getattr(inner, "view_initkwargs", None) or getattr(inner, "initkwargs", None) or {}
    actions = getattr(inner, "actions", None) or {}
    # What a router adds names the route, not the view.
    own = {
        (name, _alike(value))
        for name, value in given.items()
        if name not in ("basename", "suffix", "name", "description")
    }
    return cls, frozenset(own), frozenset((method, str(action)) for method, action in actions.items())


def _alike(value: Any) -> Hashable:
    """What is plain is compared; anything else is only itself. To look into it could ask a database: a QuerySet."""
    return (type(value), value) if isinstance(value, (str, int, bool, float, type)) or value is None else id(value)


def _is_meant(policy: Policy, name: str, table: PolicyTable) -> bool:
    """Is this name covered, by the policy or one that limits the same clients as much, or left out on purpose?"""
    if _matches(policy.exclude, name):
        return True
    return any(covers(other, name) for other in table if other is policy or _limits_alike(other, policy))


def _limits_alike(other: Policy, policy: Policy) -> bool:
    if other.key.text != policy.key.text or (policy.block and not other.block):
        return False
    limits = (other.max_concurrent, policy.max_concurrent)
    if isinstance(limits[0], int) and isinstance(limits[1], int):
        return limits[0] <= limits[1]
    return limits[0] is not None or limits[1] is None


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(policy: Policy) -> tuple[tuple[Literal["url_names", "exclude"], tuple[str, ...]], ...]:
    return ("url_names", policy.url_names), ("exclude", policy.exclude)


def _nearest(pattern: str, names: Sequence[str]) -> str | None:
    """The most alike name; of a glob, the wildcards do not count."""
    bare = "".join(character for character in pattern if character not in "*?[]!")
    whole = get_close_matches(bare, names, n=1)
    if whole:
        return whole[0]
    # `export` for `reports:export`: a namespace that was forgotten.
    last = {name.rpartition(":")[2]: name for name in reversed(names)}
    near = get_close_matches(bare.rpartition(":")[2], last, n=1)
    return last[near[0]] if near else None
