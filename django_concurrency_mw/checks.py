"""The system checks: what is wrong with the configuration, before a request finds out. Ids are unique and never reused.

E001 settings or policy file; E002 a store that cannot be used; E003 a dotted path that cannot be imported; E004 a decorator
that names what it must not, or what is not there; E005 a store that answers, but will not do what is asked until somebody
changes something; W001 no middleware; W002 middleware twice; W003 a limit by address that may see only a proxy's; W004 a limit
by user on a view of Django REST framework whose user it cannot see; W005 such a view whose throttles cannot be seen; W006 a
store that cannot be reached now; W007 a store that keeps a connection from being fenced off; W008
a default store that counts in each process; W009 a default store that counts on one machine; W010 a default name that another
site may have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.utils.module_loading import import_string

from . import backends, conf
from .backends import DEFAULT_PREFIX, BaseBackend, worker_suffix
from .backends.base import settings_module
from .decorated import all_decorators, stores_in_use
from .exceptions import ConfigurationError
from .keys import callable_of
from .keyspec import is_dotted_path
from .limiter import MARK, store_of
from .middleware import ConcurrencyLimitMiddleware, throttles_itself
from .policies import Policy
from .routes import innermost, routes

TAG = "concurrency"
MIDDLEWARE = "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"
#: The first part of a settings module's name that many projects have.
COMMON_NAMES = frozenset(
    {
        "app",
        "backend",
        "conf",
        "config",
        "core",
        "django_project",
        "main",
        "mysite",
        "project",
        "server",
        "settings",
        "site",
    }
    | {"src", "web", "website"}
)
#: Views that a warning names.
LISTED = 5


def check_settings(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """E001: everything that is wrong with CONCURRENCY_LIMIT and its policy file, each with its place."""
    try:
        conf.current()
    except ConfigurationError as error:
        return [
            Error(
                str(problem),
                hint=problem.hint or "Correct the value at the place named; the server does not start before that.",
                id="django_concurrency_mw.E001",
            )
            for problem in error.problems
        ]
    return []


def check_policies(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """E002 and E003 for the table: stores and dotted paths, which requests resolve at first use."""
    config = _config()
    return [] if config is None else [message for policy in config.table for message in _about(policy, config)]


def check_decorators(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """E002 to E004 for each `@concurrency_limit` that has been imported (the URL configuration is)."""
    config = _config()
    if config is None:
        return []
    messages: list[CheckMessage] = []
    for made in all_decorators(config):
        if isinstance(made, Policy):
            messages += _about(made, config)
        else:
            hint = "Change the decorator or the table."
            messages.append(Error(str(made), hint=hint, id="django_concurrency_mw.E004"))
    return messages


def check_stores(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """What the stores that policies and decorators use say of themselves, under ids of their own."""
    config = _config()
    if config is None:
        return []
    return [message for store in _stores(config) for message in store.check()]


def check_default_store(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W008: there is no store of the machine here, so what is the default counts in each process."""
    config = _config()
    if config is None or _backends_are_set() or backends.DEFAULT_BACKEND != "memory" or not _stores(config):
        return []
    return [
        Warning(
            "CONCURRENCY_LIMIT has no BACKENDS, and on this platform the default is 'memory': each worker process counts by "
            "itself, so four workers let in four times a limit.",
            hint="Use 'redis', or run one process; or say {'default': {'BACKEND': 'memory'}} if that is what you want.",
            id="django_concurrency_mw.W008",
        )
    ]


