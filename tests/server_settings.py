"""The test site as real servers run it: our middleware alone, a cap of 5 on each busy view."""

from __future__ import annotations

from .settings import *  # noqa: F403  # settings are a module of names
from .settings import MIDDLEWARE as _MIDDLEWARE

MIDDLEWARE = _MIDDLEWARE[-1:]
KINDS = ["sync", "async", "class", "async-class", "stream", "async-stream", "raising"]
CONCURRENCY_LIMIT = {
    "POLICIES": {
        "policies": {
            f"cap-{kind}": {"url_names": [f"busy-{kind}"], "key": "global", "max_concurrent": 5} for kind in KINDS
        }
    }
}
LOGGING = {"version": 1, "disable_existing_loggers": False, "loggers": {"django.request": {"level": "CRITICAL"}}}
