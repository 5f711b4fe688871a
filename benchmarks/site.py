"""The views: the same answer bare, with our decorator, with that of django-smart-ratelimit, each sync and async.

A view's URL name says what is around it; a name with `-mw-` is for the middleware's table. Paths of asynchronous ones begin
with `a-`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path

from django_concurrency_mw import concurrency_limit

from . import floor, peer
from .policies import AMPLE, HOLDERS, held_name
from .settings import REDIS

if TYPE_CHECKING:
    from .room import Awork

View = Callable[..., Any]
Around = Callable[[View], View]


def plain() -> View:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("ok")

    return view


def aplain() -> View:
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("ok")

    return view


def too_many(request: HttpRequest) -> HttpResponse:
    return HttpResponse("no", status=429)


async def atoo_many(request: HttpRequest) -> HttpResponse:
    return HttpResponse("no", status=429)


def ours(name: str, store: str, times: int = 1, key: str = "ip", **more: Any) -> Around:
    """So many limits, one around the other."""

    def around(view: View) -> View:
        for number in range(times):
            view = concurrency_limit(key, AMPLE, backend=store, name=f"on-view-{name}-{number}", **more)(view)
        return view

    return around


def as_it_is(view: View) -> View:
    return view


def between_two_trips(view: View) -> View:
    """The two raw round trips of each request, in a view."""
    if iscoroutinefunction(view):
        clients: dict[asyncio.AbstractEventLoop, Awork] = {}

        async def aview(request: HttpRequest) -> Any:
            loop = asyncio.get_running_loop()
            awork = clients.get(loop)
            if awork is None:  # its connections are of one loop
                awork = clients[loop] = floor.araw2(REDIS)
            await awork(1)
            return await view(request)

        return aview
    work = floor.raw2(REDIS)

    def sync_view(request: HttpRequest) -> Any:
        work(1)
        return view(request)

    return sync_view


def _views() -> dict[str, Around]:
    found: dict[str, Around] = {"bare": as_it_is, "rejected": as_it_is}
    for store in settings.CONCURRENCY_LIMIT["BACKENDS"]:
        if store == "default":
            continue
        for times in (1, 3):
            found[f"{store}-mw-{times}"] = as_it_is
            found[f"{store}-view-{times}"] = ours(f"{store}-{times}", store, times)
        for holders in HOLDERS:
            name = held_name(store, holders)
            found[name] = ours(name, store, ttl=3600)
        if peer.limit is not None and store in peer.STORES:
            found[f"{store}-peer"] = peer.limit(key="ip", max_concurrent=AMPLE, backend=store)
    if REDIS:
        found["redis-raw2"] = between_two_trips
    found["memory-view-global"] = ours("memory-global", "memory", key="global")
    if peer.limit is not None:
        found["memory-peer-global"] = peer.limit(key="everybody", max_concurrent=AMPLE, backend="memory")
    return found


def _routes() -> dict[str, Any]:
    made = {"too-many": path("too-many/", too_many, name="too-many"), "a-too-many": path("a-too-many/", atoo_many)}
    for name, around in _views().items():
        made[name] = path(f"{name}/", around(plain()), name=name)
        # The table knows a view by its name alone, so the asynchronous one has the same.
        made[f"a-{name}"] = path(f"a-{name}/", around(aplain()), name=name)
    return made


#: The beginning of a path -> its route.
ROUTES = _routes()
urlpatterns = list(ROUTES.values())


def alone(name: str) -> Any:
    """A URL configuration with one route, so that every view is found as fast as every other one."""
    return (ROUTES[name],)
