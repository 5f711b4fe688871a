"""URLs whose names are hard to match: namespaces, prefixes of languages, views without a name, and a second URLconf."""

from __future__ import annotations

from django.conf.urls.i18n import i18n_patterns
from django.http import HttpRequest, JsonResponse
from django.urls import URLPattern, URLResolver, include, path, re_path
from django.views import View

from . import views

_inner: list[URLPattern | URLResolver] = [
    path("list/", views.told, name="list"),
    path("deep/", include(([path("end/", views.told, name="end")], "deep"))),
    path("unnamed/", views.told),
]
inner = (_inner, "shop")


class Unnamed(View):
    def get(self, request: HttpRequest, **kwargs: object) -> JsonResponse:
        return views.told(request)


class Callable:
    def __call__(self, request: HttpRequest) -> JsonResponse:
        return views.told(request)


urlpatterns = [
    path("told/", views.told, name="told"),
    path("atold/", views.atold, name="atold"),
    path("report-a/", views.told, name="report-a"),
    path("report-b/", views.told, name="report-b"),
    path("status/", views.told, name="report-status"),
    path("shop/", include(inner, namespace="shop")),
    path("second/", include(inner, namespace="second")),
    path("unnamed/", views.told),
    path("unnamed-class/", Unnamed.as_view()),
    path("unnamed-callable/", Callable()),
    re_path(r"^page/(?P<pk>\d+)/$", views.told, name="page"),
    *i18n_patterns(path("greeting/", views.told, name="greeting"), prefix_default_language=True),
]
