"""Tables of many sizes, each compiled once: what is in force can be changed between two slices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from django.conf import settings

from django_concurrency_mw import conf

from .policies import among


@cache
def _compiled(size: int) -> tuple[object, conf.Config]:
    raw = among(_own, size)
    return raw, conf.compile_settings(raw)


_own = settings.CONCURRENCY_LIMIT


def switch(size: int) -> Callable[[], None]:
    """Put the table with so many policies in force."""
    compiled = _compiled(size)

    def put() -> None:
        # As after a change of the setting, but for compiling thousands of policies again each time.
        settings.CONCURRENCY_LIMIT = compiled[0]
        conf._current = compiled

    return put


def restore() -> None:
    """Put the site's own table back."""
    settings.CONCURRENCY_LIMIT = _own
