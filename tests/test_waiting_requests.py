"""The wait of a request: wherever slots are taken, and wherever nobody waits; what the answer says; a client that leaves."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any, ClassVar

import pytest
from asgiref.sync import markcoroutinefunction
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, JsonResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from rest_framework.response import Response
from rest_framework.views import APIView

from django_concurrency_mw import ConcurrencyLimitExceeded, backends, concurrency_limit, drivers, hold, pace
from django_concurrency_mw import conf as our_conf
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.drf import ConcurrencyThrottle
from django_concurrency_mw.exceptions import DecoratorUsageError
from django_concurrency_mw.signals import request_rejected, slot_acquired
from django_concurrency_mw.testing import hold_slots

from .asgi_driver import Exchange, fetch
from .chaos import LONG
from .support import OURS, Limits, SyncOnly, await_until, backend_entry, held, named, wait_until
from .test_lifetime import wsgi
from .test_queueing import WAITING

#: Seconds that nobody waits to the end.
LONGER = 30


def told(request: Any) -> dict[str, Any]:
    concurrency = request.concurrency
    return {"waited": concurrency.waited, "states": [result.state for result in concurrency.policies], "held": held()}


def plain(request: HttpRequest) -> JsonResponse:
    return JsonResponse(told(request))


async def aplain(request: HttpRequest) -> JsonResponse:
    return JsonResponse(told(request))


@concurrency_limit(policy="p", wait=LONGER, max_waiting=10_000)
def decorated(request: HttpRequest) -> JsonResponse:
    return plain(request)


@concurrency_limit(policy="p", wait=LONGER, max_waiting=10_000)
async def adecorated(request: HttpRequest) -> JsonResponse:
    return plain(request)


@method_decorator(concurrency_limit(policy="p", wait="30s"), name="dispatch")
class OnClass(View):
    def get(self, request: HttpRequest) -> JsonResponse:
        return plain(request)


@concurrency_limit(key="global", max_concurrent=1, wait=LONGER, max_waiting=1, name="own")
def own(request: HttpRequest) -> JsonResponse:
    return plain(request)


@concurrency_limit(policy="inner", wait=LONGER)
def nested(request: HttpRequest) -> JsonResponse:
    return plain(request)


@concurrency_limit(policy="inner", wait=LONGER)
def both(request: HttpRequest) -> JsonResponse:
    return plain(request)


class Api(APIView):
    throttle_classes: ClassVar = [ConcurrencyThrottle]
    authentication_classes: ClassVar[list[Any]] = []

    def get(self, request: Any) -> Response:
        return Response(told(request._request))


urlpatterns = [
    path("plain/", plain, name="plain"),
    path("aplain/", aplain, name="aplain"),
    path("decorated/", decorated, name="decorated"),
    path("adecorated/", adecorated, name="adecorated"),
    path("class/", OnClass.as_view(), name="class"),
    path("own/", own, name="own"),
    path("nested/", nested, name="nested"),
    path("both/", both, name="both"),
    path("api/", Api.as_view(), name="api"),
]
#: Where a slot is taken -> the path, and the policy whose slot it is.
FACES = {
    "middleware": ("/plain/", "p"),
    "middleware, async view": ("/aplain/", "p"),
    "decorator over a policy": ("/decorated/", "p"),
    "async decorator": ("/adecorated/", "p"),
    "decorator on a class": ("/class/", "p"),
    "decorator": ("/own/", "own"),
    "throttle": ("/api/", "p"),
}
Get = Callable[[str], tuple[int, dict[str, str], dict[str, Any]]]


def by_wsgi(path: str, multithread: bool = True) -> tuple[int, dict[str, str], dict[str, Any]]:
    body, answer = wsgi(path, **{"wsgi.multithread": multithread})
    content = json.loads(b"".join(body))
    body.close()  # type: ignore[attr-defined]  # a response
    return answer["status"], {name.lower(): value for name, value in answer["headers"].items()}, content


def by_asgi(path: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    exchange = asyncio.run(fetch(path))
    return exchange.status, exchange.headers, json.loads(exchange.body)


WAYS: dict[str, Get] = {"wsgi": by_wsgi, "asgi": by_asgi}


class Site:
    """A site with one slot of `p`, for the views without a decorator."""

    def __init__(self, limits: Limits, entry: dict[str, Any]) -> None:
        self._limits, self._entry = limits, entry
        self._pool = ThreadPoolExecutor(16)

    def use(self, middleware: list[str] | None = None, limit: int = 1, waiters: int = 8, **fields: Any) -> None:
        table = {
            "p": {
                "url_names": ["plain", "aplain", "api"],
                "key": "global",
                "max_concurrent": limit,
                "wait": LONGER,
                **fields,
            },
            "outer": {"url_names": ["nested"], "key": "global", "max_concurrent": 1000, "overridable": False},
            "far": {
                "url_names": ["both"],
                "key": "global",
                "max_concurrent": 9,
                "overridable": False,
                "backend": "two",
            },
            "inner": {"key": "global", "max_concurrent": 1},
        }
        self._limits(
            {"policies": table},
            middleware=[OURS] if middleware is None else middleware,
            BACKENDS={"default": self._entry, "two": {"BACKEND": "memory", "KEY_PREFIX": "two"}},
            MAX_SYNC_WAITERS=waiters,
        )

    def asks(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments)

    def waits(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        before = in_line()
        future = self.asks(call, *arguments)
        assert wait_until(lambda: in_line() > before or future.done())
        assert not future.done(), future.result()
        return future


def in_line() -> int:
    return sum(len(store.waiters()) for store in list(backends._instances.values()))


@pytest.fixture(autouse=True)
def _urls() -> Iterator[None]:
    """Those of this module. Before `limits`, as overrides are undone in their order."""
    with override_settings(ROOT_URLCONF=__name__):
        yield


@pytest.fixture(params=WAITING)
def site(request: pytest.FixtureRequest, limits: Limits, prefix: str, tmp_path: Any) -> Iterator[Site]:
    yield from _site(limits, backend_entry(request.param, request, prefix, tmp_path))


@pytest.fixture
def memory_site(request: pytest.FixtureRequest, limits: Limits, prefix: str, tmp_path: Any) -> Iterator[Site]:
    yield from _site(limits, backend_entry("memory", request, prefix, tmp_path))


def _site(limits: Limits, entry: dict[str, Any]) -> Iterator[Site]:
    site = Site(limits, entry)
    site.use()
    yield site
    site._pool.shutdown()
    assert wait_until(lambda: held() == [] and in_line() == 0), (held(), in_line())
    assert len(drivers._waiting) == 0


@pytest.fixture
def events() -> Iterator[list[tuple[str, str, Any]]]:
    """What the signals told: which one, of which policy, and how long it waited or why it was rejected."""
    heard: list[tuple[str, str, Any]] = []

    def acquired(policy: Any, waited: float, **rest: Any) -> None:
        heard.append(("acquired", policy.name, waited))

    def rejected(policy: Any, reason: str, **rest: Any) -> None:
        heard.append(("rejected", policy.name, reason))

    slot_acquired.connect(acquired)
    request_rejected.connect(rejected)
    yield heard
    slot_acquired.disconnect(acquired)
    request_rejected.disconnect(rejected)


# -- where it waits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("face", FACES)
def test_a_request_waits_wherever_its_slot_is_taken(
    memory_site: Site, face: str, way: str, events: list[tuple[str, str, Any]]
) -> None:
    url, policy = FACES[face]
    with hold_slots(policy):
        waiting = memory_site.waits(WAYS[way], url)
        assert held() == [policy]
        sleep(0.02)
    status, _, body = waiting.result(15)
    assert (status, body["states"], body["held"]) == (200, ["held"], [policy])
    assert 0.02 <= body["waited"] < LONGER / 2
    assert events == [("acquired", policy, body["waited"])]


def test_a_decorators_own_wait_goes_before_that_of_its_policy(memory_site: Site) -> None:
    memory_site.use(wait=0)
    with hold_slots("p"):
        assert by_wsgi("/plain/")[2]["reason"] == "full"
        waiting = memory_site.waits(by_wsgi, "/decorated/")
    assert waiting.result(15)[0] == 200
    memory_site.use()
    with hold_slots("p"), pytest.raises(DecoratorUsageError, match="wait"):
        concurrency_limit(policy="p", block=False)(plain)(RequestFactory().get("/"))
    shadow = concurrency_limit(policy="p", block=False, wait=0)(plain)
    with hold_slots("p"):
        assert json.loads(shadow(RequestFactory().get("/")).content)["states"] == ["over"]


@pytest.mark.parametrize("way", WAYS)
def test_it_waits_on_every_store(site: Site, way: str) -> None:
    with hold_slots("p"):
        waiting = site.waits(WAYS[way], "/aplain/")
    status, _, body = waiting.result(15)
    assert (status, body["held"]) == (200, ["p"])
    assert 0 < body["waited"] < LONGER / 2


def test_hold_waits_in_threads_and_on_loops(site: Site, events: list[tuple[str, str, Any]]) -> None:
    def in_thread() -> float:
        with hold("p") as concurrency:
            assert held() == ["p"]
            return concurrency.waited

    async def on_loop() -> float:
        async with hold("p") as concurrency:
            assert held() == ["p"]
            return concurrency.waited

    for call in (in_thread, lambda: asyncio.run(on_loop())):
        with hold_slots("p"):
            waiting = site.waits(call)
        waited = waiting.result(15)
        assert 0 < waited < LONGER / 2
        assert events.pop() == ("acquired", "p", waited)


def test_hold_in_threads_is_bounded_by_the_setting_too(memory_site: Site) -> None:
    with hold_slots("p"):
        for _ in range(8):
            memory_site.waits(by_wsgi, "/plain/")
        with pytest.raises(ConcurrencyLimitExceeded) as caught, hold("p"):
            pass
        assert caught.value.rejection.reason == "queue_full"

        async def on_loop() -> None:
            async with hold("p"):
                pass

        memory_site.waits(lambda: asyncio.run(on_loop()))
        assert in_line() == 9


class AsyncOnly:
    """What forces the middlewares inside it onto an event loop, under WSGI onto one of its own."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> Any:
        return await self.get_response(request)


