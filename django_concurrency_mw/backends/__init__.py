"""Which store a name means: short names and dotted paths to one instance per configuration."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .. import afresh
from ..exceptions import did_you_mean
from .base import DEFAULT_PREFIX, BackendConfig, BaseBackend, Holder, has_host, worker_suffix

__all__ = [
    "DEFAULT_BACKEND",
    "DEFAULT_PREFIX",
    "SHORT_NAMES",
    "BackendConfig",
    "BaseBackend",
    "Holder",
    "get_backend",
    "snapshot_all",
    "worker_suffix",
]

#: The short names of BACKEND.
SHORT_NAMES: Final[Mapping[str, str]] = {
    "host": "django_concurrency_mw.backends.host.store.HostBackend",
    "memory": "django_concurrency_mw.backends.memory.MemoryBackend",
    "redis": "django_concurrency_mw.backends.redis.store.RedisBackend",
}
#: What a site has that names no store: one count over all processes of the machine, where the platform has that.
DEFAULT_BACKEND: Final = "host" if has_host() else "memory"
#: Names that are part of the public face, but whose store this version does not have.
LATER: Final[frozenset[str]] = frozenset()

_instances: dict[str, BaseBackend] = {}
#: An RLock: a garbage collection inside may end a stream, whose own code may use a store.
_making = threading.RLock()


def _forked() -> None:
    global _making
    _making = threading.RLock()  # a thread that is not in the child may have held it


afresh.begin_with(_forked)


def get_backend(name: str, configs: Mapping[str, BackendConfig]) -> BaseBackend:
    """The store for an alias of BACKENDS, else for the only alias of that kind, else that kind on its own defaults.

    One configuration is one instance, so that `override_settings` and two aliases of the same store share its counts.
    Raises: ImproperlyConfigured for an unknown name, a store that cannot be loaded, or one without semaphores.
    """
    config = configs.get(name)
    if config is None:
        same_kind = [config for config in configs.values() if config.backend == name]
        if len(same_kind) == 1:
            config = same_kind[0]
        elif name in SHORT_NAMES or name in LATER or "." in name:
            config = BackendConfig(alias=name, backend=name, key_prefix=DEFAULT_PREFIX + worker_suffix())
        else:
            raise ImproperlyConfigured(
                f"unknown backend {name!r}: CONCURRENCY_LIMIT['BACKENDS'] has {', '.join(map(repr, configs))}, and "
                f"the kinds are {', '.join(map(repr, SHORT_NAMES))}, or a dotted path to a BaseBackend"
                + did_you_mean(name, [*configs, *SHORT_NAMES])
            )
    identity = repr((config.backend, config.location, config.key_prefix, sorted(config.options.items(), key=repr)))
    found = _instances.get(identity)
    if found is None:
        with _making:
            found = _instances.get(identity)
            if found is None:
                found = _instances.setdefault(identity, _load(config))
    return found


def snapshot_all() -> list[Holder]:
    """The holders in every store that this process has used so far."""
    return [holder for backend in list(_instances.values()) for holder in backend.snapshot()]


def _load(config: BackendConfig) -> BaseBackend:
    place = f"{config.place}['BACKEND']"
    if config.backend in LATER:
        raise ImproperlyConfigured(
            f"{place}: {config.backend!r} is not carried out by this version of django_concurrency_mw yet; use 'memory'"
        )
    try:
        loaded = import_string(SHORT_NAMES.get(config.backend, config.backend))
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "redis":
            raise ImproperlyConfigured(
                f"{place}: the redis store needs redis-py: python -m pip install 'django_concurrency_mw[redis]'"
            ) from error
        raise ImproperlyConfigured(
            f"{place}: {config.backend!r} cannot be loaded: {error}{did_you_mean(config.backend, SHORT_NAMES)}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, BaseBackend)):
        raise ImproperlyConfigured(f"{place}: {config.backend!r} is not a subclass of BaseBackend")
    if not loaded.supports_semaphores:
        raise ImproperlyConfigured(
            f"{place}: {config.backend!r} does not support semaphores (supports_semaphores is False), so it cannot "
            "limit what is in flight; use 'memory' or another BaseBackend that does"
        )
    if getattr(loaded, "__abstractmethods__", None):
        raise ImproperlyConfigured(f"{place}: {config.backend!r} lacks {', '.join(sorted(loaded.__abstractmethods__))}")
    return loaded(config)
