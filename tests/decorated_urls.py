"""A site of decorated views: every form in which the decorator can stand, all of them answering what their request was told."""

from __future__ import annotations

from functools import partial
from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import cache_page, never_cache

from django_concurrency_mw import concurrency_limit, concurrency_limit_exempt

from . import views
from .views import held, switch, told

one = concurrency_limit(key="global", max_concurrent=1)
#: Another call, so another mark: the second of a list.
other = concurrency_limit(key="ip", max_concurrent=2)


def inner(request: HttpRequest, **kwargs: object) -> JsonResponse:
    switch.gate(0)
    return told(request)


async def ainner(request: HttpRequest, **kwargs: object) -> JsonResponse:
    await switch.agate(0)
    return told(request)


@one
def function(request: HttpRequest, **kwargs: object) -> JsonResponse:
    return inner(request)


@one
async def afunction(request: HttpRequest, **kwargs: object) -> JsonResponse:
    return await ainner(request)


class Plain(View):
    def get(self, request: HttpRequest) -> JsonResponse:
        return inner(request)


class APlain(View):
    async def get(self, request: HttpRequest) -> JsonResponse:
        return await ainner(request)


@method_decorator(one, name="dispatch")
class OnClass(Plain):
    pass


@method_decorator(one, name="dispatch")
class AOnClass(APlain):
    pass


@method_decorator([one, other], name="dispatch")
class ListOnClass(Plain):
    pass


@method_decorator([one, other], name="dispatch")
class AListOnClass(APlain):
    pass


@method_decorator(one, name="dispatch")
@method_decorator(other, name="dispatch")
class StackOnClass(Plain):
    pass


@method_decorator(other, name="dispatch")
class Subclass(OnClass):
    """Has its parent's limit too."""


class OnDispatch(Plain):
    @method_decorator(one)
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)


class AOnDispatch(APlain):
    @method_decorator(one)
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)


class DispatchTwice(OnDispatch):
    """Its own dispatch is limited, and its parent's behind `super()` is."""

    @method_decorator(concurrency_limit(key="global", max_concurrent=7))
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)


class DirectDispatch(Plain):
    @one
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)


class ADirectDispatch(APlain):
    @one
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)


class OnMethod(View):
    @method_decorator(one)
    def get(self, request: HttpRequest) -> JsonResponse:
        return inner(request)

    def post(self, request: HttpRequest) -> JsonResponse:
        return inner(request)


class AOnMethod(View):
    @method_decorator(one)
    async def get(self, request: HttpRequest) -> JsonResponse:
        return await ainner(request)


class ListOnMethod(View):
    @method_decorator([one, other])
    def get(self, request: HttpRequest) -> JsonResponse:
        return inner(request)


class DirectMethod(View):
    @one
    def get(self, request: HttpRequest) -> JsonResponse:
        return inner(request)


class ADirectMethod(View):
    @one
    async def get(self, request: HttpRequest) -> JsonResponse:
        return await ainner(request)


@method_decorator(one, name="get")
class NamedMethod(Plain):
    pass


class CallableView:
    def __call__(self, request: HttpRequest) -> JsonResponse:
        return inner(request)


class ACallableView:
    async def __call__(self, request: HttpRequest) -> JsonResponse:
        return await ainner(request)


class Admin:
    """Has a view as a bound method, as a ModelAdmin does."""

    def report(self, request: HttpRequest) -> JsonResponse:
        return inner(request)


def with_option(request: HttpRequest, option: str) -> JsonResponse:
    assert option == "set"
    return inner(request)


async def awith_option(request: HttpRequest, option: str) -> JsonResponse:
    assert option == "set"
    return await ainner(request)


#: Form: (view, the default name of its decorators from the inside out).
FORMS: dict[str, tuple[Any, list[str]]] = {
    "function": (function, ["function"]),
    "async function": (afunction, ["afunction"]),
    "as_view": (one(Plain.as_view()), ["Plain"]),
    "async as_view": (one(APlain.as_view()), ["APlain"]),
    "on a class": (OnClass.as_view(), ["OnClass"]),
    "on an async class": (AOnClass.as_view(), ["AOnClass"]),
    "two on a class": (ListOnClass.as_view(), ["ListOnClass", "ListOnClass-2"]),
    "two on an async class": (AListOnClass.as_view(), ["AListOnClass", "AListOnClass-2"]),
    "two decorators on a class": (StackOnClass.as_view(), ["StackOnClass", "StackOnClass-2"]),
    "on a subclass of a decorated class": (Subclass.as_view(), ["Subclass", "Subclass-2"]),
    "on dispatch": (OnDispatch.as_view(), ["OnDispatch"]),
    "on an async class's dispatch": (AOnDispatch.as_view(), ["AOnDispatch"]),
    "on dispatch and on the parent's": (DispatchTwice.as_view(), ["DispatchTwice", "DispatchTwice-2"]),
    "dispatch decorated directly": (DirectDispatch.as_view(), ["DirectDispatch"]),
    "async class, dispatch decorated directly": (ADirectDispatch.as_view(), ["ADirectDispatch"]),
    "on a method": (OnMethod.as_view(), ["OnMethod.get"]),
    "on an async method": (AOnMethod.as_view(), ["AOnMethod.get"]),
    "two on a method": (ListOnMethod.as_view(), ["ListOnMethod.get", "ListOnMethod.get-2"]),
    "a method decorated directly": (DirectMethod.as_view(), ["DirectMethod.get"]),
    "an async method decorated directly": (ADirectMethod.as_view(), ["ADirectMethod.get"]),
    "on a named method": (NamedMethod.as_view(), ["NamedMethod.get"]),
    "around a decorated class": (other(OnClass.as_view()), ["OnClass", "OnClass-2"]),
    "partial": (one(partial(with_option, option="set")), ["with_option"]),
    "async partial": (one(partial(awith_option, option="set")), ["awith_option"]),
    "partial inside and out": (other(partial(one(with_option), option="set")), ["with_option", "with_option-2"]),
    "callable instance": (one(CallableView()), ["CallableView"]),
    "async callable instance": (one(ACallableView()), ["ACallableView"]),
    "bound method": (one(Admin().report), ["Admin.report"]),
    "twice on a function": (other(one(inner)), ["inner", "inner-2"]),
    "twice on an async function": (other(one(ainner)), ["ainner", "ainner-2"]),
    "under another decorator": (never_cache(one(inner)), ["inner"]),
    "above another decorator": (one(never_cache(ainner)), ["ainner"]),
}


