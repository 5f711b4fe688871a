"""Django REST framework: the table's policies, taken where the user is known.

DRF authenticates inside the view, so in the middleware the user of a token is anonymous. A view with this throttle is left
alone by the middleware's table; the throttle takes the same policies after authentication and permissions, in one round
trip, and the slots are given back with all the others at the response's true end.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from django.http.response import HttpResponseBase
from rest_framework import status
from rest_framework.exceptions import APIException
from rest_framework.throttling import BaseThrottle

from . import conf
from .drivers import run
from .keeper import keeper
from .lifetime import finish
from .limiter import conclude, decide, join, leave, policies_of
from .outcomes import NOT_LIMITED, LimitField
from .rejection import add_fields, texts

if TYPE_CHECKING:
    from rest_framework.request import Request
    from rest_framework.views import APIView

    from .lease import Lease
    from .outcomes import Rejection
    from .policies import Policy


class ServiceBusy(APIException):
    """A rejection by a policy that says `status: 503`, or by a store that fails under `deny`.

    `wait` is in seconds, for Retry-After; None where waiting cannot help.
    """

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "busy"

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(texts(rejection)[1])
        self.wait = rejection.retry_after


class ConcurrencyThrottle(BaseThrottle):
    """Put it into `throttle_classes` of a view, or into DEFAULT_THROTTLE_CLASSES.

    A rejection is DRF's own `Throttled`, a 429 whose body and headers follow the project's exception handler; a policy with
    `status: 503` raises `ServiceBusy`. `response_callback` does not apply. The middleware does not see `get_throttles()`.
    """

    #: What the middleware looks for, without importing DRF.
    takes_concurrency_policies = True

    def __init__(self) -> None:
        self._rejection: Rejection | None = None

    def allow_request(self, request: Request, view: APIView) -> bool:
        """Take the slots of all the table's policies for this view, or of none."""
        django_request, config = request._request, conf.current()
        if not hasattr(django_request, "concurrency"):  # no middleware put it there
            django_request.concurrency = NOT_LIMITED  # type: ignore[attr-defined]  # ours to set
        match = django_request.resolver_match
        policies = policies_of(django_request, None if match is None else match.func, config)
        if match is None or not policies:
            return True
        if any(map(_may_ask_for_user, policies)):
            _ = request.user  # known by now, but where the project makes DRF authenticate on first use
        lease, shares = join(django_request)
        ending = _Ending(view, django_request, lease, shares=shares)
        verdict = run(decide(django_request, lease, policies, match.kwargs, config))
        self._rejection = None if verdict is None else verdict.concurrency.rejection
        if verdict is None or self._rejection is None:
            return True
        ending.rejected(lease.fields + verdict.fields)
        if self._rejection.status == ServiceBusy.status_code:
            raise ServiceBusy(self._rejection)
        return False

    def wait(self) -> float | None:
        """Seconds for Retry-After, None where waiting cannot help."""
        return None if self._rejection is None else self._rejection.retry_after


def _may_ask_for_user(policy: Policy) -> bool:
    callables = [one for one in (policy.max_concurrent, policy.cost) if one is not None and not isinstance(one, int)]
    return bool(
        policy.key.needs_user
        or policy.key.kind == "callable"
        or policy.when is not None
        or policy.except_users
        or callables
    )


class _Ending:
    """The end of one call of a view: `finalize_response` sees every response that DRF makes, and `handle_exception` every
    exception. Both are replaced on the instance, which serves one request. `shares`: the lease's end is ours to see
    to, or that of others who share in it.
    """

    def __init__(self, view: Any, request: Any, lease: Lease, *, shares: bool) -> None:
        self._request, self._lease, self._shares = request, lease, shares
        self._fields: tuple[LimitField, ...] | None = None
        self._finalize, self._handle = view.finalize_response, view.handle_exception
        view.finalize_response = self._finalize_response
        if shares:
            view.handle_exception = self._handle_exception
            # DRF lets SystemExit and the like through: then nothing but the view's own end is left.
            self._unfinished = weakref.finalize(view, keeper.abandon, lease)
            self._unfinished.atexit = False
            keeper.ready()

    def rejected(self, fields: tuple[LimitField, ...]) -> None:
        """The response will be a rejection, with these header fields."""
        self._fields = fields

    def _handle_exception(self, error: Exception) -> HttpResponseBase:
        try:
            return self._handle(error)  # type: ignore[no-any-return]  # the view is Any: its methods are replaced
        except BaseException:
            self._abort()
            raise

    def _abort(self) -> None:
        if self._shares and leave(self._request, self._lease):
            self._lease.release()

    def _finalize_response(self, request: Any, response: Any, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            final: HttpResponseBase = self._finalize(request, response, *args, **kwargs)
        except BaseException:
            self._abort()
            raise
        config = conf.current()
        # The project may let a throttled request through after all.
        if self._fields is not None and final.status_code >= 400:
            final.headers.setdefault("Cache-Control", "no-store")
            if config.headers != "never":
                add_fields(final, self._fields)
            # Django would log it to django.request: one line per rejection, and for a 503 a mail to ADMINS each.
            final._has_been_logged = True  # type: ignore[attr-defined]  # Django's own mark
        if self._shares and leave(self._request, self._lease):
            lease = self._lease
            conclude(self._request, final, lease)
            finish(lease, final)
            if lease and getattr(final, "is_rendered", True) is False:
                _release_if_rendering_fails(lease, final)
        if self._shares:
            # From here on the response has the lease, or another who shares in it, and may outlive the view.
            self._unfinished.detach()
        return final


def _release_if_rendering_fails(lease: Lease, response: Any) -> None:
    """View and response refer to each other in DRF, so the end of a broken one would be the garbage collector's to find."""

    def render() -> HttpResponseBase:
        del response.render
        try:
            return response.render()  # type: ignore[no-any-return]  # any kind of response that renders
        except BaseException:
            lease.release()
            raise

    response.render = render
