"""Is the middleware there, once, and where it belongs? And do the others that policies need stand beside it?"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Warning

from ..chain import AUTHENTICATION, SESSION, has, positions
from ..coverage import covered_routes
from ..middleware import MIDDLEWARE, is_ours, throttles_itself
from ..policies import Policy, PolicyTable
from ..routes import routes
from .common import asks_for_session, asks_for_user, configuration, listed
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
    """W013: does it stand above what rejects?

    Users and sessions are known to it wherever it stands, as it takes its slots in `process_view`, behind every middleware's
    request phase. What rejects in a `process_view` of its own below ours comes too late, though.
    """
    config = configuration()
    ours = positions(is_ours)
    if config is None or not ours or not any(policy.url_names for policy in config.table):
        return []
    rejecting = positions(lambda cls: hasattr(cls, "process_view"))
    below = [settings.MIDDLEWARE[place] for place in rejecting if place > ours[-1]]
    if not below:
        return []
    return [
        Warning(
            f"ConcurrencyLimitMiddleware stands above {listed(path.rpartition('.')[2] for path in below)}: a request that is "
            "rejected there has taken a slot first, and where the limit is full it is told to come again instead.",
            hint="Make it the last entry of MIDDLEWARE. Where that one rejects nothing, silence this check.",
            id="django_concurrency_mw.W013",
        )
    ]


def check_identity(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W014: can the table's policies see the user and the session that they ask for?"""
    config = configuration()
    if config is None or not positions(is_ours):  # the throttle of Django REST framework knows the user by itself
        return []
    messages: list[CheckMessage] = []
    for what, path, asks, otherwise in (
        ("user", AUTHENTICATION, asks_for_user, "nobody is logged in here: an anonymous user counts by address"),
        ("session", SESSION, asks_for_session, "no request has one here: `missing` decides"),
    ):
        asking = [] if has(path) else [policy for policy in _taken_here(config.table) if asks(policy)]
        if asking:
            messages.append(
                Warning(
                    f"{path.rpartition('.')[2]} is not in MIDDLEWARE, so {otherwise}. These policies ask for the {what}: "
                    f"{listed(policy.name for policy in asking)}.",
                    hint=f"Add {path!r}. Where a middleware of your own sets request.{what}, silence this check.",
                    id="django_concurrency_mw.W014",
                )
            )
    return messages


def _taken_here(table: PolicyTable) -> list[Policy]:
    """What the middleware takes for some view; not what is left to the throttles of Django REST framework everywhere."""
    return [
        policy
        for policy, covered in covered_routes(table, routes()).items()
        if policy.url_names and (not covered or not all(throttles_itself(route.view) for route in covered))
    ]