@login_required
@concurrency_limit(key="user", max_concurrent=1)
def private(request: HttpRequest) -> JsonResponse:
    return inner(request)


@cache_page(60)
@concurrency_limit(key="global", max_concurrent=1)
def cached(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(policy="from-table", max_concurrent=3)
def from_table(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(policy="from-table")
async def afrom_table(request: HttpRequest) -> JsonResponse:
    return await ainner(request)


@concurrency_limit(key="global", max_concurrent=4, methods=["POST"])
def only_post(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(key="global", max_concurrent=4, when="authenticated")
def only_users(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(key="{kwargs.pk}", max_concurrent=1)
def by_keyword(request: HttpRequest, pk: str) -> JsonResponse:
    return inner(request)


@concurrency_limit(key="global", max_concurrent=2, name="shared")
def shared(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(key="global", max_concurrent=1, name="shared")
def shared_too(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(key="global", max_concurrent=1, block=False)
def shadow(request: HttpRequest) -> JsonResponse:
    return inner(request)


@concurrency_limit(key="global", max_concurrent=0)
def closed(request: HttpRequest) -> JsonResponse:
    raise AssertionError("nobody is let in")


@concurrency_limit(key="global", max_concurrent=1)
def early(request: HttpRequest) -> JsonResponse:
    before = held()
    request.concurrency.release()  # type: ignore[attr-defined]  # set by the decorator
    return JsonResponse({"before": before, "after": held()})


@concurrency_limit(key="global", max_concurrent=1)
async def aearly(request: HttpRequest) -> JsonResponse:
    before = held()
    request.concurrency.release()  # type: ignore[attr-defined]  # set by the decorator
    return JsonResponse({"before": before, "after": held()})


@concurrency_limit(key="global", max_concurrent=1)
def page(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "page.html", {"held": held})


@concurrency_limit(key="global", max_concurrent=1)
async def apage(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, "page.html", {"held": held})


@concurrency_limit(key="global", max_concurrent=1)
def stream(request: HttpRequest) -> StreamingHttpResponse:
    return views.stream(request)


@concurrency_limit(key="global", max_concurrent=1)
async def astream(request: HttpRequest) -> StreamingHttpResponse:
    return await views.astream(request)


@concurrency_limit(key="global", max_concurrent=1)
def fails(request: HttpRequest) -> HttpResponse:
    return views.fails(request)


@concurrency_limit(key="global", max_concurrent=1)
async def afails(request: HttpRequest) -> HttpResponse:
    return await views.afails(request)


exempt = concurrency_limit_exempt(inner)
aexempt = concurrency_limit_exempt(ainner)


@method_decorator(concurrency_limit_exempt, name="dispatch")
class Exempt(Plain):
    pass


#: Its mark is not to be seen: the decorator stands in a partial.
hidden = partial(one(with_option), option="set")

urlpatterns = [
    *(path(f"form/{number}/", view) for number, (view, _) in enumerate(FORMS.values())),
    path("private/", private),
    path("cached/", cached),
    path("from-table/", from_table, name="from-table-view"),
    path("afrom-table/", afrom_table, name="afrom-table-view"),
    path("only-post/", only_post),
    path("only-users/", only_users),
    path("by-keyword/<str:pk>/", by_keyword),
    path("shared/", shared),
    path("shared-too/", shared_too),
    path("shadow/", shadow),
    path("closed/", closed),
    path("early/", early),
    path("aearly/", aearly),
    path("page/", page),
    path("apage/", apage),
    path("stream/", stream),
    path("astream/", astream),
    path("fails/", fails),
    path("afails/", afails),
    path("function/<str:pk>/", function, name="function-pk"),
    path("exempt/", exempt, name="exempt"),
    path("aexempt/", aexempt, name="aexempt"),
    path("exempt-class/", Exempt.as_view(), name="exempt-class"),
    path("hidden/", hidden, name="hidden"),
    path("plain/", inner, name="plain"),
]
