"""Views that stay for as long as they are told to, one that has no limit, and what is held and who waits."""

from __future__ import annotations

import asyncio
import time

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from django_concurrency_mw import backends, concurrency_limit

from . import gauge
from .views import held


def _seconds(request: HttpRequest) -> float:
    return int(request.GET.get("for", "20")) / 1000


def stays(request: HttpRequest) -> HttpResponse:
    with gauge.inside("stays"):
        time.sleep(_seconds(request))  # by its module: it may be patched after this one was loaded
    return HttpResponse("done")


async def astays(request: HttpRequest) -> HttpResponse:
    with gauge.inside("stays"):
        await asyncio.sleep(_seconds(request))
    return HttpResponse("done")


@concurrency_limit(policy="cap")
def in_a_thread(request: HttpRequest) -> HttpResponse:
    return stays(request)


def free(request: HttpRequest) -> HttpResponse:
    return HttpResponse("free")


def line(request: HttpRequest) -> JsonResponse:
    waiting = [waiter for store in list(backends._instances.values()) for waiter in store.waiters()]
    return JsonResponse({"held": held(), "waiting": len(waiting)})


urlpatterns = [
    path("stays/", stays, name="stays"),
    path("astays/", astays, name="astays"),
    path("thread/", in_a_thread, name="thread"),
    path("free/", free, name="free"),
    path("-/held/", line, name="line"),
    *[
        path(f"{name}/", stays, name=name)
        for name in ("memory", "host", "redis", "memory-long", "host-long", "redis-long")
    ],
]