@pytest.mark.parametrize(
    ("url", "chain"),
    [("/adecorated/", []), ("/adecorated/", [OURS]), ("/plain/", [named(AsyncOnly), OURS])],
    ids=["decorator", "decorator and middleware", "middleware"],
)
def test_a_coroutine_of_a_server_of_threads_keeps_a_thread_and_is_counted(
    memory_site: Site, url: str, chain: list[str]
) -> None:
    memory_site.use(chain, waiters=1)
    with hold_slots("p"):
        waiting = memory_site.waits(by_wsgi, url)
        status, _, body = memory_site.asks(by_wsgi, url).result(15)
        assert (status, body["reason"]) == (429, "queue_full")
        on_loop = memory_site.waits(by_asgi, "/adecorated/")
    assert [one.result(15)[0] for one in (waiting, on_loop)] == [200, 200]


@pytest.mark.parametrize("way", WAYS)
def test_a_decorator_does_not_wait_while_the_middleware_holds_a_slot_of_another_store(
    memory_site: Site, way: str
) -> None:
    with hold_slots("inner"):
        status, _, body = memory_site.asks(WAYS[way], "/both/").result(15)
        assert (status, body["reason"]) == (429, "full")
        assert held() == ["inner"]
        memory_site.use([])
        waiting = memory_site.waits(WAYS[way], "/both/")
    assert waiting.result(15)[0] == 200


