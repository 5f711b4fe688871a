"""The test site as real servers run it: our middleware alone, a cap of 5 on each busy view.

TEST_LIMITER_REDIS (a URL) and TEST_LIMITER_PREFIX put the slots into Redis. A store that fails is a 503 then, so that no
answer hides it, and has 5 seconds, as the tests share their cores with the servers.
"""

from __future__ import annotations

import os
from typing import Any

from .settings import *  # noqa: F403  # settings are a module of names
from .settings import MIDDLEWARE as _MIDDLEWARE

MIDDLEWARE = _MIDDLEWARE[-1:]
KINDS = ["sync", "async", "class", "async-class", "stream", "async-stream", "raising"]
CONCURRENCY_LIMIT: dict[str, Any] = {
    "POLICIES": {
        "policies": {
            f"cap-{kind}": {"url_names": [f"busy-{kind}"], "key": "global", "max_concurrent": 5} for kind in KINDS
        }
    }
}
if os.environ.get("TEST_LIMITER_REDIS"):
    CONCURRENCY_LIMIT["BACKENDS"] = {
        "default": {
            "BACKEND": "redis",
            "LOCATION": os.environ["TEST_LIMITER_REDIS"],
            "KEY_PREFIX": os.environ["TEST_LIMITER_PREFIX"],
            "OPTIONS": {"socket_timeout": 5.0},
        }
    }
    CONCURRENCY_LIMIT["ON_BACKEND_ERROR"] = "deny"
LOGGING = {"version": 1, "disable_existing_loggers": False, "loggers": {"django.request": {"level": "CRITICAL"}}}
