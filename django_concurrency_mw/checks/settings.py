"""What is wrong with the settings, the policy file and the decorators, such that limited views would answer with an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from django.core.checks import CheckMessage, Error

from .. import conf
from ..decorated import all_decorators
from ..exceptions import ConfigurationError
from ..keys import callable_of
from ..limiter import store_of
from ..policies import Policy
from .common import configuration


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
    config = configuration()
    return [] if config is None else [message for policy in config.table for message in _about(policy, config)]


def check_decorators(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """E002 to E004 for each `@concurrency_limit` that has been imported (the URL configuration is)."""
    config = configuration()
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


def _about(policy: Policy, config: conf.Config) -> Iterator[CheckMessage]:
    yield from _tried(partial(store_of, policy, config), policy, "django_concurrency_mw.E002")
    for name, path in conf.dotted_paths(policy).items():
        yield from _tried(partial(callable_of, path), policy, "django_concurrency_mw.E003", name)


def _tried(use: Callable[[], Any], policy: Policy, number: str, name: str = "") -> Iterator[CheckMessage]:
    try:
        use()
    except (Exception, SystemExit) as error:  # a store or a module of the project's may fail in any way
        yield Error(
            f"{policy.place}: {conf.failure(policy, name, error)}",
            hint="A view that this policy limits answers with this error until it is mended.",
            id=number,
        )
