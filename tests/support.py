"""What many tests share: settings with limits of their own, middlewares that get in the way, and waiting for a fact."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.test import override_settings

from django_concurrency_mw import health
from django_concurrency_mw.backends.base import BaseBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot, Taken
from django_concurrency_mw.tokens import new_token

from .views import Deliberate, held, switch

OURS = "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"
#: The alias of a store that an earlier test has left failing: it may come back in any later one.
EARLIER = "of an earlier test"
_numbers = count()

Limits = Callable[..., Any]


def backend_entry(kind: str, request: pytest.FixtureRequest, prefix: str, folder: Path) -> dict[str, Any]:
    """An entry of BACKENDS for a store of this kind that no other test has."""
    options: dict[str, Any] = {}
    if kind == "redis":
        options = {"LOCATION": request.getfixturevalue("redis_server").url, "OPTIONS": {"socket_timeout": 5}}
    elif kind == "host":
        options = {"OPTIONS": {"path": str(folder / "table"), "slots": 256}}
    return {"BACKEND": kind, "KEY_PREFIX": prefix, **options}


def everything(limit: int = 5, **fields: Any) -> dict[str, Any]:
    """A table with one policy for every view, one bucket for everybody."""
    return {"policies": {"all": {"url_names": ["*"], "key": "global", "max_concurrent": limit, **fields}}}


@pytest.fixture
def limits() -> Iterator[Limits]:
    """Call it with a table (and other keys of CONCURRENCY_LIMIT): in force for the test, on a store of its own."""
    entered = []

    def use(table: Any = None, *, middleware: list[str] | None = None, **settings: Any) -> None:
        settings.setdefault("BACKENDS", {"default": {"BACKEND": "memory", "KEY_PREFIX": f"test-{next(_numbers)}"}})
        changed: dict[str, Any] = {"CONCURRENCY_LIMIT": {"POLICIES": table or {"policies": {}}, **settings}}
        if middleware is not None:
            changed["MIDDLEWARE"] = middleware
        override = override_settings(**changed)
        override.enable()
        entered.append(override)

    switch.reset()
    yield use
    switch.go.set()
    for override in reversed(entered):
        override.disable()


#: Seconds that a fact is waited for which is to come: far more than it takes, as a busy machine may be far slower.
SOON = 30.0


def wait_until(fact: Callable[[], bool], seconds: float = SOON) -> bool:
    """Is it true within that time?"""
    end = monotonic() + seconds
    while not fact():
        if monotonic() > end:
            return False
        sleep(0.005)
    return True


async def await_until(fact: Callable[[], bool], seconds: float = SOON) -> bool:
    """Is it true within that time? For event loops."""
    end = monotonic() + seconds
    while not fact():
        if monotonic() > end:
            return False
        await asyncio.sleep(0.005)
    return True


def exit_code(pid: int) -> int:
    """Of a forked child; one that hangs is killed."""
    ended: list[int] = []

    def has_ended() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended.append(os.waitstatus_to_exitcode(status))
        return bool(done)

    if not wait_until(has_ended, 2 * SOON):  # it may itself wait for something
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError("the child hangs")
    return ended[0]


def nothing_held() -> bool:
    return held() == []


class _Middleware:
    """Sync and async, and told what to do by its subclass."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        if self.is_async:
            return self._acall(request)
        return self.after(self.get_response(request))

    async def _acall(self, request: HttpRequest) -> Any:
        return self.after(await self.get_response(request))

    def after(self, response: Any) -> Any:
        return response


class Raises(_Middleware):
    """Raises when it has the response."""

    def after(self, response: Any) -> Any:
        raise Deliberate("an outer middleware")


class Replaces(_Middleware):
    """Drops the response, unclosed, as ConditionalGetMiddleware does, and sends another one."""

    def after(self, response: Any) -> Any:
        return HttpResponse("instead")


class ViewHookReturns(_Middleware):
    """Answers in process_view, so that the view is skipped."""

    def process_view(self, request: HttpRequest, *args: Any) -> HttpResponse:
        return HttpResponse("from a hook")


class ViewHookRaises(_Middleware):
    """Raises in process_view, so that the view is skipped."""

    def process_view(self, request: HttpRequest, *args: Any) -> HttpResponse:
        raise Deliberate("in a hook")


class SyncOnly:
    """What forces the middlewares outside it into a thread under ASGI."""

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)


def named(cls: type) -> str:
    """A class as MIDDLEWARE names it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def run_async(main: Callable[[], Awaitable[Any]]) -> Any:
    """A coroutine function on an event loop of its own."""

    async def whole() -> Any:
        return await main()

    return asyncio.run(whole())


def stores_work() -> bool:
    """Is no store left alone as one that failed?"""
    from django_concurrency_mw import backends

    return all(store.failure is None for store in backends._instances.values())


def works_again(store: Any, seconds: float = SOON) -> bool:
    """Is it left alone no more within that time? Then all that is said of it is said."""
    if not wait_until(lambda: store.failure is None, seconds):
        return False
    if (probe := health._probes.get(store)) is not None:
        probe.join(seconds)
    return True


def works(store: BaseBackend, half: str = "both") -> None:
    """A slot can be taken and given back there, in threads, on a loop, or in both halves."""
    one = Slot("p", make_key("k"), 100, 60.0, new_token())
    if half != "loop":
        assert isinstance(store.take([one]), Taken)
        store.give([one])

    async def main() -> None:
        assert isinstance(await store.atake([one]), Taken)
        await store.agive([one])

    if half != "threads":
        asyncio.run(main())