def test_a_sync_hold_on_an_event_loop_does_not_wait(memory_site: Site) -> None:
    async def main() -> str:
        with pytest.raises(ConcurrencyLimitExceeded) as caught, hold("p"):
            pass
        return caught.value.rejection.reason

    with hold_slots("p"):
        assert asyncio.run(main()) == "full"


@pytest.mark.parametrize("way", WAYS)
def test_the_slot_of_the_middleware_stays_while_a_decorator_waits(memory_site: Site, way: str) -> None:
    with hold_slots("inner"):
        waiting = memory_site.waits(WAYS[way], "/nested/")
        assert held() == ["inner", "outer"]
    status, _, body = waiting.result(15)
    assert (status, body["held"]) == (200, ["inner", "outer"])


# -- where nobody waits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/plain/", "/decorated/", "/own/"])
def test_it_does_not_wait_where_the_server_says_that_one_thread_serves_all(memory_site: Site, url: str) -> None:
    """Nobody could give a slot back meanwhile. Django's test client says so too."""
    with hold_slots("own" if url == "/own/" else "p"):
        for answer in (by_wsgi(url, False), (lambda r: (r.status_code, {}, r.json()))(Client().get(url))):
            assert (answer[0], answer[2]["reason"]) == (429, "full")
    assert in_line() == 0


