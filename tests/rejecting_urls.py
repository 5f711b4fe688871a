"""Views that are full, and views whose answers must not be touched."""

from __future__ import annotations

import asyncio

from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import path
from django.views.decorators.cache import cache_control, cache_page

from django_concurrency_mw import concurrency_limit


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine")


async def aview(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine")


def redirect(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/view/")


def dated(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine", headers={"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"})


def expires(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine", headers={"Expires": "Wed, 21 Oct 2065 07:28:00 GMT"})


@concurrency_limit(key="global", max_concurrent=0, name="decorator")
def closed_by_decorator(request: HttpRequest) -> HttpResponse:
    raise AssertionError("nobody is let in")


@cache_page(60)
@concurrency_limit(key="global", max_concurrent=3, name="cached")
def cached(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine")


# -- what the project answers by itself ------------------------------------------------------------------------------


def busy(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"busy {request.path}", status=418)


async def abusy(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(0)
    return HttpResponse(f"busy {request.path}", status=418)


def own_fields(request: HttpRequest) -> HttpResponse:
    fields = {"Retry-After": "77", "Cache-Control": "private", "RateLimit": "mine", "RateLimit-Policy": "mine too"}
    return HttpResponse("busy", status=429, headers=fields)


def elsewhere(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/waiting-room/")


def breaks(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("the callback")


async def abreaks(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("the callback")


def no_response(request: HttpRequest) -> str:
    return "busy"


urlpatterns = [
    path("view/", view, name="view"),
    path("aview/", aview, name="aview"),
    path("redirect/", redirect, name="redirect"),
    path("public/", cache_control(public=True)(view), name="public"),
    path("max-age/", cache_control(max_age=5)(view), name="max-age"),
    path("s-maxage/", cache_control(s_maxage=5)(view), name="s-maxage"),
    path("private/", cache_control(private=True, max_age=5)(view), name="private"),
    path("dated/", dated, name="dated"),
    path("expires/", expires, name="expires"),
    path("closed-by-decorator/", closed_by_decorator, name="closed-by-decorator"),
    path("cached/", cached, name="cached"),
]
