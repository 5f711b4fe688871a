"""Health: a circuit breaker per store. What fails is left alone until a probe finds that it works again.

The first failure opens it and the first probe follows at once, so that a single slow answer costs nobody else anything; while
it is open no request waits for the store, ON_BACKEND_ERROR decides. Each change is logged, and told by `backend_failed`, once,
by the thread that probes: one for each store that fails, which ends when it works.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from . import afresh, signals
from .backends.base import BaseBackend
from .exceptions import BackendError, PermanentBackendError
from .policies import Policy

logger = logging.getLogger("django_concurrency_mw")

#: Seconds between two probes of a store that fails.
PROBE_EVERY = 0.25

_before_recovery: list[Callable[[BaseBackend], None]] = []


def before_recovery(call: Callable[[BaseBackend], None]) -> None:
    """Call it when a store works again, before the first request uses it."""
    _before_recovery.append(call)


def failed(store: BaseBackend, raised: BaseException, began: float) -> None:
    """The store failed a call that began at this monotonic second. Only notes it: a thread of its own does the rest."""
    error = _exception(raised)
    if isinstance(error, BackendError) and not error.whole:
        _say_of_one_call(store, error)
        return
    with _changing:
        if store.failure is not None or began < _recovered.get(store, 0.0):  # known, or an old story
            return
        thread = threading.Thread(target=_mend, args=(weakref.ref(store), error), name="concurrency-probe", daemon=True)
        _probes[store] = thread
        store.failure = error
        try:
            thread.start()
        except RuntimeError:  # the process ends
            store.failure = None


def _mend(known: weakref.ref[BaseBackend], error: Exception) -> None:
    """The thread of a store that fails, until it works. It keeps neither the store alive nor an error, whose trace would."""
    _tell(known(), error)
    said = {_cure(error)}
    del error
    while (store := known()) is not None:
        try:
            store.probe()
            break
        except BaseException as still:  # whatever a store raises: without this thread it would be left alone for ever
            _instead(store, still, said)
        del store
        time.sleep(PROBE_EVERY)
    else:
        return
    _carefully(store, store.recovered)
    for call in _before_recovery:
        _carefully(store, lambda call=call: call(store))  # type: ignore[misc]  # mypy cannot infer it
    with _changing:
        _recovered[store] = monotonic()
        store.failure = None
    _tell(store, None)


def _tell(store: BaseBackend | None, error: Exception | None) -> None:
    """Log it and send it. None: it works again."""
    if store is None:
        return
    alias = store.config.alias

    def tell() -> None:
        if error is None:
            logger.warning("backend %s works again", alias)
        else:
            logger.error(
                "backend %s fails, ON_BACKEND_ERROR decides until it works again: %r%s", alias, error, _cure(error)
            )

    _carefully(store, tell)
    about = {"sender": Policy, "alias": alias, "error": error, "recovered": error is None}
    _carefully(store, lambda: signals.backend_failed.send_robust(**about))


def _carefully(store: BaseBackend, call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException:
        try:
            logger.exception("backend %s: the way back to it goes on after an error", store.config.alias)
        except BaseException:  # a log handler that raises
            return


def _instead(store: BaseBackend, raised: BaseException, said: set[str]) -> None:
    """What is wrong now may be something else than at first, and not go away: a password, a permission."""
    error = _exception(raised)
    with _changing:
        store.failure = error
    if _cure(error) not in said:
        said.add(_cure(error))
        _carefully(store, lambda: logger.error("backend %s fails still: %r%s", store.config.alias, error, _cure(error)))


def _exception(raised: BaseException) -> Exception:
    return raised if isinstance(raised, Exception) else BackendError(repr(raised))


def _cure(error: Exception) -> str:
    return f". This does not go away by itself: {error.cure}" if isinstance(error, PermanentBackendError) else ""


def _say_of_one_call(store: BaseBackend, error: BackendError) -> None:
    with _changing:
        said = _said.setdefault(store, set())
        if type(error) in said:
            return
        said.add(type(error))
    _carefully(
        store,
        lambda: logger.error(
            "backend %s failed one call, ON_BACKEND_ERROR decided about it: %r%s (Said once per process and kind of error.)",
            store.config.alias,
            error,
            _cure(error),
        ),
    )


#: The thread of each store that failed in this process: it probes while the breaker is open, and ends with its last word.
_probes: weakref.WeakKeyDictionary[BaseBackend, threading.Thread] = weakref.WeakKeyDictionary()
#: When it was closed last.
_recovered: weakref.WeakKeyDictionary[BaseBackend, float] = weakref.WeakKeyDictionary()
_said: weakref.WeakKeyDictionary[BaseBackend, set[type]] = weakref.WeakKeyDictionary()
#: An RLock: a garbage collection inside may end a stream, whose own code may meet a store that fails.
_changing: Any = threading.RLock()


def _forked() -> None:
    """The threads that probe are the parent's; and one that is not in the child may have held the lock."""
    global _changing
    _changing = threading.RLock()
    for store in list(_probes):
        store.failure = None
    _probes.clear()


afresh.begin_with(_forked)
