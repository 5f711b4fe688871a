"""Routes: every view of the URL configuration, under the name that policies match.

An unnamed view's name is its dotted path, as `ResolverMatch.view_name` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.conf import settings

from .exceptions import ConfigurationError


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of the URL configuration: the name that policies match, the view, and the pattern as it was written."""

    name: str
    view: Callable[..., Any]
    pattern: str


def routes() -> list[Route]:
    """All of them, in the order of the URL configuration; none where there is none, or where a decorator in it is wrong."""
    from django.urls import get_resolver

    if not getattr(settings, "ROOT_URLCONF", None):
        return []
    try:
        entries = get_resolver().url_patterns
    except ConfigurationError:  # of a decorator: the system checks have the word
        return []
    return list(_walk(entries, [], ""))


def _walk(entries: Iterable[Any], namespaces: list[str | None], prefix: str) -> Iterator[Route]:
    from django.urls import ResolverMatch, URLPattern, URLResolver

    for entry in entries:
        pattern = f"{prefix}{entry.pattern}"
        if isinstance(entry, URLResolver):
            yield from _walk(entry.url_patterns, [*namespaces, entry.namespace], pattern)
        elif isinstance(entry, URLPattern):
            match = ResolverMatch(entry.callback, (), {}, entry.name, namespaces=namespaces)
            yield Route(match.view_name, entry.callback, pattern)


def class_of(view: Any) -> type | None:
    """The class behind `as_view()`, of Django's views and of Django REST framework's; None for a function."""
    inner = innermost(view)
    return next((cls for name in ("view_class", "cls") if isinstance(cls := getattr(inner, name, None), type)), None)


def innermost(view: Any) -> Any:
    """The view behind partials."""
    while isinstance(view, partial):
        view = view.func
    return view
