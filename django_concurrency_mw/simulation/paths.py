"""Paths: from a path as a log has it to the view that it leads to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from urllib.parse import unquote_to_bytes

from django.conf import settings
from django.urls import Resolver404, get_resolver
from django.urls.resolvers import RoutePattern, URLResolver
from django.utils.encoding import repercent_broken_unicode


def resolving() -> Callable[[str], Any]:
    """A path as a log has it to what it leads to; None where that is nowhere."""
    from django.conf.urls.i18n import is_language_prefix_patterns_used
    from django.utils import translation

    find = _finder(get_resolver())
    prefix = (getattr(settings, "FORCE_SCRIPT_NAME", None) or "").rstrip("/")
    speaks = (
        bool(getattr(settings, "ROOT_URLCONF", None)) and is_language_prefix_patterns_used(settings.ROOT_URLCONF)[0]
    )

    def resolve(path: str) -> Any:
        if not path.startswith("/"):
            _, found, rest = path.partition("://")
            if not found:
                return None
            path = f"/{rest.partition('/')[2]}"
        if prefix and path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
        if "%" in path or not path.isascii():
            path = repercent_broken_unicode(unquote_to_bytes(path.encode("utf-8", "surrogatepass"))).decode()
        spoken = translation.get_language_from_path(path) if speaks else None
        with translation.override(spoken or settings.LANGUAGE_CODE) if speaks else nullcontext():
            return find(path)

    return resolve


def _finder(resolver: URLResolver) -> Callable[[str], Any]:
    """What Django's resolver finds, by asking only those patterns of the root whose literal beginning a path has.

    Its answer for the root has the view, the view's name and the keyword arguments of the pattern's own answer, as the root
    itself has no name and captures nothing.
    """
    patterns = [(_beginning(entry.pattern), entry.resolve) for entry in resolver.url_patterns]

    def find(path: str) -> Any:
        rest = path[1:]  # the root's own pattern is the slash
        for beginning, resolve in patterns:
            if rest.startswith(beginning):
                try:
                    found = resolve(rest)
                except Resolver404:
                    continue
                if found:
                    return found
        return None

    return find


def _beginning(pattern: Any) -> str:
    """What every path begins with that this pattern takes; nothing where that is not known."""
    route = getattr(pattern, "_route", None)  # a translated one is no text yet
    return route.partition("<")[0] if type(pattern) is RoutePattern and isinstance(route, str) else ""
