"""The signals: each with exactly its arguments, to sync and async receivers, in both halves; none of them can do harm."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import sleep
from typing import Any

import pytest
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse

from django_concurrency_mw import concurrency_limit, drivers, signals
from django_concurrency_mw.backends import snapshot_all
from django_concurrency_mw.effects import Notify
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.policies import Policy

from .support import OURS, Limits, await_until, nothing_held, run_async, stores_work, wait_until
from .test_matching import Switchable, ask, remote, table
from .test_matching import stores as stores
from .views import Deliberate, switch

pytestmark = pytest.mark.urls("tests.urls")

NAMES = ["slot_acquired", "slot_released", "request_rejected", "backend_failed"]
both_halves = pytest.mark.parametrize("half", ["wsgi", "asgi"])
both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


class Heard:
    """What receivers were told, in order: (signal's name, its arguments)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def names(self) -> list[str]:
        return [name for name, _ in self.told]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for heard, arguments in self.told if heard == name]


@pytest.fixture
def heard() -> Iterator[Callable[..., Heard]]:
    """Call it with "sync" or "async" to connect receivers to all signals; `then` is what they do besides."""
    with ExitStack() as stack:

        def connect(kind: str, then: Callable[[], None] = lambda: None) -> Heard:
            heard = Heard()
            for name in NAMES:
                signal: Signal = getattr(signals, name)

                def receiver(_name: str = name, **arguments: Any) -> None:
                    heard.told.append((_name, {n: v for n, v in arguments.items() if n != "signal"}))
                    then()

                async def areceiver(_name: str = name, **arguments: Any) -> None:
                    await asyncio.sleep(0)
                    receiver(_name, **arguments)

                chosen: Any = receiver if kind == "sync" else areceiver
                signal.connect(chosen, weak=False)
                stack.callback(signal.disconnect, chosen)
            return heard

        yield connect


