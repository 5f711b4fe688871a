"""The views of the inspected site: they answer what their request was told, once the barrier is open or `?go` is said."""

from __future__ import annotations

import asyncio
import os
from time import monotonic, sleep

from django.conf import settings
from django.http import HttpRequest, JsonResponse
from django.urls import path

from django_concurrency_mw import concurrency_limit

from .views import told

#: Seconds after which a view gives up waiting.
LONGEST = 60


def _is_open(request: HttpRequest) -> bool:
    return "go" in request.GET or os.path.exists(settings.BARRIER)


def work(request: HttpRequest, **kwargs: object) -> JsonResponse:
    end = monotonic() + LONGEST
    while not _is_open(request) and monotonic() < end:
        sleep(0.01)
    return told(request)


async def awork(request: HttpRequest, **kwargs: object) -> JsonResponse:
    end = monotonic() + LONGEST
    while not _is_open(request) and monotonic() < end:
        await asyncio.sleep(0.01)
    return told(request)


@concurrency_limit(key="global", max_concurrent=1, name="own")
def decorated(request: HttpRequest) -> JsonResponse:
    return told(request)


def ready(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"held": [], "pid": os.getpid()})


urlpatterns = [
    path("export/<int:pk>/", work, name="export"),
    path("aexport/<int:pk>/", awork, name="export-async"),
    path("export/<int:pk>/status/", told, name="export-status"),
    path("job/", work, name="job"),
    path("ajob/", awork, name="job-async"),
    path("report/", told, name="report"),
    path("decorated/", decorated, name="decorated"),
    path("-/held/", ready, name="ready"),
]
