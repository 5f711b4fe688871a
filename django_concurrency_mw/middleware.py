"""The middleware: asks the table before the view, and owns the slots until the response is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http.response import HttpResponseBase

from . import conf
from .admission import aadmit, admit
from .lifetime import ENDED, afinish, finish, release_cancelled
from .limiter import LEASE, begin, conclude, end, join, policies_of
from .outcomes import NOT_LIMITED
from .routes import innermost

if TYPE_CHECKING:
    from django.http import HttpRequest

    from .policies import Policy

#: What MIDDLEWARE calls it.
MIDDLEWARE = "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"


class ConcurrencyLimitMiddleware:
    """Put it last in MIDDLEWARE: what the others reject then takes no slot.

    Raises, when the server starts: ConfigurationError with everything that is wrong with CONCURRENCY_LIMIT.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        conf.prepare()
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
        # `begin` and `end` by hand: of a view without a policy the calls would be a third of the cost.
        request.concurrency = NOT_LIMITED  # type: ignore[attr-defined]  # ours to set
        request._concurrency_lease = None  # type: ignore[attr-defined]
        try:
            response: HttpResponseBase = self.get_response(request)
        except BaseException:
            _abort(request)
            raise
        request._concurrency_ended = True  # type: ignore[attr-defined]
        if getattr(request, LEASE, None) is not None and (lease := request.__dict__.pop(LEASE, None)) is not None:
            if lease.tells:
                conclude(request, response, lease)
            if type(response) in ENDED:  # as nearly always
                lease.release()
            else:
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
        request._concurrency_ended = True  # type: ignore[attr-defined]
        if getattr(request, LEASE, None) is not None and (lease := request.__dict__.pop(LEASE, None)) is not None:
            if lease.tells:
                conclude(request, response, lease)
            if type(response) not in ENDED:
                await afinish(lease, response)
            elif (rest := lease.released()) is not None:
                await rest
        return response

    def sync_process_view(
        self, request: HttpRequest, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        config = conf.current()
        match = request.resolver_match
        known = None if match is None else config.table.known.get(match.view_name)
        if known is not None and not known:  # as nearly always: no policy matches, whatever the method
            return None
        policies = _policies(request, view, config, known)
        return admit(request, join(request)[0], policies, kwargs, config) if policies else None

    async def aprocess_view(
        self, request: HttpRequest, view: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponseBase | None:
        config = conf.current()
        match = request.resolver_match
        known = None if match is None else config.table.known.get(match.view_name)
        if known is not None and not known:
            return None
        policies = _policies(request, view, config, known)
        return await aadmit(request, join(request)[0], policies, kwargs, config) if policies else None


def _abort(request: HttpRequest) -> None:
    """What ended the request is nothing that Django turns into a response: SystemExit, KeyboardInterrupt, a closed
    coroutine. Nothing can be awaited here."""
    lease = end(request)
    if lease is not None:
        lease.release()


def _policies(
    request: HttpRequest, view: Callable[..., Any], config: conf.Config, known: Mapping[str, tuple[Policy, ...]] | None
) -> tuple[Policy, ...]:
    """What is to be taken here: nothing where the view's own throttle takes it. `known`: see `PolicyTable`."""
    if (
        known and type(view) is FunctionType and not view.__dict__ and config.enabled
    ):  # nothing marks it; it is of no class
        found = known.get(request.method or "")
        if found is not None:
            return found
    policies = policies_of(request, view, config)
    return () if policies and throttles_itself(view) else policies


def is_ours(cls: type) -> bool:
    """Is this our middleware, or a subclass of it?"""
    return issubclass(cls, ConcurrencyLimitMiddleware)


def authenticates_itself(view: Any) -> bool:
    """Is this a view of Django REST framework that knows users whom Django's own session does not, such as those of tokens?"""
    inner = innermost(view)
    given = getattr(inner, "initkwargs", None) or {}
    classes = given.get("authentication_classes", getattr(getattr(inner, "cls", None), "authentication_classes", None))
    if classes is None:
        return False
    from rest_framework.authentication import SessionAuthentication

    return not all(isinstance(found, type) and issubclass(found, SessionAuthentication) for found in classes)


def throttles_itself(view: Any) -> bool:
    """Is this a view of Django REST framework with our throttle? It takes the table's policies when it knows the user."""
    inner = innermost(view)
    cls = getattr(inner, "cls", None)
    if cls is None:
        return False
    given = getattr(inner, "initkwargs", None) or {}  # of as_view(), where @action(throttle_classes=...) goes too
    throttles = given.get("throttle_classes", getattr(cls, "throttle_classes", None))
    return any(getattr(throttle, "takes_concurrency_policies", False) for throttle in throttles or ())