def check_deployed_store(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W009 and W010 (--deploy): the store `host` sees one machine, and whoever has its name shares its count."""
    config = _config()
    if config is None:
        return []
    hosts = [store.config for store in _stores(config) if store.config.backend == "host"]
    messages: list[CheckMessage] = []
    if hosts and not _backends_are_set():
        messages.append(
            Warning(
                "CONCURRENCY_LIMIT has no BACKENDS, so the store is 'host': it counts over all processes of one machine or "
                "container. Several of them have a count each.",
                hint="Several machines or containers need 'redis'. Where there is one, say {'default': {'BACKEND': 'host'}}.",
                id="django_concurrency_mw.W009",
            )
        )
    module = settings_module().partition(".")[0]
    common = not module or module in COMMON_NAMES
    if common and any(
        one.key_prefix == DEFAULT_PREFIX + worker_suffix() and "path" not in one.options for one in hosts
    ):
        messages.append(
            Warning(
                f"The store 'host' counts together with every site of this user whose settings module and KEY_PREFIX are "
                f"called the same; {module!r} and {DEFAULT_PREFIX!r} are names that another site may have.",
                hint="Give this site a KEY_PREFIX of its own in CONCURRENCY_LIMIT['BACKENDS'].",
                id="django_concurrency_mw.W010",
            )
        )
    return messages


def check_middleware(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W001 and W002: is the middleware there, once?"""
    config = _config()
    if config is None:
        return []
    number = sum(map(_is_ours, settings.MIDDLEWARE))
    if number > 1:
        return [
            Warning(
                f"ConcurrencyLimitMiddleware is in MIDDLEWARE {number} times.",
                hint="Keep the last one only.",
                id="django_concurrency_mw.W002",
            )
        ]
    if number == 0 and any(policy.url_names for policy in config.table) and not any(map(_throttled, _api_views())):
        return [
            Warning(
                "The policies limit nothing: ConcurrencyLimitMiddleware is not in MIDDLEWARE.",
                hint=f"Add {MIDDLEWARE!r} as the last entry of MIDDLEWARE.",
                id="django_concurrency_mw.W001",
            )
        ]
    return []


def check_addresses(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W003 (--deploy): behind a proxy every client has the proxy's address, or on a unix socket none at all."""
    config = _config()
    if config is None or config.trusted.networks or config.trusted.unix:
        return []
    names = [policy.name for policy in config.table if _may_count_by_address(policy)]
    names += [made.place for made in all_decorators(config) if isinstance(made, Policy) and _may_count_by_address(made)]
    if not names:
        return []
    return [
        Warning(
            "CONCURRENCY_LIMIT['TRUSTED_PROXIES'] is empty, and these may count by address: "
            f"{', '.join(dict.fromkeys(names))}.",
            hint="Behind a reverse proxy all clients then share the proxy's address, and behind a unix socket a request has "
            "none and is not limited. Name the proxies' networks (and 'unix'). Where clients connect directly, silence this "
            "check.",
            id="django_concurrency_mw.W003",
        )
    ]


def check_api_views(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W004 and W005: does ConcurrencyThrottle take the policies of Django REST framework's views, where it has to?"""
    config = _config()
    if config is None:
        return []
    views = _api_views()
    messages: list[CheckMessage] = []
    for policy in config.table:
        blind = [view for view in views if _is_blind(view, policy, config)]
        if blind:
            messages.append(
                Warning(
                    f"{policy.place}: policy {policy.name} needs the user, whom Django REST framework knows inside the view "
                    f"only. Without ConcurrencyThrottle a token's user is anonymous here: {_listed(blind)}.",
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
                f"throttle_classes: {_listed(hidden)}.",
                hint="Make sure that get_throttles() returns it always, or nobody takes the policies; then silence this check.",
                id="django_concurrency_mw.W005",
            )
        )
    return messages


class _ApiView(NamedTuple):
    """A view of Django REST framework in the URL configuration."""

    name: str
    function: Any


def _is_blind(view: _ApiView, policy: Policy, config: conf.Config) -> bool:
    """Does the policy ask for the user of this view where nobody knows it?"""
    words = isinstance(policy.when, str) and not is_dotted_path(policy.when)
    asks = policy.key.needs_user or words or bool(policy.except_users)
    return asks and not _throttled(view) and _by_token(view) and _meets(view, policy, config)


def _meets(view: _ApiView, policy: Policy, config: conf.Config) -> bool:
    """Does the table give the policy to a method of this view?"""
    if policy.overridable and getattr(view.function, MARK, False):
        return False
    function = innermost(view.function)
    # A ViewSet's methods are made of its actions, for each request.
    handled = getattr(function, "actions", None) or [
        name for name in function.cls.http_method_names if hasattr(function.cls, name)
    ]
    return any(policy in config.table.match(view.name, method.upper()) for method in handled)


def _throttled(view: _ApiView) -> bool:
    return throttles_itself(view.function)


def _overrides_throttles(view: _ApiView) -> bool:
    from rest_framework.views import APIView

    return _throttled(view) and _class_of(view.function).get_throttles is not APIView.get_throttles


def _by_token(view: _ApiView) -> bool:
    """Does it know users whom Django's own session does not?"""
    from rest_framework.authentication import SessionAuthentication

    function = innermost(view.function)
    given = getattr(function, "initkwargs", None) or {}
    classes = given.get("authentication_classes", function.cls.authentication_classes)
    return not all(isinstance(found, type) and issubclass(found, SessionAuthentication) for found in classes)


def _class_of(function: Any) -> Any:
    return getattr(innermost(function), "cls", None)


def _api_views() -> list[_ApiView]:
    """The views of Django REST framework, once for each name; none where nothing has imported it."""
    framework = sys.modules.get("rest_framework.views")
    if framework is None:
        return []
    return list(
        dict.fromkeys(
            _ApiView(route.name, route.view)
            for route in routes()
            if isinstance(cls := _class_of(route.view), type) and issubclass(cls, framework.APIView)
        )
    )


def _listed(views: Sequence[_ApiView]) -> str:
    """The names of views, the first few of many."""
    names = list(dict.fromkeys(view.name for view in views))
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _stores(config: conf.Config) -> list[BaseBackend]:
    """Those that policies and decorators use; about others E002 has the word."""
    return [store for store in stores_in_use(config) if isinstance(store, BaseBackend)]


def _backends_are_set() -> bool:
    return bool((getattr(settings, "CONCURRENCY_LIMIT", None) or {}).get("BACKENDS"))


def _config() -> conf.Config | None:
    """The configuration; None where E001 has the word."""
    try:
        return conf.current()
    except ConfigurationError:
        return None


def _about(policy: Policy, config: conf.Config) -> Iterator[CheckMessage]:
    yield from _tried(partial(store_of, policy, config), policy, "E002")
    for name, path in conf.dotted_paths(policy).items():
        yield from _tried(partial(callable_of, path), policy, "E003", name)


def _tried(use: Callable[[], Any], policy: Policy, number: str, name: str = "") -> Iterator[CheckMessage]:
    try:
        use()
    except (Exception, SystemExit) as error:  # a store or a module of the project's may fail in any way
        yield Error(
            f"{policy.place}: {conf.failure(policy, name, error)}",
            hint="A view that this policy limits answers with this error until it is mended.",
            id=f"django_concurrency_mw.{number}",
        )


def _may_count_by_address(policy: Policy) -> bool:
    never_missing = policy.key.kind in ("global", "callable")
    return policy.key.needs_ip or bool(policy.except_ips) or (policy.missing == "ip" and not never_missing)


def _is_ours(path: str) -> bool:
    """Does this entry of MIDDLEWARE name our middleware, or a subclass of it?"""
    if path == MIDDLEWARE:
        return True
    try:
        found = import_string(path)
    except Exception:  # Django says so when it builds the chain
        return False
    return isinstance(found, type) and issubclass(found, ConcurrencyLimitMiddleware)
