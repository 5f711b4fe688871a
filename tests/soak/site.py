"""The soak's site: views that stay for `for` milliseconds, sync and async, plain and streaming, and tell who is inside."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from time import sleep

from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from . import events

CHUNKS = 10


def _seconds(request: HttpRequest) -> float:
    return float(request.GET.get("for", "20")) / 1000


def cost(request: HttpRequest) -> int:
    """Of a heavy one: as it says."""
    return int(request.GET.get("cost", "1"))


def _inside(request: HttpRequest, *policies: str) -> AbstractContextManager[None]:
    """Written down under the policies that this view is to have, whatever the limiter thinks."""
    results = {each.policy: each.state for each in request.concurrency.policies}  # type: ignore[attr-defined]  # ours
    slots = {name: (cost(request), results.get(name, "none")) for name in policies}
    return events.inside(os.environ["SOAK_EVENTS"], slots)


def work(request: HttpRequest) -> HttpResponse:
    with _inside(request, "cap"):
        sleep(_seconds(request))
    return HttpResponse("done")


async def awork(request: HttpRequest) -> HttpResponse:
    with _inside(request, "cap"):
        await asyncio.sleep(_seconds(request))
    return HttpResponse("done")


def heavy(request: HttpRequest) -> HttpResponse:
    with _inside(request, "heavy"):
        sleep(_seconds(request))
    return HttpResponse("done")


async def aheavy(request: HttpRequest) -> HttpResponse:
    with _inside(request, "heavy"):
        await asyncio.sleep(_seconds(request))
    return HttpResponse("done")


def line(request: HttpRequest) -> HttpResponse:
    with _inside(request, "line"):
        sleep(_seconds(request))
    return HttpResponse("done")


async def aline(request: HttpRequest) -> HttpResponse:
    with _inside(request, "line"):
        await asyncio.sleep(_seconds(request))
    return HttpResponse("done")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[bytes]:
        with _inside(request, "cap", "streams"):
            for _ in range(CHUNKS):
                sleep(_seconds(request) / CHUNKS)
                yield b"x" * 1000

    return StreamingHttpResponse(chunks())


async def astream(request: HttpRequest) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[bytes]:
        with _inside(request, "cap", "streams"):
            for _ in range(CHUNKS):
                await asyncio.sleep(_seconds(request) / CHUNKS)
                yield b"x" * 1000

    return StreamingHttpResponse(chunks())


def ready(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"held": []})


urlpatterns = [
    path("work/", work, name="work"),
    path("awork/", awork, name="awork"),
    path("heavy/", heavy, name="heavy"),
    path("aheavy/", aheavy, name="aheavy"),
    path("line/", line, name="line"),
    path("aline/", aline, name="aline"),
    path("stream/", stream, name="stream"),
    path("astream/", astream, name="astream"),
    path("-/held/", ready, name="ready"),
]
