"""The checks of the table against the URLs: patterns that match none, health checks, ways around a policy."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import include, path

from django_concurrency_mw import concurrency_limit, concurrency_limit_exempt

from .checking import Decorate, decorate, found, ids
from .support import Limits

__all__ = ["decorate"]


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def other(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


@concurrency_limit(key="global", max_concurrent=1)
def decorated(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def use(limits: Limits, urls: list[Any], **fields: Any) -> None:
    """One policy in a site with these URLs."""
    limits({"policies": {"p": {"key": "global", "max_concurrent": 1, **fields}}})
    _use_urls(urls)


@pytest.fixture(autouse=True)
def _site(limits: Limits) -> Any:
    """The site of `use`, for one test. It ends before the limits do, as overrides are undone in their order."""
    global _use_urls
    entered: list[Any] = []

    def enter(urls: list[Any]) -> None:
        site = ModuleType("site")
        site.urlpatterns = urls  # type: ignore[attr-defined]  # as a URL configuration has it
        override = override_settings(ROOT_URLCONF=site)
        override.enable()
        entered.append(override)

    _use_urls = enter
    yield
    for override in reversed(entered):
        override.disable()


_use_urls: Any = None
URLS = [
    path("a/", page, name="report-list"),
    path("b/", other),
    path("shop/", include(([path("c/", decorated, name="orders")], "shop"), namespace="shop")),
]


@pytest.mark.parametrize(
    ("fields", "unmatched", "nearest"),
    [
        ({"url_names": ["report-lists"]}, "url_names: 'report-lists'", "; did you mean 'report-list'?"),
        ({"url_names": ["orders"]}, "url_names: 'orders'", "; did you mean 'shop:orders'?"),
        ({"url_names": ["reprt-*"]}, "url_names: 'reprt-*'", "; did you mean 'report-list'?"),
        ({"url_names": ["report-list", "zzz"]}, "url_names: 'zzz'", " matches no URL."),
        ({"url_names": ["*"], "exclude": ["shop:order"]}, "exclude: 'shop:order'", "; did you mean 'shop:orders'?"),
    ],
)
def test_w011_a_pattern_that_matches_no_url(
    limits: Limits, fields: dict[str, Any], unmatched: str, nearest: str
) -> None:
    use(limits, URLS, **fields)
    (warning,) = found()
    assert warning.id == "django_concurrency_mw.W011"
    assert warning.msg.startswith("CONCURRENCY_LIMIT['POLICIES'].policies.p: policy p: ")
    assert unmatched in warning.msg
    assert warning.msg.endswith(nearest)


@pytest.mark.parametrize(
    "fields",
    [
        {"url_names": ["report-*", "shop:orders"], "exclude": ["report-list"]},
        {"url_names": [f"{__name__}.other"]},
        {},
    ],
)
def test_w011_is_silent_about_what_matches(limits: Limits, fields: dict[str, Any]) -> None:
    """And about a policy without url_names, which is for `policy=` only."""
    use(limits, URLS, **fields)
    assert ids() == []


def test_w011_is_silent_where_there_are_no_urls(limits: Limits) -> None:
    use(limits, [], url_names=["anything"])
    assert ids() == []


MACHINES = [
    "health",
    "healthz",
    "health-check",
    "monitor:health_check",
    "LivenessProbe",
    "readyz",
    "ping",
    "status",
    "server-status",
    "metrics",
    "api:heartbeat",
]
PEOPLE = ["order-status", "shipping", "alive-and-kicking", "ready-meals", "wealth", "healthy-food", "health:index"]


@pytest.mark.parametrize("name", MACHINES)
def test_w012_a_wildcard_over_a_health_check(limits: Limits, name: str) -> None:
    urls = [path("a/", page, name="home"), _named(name)]
    use(limits, urls, url_names=["*"])
    (warning,) = found()
    assert warning.id == "django_concurrency_mw.W012"
    assert warning.msg.endswith(f"by a pattern with a wildcard: {name}.")
    for meant in ({"exclude": [name]}, {"url_names": ["home", name]}, {"url_names": ["*", name]}):
        use(limits, urls, **{"url_names": ["*"], **meant})
        assert ids() == []


@pytest.mark.parametrize("name", PEOPLE)
def test_w012_is_silent_about_pages_of_people(limits: Limits, name: str) -> None:
    use(limits, [_named(name)], url_names=["*"])
    assert ids() == []


@pytest.mark.parametrize(
    "fields", [{"methods": ["POST"]}, {"block": False}, {"max_concurrent": None}, {"when": "authenticated"}], ids=str
)
def test_w012_is_silent_where_no_probe_is_rejected(limits: Limits, fields: dict[str, Any]) -> None:
    use(limits, [_named("healthz")], url_names=["*"], **fields)
    assert ids() == []


def test_w012_is_silent_where_the_view_is_exempt(limits: Limits) -> None:
    urls = [path("h/", concurrency_limit_exempt(other), name="healthz")]
    use(limits, urls, url_names=["*"])
    assert ids() == []
    use(limits, urls, url_names=["*"], overridable=False)
    assert ids() == ["W012"]


def test_w012_sees_the_view_of_a_url_without_a_name(limits: Limits) -> None:
    def healthz(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    use(limits, [path("h/", healthz)], url_names=["*"])
    assert ids() == ["W012"]


TWICE = [path("a/", page, name="a"), path("b/", page, name="b"), path("c/", other, name="c")]


def test_w023_a_view_under_a_second_name(limits: Limits) -> None:
    use(limits, TWICE, url_names=["a"])
    (warning,) = found()
    assert warning.id == "django_concurrency_mw.W023"
    assert "policy p can be gone around" in warning.msg
    assert warning.msg.endswith("b is the view of a.")


@pytest.mark.parametrize(
    "fields", [{"url_names": ["a", "b"]}, {"url_names": ["a"], "exclude": ["b"]}, {"url_names": ["c"]}]
)
def test_w023_is_silent_about_what_is_covered_or_left_out_on_purpose(limits: Limits, fields: dict[str, Any]) -> None:
    use(limits, TWICE, **fields)
    assert ids() == []


def test_w023_is_silent_where_the_view_has_a_decorator(limits: Limits) -> None:
    """It counts wherever the view is reached; but one that the policy does not leave the view to adds to the policy."""
    urls = [path("a/", decorated, name="a"), path("b/", decorated, name="b")]
    use(limits, urls, url_names=["a"])
    assert ids() == []
    use(limits, urls, url_names=["a"], overridable=False)
    assert ids() == ["W023"]


TWO_STORES = {
    "default": {"BACKEND": "memory"},
    "far": {"BACKEND": "memory", "KEY_PREFIX": "far"},
    "same": {"BACKEND": "memory"},
}


@pytest.mark.parametrize(
    ("first", "second", "fires"),
    [
        ({"wait": 2}, {"backend": "far"}, True),
        ({"wait": "2s", "backend": "far"}, {}, True),
        ({"wait": 2}, {"backend": "far", "block": False}, True),
        ({"wait": 2}, {"backend": "far", "when": "staff"}, True),
        ({"wait": 2, "methods": ["GET", "PUT"]}, {"backend": "far", "methods": ["PUT", "POST"]}, True),
        ({"wait": 2}, {"backend": "far", "methods": ["PURGE"]}, True),
        ({"wait": 0}, {"backend": "far"}, False),
        ({}, {"backend": "far"}, False),
        ({"wait": 2}, {}, False),
        ({"wait": 2}, {"backend": "same"}, False),
        ({"wait": 2, "methods": ["GET"]}, {"backend": "far", "methods": ["POST"]}, False),
        ({"wait": 2, "url_names": ["a"]}, {"backend": "far", "url_names": ["b"]}, False),
        ({"wait": 2, "url_names": ["*"], "exclude": ["b"]}, {"backend": "far", "url_names": ["b"]}, False),
    ],
    ids=str,
)
def test_w024_a_wait_that_nobody_ever_waits(
    limits: Limits, first: dict[str, Any], second: dict[str, Any], fires: bool
) -> None:
    common = {"key": "global", "max_concurrent": 1, "url_names": ["a", "b"]}
    limits({"policies": {"p": {**common, **first}, "q": {**common, **second}}}, BACKENDS=TWO_STORES)
    _use_urls([path("a/", page, name="a"), path("b/", other, name="b")])
    messages = [message for message in found() if message.id == "django_concurrency_mw.W024"]
    assert len(messages) == fires
    if fires:
        assert "policy p has a `wait` without effect" in messages[0].msg
        assert "for q:" in messages[0].msg
        assert messages[0].msg.endswith("Views: a, b.")


@pytest.mark.parametrize(
    ("waits", "beside", "fires"),
    [(True, True, False), (False, False, True), (True, False, False), (False, True, False)],
)
def test_w024_does_not_count_what_a_decorator_replaces(limits: Limits, waits: bool, beside: bool, fires: bool) -> None:
    """A decorator takes its slot by itself, whatever the request holds by then."""
    fields = {"key": "global", "max_concurrent": 1, "url_names": ["a"]}
    p = {**fields, "wait": 1, "overridable": waits}
    q = {**fields, "backend": "far", "overridable": beside}
    limits({"policies": {"p": p, "q": q}}, BACKENDS=TWO_STORES)
    _use_urls([path("a/", decorated, name="a")])
    assert ("W024" in ids()) == fires


@concurrency_limit(policy="outer", wait=2)
@concurrency_limit(policy="inner", wait=2)
def twice(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"methods": ["GET"]}, {"outer": "p", "inner": "outer"}),
        ({"backend": "far", "wait": 3}, {"inner": "p, outer"}),
        ({"url_names": ["b"]}, {"inner": "outer"}),
    ],
    ids=str,
)
def test_w024_is_about_decorators_too(limits: Limits, fields: dict[str, Any], told: dict[str, str]) -> None:
    """Whatever is asked further in does not wait while something of another store is held from further out."""
    common = {"key": "global", "max_concurrent": 1}
    p = {**common, "url_names": ["a"], "overridable": False, **fields}
    limits({"policies": {"p": p, "outer": {**common, "backend": "far"}, "inner": common}}, BACKENDS=TWO_STORES)
    _use_urls([path("a/", twice, name="a"), path("b/", page, name="b")])
    messages = [one.msg for one in found() if one.id == "django_concurrency_mw.W024"]
    assert dict(re.findall(r"policy (\w+) has .* for (.*): such .* Views: a\.$", "\n".join(messages), re.M)) == told


def test_w024_is_silent_about_a_store_that_cannot_be_used(limits: Limits) -> None:
    fields = {"key": "global", "max_concurrent": 1, "url_names": ["a"]}
    limits({"policies": {"p": {**fields, "wait": 1}, "q": {**fields, "backend": "nowhere"}}}, BACKENDS=TWO_STORES)
    _use_urls([path("a/", page, name="a")])
    assert "W024" not in ids()
    assert "E002" in ids()


def test_policies_that_only_decorators_use_have_no_urls_to_check(limits: Limits, decorate: Decorate) -> None:
    use(limits, TWICE)
    view = decorate(policy="p")
    assert ids() == []
    assert view


def _named(name: str) -> Any:
    """A URL of this name, in its namespaces."""
    *namespaces, last = name.split(":")
    route: Any = path("n/", other, name=last)
    for namespace in reversed(namespaces):
        route = path("", include(([route], namespace), namespace=namespace))
    return route
