"""The settings of the measured site: what a handler needs, and nothing that would be measured along with the limits.

BENCHMARK_REDIS is the URL of the Redis, BENCHMARK_HOST_TABLE the file of the host store; without one, its policies are not in
the table. BENCHMARK_MIDDLEWARE is set for servers: 1 puts our middleware in; within one process `handlers` says what is in.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from .policies import setting

REDIS = os.environ.get("BENCHMARK_REDIS", "")

SECRET_KEY = "only for the benchmarks"
DEBUG = False
ALLOWED_HOSTS = ["testserver", "127.0.0.1"]
USE_TZ = True
ROOT_URLCONF = "benchmarks.served" if "BENCHMARK_MIDDLEWARE" in os.environ else "benchmarks.site"
INSTALLED_APPS = ["django_concurrency_mw"]
DATABASES: dict[str, object] = {}
OURS = "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"
MIDDLEWARE = [OURS] if os.environ.get("BENCHMARK_MIDDLEWARE") else []
CONCURRENCY_LIMIT = setting(REDIS, os.environ.get("BENCHMARK_HOST_TABLE", ""))

# Django's own stays as it is: what it does with a 429 is measured. Ours says little, but into the middle of a table.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"nowhere": {"class": "logging.NullHandler"}},
    "loggers": {"django_concurrency_mw": {"handlers": ["nowhere"], "propagate": False}},
}

# Of django-smart-ratelimit, where it is installed.
RATELIMIT_BACKEND = "memory"
RATELIMIT_REDIS = {"host": urlsplit(REDIS).hostname or "127.0.0.1", "port": urlsplit(REDIS).port or 6379}