@both_halves
@both_kinds
class TestArguments:
    def test_a_slot(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        """Acquired with the count and the limit, released without a count and still held."""
        limits(table(p={"url_names": ["*"]}), middleware=[OURS])
        found = heard(kind)
        assert ask(half, "/told/")[0] == 200
        assert wait_until(lambda: len(found.told) == 2)
        assert found.names() == ["slot_acquired", "slot_released"]
        (acquired,), (released,) = found.of("slot_acquired"), found.of("slot_released")
        assert isinstance(acquired.pop("request"), HttpRequest)
        policy = acquired.pop("policy")
        assert isinstance(policy, Policy)
        assert policy.name == "p"
        assert acquired == {"sender": Policy, "key": "global", "in_flight": 1, "limit": 5, "waited": 0.0}
        assert isinstance(released.pop("request"), HttpRequest)
        assert released.pop("policy") is policy
        assert released == {"sender": Policy, "key": "global", "limit": 5, "held": True}

    def test_a_rejection(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        """One for each violated policy, none for the others, and no slot."""
        closed = {"url_names": ["*"], "max_concurrent": 0}
        limits(table(open={"url_names": ["*"]}, p=closed, q=closed), middleware=[OURS])
        found = heard(kind)
        assert ask(half, "/told/")[0] == 429
        assert found.names() == ["request_rejected"] * 2
        for name, arguments in zip(["p", "q"], found.of("request_rejected"), strict=True):
            assert isinstance(arguments.pop("request"), HttpRequest)
            assert arguments.pop("policy").name == name
            assert arguments == {
                "sender": Policy,
                "key": "global",
                "in_flight": 0,
                "limit": 0,
                "reason": "full",
                "shadow": False,
            }

    def test_a_missing_key(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        limits(
            table(p={"url_names": ["*"], "key": "header:X-Api-Key", "missing": "reject"}),
            middleware=[OURS],
        )
        found = heard(kind)
        assert ask(half, "/told/")[0] == 429
        (arguments,) = found.of("request_rejected")
        assert (arguments["reason"], arguments["in_flight"], arguments["shadow"]) == ("key_missing", None, False)

    def test_a_shadow_policy(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        limits(table(p={"url_names": ["*"], "max_concurrent": 0, "block": False}), middleware=[OURS])
        found = heard(kind)
        assert ask(half, "/told/")[0] == 200
        (arguments,) = found.of("request_rejected")
        assert arguments["shadow"] is True
        assert (arguments["reason"], arguments["in_flight"], arguments["limit"]) == ("full", 0, 0)
        assert found.names() == ["request_rejected"]

    def test_a_store(
        self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard], stores: dict[str, Any]
    ) -> None:
        """Once when it begins to fail, once when it answers again, however many requests there are."""
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="allow")
        found = heard(kind)
        for down in (None, "down", "down", None, None, "down", None):
            Switchable.down = down
            assert wait_until(lambda down=down: down is not None or stores_work())
            assert ask(half, "/told/")[0] == 200
        assert wait_until(lambda: len(found.of("backend_failed")) == 4)  # by the probe's thread, behind its look
        told = found.of("backend_failed")
        assert [arguments["recovered"] for arguments in told] == [False, True, False, True]
        error = told[0].pop("error")
        assert isinstance(error, BackendError)
        assert told[0] == {"sender": Policy, "alias": "remote", "recovered": False}
        assert told[1] == {"sender": Policy, "alias": "remote", "error": None, "recovered": True}

    def test_a_slot_counted_here(
        self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard], stores: dict[str, Any]
    ) -> None:
        """`local` is a slot too; `unprotected` is none."""
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores)
        found = heard(kind)
        Switchable.down = "down"
        assert ask(half, "/told/")[0] == 200
        assert wait_until(lambda: sorted(found.names()) == ["backend_failed", "slot_acquired", "slot_released"])
        assert found.of("slot_acquired")[0]["in_flight"] == 1
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="allow")
        found.told.clear()
        assert ask(half, "/told/")[0] == 200
        assert found.names() == []

    def test_a_slot_whose_lease_had_ended(
        self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]
    ) -> None:
        limits(middleware=[])
        found = heard(kind)

        @concurrency_limit(key="global", max_concurrent=1, ttl=0.05, renew=False, name="brief")
        def view(request: HttpRequest) -> HttpResponse:
            sleep(0.1)
            return HttpResponse()

        @concurrency_limit(key="global", max_concurrent=1, ttl=0.05, renew=False, name="brief")
        async def aview(request: HttpRequest) -> HttpResponse:
            await asyncio.sleep(0.1)
            return HttpResponse()

        asked = _request()
        if half == "wsgi":
            view(asked)
        else:
            run_async(lambda: aview(asked))
        (released,) = found.of("slot_released")
        assert released["held"] is False
        assert nothing_held()

    def test_a_slot_evicted(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        """Somebody took it away meanwhile."""
        from django_concurrency_mw import conf
        from django_concurrency_mw.backends import get_backend

        limits(middleware=[])
        found = heard(kind)
        store = get_backend("default", conf.current().backends)

        def evict() -> None:
            for holder in snapshot_all():
                assert store.evict(holder.token)

        @concurrency_limit(key="global", max_concurrent=1, name="evicted")
        def view(request: HttpRequest) -> HttpResponse:
            evict()
            return HttpResponse()

        @concurrency_limit(key="global", max_concurrent=1, name="evicted")
        async def aview(request: HttpRequest) -> HttpResponse:
            evict()
            return HttpResponse()

        asked = _request()
        if half == "wsgi":
            view(asked)
        else:
            run_async(lambda: aview(asked))
        assert [arguments["held"] for arguments in found.of("slot_released")] == [False]

    def test_by_a_decorator(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        limits(middleware=[])
        found = heard(kind)
        assert ask(half, "/decorated/" if half == "wsgi" else "/adecorated/")[0] == 200
        assert wait_until(lambda: len(found.told) == 2)
        assert found.names() == ["slot_acquired", "slot_released"]
        assert found.of("slot_acquired")[0]["policy"].name.endswith("decorated")

    def test_of_a_view_that_raises(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        """What comes out is the view's own exception, also on an event loop with an asynchronous receiver."""
        limits(middleware=[])
        found = heard(kind)

        @concurrency_limit(key="global", max_concurrent=1, name="raises")
        def view(request: HttpRequest) -> HttpResponse:
            raise Deliberate("as it should")

        @concurrency_limit(key="global", max_concurrent=1, name="raises")
        async def aview(request: HttpRequest) -> HttpResponse:
            raise Deliberate("as it should")

        asked = _request()
        call = (lambda: view(asked)) if half == "wsgi" else (lambda: run_async(lambda: aview(asked)))
        with pytest.raises(Deliberate):
            call()
        assert found.names() == ["slot_acquired", "slot_released"]

    def test_of_an_early_release(self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]) -> None:
        """`request.concurrency.release()` in an async view cannot wait for anybody: they are told from a thread."""
        limits(middleware=[])
        found = heard(kind)
        seen: list[bool] = []

        @concurrency_limit(key="global", max_concurrent=1, name="early")
        def view(request: HttpRequest) -> HttpResponse:
            request.concurrency.release()  # type: ignore[attr-defined]
            seen.append(nothing_held())
            return HttpResponse()

        @concurrency_limit(key="global", max_concurrent=1, name="early")
        async def aview(request: HttpRequest) -> HttpResponse:
            request.concurrency.release()  # type: ignore[attr-defined]
            seen.append(nothing_held())
            assert await await_until(lambda: len(found.told) == 2)
            return HttpResponse()

        asked = _request()
        if half == "wsgi":
            view(asked)
        else:
            run_async(lambda: aview(asked))
        assert seen == [True]
        assert found.names() == ["slot_acquired", "slot_released"]


@both_halves
@both_kinds
class TestHarmless:
    @pytest.mark.parametrize("path", ["/told/", "/atold/", "/stream/", "/astream/", "/page/", "/fails/", "/afails/"])
    @pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
    def test_receivers_that_fail(
        self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard], path: str
    ) -> None:
        """The answer is the same, the slot is given back, and all were asked."""
        limits(table(p={"url_names": ["*"], "max_concurrent": 1}), middleware=[OURS])
        expected = ask(half, path)
        assert wait_until(nothing_held)
        gc.collect()

        def fail() -> None:
            raise Deliberate("a receiver")

        found = heard(kind, fail)
        logging.getLogger("django.dispatch").disabled = True
        try:
            for number in range(3):
                answer = ask(half, path)
                assert (answer[0], answer[2]) == (expected[0], expected[2])
                assert wait_until(nothing_held)
                wait_until(lambda number=number: len(found.told) == 2 * (number + 1))  # type: ignore[misc]
                assert len(found.told) == 2 * (number + 1), (number, found.names())
        finally:
            logging.getLogger("django.dispatch").disabled = False

    def test_receivers_that_fail_at_a_rejection(
        self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard]
    ) -> None:
        limits(table(p={"url_names": ["*"], "max_concurrent": 0}), middleware=[OURS])

        def fail() -> None:
            raise Deliberate("a receiver")

        found = heard(kind, fail)
        assert ask(half, "/told/")[0] == 429
        assert found.names() == ["request_rejected"]

    def test_a_store_that_fails(
        self, limits: Limits, half: str, kind: str, heard: Callable[..., Heard], stores: dict[str, Any]
    ) -> None:
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores)

        def fail() -> None:
            raise Deliberate("a receiver")

        found = heard(kind, fail)
        for down in ("down", None):
            Switchable.down = down
            assert ask(half, "/told/")[0] == 200
            assert wait_until(lambda down=down: down is not None or stores_work())
        assert wait_until(lambda: len(found.of("backend_failed")) == 2)
        assert wait_until(nothing_held)


