"""A slot is held until the response is finished, and given back however that comes about."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest
from django.test import Client, RequestFactory

from django_concurrency_mw import conf
from django_concurrency_mw.drivers import run
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.lifetime import release_cancelled
from django_concurrency_mw.limiter import admit, begin, end, join
from django_concurrency_mw.policies import Policy

from .asgi_driver import Exchange, fetch
from .chaos import LONG
from .support import (
    OURS,
    SOON,
    Limits,
    Raises,
    Replaces,
    SyncOnly,
    ViewHookRaises,
    ViewHookReturns,
    await_until,
    everything,
    held,
    named,
    nothing_held,
    run_async,
    wait_until,
)
from .views import Deliberate, switch

pytestmark = [
    # Which way a stream is consumed is the server's business, and both ways have to be survived.
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
    # ASGIHandler leaves the request's body file to the collector when sending fails.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function SpooledTemporaryFile"),
]


@pytest.fixture(autouse=True)
def _no_record_of_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps log records, their tracebacks, and so the responses whose end these tests wait for."""
    monkeypatch.setattr(logging.getLogger("django.request"), "disabled", True)


#: sync view and async view, each with a sync stream, an async stream and a file
STREAMS = ["stream", "astream-from-sync", "file", "stream-from-async", "astream", "afile"]
PLAIN = ["plain", "aplain"]
#: Under ASGI these are read in a thread, which goes on when the client has left.
IN_A_THREAD = {"stream", "file", "stream-from-async", "afile"}
CHAINS = {
    "alone": [OURS],
    "with a sync-only one inside": [OURS, named(SyncOnly)],
}


def wsgi(path: str, **environ: Any) -> tuple[Iterable[bytes], dict[str, Any]]:
    """One request as a WSGI server makes it: the body's iterable, to be read and closed by the caller."""
    answer: dict[str, Any] = {}

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        answer.update(status=int(status.split()[0]), headers=dict(headers))

    path, _, query = path.partition("?")
    environ = RequestFactory()._base_environ(PATH_INFO=path, QUERY_STRING=query, **environ)
    return WSGIHandler()(environ, start_response), answer