class Impatient(MemoryBackend):
    supports_wait = False


def test_a_store_where_nobody_can_wait_raises_what_is_wrong(memory_site: Site) -> None:
    memory_site._entry = {"BACKEND": named(Impatient)}
    memory_site.use()
    for url in ("/plain/", "/decorated/"):
        with pytest.raises(
            ImproperlyConfigured, match=r"policy p: wait: the backend 'default' cannot let requests wait"
        ):
            Client().get(url)
    with pytest.raises(ImproperlyConfigured, match="supports_wait is False"), hold("p"):
        pass
    memory_site.use(wait=0)
    assert Client().get("/plain/").status_code == 200


# -- what the answer says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fields", "reason"), [({"wait": 0.05}, "wait_timeout"), ({"max_waiting": 0}, "queue_full")], ids=str
)
def test_the_answer_the_signal_and_the_log_say_why(
    memory_site: Site,
    fields: dict[str, Any],
    reason: str,
    way: str,
    events: list[tuple[str, str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory_site.use(**fields)
    from django_concurrency_mw import rejection

    rejection._sampled.forget()
    with hold_slots("p"):
        status, headers, body = memory_site.asks(WAYS[way], "/plain/").result(15)
    assert status == 429
    assert (body["reason"], body["violated-policies"], body["status"]) == (reason, ["p"], 429)
    assert body["title"] == "Too many requests at the same time"
    assert headers["ratelimit"] == '"p";r=0'
    assert headers["ratelimit-policy"] == '"p";q=1;qu="concurrent-requests"'
    assert 1 <= int(headers["retry-after"]) <= 5
    assert events == [("rejected", "p", reason)]
    assert f"policy p: 1 rejected ({reason})" in caplog.text


@pytest.mark.parametrize("accept", ["application/json", "text/html", "text/plain", "application/problem+json"])
def test_every_body_is_that_of_a_full_one(memory_site: Site, accept: str) -> None:
    def answer(multithread: bool) -> tuple[int, bytes]:
        body, told = wsgi("/plain/", HTTP_ACCEPT=accept, **{"wsgi.multithread": multithread})
        return told["status"], b"".join(body)

    memory_site.use(wait=0.01)
    with hold_slots("p"):
        full, timed_out = answer(False), answer(True)
    assert full[0] == timed_out[0] == 429
    assert timed_out[1] == full[1].replace(b'"full"', b'"wait_timeout"')


def test_retry_after_is_what_the_line_has_seen(memory_site: Site) -> None:
    memory_site.use(wait=0.05)
    policy = our_conf.current().table.get("p")
    assert policy is not None
    for _ in range(40):
        pace.seen(policy, 1, 50.0)
    with hold_slots("p"):
        assert 50 <= int(by_wsgi("/plain/")[1]["retry-after"]) <= 75
        assert 1 <= int(by_wsgi("/plain/", False)[1]["retry-after"]) <= 5, "it stood in no line"


def test_the_throttle_passes_on_how_long_to_wait_and_the_fields(memory_site: Site) -> None:
    memory_site.use(wait=0.05)
    policy = our_conf.current().table.get("p")
    assert policy is not None
    for _ in range(40):
        pace.seen(policy, 1, 50.0)
    with hold_slots("p"):
        status, headers, _ = by_wsgi("/api/")
    assert (status, headers["ratelimit"]) == (429, '"p";r=0')
    assert 50 <= int(headers["retry-after"]) <= 75


def test_a_waiter_that_is_granted_tells_the_pace(memory_site: Site) -> None:
    policy = our_conf.current().table.get("p")
    assert policy is not None
    with hold_slots("p"):
        waiting = memory_site.waits(by_wsgi, "/plain/")
    waiting.result(15)
    assert pace.retry_after(policy, 1) is not None


# -- a client that leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/plain/", "/aplain/", "/adecorated/", "/decorated/", "/class/", "/api/"])
@pytest.mark.parametrize("chain", [[OURS], [named(SyncOnly), OURS]], ids=["alone", "below a sync one"])
def test_a_client_that_leaves_ends_its_wait_at_once(memory_site: Site, url: str, chain: list[str]) -> None:
    """Also where it is a thread that waits, as in a sync view."""
    memory_site.use(middleware=chain)
    left = asyncio.run(_leaves_in_line(url))
    print(f"{url}: {left:.3f} s")
    assert left < LONGER / 2


def test_below_a_sync_middleware_of_ours_a_thread_waits_to_its_end(memory_site: Site) -> None:
    """The whole chain runs in one thread then, and nobody there hears that the client has left. It takes nothing with it."""
    memory_site.use(middleware=[OURS, named(SyncOnly)], wait=0.3)
    asyncio.run(_leaves_in_line("/plain/"))


async def _leaves_in_line(url: str) -> float:
    """Seconds from the client's leaving until nothing of it is left in the line."""
    async with hold_slots("p"):
        exchange = Exchange(ASGIHandler(), url)
        assert await await_until(lambda: in_line() == 1)
        left = monotonic()
        exchange.leave()
        assert await await_until(lambda: in_line() == 0)
        gone = monotonic() - left
        assert held() == ["p"]
        await exchange.end()
        assert exchange.events == []
    assert await await_until(lambda: held() == [])
    return gone


CLIENTS = 2000 if LONG else 300


@pytest.mark.parametrize("url", ["/aplain/", "/adecorated/"])
def test_clients_that_leave_at_random_while_they_wait_leave_nothing(memory_site: Site, url: str) -> None:
    memory_site.use(max_waiting=10_000)

    async def main() -> float:
        app = ASGIHandler()
        async with hold_slots("p"):
            exchanges = [Exchange(app, url) for _ in range(CLIENTS)]
            assert await await_until(lambda: in_line() > CLIENTS / 2, 60)
            random.shuffle(exchanges)
            for exchange in exchanges[: CLIENTS // 2]:
                exchange.leave()
                await asyncio.sleep(random.uniform(0, 0.5 / CLIENTS))
        # Now the rest of the line is let in, one after another, while it goes on leaving.
        for exchange in exchanges[CLIENTS // 2 :]:
            if random.random() < 0.7:
                exchange.leave()
            await asyncio.sleep(0)
        over = monotonic()
        for exchange in exchanges:
            await asyncio.wait([exchange.task], timeout=60)
            assert exchange.task.done()
        assert await await_until(lambda: in_line() == 0 and held() == [])
        return monotonic() - over

    print(f"{url}: {CLIENTS} clients, empty {asyncio.run(main()):.2f} s after the last one left")
    assert sys.exc_info() == (None, None, None)
