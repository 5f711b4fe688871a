"""Who owns a request's lease, and ends it: with the middleware and without, nested, side by side, cancelled or late."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import path

from django_concurrency_mw import backends, concurrency_limit, health, rejection, signals, stand_ins
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.limiter import begin, end, join, leave

from .asgi_driver import Exchange
from .support import OURS, SOON, Limits, await_until, exit_code, held, nothing_held, run_async

in_the_key, go, ended = threading.Event(), threading.Event(), threading.Event()


def slow_key(request: HttpRequest) -> str:
    in_the_key.set()
    go.wait(SOON)
    return "k"


@concurrency_limit(key=slow_key, max_concurrent=1, name="slow-key")
def with_a_slow_key(request: HttpRequest) -> HttpResponse:
    ended.set()
    return HttpResponse("done")


@concurrency_limit(key="global", max_concurrent=1, name="helper")
def helper(request: HttpRequest) -> HttpResponse:
    return HttpResponse(",".join(held()))


def stream_with_a_helper(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[bytes]:
        yield b"helped: "
        yield helper(request).content

    return StreamingHttpResponse(chunks())


def told(request: HttpRequest) -> HttpResponse:
    return HttpResponse(",".join(held()))


def fallback(request: HttpRequest) -> HttpResponse:
    return patient(request)


@concurrency_limit(policy="patient")
def patient(request: HttpRequest) -> HttpResponse:
    return told(request)


def early(request: HttpRequest) -> HttpResponse:
    request.concurrency.release()  # type: ignore[attr-defined]  # the middleware's
    return again(request)


@concurrency_limit(policy="all")
def again(request: HttpRequest) -> HttpResponse:
    return HttpResponse(",".join(held()))


urlpatterns = [
    path("slow-key/", with_a_slow_key, name="slow-key"),
    path("stream/", stream_with_a_helper, name="stream"),
    path("early/", early, name="early"),
    path("told/", told, name="told"),
]


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    for event in (in_the_key, go, ended):
        event.clear()
    with override_settings(ROOT_URLCONF=__name__):
        yield
    go.set()


def test_a_client_that_leaves_while_the_key_is_resolved(limits: Limits) -> None:
    """The view's thread takes its slot after the middleware was cancelled: it comes back all the same."""
    limits(middleware=[OURS])

    async def main() -> None:
        exchange = Exchange(ASGIHandler(), "/slow-key/")
        assert await await_until(in_the_key.is_set)
        threading.Timer(0.1, go.set).start()
        exchange.leave()
        await exchange.end()
        assert await await_until(ended.is_set)
        assert await await_until(nothing_held)

    run_async(main)


def test_a_limited_helper_called_from_the_body_of_a_stream(limits: Limits) -> None:
    """The middleware is through with the request; the helper owns its slot itself, each time."""
    limits(middleware=[OURS])
    for _ in range(2):
        assert b"".join(Client().get("/stream/")) == b"helped: helper"  # type: ignore[arg-type]  # it streams
        assert nothing_held()


class FallsBack:
    """Answers itself when the view has, as one does that has a page for what is not found."""

    answer: Any = None

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        self.get_response(request)
        return type(self).answer(request)


class Repeats(FallsBack):
    """Asks again, as one does that has found a transaction lost."""

    def __call__(self, request: HttpRequest) -> Any:
        self.get_response(request)
        return self.get_response(request)


PATIENT = {"patient": {"key": "global", "max_concurrent": 1, "wait": SOON}}


