"""Which routes a table reaches, by name alone."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.views import View
from django.views.decorators.cache import cache_page
from rest_framework.viewsets import ViewSet

from django_concurrency_mw.coverage import (
    covered_routes,
    covers_by_glob,
    second_names,
    unmatched_patterns,
    view_identity,
)
from django_concurrency_mw.loader import load_policies
from django_concurrency_mw.policies import PolicyTable
from django_concurrency_mw.routes import Route


def first(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def second(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def table(**policies: dict[str, Any]) -> PolicyTable:
    return load_policies(
        {"policies": {name: {"key": "user", "max_concurrent": 1, **fields} for name, fields in policies.items()}}
    )


ROUTES = [
    Route("reports:export", first, "reports/export/"),
    Route("reports:export-status", second, "reports/status/"),
    Route("home", second, ""),
    Route("accounting:of-the-year:summary", second, "accounting/summary/"),
]


def test_the_routes_of_each_policy_and_of_none() -> None:
    found = table(a={"url_names": ["reports:*"], "exclude": ["*-status"]}, b={"url_names": ["nothing"]}, c={})
    a, b, c = found
    assert covered_routes(found, ROUTES) == {a: (ROUTES[0],), b: (), c: ()}


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("reports:exprt", "reports:export"),
        ("report:export*", "reports:export"),
        ("export", "reports:export"),
        ("hom?x", "home"),
        ("sumary", "accounting:of-the-year:summary"),
        ("zzz", None),
    ],
)
@pytest.mark.parametrize("field", ["url_names", "exclude"])
def test_a_pattern_that_matches_no_route(pattern: str, nearest: str | None, field: str) -> None:
    found = table(a={"url_names": ["*"], **{field: ["home", pattern]}})
    (unmatched,) = unmatched_patterns(found, ROUTES)
    assert (unmatched.policy.name, unmatched.field, unmatched.pattern) == ("a", field, pattern)
    assert unmatched.nearest == nearest
    assert unmatched_patterns(found, []) == [], "nothing is known of the URLs"


def test_patterns_that_match_are_not_named() -> None:
    assert (
        unmatched_patterns(table(a={"url_names": ["reports:*", "home"], "exclude": ["*-status"]}, b={}), ROUTES) == []
    )


def test_by_glob_only() -> None:
    (policy,) = table(a={"url_names": ["*", "home"], "exclude": ["out"]})
    assert covers_by_glob(policy, "other")
    assert not covers_by_glob(policy, "home")
    assert not covers_by_glob(policy, "out")


TWICE = [Route("a", first, "a/"), Route("b", first, "b/"), Route("c", second, "c/"), Route("a", first, "a2/")]


@pytest.mark.parametrize(
    ("policies", "outside"),
    [
        ({"p": {"url_names": ["a"]}}, ["b"]),
        ({"p": {"url_names": ["b"]}}, ["a"]),
        ({"p": {"url_names": ["a", "b"]}}, []),
        ({"p": {"url_names": ["c"]}}, []),
        ({"p": {"url_names": ["a"], "exclude": ["b"]}}, []),
        ({"p": {"url_names": ["a"]}, "q": {"url_names": ["b"]}}, []),
        ({"p": {"url_names": ["a"]}, "q": {"url_names": ["b"], "key": "global"}}, ["b", "a"]),
        ({"p": {}}, []),
    ],
)
def test_a_way_around_a_policy(policies: dict[str, Any], outside: list[str]) -> None:
    assert [each.outside.name for each in second_names(table(**policies), TWICE)] == outside


class Page(View):
    template = ""


class Things(ViewSet):
    def list(self, request: object) -> None: ...


def test_what_one_view_is() -> None:
    """Its function, whoever wraps it; a class by what it was given."""
    assert view_identity(first) == view_identity(cache_page(60)(first)) != view_identity(second)
    assert view_identity(Page.as_view()) == view_identity(Page.as_view())
    assert view_identity(Page.as_view()) != view_identity(Page.as_view(template="x"))
    rows = User.objects.all()  # to look into it would ask the database, which this test may not
    assert view_identity(Page.as_view(template=rows)) == view_identity(Page.as_view(template=rows))
    assert view_identity(Page.as_view(template=rows)) != view_identity(Page.as_view(template=rows.all()))
    listing = {"get": "list"}
    assert view_identity(Things.as_view(listing, basename="a")) == view_identity(Things.as_view(listing, basename="b"))
    assert view_identity(Things.as_view(listing)) != view_identity(Things.as_view({"post": "list"}))


@pytest.mark.parametrize(
    ("other", "silent"),
    [
        ({"key": "ip", "max_concurrent": 2}, True),
        ({"key": "ip", "max_concurrent": 1}, True),
        ({"key": "ip", "max_concurrent": 20}, False),
        ({"key": "ip", "max_concurrent": None}, False),
        ({"key": "ip", "max_concurrent": 2, "block": False}, False),
        ({"key": "user", "max_concurrent": 2}, False),
    ],
)
def test_a_looser_policy_is_no_cover(other: dict[str, object], silent: bool) -> None:
    known = [Route("export", first, "export/"), Route("export-again", first, "again/")]
    found = table(a={"url_names": ["export"], "key": "ip", "max_concurrent": 2}, b={"url_names": ["*"], **other})
    assert (second_names(found, known) == []) is silent
