"""The test site with its policies in a file, TEST_POLICIES, that is looked at every TEST_INTERVAL seconds (JSON).

Every answer says which process gave it (`X-Pid`) and what the limit was for it (`X-Limit`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.utils.decorators import sync_and_async_middleware

SECRET_KEY = "reload"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.urls"
USE_TZ = True
INSTALLED_APPS = ["django_concurrency_mw"]
MIDDLEWARE = ["tests.reload_settings.told", "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"]
CONCURRENCY_LIMIT: dict[str, Any] = {
    "BACKENDS": {"default": {"BACKEND": "host", "KEY_PREFIX": os.environ.get("TEST_PREFIX", "reload")}},
    "POLICIES": os.environ.get("TEST_POLICIES"),
    "RELOAD_INTERVAL": json.loads(os.environ.get("TEST_INTERVAL", "0.25")),
}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(process)d %(levelname)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "django_concurrency_mw": {"handlers": ["console"], "level": "INFO"},
        "django.request": {"level": "CRITICAL"},
    },
}


@sync_and_async_middleware
def told(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
    def stamped(request: HttpRequest, response: HttpResponse) -> HttpResponse:
        response["X-Pid"] = str(os.getpid())
        for result in request.concurrency.policies:  # type: ignore[attr-defined]  # ours sets it
            response["X-Limit"] = str(result.limit)
        return response

    if iscoroutinefunction(get_response):

        async def amiddleware(request: HttpRequest) -> HttpResponse:
            return stamped(request, await get_response(request))

        return amiddleware

    return lambda request: stamped(request, get_response(request))
