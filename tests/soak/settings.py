"""The settings of the soak's site: SOAK_BACKEND is the entry of its store, as JSON, SOAK_POLICIES the file of its table.

SOAK_LIMITS=off leaves out the limits, so that one may see the soak find that.
"""

from __future__ import annotations

import json
import os
from typing import Any

SECRET_KEY = "soak"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.soak.site"
INSTALLED_APPS = ["django_concurrency_mw"]
MIDDLEWARE = ["django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"]
USE_TZ = True
CONCURRENCY_LIMIT: dict[str, Any] = {
    "ENABLED": os.environ.get("SOAK_LIMITS") != "off",
    "BACKENDS": {"default": json.loads(os.environ["SOAK_BACKEND"])},
    "POLICIES": os.environ["SOAK_POLICIES"],
    "ON_BACKEND_ERROR": "local",
}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(process)d %(levelname)s %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {"django_concurrency_mw": {"level": "INFO"}},
}
