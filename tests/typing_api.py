"""The public face as a type checker sees it: checked by `mypy --strict`, never run.

Each `assert_type` fails the check if a decorator loses the type of what it decorates.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils.decorators import method_decorator
from django.views import View

from django_concurrency_mw import (
    Concurrency,
    ConcurrencyLimitExceeded,
    PolicyResult,
    Rejection,
    concurrency_limit,
    concurrency_limit_exempt,
    hold,
)
from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.signals import slot_acquired


@concurrency_limit(key="user", max_concurrent=5)
def view(request: HttpRequest, pk: int) -> JsonResponse:
    return JsonResponse({})


def _view(request: HttpRequest) -> None:
    assert_type(view(request, 1), JsonResponse)
    assert_type(view(request, pk=1), JsonResponse)
    view(request, "one")  # type: ignore[arg-type]
    view(request, 1, 2)  # type: ignore[call-arg]


@concurrency_limit("ip", 5, "5m", "default", False, "shop.limits.busy")
async def aview(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


async def _aview(request: HttpRequest) -> None:
    coroutine = assert_type(aview(request), Coroutine[Any, Any, HttpResponse])
    assert_type(await coroutine, HttpResponse)


def key(request: HttpRequest) -> str:
    return "all"


async def akey(request: HttpRequest) -> str | None:
    return None


def busy(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status=429)


def limit_of(request: HttpRequest) -> int | None:
    return 5 if request.method == "POST" else None


async def cost_of(request: HttpRequest) -> int:
    return 2


def outside() -> str:
    with hold("report-exports", key="user:42", max_concurrent=None, cost=2) as held:
        return held.hand_over()


async def claims(token: str) -> bool:
    async with hold(token) as held:
        return held.limited


by_callables: Callable[[Callable[[HttpRequest], HttpResponse]], Callable[[HttpRequest], HttpResponse]]
by_callables = concurrency_limit(key=key, max_concurrent=1, response_callback=busy)
by_callables = concurrency_limit(key=akey, max_concurrent=1, methods=["POST"], when="staff", status=503, renew=False)
by_callables = concurrency_limit(policy="report-exports", ttl=60.5, wait="2s", max_waiting=10)
wrong_key = concurrency_limit(key=5, max_concurrent=1)  # type: ignore[arg-type]
by_callables = concurrency_limit(key="ip", max_concurrent=limit_of, cost=cost_of, per_key={"ip:::1": None})
wrong_limit = concurrency_limit(key="ip", max_concurrent=5.0)  # type: ignore[arg-type]
wrong_name = concurrency_limit(key="ip", max_concurrent=5, name=5)  # type: ignore[arg-type]


@method_decorator(concurrency_limit(key="ip", max_concurrent=3), name="dispatch")
class OnClass(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


assert_type(OnClass(), OnClass)


class OnMethod(View):
    @concurrency_limit(key="ip", max_concurrent=3)
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    @concurrency_limit_exempt
    async def post(self, request: HttpRequest) -> JsonResponse:
        return JsonResponse({})


async def _methods(request: HttpRequest) -> None:
    assert_type(OnMethod().get(request), HttpResponse)
    assert_type(await OnMethod().post(request), JsonResponse)


@concurrency_limit_exempt
def exempt(request: HttpRequest, *, option: bool = False) -> HttpResponse:
    return HttpResponse()


def _exempt(request: HttpRequest) -> None:
    assert_type(exempt(request, option=True), HttpResponse)
    exempt(request, option="yes")  # type: ignore[arg-type]


limited_as_view = concurrency_limit(key="ip", max_concurrent=1)(OnClass.as_view())


def told(concurrency: Concurrency, error: ConcurrencyLimitExceeded) -> None:
    assert_type(concurrency.limited, bool)
    assert_type(concurrency.policies, tuple[PolicyResult, ...])
    assert_type(concurrency.rejection, Rejection | None)
    assert_type(concurrency.waited, float)
    assert_type(concurrency.policies[0].in_flight, int | None)
    assert_type(error.rejection, Rejection)
    concurrency.release()
    concurrency.limited = True  # type: ignore[misc]


def receiver(sender: object, **arguments: object) -> None:
    """Connected below."""


slot_acquired.connect(receiver)


def config(backend: BaseBackend) -> None:
    assert_type(backend.config, BackendConfig)