class TestWSGI:
    @pytest.mark.parametrize("view", STREAMS)
    def test_a_stream_that_completes(self, limits: Limits, view: str) -> None:
        limits(everything(), middleware=[OURS])
        body, _answer = wsgi(f"/{view}/")
        assert b"".join(body) == b"one two three"
        assert held() == ["all"], "given back before the server closed the response"
        body.close()
        assert nothing_held()
        assert switch.seen == [["all"], ["all"]]

    @pytest.mark.parametrize("view", STREAMS)
    def test_a_stream_that_raises(self, limits: Limits, view: str) -> None:
        limits(everything(), middleware=[OURS])
        body, _answer = wsgi(f"/{view}/?fail")
        with pytest.raises(Deliberate):
            b"".join(body)
        body.close()
        assert nothing_held()
        assert switch.seen == [["all"], ["all"]]

    @pytest.mark.parametrize("view", STREAMS)
    @pytest.mark.parametrize("chunks", [0, 1])
    def test_a_client_that_leaves(self, limits: Limits, view: str, chunks: int) -> None:
        limits(everything(), middleware=[OURS])
        body, _answer = wsgi(f"/{view}/")
        iterator = iter(body)
        for _ in range(chunks):
            next(iterator)
        assert held() == ["all"]
        body.close()
        assert nothing_held()

    @pytest.mark.parametrize("view", STREAMS + PLAIN)
    @pytest.mark.parametrize("outer", [Raises, Replaces])
    def test_an_outer_middleware_that_drops_the_response(self, limits: Limits, view: str, outer: type) -> None:
        limits(everything(), middleware=[named(outer), OURS])
        client = Client(raise_request_exception=False)
        response = client.get(f"/{view}/")
        assert response.status_code == (500 if outer is Raises else 200)
        del response
        client.exc_info = None  # its traceback refers to the response
        gc.collect()
        assert wait_until(nothing_held)

    @pytest.mark.parametrize("view", ["file", "afile"])
    def test_a_file_that_the_server_sends_by_itself_stays_recognisable(self, limits: Limits, view: str) -> None:
        limits(everything(), middleware=[OURS])
        sent = []

        def wrapper(file: Any, size: int) -> Any:
            sent.append(file)
            return file

        body, _answer = wsgi(f"/{view}/", **{"wsgi.file_wrapper": wrapper})
        assert sent, "wsgi.file_wrapper was not used"
        assert held() == ["all"]
        body.close()
        assert nothing_held()

    @pytest.mark.parametrize("view", ["fails", "afails"])
    def test_a_view_that_raises(self, limits: Limits, view: str) -> None:
        limits(everything(), middleware=[OURS])
        _body, answer = wsgi(f"/{view}/")
        assert answer["status"] == 500
        assert nothing_held()
        assert switch.seen == [["all"]]

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_what_is_no_exception_of_djangos(
        self, limits: Limits, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """gunicorn's worker timeout raises SystemExit inside the view."""
        limits(everything(), middleware=[OURS])

        def gate(number: int) -> None:
            switch.seen.append(held())
            raise error

        monkeypatch.setattr(switch, "gate", gate)
        with pytest.raises(error):
            wsgi("/plain/")
        assert switch.seen == [["all"]]
        assert nothing_held()

    def test_a_template_response_is_rendered_with_its_slot(self, limits: Limits) -> None:
        limits(everything(), middleware=[OURS])
        assert Client().get("/page/").content == b"[&#x27;all&#x27;]"
        assert nothing_held()

    def test_head_and_a_body_that_nobody_reads(self, limits: Limits) -> None:
        limits(everything(), middleware=[OURS])
        response = Client().head("/stream/")
        del response
        gc.collect()
        assert wait_until(nothing_held)

    def test_gzip_wraps_the_stream_anew(self, limits: Limits) -> None:
        limits(everything(), middleware=["django.middleware.gzip.GZipMiddleware", OURS])
        body, answer = wsgi("/stream/", HTTP_ACCEPT_ENCODING="gzip")
        assert answer["headers"]["Content-Encoding"] == "gzip"
        assert b"".join(body)
        assert held() == ["all"]
        body.close()
        assert nothing_held()

    def test_gzip_over_a_stream_that_raises(self, limits: Limits) -> None:
        limits(everything(), middleware=["django.middleware.gzip.GZipMiddleware", OURS])
        body, _answer = wsgi("/stream/?fail", HTTP_ACCEPT_ENCODING="gzip")
        with pytest.raises(Deliberate):
            b"".join(body)
        assert nothing_held()
        body.close()

    def test_conditional_get_drops_a_file_unclosed(self, limits: Limits) -> None:
        limits(everything(), middleware=[named(Replaces), OURS])
        body, _answer = wsgi("/file/")
        assert b"".join(body) == b"instead"
        body.close()
        gc.collect()
        assert wait_until(nothing_held)


@pytest.mark.parametrize("chain", CHAINS)
class TestASGI:
    def middleware(self, chain: str, *outer: type) -> list[str]:
        return [*map(named, outer), *CHAINS[chain]]

    @pytest.mark.parametrize("view", STREAMS)
    def test_a_stream_that_completes(self, limits: Limits, chain: str, view: str) -> None:
        limits(everything(), middleware=self.middleware(chain))

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/")
            await exchange.end()
            assert exchange.body == b"one two three"
            assert switch.seen == [["all"], ["all"]]
            assert await await_until(nothing_held)

        run_async(main)

    @pytest.mark.parametrize("view", STREAMS)
    def test_a_stream_that_raises(self, limits: Limits, chain: str, view: str) -> None:
        limits(everything(), middleware=self.middleware(chain))

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/?fail")
            await exchange.end()
            assert switch.seen == [["all"], ["all"]]
            # The exception, and with it the response, is still referred to: it is not the collector that gives back.
            assert await await_until(nothing_held)
            del exchange

        run_async(main)

    @pytest.mark.parametrize("view", STREAMS)
    @pytest.mark.parametrize("gate", [0, 1])
    def test_a_client_that_leaves(self, limits: Limits, chain: str, view: str, gate: int) -> None:
        limits(everything(), middleware=self.middleware(chain))
        switch.stop_at = gate

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/")
            assert await await_until(switch.entered.is_set)
            assert held() == ["all"]
            # A thread that reads the stream does not stop when the client leaves, and Django waits for it.
            threading.Timer(0.05, switch.go.set).start()
            exchange.leave()
            await exchange.end()
            assert switch.go.is_set() or view not in IN_A_THREAD
            if view in IN_A_THREAD:
                assert switch.seen[gate + 1] == ["all"], "given back while the thread still read the stream"
            del exchange
            gc.collect()
            assert await await_until(nothing_held)

        run_async(main)

    @pytest.mark.parametrize("view", STREAMS)
    def test_a_client_whose_connection_is_gone(self, limits: Limits, chain: str, view: str) -> None:
        """`send` raises once the response has started."""
        limits(everything(), middleware=self.middleware(chain))

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/", send_fails_after=1)
            await exchange.end()
            del exchange
            gc.collect()
            assert await await_until(nothing_held)

        run_async(main)

    @pytest.mark.parametrize("view", PLAIN)
    def test_a_client_that_leaves_while_the_view_runs(self, limits: Limits, chain: str, view: str) -> None:
        """A sync view runs on in its thread and keeps its slot; an async one ends at its await."""
        limits(everything(), middleware=self.middleware(chain))
        switch.stop_at = 0

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/")
            assert await await_until(switch.entered.is_set)
            assert held() == ["all"]
            threading.Timer(0.05, switch.go.set).start()
            exchange.leave()
            await exchange.end()
            assert await await_until(nothing_held)
            if view == "plain":
                assert switch.finished.is_set()
                assert switch.seen == [["all"], ["all"]], "given back while the view still ran in its thread"

        run_async(main)

    @pytest.mark.parametrize("view", STREAMS + PLAIN)
    @pytest.mark.parametrize("outer", [Raises, Replaces])
    def test_an_outer_middleware_that_drops_the_response(
        self, limits: Limits, chain: str, view: str, outer: type
    ) -> None:
        limits(everything(), middleware=self.middleware(chain, outer))

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/")
            await exchange.end()
            assert exchange.status == (500 if outer is Raises else 200)
            del exchange
            gc.collect()
            assert await await_until(nothing_held)

        run_async(main)

    @pytest.mark.parametrize("view", ["fails", "afails"])
    def test_a_view_that_raises(self, limits: Limits, chain: str, view: str) -> None:
        limits(everything(), middleware=self.middleware(chain))

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/{view}/")
            await exchange.end()
            assert exchange.status == 500
            assert switch.seen == [["all"]]
            assert await await_until(nothing_held)

        run_async(main)


@pytest.mark.parametrize("view", STREAMS)
def test_a_stream_that_outlives_its_response_keeps_the_slot(limits: Limits, view: str) -> None:
    """A thread that reads on after the client has left refers to the iterator alone."""
    limits(everything(), middleware=[OURS])
    response = WSGIHandler().get_response(RequestFactory().get(f"/{view}/"))
    iterator = response._iterator
    response._resource_closers.clear()
    del response
    gc.collect()
    assert not wait_until(nothing_held, 0.1)
    del iterator
    gc.collect()
    assert wait_until(nothing_held)


def test_under_asgi_the_middleware_adds_no_hop_between_threads(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process_view of the wrong mode would cost two thread hops a request."""
    hops: list[object] = []
    hop = SyncToAsync.__call__

    async def counted(self: SyncToAsync, *args: Any, **kwargs: Any) -> Any:
        hops.append(self.func)
        return await hop(self, *args, **kwargs)

    monkeypatch.setattr(SyncToAsync, "__call__", counted)

    def hops_of_a_request(middleware: list[str]) -> int:
        limits(everything(), middleware=middleware)
        hops.clear()
        run_async(lambda: fetch("/aplain/"))
        return len(hops)

    hops_of_a_request([])  # the first one of a process has more
    assert hops_of_a_request([OURS]) == hops_of_a_request([])


@pytest.mark.parametrize("hook", [ViewHookReturns, ViewHookRaises])
@pytest.mark.parametrize("inside", [[], [named(SyncOnly)]], ids=["async", "with a sync-only one inside"])
def test_a_lower_middleware_that_skips_the_view(limits: Limits, hook: type, inside: list[str]) -> None:
    """process_view hooks that run after ours may answer or raise: no view runs, and our slot comes back all the same."""
    limits(everything(), middleware=[OURS, *inside, named(hook)])
    status = 500 if hook is ViewHookRaises else 200
    _body, answer = wsgi("/plain/")
    assert answer["status"] == status
    assert nothing_held()

    async def main() -> None:
        exchange = Exchange(ASGIHandler(), "/plain/")
        await exchange.end()
        assert exchange.status == status
        assert await await_until(nothing_held)

    run_async(main)
    assert switch.seen == []


def test_ten_thousand_requests_leave_nothing(limits: Limits) -> None:
    """And the cap of 1 holds each time: were one slot lost, the next request would be rejected. 4,000 in the short run."""
    limits(everything(1), middleware=[OURS])
    handler = WSGIHandler()
    factory = RequestFactory()
    for number in range(10_000 if LONG else 4_000):
        environ = factory._base_environ(PATH_INFO="/told/" if number % 2 else "/file/")
        statuses: list[str] = []
        body = handler(environ, lambda status, headers, exc_info=None: statuses.append(status))  # noqa: B023  # used at once
        assert statuses == ["200 OK"], number
        body.close()
        switch.seen.clear()
    assert nothing_held()


def admitted(request: HttpRequest, name: str, limit: int) -> bool:
    config = conf.current()
    policy = Policy(name, parse_key("global"), limit)
    return run(admit(request, join(request)[0], [policy], {}, config)) is None


def test_a_loop_that_ends_right_after_the_cancel_leaves_nothing(limits: Limits) -> None:
    """The hop that was to give back waits behind the view's thread, and is cancelled with the loop."""
    limits()
    request = RequestFactory().get("/")
    begin(request)
    assert admitted(request, "one", 1)
    in_the_view = threading.Event()

    async def main() -> None:
        view = asyncio.create_task(sync_to_async(in_the_view.wait)(SOON))
        await asyncio.sleep(0.05)
        task = asyncio.create_task(release_cancelled(end(request) or Lease()))
        await asyncio.sleep(0.05)
        assert not task.done()
        assert not view.done()

    run_async(main)
    in_the_view.set()
    assert wait_until(nothing_held)


def test_a_rejection_further_in_leaves_what_is_held_further_out(limits: Limits) -> None:
    limits()
    request = RequestFactory().get("/")
    begin(request)
    assert admitted(request, "outer", 1)
    assert not admitted(request, "inner", 0)
    assert held() == ["outer"]
    (end(request) or Lease()).release()
    assert nothing_held()
