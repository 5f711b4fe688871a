"""Health: a circuit breaker per store. What fails is left alone until a probe of the keeper's finds that it works again.

The first failure opens it and the first probe follows at once, so that a single slow answer costs nobody else anything; while
it is open no request waits for the store, ON_BACKEND_ERROR decides. Each change is logged, and told by `backend_failed`, once.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from . import signals
from .backends.base import BaseBackend
from .exceptions import BackendError, PermanentBackendError
from .keeper import keeper
from .policies import Policy

logger = logging.getLogger("django_concurrency_mw")

#: Seconds between two probes of a store that fails.
PROBE_EVERY = 0.25

_before_recovery: list[Callable[[BaseBackend], None]] = []


def before_recovery(call: Callable[[BaseBackend], None]) -> None:
    """Call it, in the keeper's thread, when a store works again, before the first request uses it."""
    _before_recovery.append(call)


def failed(store: BaseBackend, error: Exception) -> bool:
    """The store failed a call. Is that news? Then `news` is to be told."""
    if isinstance(error, BackendError) and not error.whole:
        _say_of_one_call(store, error)
        return False
    with _changing:
        if store.failure is not None:
            return False
        store.failure = error
        _down.add(store)
    cure = getattr(error, "cure", "")
    logger.error(
        "backend %s fails, ON_BACKEND_ERROR decides until it works again: %r%s",
        store.config.alias,
        error,
        f". This does not go away by itself: {cure}" if cure else "",
    )
    keeper.at(0, partial(_probe, weakref.ref(store)))
    return True


def news(store: BaseBackend, error: Exception | None) -> dict[str, Any]:
    """What `backend_failed` says of it; None: it works again."""
    return {"sender": Policy, "alias": store.config.alias, "error": error, "recovered": error is None}


def failed_here(store: BaseBackend, raised: BaseException) -> None:
    """`failed`, and told at once: where no request is at work."""
    error = raised if isinstance(raised, Exception) else BackendError(repr(raised))
    if failed(store, error):
        signals.backend_failed.send_robust(**news(store, error))


def _probe(known: weakref.ref[BaseBackend]) -> None:
    """In the keeper's thread."""
    store = known()
    if store is None:
        return
    try:
        store.probe()
    except Exception as error:
        _instead(store, error)
        keeper.at(PROBE_EVERY, partial(_probe, known))
        return
    try:
        store.recovered()
    except Exception:
        logger.exception("backend %s: it works again, but not all of it", store.config.alias)
    for call in _before_recovery:
        try:
            call(store)
        except Exception:
            logger.exception("backend %s: what it has lost could not be counted again", store.config.alias)
    with _changing:
        store.failure = None
        _down.discard(store)
    logger.warning("backend %s works again", store.config.alias)
    signals.backend_failed.send_robust(**news(store, None))


def _instead(store: BaseBackend, error: Exception) -> None:
    """What is wrong now may be something else than at first, and not go away: a password, a permission."""
    with _changing:
        before, store.failure = store.failure, error
    if isinstance(error, PermanentBackendError) and type(before) is not type(error):
        logger.error(
            "backend %s fails still: %r. This does not go away by itself: %s", store.config.alias, error, error.cure
        )


def _say_of_one_call(store: BaseBackend, error: BackendError) -> None:
    if isinstance(error, PermanentBackendError):
        with _changing:
            said = _said.setdefault(store, set())
            if type(error) in said:
                return
            said.add(type(error))
        logger.error("backend %s: %r. This does not go away by itself: %s", store.config.alias, error, error.cure)


#: The stores whose breaker is open.
_down: weakref.WeakSet[BaseBackend] = weakref.WeakSet()
_said: weakref.WeakKeyDictionary[BaseBackend, set[type]] = weakref.WeakKeyDictionary()
_changing = threading.Lock()


def _forked() -> None:
    """The probes are the parent's; and a thread that is not in the child may have held the lock."""
    global _changing
    _changing = threading.Lock()
    for store in list(_down):
        store.failure = None
    _down.clear()


os.register_at_fork(after_in_child=_forked)
