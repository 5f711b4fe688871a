"""The chain: the classes that MIDDLEWARE names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.utils.module_loading import import_string

AUTHENTICATION = "django.contrib.auth.middleware.AuthenticationMiddleware"
SESSION = "django.contrib.sessions.middleware.SessionMiddleware"


def imported(path: object) -> Any:
    """What a dotted path leads to; None where that fails: Django says so itself when it needs it."""
    try:
        return import_string(path)  # type: ignore[arg-type]  # settings may hold anything
    except Exception:
        return None


def positions(is_one: Callable[[type], bool]) -> list[int]:
    """Where in MIDDLEWARE the classes stand that this is true of."""
    classes = map(imported, settings.MIDDLEWARE)
    return [place for place, found in enumerate(classes) if isinstance(found, type) and is_one(found)]


def has(path: str) -> bool:
    """Is this class, or a subclass of it, in MIDDLEWARE?"""
    if path in settings.MIDDLEWARE:
        return True
    # Its module needs an app that may not be installed; whoever has a subclass in MIDDLEWARE has imported it.
    found = {imported(entry) for entry in settings.MIDDLEWARE}
    return any(
        f"{base.__module__}.{base.__qualname__}" == path for cls in found for base in getattr(cls, "__mro__", ())
    )
