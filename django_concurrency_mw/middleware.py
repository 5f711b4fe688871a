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
from .limiter import LEASE, MARK, abort, admit, conclude, take_lease
from .outcomes import NOT_LIMITED
from .policies import Policy

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
        _begin(request)
        try:
            response: HttpResponseBase = self.get_response(request)
        except BaseException:
            abort(request)
            raise
        if vars(request).get(LEASE) is not None:
            finish(conclude(request, response, conf.current()), response)
        return response

    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        _begin(request)
        try:
            response: HttpResponseBase = await self.get_response(request)
        except asyncio.CancelledError:
            await release_cancelled(take_lease(request))
            raise
        except BaseException:
            abort(request)
            raise
        if vars(request).get(LEASE) is not None:
            await afinish(conclude(request, response, conf.current()), response)
        return response

    def sync_process_view(
        self, request: HttpRequest, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        config = conf.current()
        policies = _policies(request, view, config)
        return run(admit(request, policies, kwargs, config)) if policies else None

    async def aprocess_view(
        self, request: HttpRequest, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        config = conf.current()
        policies = _policies(request, view, config)
        return await arun(admit(request, policies, kwargs, config)) if policies else None


def _begin(request: HttpRequest) -> None:
    request.concurrency = NOT_LIMITED  # type: ignore[attr-defined]  # ours to set
    setattr(request, LEASE, None)  # a lease that is made from here on is ours to give back


def _policies(request: HttpRequest, view: Callable[..., Any], config: conf.Config) -> tuple[Policy, ...]:
    """The table's policies for this view, without those that a mark on the view replaces."""
    match = request.resolver_match
    if not config.enabled or match is None:
        return ()
    policies = config.table.match(match.view_name, request.method or "")
    if policies and getattr(view, MARK, False):
        return tuple(policy for policy in policies if not policy.overridable)
    return policies
