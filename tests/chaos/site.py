"""A site that times what the middleware costs each request, and counts in memory how many are inside its views at once.

`/work/` and `/awork/` hold a slot for `for` milliseconds of the query, or until the file `until` is there. The answer's
headers say what the middleware cost (`X-Ours`, seconds), and what the policy's word was (`X-State`). `/gauge/` tells and
resets the count.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.utils.decorators import sync_and_async_middleware

from django_concurrency_mw import conf, hold
from django_concurrency_mw.backends import get_backend

Answer = Callable[[HttpRequest], Any]


class Count:
    """Of this process alone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = self.most = self.admitted = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            self.admitted += 1
            self.most = max(self.most, self.inside)
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1


count = Count()


@sync_and_async_middleware
def stopwatch(get_response: Answer) -> Answer:
    """Outermost: all the time that is not the view's."""

    def stamped(request: HttpRequest, response: HttpResponse, began: float) -> HttpResponse:
        spent = monotonic() - began - getattr(request, "in_view", 0.0)
        response["X-Ours"] = f"{spent:.6f}"
        results = request.concurrency.policies  # type: ignore[attr-defined]  # ours sets it
        response["X-State"] = results[0].state if results else ""
        return response

    if iscoroutinefunction(get_response):

        async def amiddleware(request: HttpRequest) -> HttpResponse:
            began = monotonic()
            return stamped(request, await get_response(request), began)

        return amiddleware

    def middleware(request: HttpRequest) -> HttpResponse:
        began = monotonic()
        return stamped(request, get_response(request), began)

    return middleware


def _seconds(request: HttpRequest) -> float:
    return float(request.GET.get("for", "20")) / 1000


#: Seconds after which a view waits for its file no more.
LONGEST = 120


def _stay(request: HttpRequest) -> None:
    """Inside, for as long as the request says."""
    end, until = monotonic() + LONGEST, request.GET.get("until")
    with count():
        if until is None:
            sleep(_seconds(request))
        while until is not None and not os.path.exists(until) and monotonic() < end:
            sleep(0.01)


def work(request: HttpRequest) -> HttpResponse:
    began = monotonic()
    _stay(request)
    request.in_view = monotonic() - began  # type: ignore[attr-defined]
    return HttpResponse("done")


async def awork(request: HttpRequest) -> HttpResponse:
    began, until = monotonic(), request.GET.get("until")
    with count():
        if until is None:
            await asyncio.sleep(_seconds(request))
        while until is not None and not os.path.exists(until) and monotonic() < began + LONGEST:
            await asyncio.sleep(0.01)
    request.in_view = monotonic() - began  # type: ignore[attr-defined]
    return HttpResponse("done")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[bytes]:
        with count():
            for _ in range(10):
                sleep(_seconds(request) / 10)
                yield b"x" * 1000

    return StreamingHttpResponse(chunks())


async def astream(request: HttpRequest) -> StreamingHttpResponse:
    async def chunks() -> Any:
        with count():
            for _ in range(10):
                await asyncio.sleep(_seconds(request) / 10)
                yield b"x" * 1000

    return StreamingHttpResponse(chunks())


def spin(request: HttpRequest) -> HttpResponse:
    """A neighbour that keeps a core busy; it is not limited."""
    end = monotonic() + _seconds(request)
    while monotonic() < end:
        sum(range(1000))
    return HttpResponse("done")


def fork(request: HttpRequest) -> HttpResponse:
    """Forks inside the request; the child gives its slots back, as it believes, and ends with its exit handlers run."""
    pid = os.fork()
    if pid == 0:
        request.concurrency.release()  # type: ignore[attr-defined]  # ours sets it
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(pid, 0)
    _stay(request)
    return HttpResponse("done")


def hand_over(request: HttpRequest) -> HttpResponse:
    """Answers before the work is done, with the token; with `thread` the work is a thread's here, until that file is there."""
    token = request.concurrency.hand_over()  # type: ignore[attr-defined]  # ours sets it
    if "thread" in request.GET:
        over, latest = Path(request.GET["thread"]), monotonic() + LONGEST

        def work() -> None:
            with hold(token):
                while not over.exists() and monotonic() < latest:
                    sleep(0.01)

        threading.Thread(target=work).start()
    return HttpResponse(token, status=202)


async def ahand_over(request: HttpRequest) -> HttpResponse:
    return hand_over(request)


def gauge(request: HttpRequest) -> HttpResponse:
    with count.lock:
        told = {"most": count.most, "admitted": count.admitted, "inside": count.inside, "pid": os.getpid()}
        if "reset" in request.GET:
            count.most, count.admitted = count.inside, 0
    return JsonResponse(told)


async def agauge(request: HttpRequest) -> HttpResponse:
    return gauge(request)


def leases(request: HttpRequest) -> HttpResponse:
    """How many seconds are left of each one that is held, also where this process has not limited anybody yet."""
    store = get_backend("default", conf.current().backends)
    return JsonResponse({"left": [holder.lease_left for holder in store.snapshot()]})


def ready(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"held": []})


urlpatterns = [
    path("work/", work, name="limited-work"),
    path("awork/", awork, name="limited-awork"),
    path("stream/", stream, name="limited-stream"),
    path("astream/", astream, name="limited-astream"),
    path("fork/", fork, name="limited-fork"),
    path("hand-over/", hand_over, name="limited-hand-over"),
    path("ahand-over/", ahand_over, name="limited-ahand-over"),
    path("spin/", spin, name="spin"),
    path("gauge/", gauge, name="gauge"),
    path("agauge/", agauge, name="agauge"),
    path("leases/", leases, name="leases"),
    path("-/held/", ready, name="ready"),
]
