"""The views of the test site: every kind of view that a slot's life has to survive."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from time import sleep

from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.template.response import TemplateResponse
from django.utils.decorators import method_decorator
from django.views import View

from django_concurrency_mw import concurrency_limit, concurrency_limit_exempt
from django_concurrency_mw.backends import snapshot_all

from . import gauge


class Deliberate(Exception):
    """Raised by views that are meant to fail."""


class Switch:
    """What a test uses to hold a view at one of its gates, and to learn what was held when it passed each.

    A view passes gate 0 before its first byte and gate 1 in the middle of its body; `stop_at` is where it has to wait.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.stop_at: int | None = None
        self.entered = threading.Event()
        self.go = threading.Event()
        self.seen: list[list[str]] = []
        self.finished = threading.Event()

    def gate(self, number: int) -> None:
        self.seen.append(held())
        if number == self.stop_at:
            self.entered.set()
            if not self.go.wait(60):
                raise TimeoutError("nobody let the view go on")
            self.seen.append(held())

    async def agate(self, number: int) -> None:
        self.seen.append(held())
        if number == self.stop_at:
            self.entered.set()
            for _ in range(10_000):
                if self.go.is_set():
                    break
                await asyncio.sleep(0.001)
            else:
                raise TimeoutError("nobody let the view go on")
            self.seen.append(held())


switch = Switch()


def held() -> list[str]:
    """The policies whose slots are held now, by the store's own word."""
    return sorted(holder.policy for holder in snapshot_all())


def plain(request: HttpRequest, **kwargs: object) -> HttpResponse:
    switch.gate(0)
    switch.finished.set()
    return HttpResponse("plain")


async def aplain(request: HttpRequest, **kwargs: object) -> HttpResponse:
    await switch.agate(0)
    switch.finished.set()
    return HttpResponse("plain")


def fails(request: HttpRequest) -> HttpResponse:
    switch.gate(0)
    raise Deliberate("as it should")


async def afails(request: HttpRequest) -> HttpResponse:
    await switch.agate(0)
    raise Deliberate("as it should")


def _chunks(fail: bool) -> Iterator[bytes]:
    switch.gate(0)
    yield b"one "
    switch.gate(1)
    yield b"two "
    if fail:
        raise Deliberate("mid-stream")
    yield b"three"
    switch.finished.set()


async def _achunks(fail: bool) -> AsyncIterator[bytes]:
    await switch.agate(0)
    yield b"one "
    await switch.agate(1)
    yield b"two "
    if fail:
        raise Deliberate("mid-stream")
    yield b"three"
    switch.finished.set()


class WatchedFile:
    """A file that passes the gates as it is read."""

    def __init__(self, fail: bool) -> None:
        self._chunks = _chunks(fail)

    def read(self, size: int = -1) -> bytes:
        return next(self._chunks, b"")

    def close(self) -> None:
        pass


def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_chunks("fail" in request.GET))


async def astream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_achunks("fail" in request.GET))


def astream_from_sync(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_achunks("fail" in request.GET))


async def stream_from_async(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_chunks("fail" in request.GET))


def file(request: HttpRequest) -> FileResponse:
    return FileResponse(WatchedFile("fail" in request.GET))


async def afile(request: HttpRequest) -> FileResponse:
    return FileResponse(WatchedFile("fail" in request.GET))


def page(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "page.html", {"held": held})


class ClassView(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        switch.gate(0)
        return HttpResponse("class")


class AsyncClassView(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        await switch.agate(0)
        return HttpResponse("class")


def told(request: HttpRequest, **kwargs: object) -> JsonResponse:
    """What the request was told of its limits."""
    concurrency = request.concurrency  # type: ignore[attr-defined]  # set by the middleware or the decorator
    return JsonResponse(
        {
            "limited": concurrency.limited,
            "policies": [[p.policy, p.key, p.state, p.in_flight, p.limit] for p in concurrency.policies],
        }
    )


async def atold(request: HttpRequest, **kwargs: object) -> JsonResponse:
    return told(request, **kwargs)


exempt = concurrency_limit_exempt(plain)


@concurrency_limit(key="global", max_concurrent=1)
def decorated(request: HttpRequest) -> HttpResponse:
    return told(request)


@concurrency_limit(key="global", max_concurrent=1)
async def adecorated(request: HttpRequest) -> HttpResponse:
    return told(request)


@method_decorator(concurrency_limit(key="global", max_concurrent=1), name="dispatch")
class DecoratedClass(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return told(request)


@method_decorator(concurrency_limit(key="global", max_concurrent=1), name="dispatch")
class AsyncDecoratedClass(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return told(request)


# -- for the servers: every view holds its slot for `DURATION` seconds and counts itself -----------------------------

DURATION = float(os.environ.get("TEST_DURATION", "0.02"))


def busy(request: HttpRequest) -> HttpResponse:
    with gauge.inside("sync"):
        sleep(DURATION)
    return HttpResponse("done")


async def abusy(request: HttpRequest) -> HttpResponse:
    with gauge.inside("async"):
        await asyncio.sleep(DURATION)
    return HttpResponse("done")


class BusyClass(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        with gauge.inside("class"):
            sleep(DURATION)
        return HttpResponse("done")


class AsyncBusyClass(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        with gauge.inside("async-class"):
            await asyncio.sleep(DURATION)
        return HttpResponse("done")


def _busy_chunks() -> Iterator[bytes]:
    with gauge.inside("stream"):
        for _ in range(4):
            yield b"chunk"
            sleep(DURATION / 4)


async def _abusy_chunks() -> AsyncIterator[bytes]:
    with gauge.inside("async-stream"):
        for _ in range(4):
            yield b"chunk"
            await asyncio.sleep(DURATION / 4)


def busy_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_busy_chunks())


async def abusy_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_abusy_chunks())


def busy_raising(request: HttpRequest) -> HttpResponse:
    with gauge.inside("raising"):
        sleep(DURATION)
    raise Deliberate("as it should")


def holders(request: HttpRequest) -> JsonResponse:
    """What the store holds, for a test that looks at a server from outside."""
    return JsonResponse({"held": held()})


# -- for the keys: who is asking -------------------------------------------------------------------------------------


def whoami(request: HttpRequest) -> HttpResponse:
    """A sync view that reads the user, as most do."""
    return HttpResponse(str(request.user))


async def awhoami(request: HttpRequest) -> HttpResponse:
    """An async view that reads the user, as most do."""
    return HttpResponse(str(await request.auser()))


@concurrency_limit(key="team:{user.last_name}", max_concurrent=1, name="teams")
def team(request: HttpRequest) -> HttpResponse:
    return plain(request)


@concurrency_limit(key="team:{user.last_name}", max_concurrent=1, name="teams")
async def ateam(request: HttpRequest) -> HttpResponse:
    return await aplain(request)
