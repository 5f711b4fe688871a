"""The stores: what they say of themselves, and what else is where they keep their counts."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Warning

from .. import backends
from ..backends import BaseBackend
from ..backends.base import check_message
from ..chain import imported
from ..limiter import store_of
from .common import backends_are_set, configuration, policies, stores

#: Caches whose clear() is FLUSHDB.
FLUSHING = frozenset({"django.core.cache.backends.redis.RedisCache", "django_redis.cache.RedisCache"})


def check_stores(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """What the stores that policies and decorators use say of themselves, under ids of their own."""
    config = configuration()
    if config is None:
        return []
    return [message for store in stores(config) for message in _said(store, store.check)]


def check_waiting(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W026: what the stores say of themselves where a policy lets requests wait."""
    config = configuration()
    if config is None:
        return []
    found: dict[int, BaseBackend] = {}
    for policy in policies(config):
        if policy.wait:
            with contextlib.suppress(Exception):  # about one that cannot be used E002 has the word
                store = store_of(policy, config)
                found[id(store)] = store
    return [message for store in found.values() for message in _said(store, store.check_waiting)]


def _said(store: BaseBackend, check: Callable[[], Sequence[CheckMessage]]) -> Sequence[CheckMessage]:
    try:
        return check()
    except Exception as error:  # a store of the project's may fail in any way
        return [check_message(store, error, "Its own check failed; until it works ON_BACKEND_ERROR decides.")]


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
    config = configuration()
    if config is None:
        return []
    same: dict[Hashable, list[str]] = defaultdict(list)
    for alias in config.backends:
        try:
            store = backends.get_backend(alias, config.backends)
            same[type(store), store.count_place()].append(alias)
        except Exception:  # one that cannot be used: where something uses it, E002 has the word
            continue
    return [
        Warning(
            f"CONCURRENCY_LIMIT['BACKENDS']: {' and '.join(map(repr, aliases))} are one place with one KEY_PREFIX: "
            "one count under several names.",
            hint="Give each a KEY_PREFIX of its own (or another LOCATION), or keep one of them.",
            id="django_concurrency_mw.W017",
        )
        for aliases in same.values()
        if len(aliases) > 1
    ]


def check_caches(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W019: caches whose clear() empties a store."""
    config = configuration()
    if config is None:
        return []
    servers = {store.server: store.config.place for store in stores(config) if store.server is not None}
    if not servers:
        return []
    return [
        Warning(
            f"CACHES[{alias!r}] and {servers[server]} are one database of one Redis, and cache.clear() is FLUSHDB: it "
            "forgets who holds what. What still runs is counted again only with its next renewal.",
            hint="Give the limits a database of their own, by the number at the end of LOCATION (or a server of their own).",
            id="django_concurrency_mw.W019",
        )
        for alias, server in _cache_servers()
        if server in servers
    ]


def _cache_servers() -> Iterator[tuple[str, Hashable]]:
    """The servers and databases of caches whose clear() empties the database, each once."""
    from ..backends.redis.connecting import server_of_url

    for alias, cache in settings.CACHES.items():
        kinds = {
            f"{cls.__module__}.{cls.__qualname__}" for cls in getattr(imported(cache.get("BACKEND")), "__mro__", ())
        }
        if kinds.isdisjoint(FLUSHING) and cache.get("BACKEND") not in FLUSHING:
            continue
        location = cache.get("LOCATION") or ""
        urls = (
            re.split("[;,]", location)
            if isinstance(location, str)
            else location
            if isinstance(location, (list, tuple))
            else ()
        )
        options = cache.get("OPTIONS") or {}
        options = {**options, **(options.get("CONNECTION_POOL_KWARGS") or {})}  # of django-redis
        found = {server_of_url(url.strip(), options) for url in urls if isinstance(url, str)}
        yield from ((alias, server) for server in found if server is not None)
