"""The settings of the tests: a small site whose limits each test sets for itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_DATABASE = os.environ.get("TEST_DATABASE") or Path(tempfile.gettempdir()) / f"concurrency-{os.getpid()}.sqlite3"

SECRET_KEY = "only for the tests"
DEBUG = False
ALLOWED_HOSTS = ["testserver", "localhost", "127.0.0.1", "[::1]"]
USE_TZ = True
ROOT_URLCONF = "tests.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "rest_framework",
    "rest_framework.authtoken",
    "django_concurrency_mw",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware",
]
# A file, as views run in threads: connections to one in-memory database lock each other out without waiting.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(_DATABASE),
        "TEST": {"NAME": str(_DATABASE)},
        # Nothing in it has to survive the machine; each wait for the disk would cost every test its share.
        "OPTIONS": {"init_command": "PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY;"},
    }
}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [Path(__file__).parent / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]
