"""The middleware: asks the table before the view, and owns the slots until the response is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http.response import HttpResponseBase

from . import conf
from .drivers import arun, run
from .lifetime import afinish, finish, release_cancelled
from .limiter import admit, begin, conclude, end, join, policies_of

if TYPE_CHECKING:
    from django.http import HttpRequest


class ConcurrencyLimitMiddleware:
    """Put it last in MIDDLEWARE: what the others reject then takes no slot.

    Raises, when the server starts: ConfigurationError with everything that is wrong with CONCURRENCY_LIMIT.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        conf.current()
        # Django adapts process_view to the handler's mode and __call__ to get_response's: both have to be of one kind.
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)
            self.process_view: Callable[..., Any] = self.aprocess_view
        else:
            self.process_view = self.sync_process_view

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self.is_async:
            return self.__acall__(request)
        begin(request)
        try:
            response: HttpResponseBase = self.get_response(request)
        except BaseException:
            _abort(request)
            raise
        lease = end(request)
        if lease is not None:
            conclude(request, response, lease)
            finish(lease, response)
        return response

    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        begin(request)
        try:
            response: HttpResponseBase = await self.get_response(request)
        except asyncio.CancelledError:
            lease = end(request)
            if lease is not None:
                await release_cancelled(lease)
            raise
        except BaseException:
            _abort(request)
            raise
        lease = end(request)
        if lease is not None:
            conclude(request, response, lease)
            await afinish(lease, response)
        return response

    def sync_process_view(
        self, request: HttpRequest, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        config = conf.current()
        policies = policies_of(request, view, config)
        return run(admit(request, join(request)[0], policies, kwargs, config)) if policies else None

    async def aprocess_view(
        self, request: HttpRequest, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        config = conf.current()
        policies = policies_of(request, view, config)
        return await arun(admit(request, join(request)[0], policies, kwargs, config)) if policies else None


def _abort(request: HttpRequest) -> None:
    """What ended the request is nothing that Django turns into a response: SystemExit, KeyboardInterrupt, a closed
    coroutine. Nothing can be awaited here."""
    lease = end(request)
    if lease is not None:
        lease.release()
