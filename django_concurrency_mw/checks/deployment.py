"""What only matters on the servers (`check --deploy`): proxies, several processes and machines, and who else is there."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Warning

from ..backends import DEFAULT_PREFIX, worker_suffix
from ..backends.base import settings_module
from ..policies import Policy
from .common import backends_are_set, configuration, policies, stores

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


def check_deployed_store(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W009 and W010: the store `host` sees one machine, and whoever has its name shares its count."""
    config = configuration()
    if config is None:
        return []
    hosts = [store.config for store in stores(config) if store.config.backend == "host"]
    messages: list[CheckMessage] = []
    if hosts and not backends_are_set():
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


def check_deployed_memory(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W015: a store that counts in each process. (Where it is the default, W008 has the word.)"""
    config = configuration()
    if config is None:
        return []
    counting = [store.config for store in stores(config) if store.one_process]
    return [
        Warning(
            f"{one.place} is {one.backend!r}, which counts in each process by itself: four workers, or four machines, let in "
            "four times a limit.",
            hint="Use 'host' for the processes of one machine, 'redis' for several machines. Where the site is one process, "
            "silence this check.",
            id="django_concurrency_mw.W015",
        )
        for one in counting
        if backends_are_set() or one.alias != "default"
    ]


def check_deployed_prefix(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W016: a name on a Redis that another site may have."""
    config = configuration()
    if config is None:
        return []
    return [
        Warning(
            f"{store.config.place} has the default KEY_PREFIX: another site on the same Redis that gives none either counts "
            "together with this one, where their policies have the same names.",
            hint="Give this site a KEY_PREFIX of its own, such as its name. Where no other site uses that Redis, silence this "
            "check.",
            id="django_concurrency_mw.W016",
        )
        for store in stores(config)
        if store.server is not None and store.config.key_prefix == DEFAULT_PREFIX + worker_suffix()
    ]


def check_addresses(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W003: behind a proxy every client has the proxy's address, or on a unix socket none at all."""
    config = configuration()
    if config is None or config.trusted.networks or config.trusted.unix:
        return []
    counting = [policy for policy in policies(config) if _may_count_by_address(policy)]
    names = [policy.name if config.table.get(policy.name) is policy else policy.place for policy in counting]
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


def _may_count_by_address(policy: Policy) -> bool:
    never_missing = policy.key.kind in ("global", "callable")
    return policy.key.needs_ip or bool(policy.except_ips) or (policy.missing == "ip" and not never_missing)