@both_halves
def test_nothing_is_sent_when_nobody_listens(
    limits: Limits, half: str, monkeypatch: pytest.MonkeyPatch, stores: dict[str, Any]
) -> None:
    """No effect, and no trip to a thread for it."""
    sent: list[Any] = []

    async def anotify(effect: Any) -> None:
        sent.append(effect)

    monkeypatch.setitem(drivers._SYNC, Notify, sent.append)
    monkeypatch.setitem(drivers._ASYNC, Notify, anotify)
    closed = {"url_names": ["atold"], "max_concurrent": 0}
    limits(
        table(p=remote(), q=closed, r={**closed, "block": False}),
        middleware=[OURS],
        BACKENDS=stores,
        ON_BACKEND_ERROR="allow",
    )
    for down, path, status in [(None, "/told/", 200), ("down", "/told/", 200), (None, "/told/", 200)]:
        Switchable.down = down
        assert down is not None or wait_until(stores_work)
        assert ask(half, path)[0] == status
    assert ask(half, "/atold/")[0] == 429
    assert sent == []
    signals.slot_acquired.connect(_listener)
    try:
        assert ask(half, "/told/")[0] == 200
    finally:
        signals.slot_acquired.disconnect(_listener)
    assert len(sent) == 1


def _listener(**arguments: Any) -> None:
    raise AssertionError("is never called here")


def test_what_fails_around_the_receivers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in one of them, as when a process exits: that does not come out of a release either."""

    async def receiver(**arguments: Any) -> None:
        raise AssertionError("is never called here")

    def no_loop(*arguments: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr("django.dispatch.dispatcher.async_to_sync", no_loop)
    signals.slot_released.connect(receiver)
    try:
        assert signals.slot_released.send_robust(sender=Policy) == []
    finally:
        signals.slot_released.disconnect(receiver)
    assert "could not be called" in caplog.text


def test_entered(limits: Limits) -> None:
    """A receiver sees the slot held at `slot_acquired`, and not any more at `slot_released`."""
    limits(table(p={"url_names": ["*"]}), middleware=[OURS])
    seen: list[bool] = []

    def note(**arguments: Any) -> None:
        seen.append(nothing_held())

    signals.slot_acquired.connect(note)
    signals.slot_released.connect(note)
    try:
        ask("wsgi", "/told/")
    finally:
        signals.slot_acquired.disconnect(note)
        signals.slot_released.disconnect(note)
    assert seen == [False, True]
    switch.reset()


def _request() -> HttpRequest:
    from django.test import RequestFactory

    return RequestFactory().get("/")
