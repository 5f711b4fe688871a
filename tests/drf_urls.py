"""The views of Django REST framework that its tests ask: every way to put the throttle there, and every end of a response."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, ClassVar

from django.contrib.auth.models import User
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import include, path
from django.utils.decorators import method_decorator
from rest_framework.authentication import SessionAuthentication, TokenAuthentication
from rest_framework.decorators import (
    action,
    api_view,
    authentication_classes,
    permission_classes,
    renderer_classes,
    throttle_classes,
)
from rest_framework.exceptions import NotFound
from rest_framework.permissions import IsAuthenticated
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from django_concurrency_mw import concurrency_limit, concurrency_limit_exempt
from django_concurrency_mw.drf import ConcurrencyThrottle

from .views import Deliberate, switch


def told(request: Request) -> dict[str, Any]:
    """What the request was told of its limits."""
    switch.gate(0)
    concurrency = request.concurrency
    return {
        "limited": concurrency.limited,
        "policies": [[p.policy, p.key, p.state, p.in_flight, p.limit] for p in concurrency.policies],
    }


class Base(APIView):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (IsAuthenticated,)

    def get(self, request: Request, **kwargs: Any) -> Response:
        return Response(told(request))


# -- the throttle, in every place ---------------------------------------------------------------------------------


class Throttled(Base):
    throttle_classes = (ConcurrencyThrottle,)


@api_view(["GET"])
@authentication_classes([TokenAuthentication])
@throttle_classes([ConcurrencyThrottle])
def function(request: Request) -> Response:
    return Response(told(request))


class Reports(ViewSet):
    authentication_classes = (TokenAuthentication,)
    throttle_classes = (ConcurrencyThrottle,)

    def list(self, request: Request) -> Response:
        return Response(told(request))

    @action(detail=False, throttle_classes=[])
    def free(self, request: Request) -> Response:
        return Response(told(request))


class Exports(ViewSet):
    authentication_classes = (TokenAuthentication,)

    @action(detail=False, throttle_classes=[ConcurrencyThrottle])
    def run(self, request: Request) -> Response:
        return Response(told(request))

    def list(self, request: Request) -> Response:
        return Response(told(request))


class Hidden(Throttled):
    def get_throttles(self) -> list[Any]:
        return super().get_throttles()


class HiddenFree(Base):
    def get_throttles(self) -> list[Any]:
        return super().get_throttles()


class SessionsOnly(Base):
    authentication_classes = (SessionAuthentication,)


# -- the ends of a response ---------------------------------------------------------------------------------------


class Watching(JSONRenderer):
    """Passes gate 1 as it renders."""

    def render(self, data: Any, *args: Any, **kwargs: Any) -> bytes:
        switch.gate(1)
        return super().render(data, *args, **kwargs)


class Broken(JSONRenderer):
    def render(self, data: Any, *args: Any, **kwargs: Any) -> bytes:
        switch.gate(1)
        raise Deliberate("in the renderer")


class Rendered(Throttled):
    renderer_classes = (Watching,)


class RendererFails(Throttled):
    renderer_classes = (Broken,)


class Plain(Throttled):
    def get(self, request: Request) -> HttpResponse:
        switch.gate(0)
        return HttpResponse("plain")


def chunks(fail: bool) -> Iterator[bytes]:
    switch.gate(0)
    yield b"one "
    gc.collect()  # the view is gone by now, and its slot must not go with it
    switch.gate(1)
    if fail:
        raise Deliberate("mid-stream")
    yield b"two"


class Stream(Throttled):
    def get(self, request: Request) -> StreamingHttpResponse:
        return StreamingHttpResponse(chunks("fail" in request.GET))


class Raises(Throttled):
    """What the exception handler of DRF knows, what it does not know, and what is no exception of its kind."""

    errors: ClassVar[dict[str, BaseException]] = {
        "known": NotFound(),
        "unknown": Deliberate("as it should"),
        "exit": SystemExit("a worker's timeout"),
    }

    def get(self, request: Request) -> Response:
        switch.gate(0)
        raise self.errors[request.GET["error"]]


class FinalizeRaises(Throttled):
    def finalize_response(self, *args: Any, **kwargs: Any) -> Any:
        switch.gate(0)
        raise Deliberate("in finalize_response")


class NoMore(BaseThrottle):
    def allow_request(self, request: Request, view: APIView) -> bool:
        switch.gate(0)
        return False

    def wait(self) -> float:
        return 60.0


class Fails(BaseThrottle):
    def allow_request(self, request: Request, view: APIView) -> bool:
        switch.gate(0)
        raise Deliberate("in a throttle")


class Another(Throttled):
    throttle_classes = (ConcurrencyThrottle, NoMore)


class AnotherFails(Throttled):
    throttle_classes = (ConcurrencyThrottle, Fails)


class Twice(Throttled):
    throttle_classes = (ConcurrencyThrottle, ConcurrencyThrottle)


class Atomic(Throttled):
    def get(self, request: Request) -> Response:
        User.objects.create_user("made-inside")
        if "fail" in request.GET:
            raise NotFound
        return Response(told(request))


class LazyThrottled(Throttled):
    permission_classes = ()

    def perform_authentication(self, request: Request) -> None:
        pass


# -- the decorator ------------------------------------------------------------------------------------------------

by_user = concurrency_limit(key="user", max_concurrent=1)


class Method(Base):
    @by_user
    def get(self, request: Request) -> Response:
        return Response(told(request))


class MethodDecorator(Base):
    @method_decorator(by_user)
    def get(self, request: Request) -> Response:
        return Response(told(request))


@method_decorator(by_user, name="dispatch")
class Dispatch(Base):
    pass


@api_view(["GET"])
@authentication_classes([TokenAuthentication])
@renderer_classes([Watching])
@by_user
def below(request: Request) -> Response:
    return Response(told(request))


@by_user
@api_view(["GET"])
@authentication_classes([TokenAuthentication])
@permission_classes([IsAuthenticated])
def above(request: Request) -> Response:
    return Response(told(request))


class Actions(ViewSet):
    authentication_classes = (TokenAuthentication,)

    @by_user
    def list(self, request: Request) -> Response:
        return Response(told(request))

    @action(detail=False)
    @by_user
    def inside(self, request: Request) -> Response:
        return Response(told(request))

    @by_user
    @action(detail=False)
    def outside(self, request: Request) -> Response:
        return Response(told(request))


@concurrency_limit_exempt
@api_view(["GET"])
@authentication_classes([TokenAuthentication])
@throttle_classes([ConcurrencyThrottle])
def exempt(request: Request) -> Response:
    return Response(told(request))


router = SimpleRouter()
router.register("reports", Reports, basename="reports")
router.register("exports", Exports, basename="exports")
router.register("actions", Actions, basename="actions")

urlpatterns = [
    path("throttled/", Throttled.as_view(), name="throttled"),
    path("throttled/<str:pk>/", Throttled.as_view(), name="throttled-pk"),
    path("function/", function, name="function"),
    path("given/", Base.as_view(throttle_classes=[ConcurrencyThrottle]), name="given"),
    path("bare/", Base.as_view(), name="bare"),
    path("sessions/", SessionsOnly.as_view(), name="sessions"),
    path("hidden/", Hidden.as_view(), name="hidden"),
    path("hidden-free/", HiddenFree.as_view(), name="hidden-free"),
    path("rendered/", Rendered.as_view(), name="rendered"),
    path("renderer-fails/", RendererFails.as_view(), name="renderer-fails"),
    path("plain/", Plain.as_view(), name="plain"),
    path("stream/", Stream.as_view(), name="stream"),
    path("raises/", Raises.as_view(), name="raises"),
    path("finalize-raises/", FinalizeRaises.as_view(), name="finalize-raises"),
    path("another/", Another.as_view(), name="another"),
    path("another-fails/", AnotherFails.as_view(), name="another-fails"),
    path("twice/", Twice.as_view(), name="twice"),
    path("atomic/", Atomic.as_view(), name="atomic"),
    path("lazy/", LazyThrottled.as_view(), name="lazy"),
    path("exempt/", exempt, name="exempt"),
    path("method/", Method.as_view(), name="method"),
    path("method-decorator/", MethodDecorator.as_view(), name="method-decorator"),
    path("dispatch/", Dispatch.as_view(), name="dispatch"),
    path("below/", below, name="below"),
    path("above/", above, name="above"),
    path("v1/", include((router.urls, "api"), namespace="v1")),
]
