"""Limits how many requests are in flight at once per key: the public names."""

from __future__ import annotations

from typing import Any, NoReturn

from .decorators import concurrency_limit, concurrency_limit_exempt
from .exceptions import (
    BackendError,
    ConcurrencyLimitExceeded,
    ConfigurationError,
    PermanentBackendError,
    SlotLost,
)
from .outcomes import Concurrency, PolicyResult, Rejection

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Concurrency",
    "ConcurrencyLimitExceeded",
    "ConfigurationError",
    "PermanentBackendError",
    "PolicyResult",
    "Rejection",
    "SlotLost",
    "concurrency_limit",
    "concurrency_limit_exempt",
    "hold",
]


def hold(policy: Any, *, key: str | None = None, **fields: Any) -> NoReturn:
    """Take a slot outside a request. Not carried out by this version yet.

    Raises: NotImplementedError, always.
    """
    raise NotImplementedError("hold() is not carried out by this version of django_concurrency_mw yet")
