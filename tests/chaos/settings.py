"""The chaos site's settings: one policy over all its limited views, its numbers from the environment.

CHAOS_REDIS (a URL) puts the slots into Redis; without it there are no BACKENDS, and so it is the default store.
"""

from __future__ import annotations

import json
import os
from typing import Any

SECRET_KEY = "chaos"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.chaos.site"
INSTALLED_APPS = ["django_concurrency_mw"]
MIDDLEWARE = ["tests.chaos.site.stopwatch", "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"]
USE_TZ = True
CONCURRENCY_LIMIT: dict[str, Any] = {
    "ON_BACKEND_ERROR": os.environ.get("CHAOS_MODE", "local"),
    "POLICIES": {
        "policies": {
            "cap": {
                "url_names": ["limited-*"],
                "key": "global",
                "max_concurrent": 5,
                **json.loads(os.environ.get("CHAOS_POLICY", "{}")),
            }
        }
    },
}
if os.environ.get("CHAOS_REDIS"):
    CONCURRENCY_LIMIT["BACKENDS"] = {
        "default": {
            "BACKEND": "redis",
            "LOCATION": os.environ["CHAOS_REDIS"],
            "KEY_PREFIX": os.environ["CHAOS_PREFIX"],
            "OPTIONS": {"socket_timeout": float(os.environ.get("CHAOS_TIMEOUT", "0.25"))},
        }
    }
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
