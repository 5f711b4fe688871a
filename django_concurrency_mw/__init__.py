"""Limits how many requests are in flight at once per key: the public names."""

from __future__ import annotations

from .decorators import concurrency_limit, concurrency_limit_exempt
from .exceptions import (
    BackendError,
    ConcurrencyLimitExceeded,
    ConfigurationError,
    PermanentBackendError,
    SlotLost,
)
from .holding import hold
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