def test_who_is_called_after_the_middleware_shares_one_slot(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decorator within another, of one policy, by a middleware further out."""
    limits({"policies": PATIENT}, middleware=[f"{__name__}.FallsBack", OURS])
    monkeypatch.setattr(FallsBack, "answer", concurrency_limit(policy="patient")(fallback))
    assert Client().get("/told/").content == b"patient"
    assert nothing_held()


def test_who_is_called_after_the_middleware_may_wait(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    limits({"policies": PATIENT}, middleware=[f"{__name__}.FallsBack", OURS])
    monkeypatch.setattr(FallsBack, "answer", fallback)

    @concurrency_limit(policy="patient")
    def first(request: HttpRequest) -> HttpResponse:
        in_the_key.set()
        go.wait(SOON)
        return HttpResponse()

    holds = threading.Thread(target=lambda: first(RequestFactory().get("/")))
    holds.start()
    assert in_the_key.wait(SOON)
    threading.Timer(0.1, go.set).start()
    answer = Client().get("/told/", **{"wsgi.multithread": True})  # type: ignore[arg-type]  # environ
    holds.join()
    assert answer.content == b"patient"


def test_nobody_waits_for_a_request_that_was_cut_short() -> None:
    """Its view's thread may go on, and comes to have a lease of its own."""
    request = RequestFactory().get("/")
    begin(request)
    assert end(request) is None
    lease, shares = join(request)
    assert lease.given_up
    assert shares
    assert join(request) == (lease, True)
    assert [leave(request, lease), leave(request, lease)] == [False, True]
    assert join(request)[0] is not lease


def test_a_request_that_comes_by_twice_is_limited_twice(limits: Limits) -> None:
    """The second time nothing of the first is left, and it ends as the first did."""
    table = {"policies": {"all": {"url_names": ["told"], "key": "global", "max_concurrent": 1}}}
    limits(table, middleware=[f"{__name__}.Repeats", OURS])
    assert Client().get("/told/").content == b"all"
    assert nothing_held()


def test_a_request_that_comes_by_twice_on_a_loop_is_limited_twice(limits: Limits) -> None:
    table = {"policies": {"all": {"url_names": ["told"], "key": "global", "max_concurrent": 1}}}
    limits(table, middleware=[OURS])
    handler = ASGIHandler()
    chain = handler._middleware_chain

    async def twice(request: HttpRequest) -> Any:
        await chain(request)
        return await chain(request)

    handler._middleware_chain = twice

    async def main() -> None:
        exchange = Exchange(handler, "/told/")
        await exchange.end()
        assert exchange.body == b"all"
        assert nothing_held()

    run_async(main)


def test_after_an_early_release_a_helper_takes_its_own_slot(limits: Limits) -> None:
    limits({"policies": {"all": {"url_names": ["early"], "key": "global", "max_concurrent": 1}}}, middleware=[OURS])
    assert Client().get("/early/").content == b"all"
    assert nothing_held()


def test_what_a_shadow_policy_let_pass_is_no_slot(limits: Limits) -> None:
    """A decorator that blocks, over a table's policy that does not, with the limit reached."""
    table = {"policies": {"all": {"url_names": ["early"], "key": "global", "max_concurrent": 0, "block": False}}}
    limits(table, middleware=[OURS])
    inner = concurrency_limit(policy="all", block=True)(again.__wrapped__)  # type: ignore[attr-defined]  # by wraps
    request = RequestFactory().get("/")
    assert concurrency_limit(policy="all")(inner)(request).status_code == 429


def test_side_by_side_on_a_loop_each_keeps_its_slot_to_its_end(limits: Limits) -> None:
    """Two limited coroutines of one request under gather, without a middleware: the first to end leaves the other alone."""
    limits(middleware=[])
    seen: list[list[str]] = []

    @concurrency_limit(key="global", max_concurrent=1, name="short")
    async def short(request: HttpRequest) -> HttpResponse:
        await asyncio.sleep(0.01)
        return HttpResponse()

    @concurrency_limit(key="global", max_concurrent=1, name="long")
    async def long(request: HttpRequest) -> HttpResponse:
        await asyncio.sleep(0.1)
        seen.append(held())
        return HttpResponse()

    async def main() -> None:
        request = RequestFactory().get("/")
        await asyncio.gather(short(request), long(request))

    run_async(main)
    assert "long" in seen[0]
    assert nothing_held()


@pytest.mark.parametrize("answer", [None, "text", 7])
def test_a_view_that_returns_no_response(limits: Limits, answer: Any) -> None:
    limits(middleware=[], HEADERS="always")
    view = concurrency_limit(key="global", max_concurrent=1, name="bad")(lambda request: answer)
    assert view(RequestFactory().get("/")) == answer
    assert nothing_held()


def test_released_is_told_of_what_acquired_was_told_of(limits: Limits) -> None:
    """Two stores in one request, the second rejects: what the first had taken for a moment is no news."""
    stores = {name: {"BACKEND": "memory", "KEY_PREFIX": f"ownership-{name}"} for name in ("default", "other")}
    one = {"url_names": ["early"], "key": "global", "max_concurrent": 1}
    two = {**one, "max_concurrent": 0, "backend": "other"}
    limits({"policies": {"one": one, "two": two}}, middleware=[OURS], BACKENDS=stores)
    told: list[str] = []

    def acquired(**kwargs: Any) -> None:
        told.append("acquired")

    def released(**kwargs: Any) -> None:
        told.append("released")

    signals.slot_acquired.connect(acquired)
    signals.slot_released.connect(released)
    try:
        assert Client().get("/early/").status_code == 429
    finally:
        signals.slot_acquired.disconnect(acquired)
        signals.slot_released.disconnect(released)
    assert told == []


@pytest.mark.parametrize(
    "lock",
    [
        lambda: rejection._sampled._lock,
        lambda: stand_ins._counting,
        lambda: health._changing,
        lambda: backends._making,
    ],
    ids=["log", "local count", "store's health", "stores"],
)
def test_a_lock_that_was_held_when_it_forked_does_not_stop_the_child(lock: Any) -> None:
    with lock():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if lock().acquire(timeout=SOON) else 1)
    assert exit_code(pid) == 0


@pytest.mark.parametrize(
    "accept",
    ["text/html;a*=bogus''%41", "text/html;a*=idna''%41%ff", "text/html;a*=undefined''%41", "a/b;c*=x\x00''%41"],
)
def test_an_accept_header_that_django_cannot_read(limits: Limits, accept: str) -> None:
    limits({"policies": {"all": {"url_names": ["early"], "key": "global", "max_concurrent": 0}}}, middleware=[OURS])
    response = Client(headers={"accept": accept}).get("/early/")
    assert response.status_code == 429


class OneHangs(MemoryBackend):
    """A store that fails: the first call waits for its time-out, the others are refused at once."""

    hanging, timed_out = threading.Event(), threading.Event()

    def take(self, slots: Any) -> Any:
        if not self.hanging.is_set():
            self.hanging.set()
            self.timed_out.wait(SOON)
        raise TimeoutError("no answer")


def test_during_an_outage_those_who_only_ask_count_for_nothing(limits: Limits) -> None:
    """Who waits for a dead store holds nothing meanwhile."""
    limits(middleware=[], BACKENDS={"default": {"BACKEND": f"{__name__}.OneHangs"}})

    @concurrency_limit(key="global", max_concurrent=1, name="outage", on_backend_error="local")
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    waiting = threading.Thread(target=lambda: view(RequestFactory().get("/")))
    waiting.start()
    assert OneHangs.hanging.wait(SOON)
    status = view(RequestFactory().get("/")).status_code
    OneHangs.timed_out.set()
    waiting.join()
    assert status == 200
