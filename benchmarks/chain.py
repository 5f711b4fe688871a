"""One middleware by itself, as Django calls it around a view that does nothing.

What a middleware adds that has nothing to do, a microsecond or two, would be lost in the noise of a whole handler.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.exception import convert_exception_to_response
from django.core.handlers.wsgi import WSGIRequest
from django.http import HttpResponse
from django.urls import resolve

from .handlers import environ, scope
from .room import Awork, Work
from .site import alone, atoo_many, too_many


class EmptyMiddleware:
    """What any middleware with `process_view` costs that has nothing to do, in either mode and without a hop between them."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[..., Any]) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)
            self.process_view: Callable[..., Any] = self.aprocess_view
        else:
            self.process_view = self.sync_process_view

    def __call__(self, request: Any) -> Any:
        return self.acall(request) if self.is_async else self.get_response(request)

    async def acall(self, request: Any) -> Any:
        return await self.get_response(request)

    def sync_process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> Any:
        return None

    async def aprocess_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> Any:
        return None


def chain(middleware: Any) -> Work:
    """`middleware` is a class, or None for nothing but the view."""
    answer, view, request = HttpResponse("ok"), too_many, WSGIRequest(environ("/bare/"))
    request.resolver_match = resolve("/bare/", alone("bare"))
    made: list[Any] = []

    def inner(request: Any) -> Any:
        for one in made:
            one(request, view, (), {})
        return answer

    respond = convert_exception_to_response(inner)
    if middleware is not None:
        instance = middleware(respond)
        made.append(instance.process_view)
        respond = convert_exception_to_response(instance)

    def work(calls: int) -> None:
        for _ in range(calls):
            respond(request)

    return work


def achain(middleware: Any) -> Awork:
    """The same on an event loop."""
    answer, view, request = HttpResponse("ok"), atoo_many, ASGIRequest(scope("/bare/"), BytesIO())
    request.resolver_match = resolve("/bare/", alone("bare"))
    made: list[Any] = []

    async def inner(request: Any) -> Any:
        for one in made:
            await one(request, view, (), {})
        return answer

    respond = convert_exception_to_response(inner)
    if middleware is not None:
        instance = middleware(respond)
        made.append(instance.process_view)
        respond = convert_exception_to_response(instance)

    async def work(calls: int) -> None:
        for _ in range(calls):
            await respond(request)  # type: ignore[misc]  # a coroutine function's, too

    return work
