"""The settings of the example site. What limits it is the last entry of MIDDLEWARE, and CONCURRENCY_LIMIT.

From the repository's root:

    python example_project/manage.py migrate
    python example_project/manage.py demo_users
    gunicorn --chdir example_project --threads 32 example.wsgi
    uvicorn --app-dir example_project example.asgi:application

Environment: EXAMPLE_DEBUG (1; 0 turns it off), EXAMPLE_SECRET_KEY (needed when it is off), EXAMPLE_DATABASE (the SQLite
file), EXAMPLE_REDIS_URL (one count over all processes that have it: then add `--workers 2` to either server),
EXAMPLE_SECONDS (how long a slow view takes), EXAMPLE_GAUGE_FILE (see gauge.py), EXAMPLE_HELD (1 shows /-/held/ without
debug), EXAMPLE_LIMITS_OFF (1: see what happens without limits).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

BASE_DIR = Path(__file__).resolve().parent.parent
REPOSITORY = BASE_DIR.parent

DEBUG = os.environ.get("EXAMPLE_DEBUG", "1") == "1"
SECRET_KEY = os.environ.get("EXAMPLE_SECRET_KEY", "not a secret, for a look at the example only" if DEBUG else "")
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "rest_framework",
    "rest_framework.authtoken",
    "django_concurrency_mw",
    "reports",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware",
]
CONCURRENCY_LIMIT: dict[str, Any] = {
    "POLICIES": REPOSITORY / "policies.example.yaml",
    "ENABLED": os.environ.get("EXAMPLE_LIMITS_OFF") != "1",
    "MAX_SYNC_WAITERS": 16,  # half of the threads that the servers above have; the default is for servers with fewer
}
# Without it: memory, which counts in one process.
if EXAMPLE_REDIS_URL := os.environ.get("EXAMPLE_REDIS_URL"):
    CONCURRENCY_LIMIT["BACKENDS"] = {
        "default": {
            "BACKEND": "redis",
            "LOCATION": EXAMPLE_REDIS_URL,
            "KEY_PREFIX": "example",
            # Seconds until ON_BACKEND_ERROR decides; more than the default, for a laptop that runs clients and servers alike.
            "OPTIONS": {"socket_timeout": 1.0},
        }
    }

ROOT_URLCONF = "example.urls"
WSGI_APPLICATION = "example.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("EXAMPLE_DATABASE") or BASE_DIR / "db.sqlite3",
        "OPTIONS": {"timeout": 20},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en"
# Django's default shows errors on the console with DEBUG only.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
USE_TZ = True
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "reports:home"
LOGOUT_REDIRECT_URL = "reports:home"

EXAMPLE_SECONDS = float(os.environ.get("EXAMPLE_SECONDS", "2"))
EXAMPLE_HELD = DEBUG or os.environ.get("EXAMPLE_HELD") == "1"
