"""Does ConcurrencyThrottle take the policies of Django REST framework's views, where it has to?"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from django.core.checks import CheckMessage, Warning

from .. import conf
from ..limiter import is_replaced
from ..middleware import authenticates_itself, throttles_itself
from ..policies import Policy
from ..routes import class_of, innermost, routes
from .common import asks_for_user, configuration, listed


class ApiView(NamedTuple):
    """A view of Django REST framework in the URL configuration."""

    name: str
    function: Any


def check_api_views(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W004 and W005: does ConcurrencyThrottle take the policies of Django REST framework's views, where it has to?"""
    config = configuration()
    if config is None:
        return []
    views = api_views()
    messages: list[CheckMessage] = []
    for policy in config.table:
        blind = [view for view in views if _is_blind(view, policy, config)]
        if blind:
            messages.append(
                Warning(
                    f"{policy.place}: policy {policy.name} needs the user, whom Django REST framework knows inside the view "
                    f"only. Without ConcurrencyThrottle a token's user is anonymous here: {_names(blind)}.",
                    hint="Add django_concurrency_mw.drf.ConcurrencyThrottle to throttle_classes of the view, or to "
                    "DEFAULT_THROTTLE_CLASSES of REST_FRAMEWORK; or `exclude` the view.",
                    id="django_concurrency_mw.W004",
                )
            )
    hidden = [
        view for view in views if _overrides_throttles(view) and any(_meets(view, p, config) for p in config.table)
    ]
    if hidden:
        messages.append(
            Warning(
                "get_throttles() is overridden, and the middleware leaves these views to the ConcurrencyThrottle in their "
                f"throttle_classes: {_names(hidden)}.",
                hint="Make sure that get_throttles() returns it always, or nobody takes the policies; then silence this check.",
                id="django_concurrency_mw.W005",
            )
        )
    return messages


def api_views() -> list[ApiView]:
    """The views of Django REST framework, once for each name; none where nothing has imported it."""
    framework = sys.modules.get("rest_framework.views")
    if framework is None:
        return []
    return list(
        dict.fromkeys(
            ApiView(route.name, route.view)
            for route in routes()
            if (cls := class_of(route.view)) is not None and issubclass(cls, framework.APIView)
        )
    )


def _is_blind(view: ApiView, policy: Policy, config: conf.Config) -> bool:
    """Does the policy ask for the user of this view where nobody knows it?"""
    return (
        asks_for_user(policy)
        and not throttles_itself(view.function)
        and authenticates_itself(view.function)
        and _meets(view, policy, config)
    )


def _meets(view: ApiView, policy: Policy, config: conf.Config) -> bool:
    """Does the table give the policy to a method of this view?"""
    if is_replaced(policy, view.function):
        return False
    function = innermost(view.function)
    # A ViewSet's methods are made of its actions, for each request.
    handled = getattr(function, "actions", None) or [
        name for name in function.cls.http_method_names if hasattr(function.cls, name)
    ]
    return any(policy in config.table.match(view.name, method.upper()) for method in handled)


def _overrides_throttles(view: ApiView) -> bool:
    from rest_framework.views import APIView

    cls: Any = class_of(view.function)
    return throttles_itself(view.function) and cls.get_throttles is not APIView.get_throttles


def _names(views: list[ApiView]) -> str:
    return listed(view.name for view in views)
