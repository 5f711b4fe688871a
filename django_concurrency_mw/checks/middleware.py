"""Is the middleware there, once, and where it belongs? And do the others that policies need stand beside it?"""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Warning

from ..middleware import throttles_itself
from .common import MIDDLEWARE, configuration, is_ours, positions
from .drf import api_views


def check_middleware(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W001 and W002: is the middleware there, once?"""
    config = configuration()
    if config is None:
        return []
    number = len(positions(is_ours))
    if number > 1:
        return [
            Warning(
                f"ConcurrencyLimitMiddleware is in MIDDLEWARE {number} times.",
                hint="Keep the last one only.",
                id="django_concurrency_mw.W002",
            )
        ]
    limiting = any(policy.url_names for policy in config.table)
    if number == 0 and limiting and not any(throttles_itself(view.function) for view in api_views()):
        return [
            Warning(
                "The policies limit nothing: ConcurrencyLimitMiddleware is not in MIDDLEWARE.",
                hint=f"Add {MIDDLEWARE!r} as the last entry of MIDDLEWARE.",
                id="django_concurrency_mw.W001",
            )
        ]
    return []


def check_order(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W013: does it stand above what rejects?"""
    return []


def check_identity(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W014: can the table's policies see the user and the session that they ask for?"""
    return []
