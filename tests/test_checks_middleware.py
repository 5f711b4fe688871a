"""The checks of what stands in MIDDLEWARE beside ours, and below it."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings

from .checking import decorate, found, ids
from .support import OURS, Limits, ViewHookReturns, everything, named

__all__ = ["decorate"]

SESSION = "django.contrib.sessions.middleware.SessionMiddleware"
USER = "django.contrib.auth.middleware.AuthenticationMiddleware"
LOGIN = "django.contrib.auth.middleware.LoginRequiredMiddleware"
CSRF = "django.middleware.csrf.CsrfViewMiddleware"


@pytest.mark.parametrize(
    ("middleware", "named"),
    [
        ([SESSION, OURS, USER, LOGIN], "LoginRequiredMiddleware"),
        ([OURS, SESSION, CSRF, USER], "CsrfViewMiddleware"),
        ([OURS, SESSION, CSRF, USER, LOGIN], "CsrfViewMiddleware, LoginRequiredMiddleware"),
        ([SESSION, USER, OURS, named(ViewHookReturns)], "ViewHookReturns"),
    ],
)
def test_w013_it_stands_above_what_rejects(limits: Limits, middleware: list[str], named: str) -> None:
    limits(everything(key="user"), middleware=middleware)
    (warning,) = found()
    assert warning.id == "django_concurrency_mw.W013"
    assert warning.msg.startswith(f"ConcurrencyLimitMiddleware stands above {named}: ")


@pytest.mark.parametrize(
    "middleware", [[SESSION, CSRF, USER, LOGIN, OURS], [OURS, SESSION, USER], [SESSION, USER, OURS, "nowhere.at_all"]]
)
def test_w013_is_silent_where_nothing_below_rejects(limits: Limits, middleware: list[str]) -> None:
    limits(everything(key="user"), middleware=middleware)
    assert ids() == []


def test_w013_is_silent_without_policies_by_name(limits: Limits) -> None:
    limits(middleware=[OURS, SESSION, CSRF])
    assert ids() == []


@pytest.mark.django_db
@pytest.mark.parametrize("middleware", [[OURS, SESSION, USER], [SESSION, OURS, USER], [SESSION, USER, OURS]])
def test_users_and_sessions_are_known_wherever_it_stands(
    limits: Limits, middleware: list[str], django_user_model: Any
) -> None:
    """Which is why W013 is about rejections alone."""
    user = django_user_model.objects.create(username="anna")
    key = "{user.pk}/{session}"
    limits(everything(key=key, missing="reject"), middleware=middleware)
    client = Client()
    client.force_login(user)
    assert client.get("/told/").json()["policies"][0][1].startswith(f"{user.pk}/")


@pytest.mark.django_db
@pytest.mark.parametrize(("place", "status"), [("above", 429), ("below", 302)])
def test_what_is_rejected_below_it_meets_the_limit_first(limits: Limits, place: str, status: int) -> None:
    """The reason of W013."""
    limits(everything(0), middleware=[SESSION, USER, OURS, LOGIN] if place == "above" else [SESSION, USER, LOGIN, OURS])
    assert Client().get("/told/").status_code == status


class OwnUser(AuthenticationMiddleware):
    """A project's own."""


class OwnSession(SessionMiddleware):
    """A project's own."""


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"key": "user"}, USER),
        ({"key": "{user.pk}"}, USER),
        ({"key": "global", "when": "staff"}, USER),
        ({"key": "global", "except_users": [1]}, USER),
        ({"key": "session"}, SESSION),
        ({"key": "{session.cart}"}, SESSION),
    ],
    ids=str,
)
def test_w014_nobody_provides_what_it_asks_for(limits: Limits, fields: dict[str, Any], needs: str) -> None:
    limits(everything(**fields), middleware=[entry for entry in (SESSION, USER, OURS) if entry != needs])
    (warning,) = found()
    assert warning.id == "django_concurrency_mw.W014"
    assert warning.msg.startswith(f"{needs.rpartition('.')[2]} is not in MIDDLEWARE, so ")
    assert warning.msg.endswith(": all.")
    assert needs in str(warning.hint)
    for middleware in ([SESSION, USER, OURS], [named(OwnSession), named(OwnUser), OURS]):
        limits(everything(**fields), middleware=middleware)
        assert ids() == []


@pytest.mark.parametrize("fields", [{"key": "ip"}, {"key": "global", "when": f"{__name__}.view"}], ids=str)
def test_w014_is_silent_about_what_asks_for_neither(limits: Limits, fields: dict[str, Any]) -> None:
    limits(everything(**fields), middleware=[OURS])
    assert ids() == []


def test_w014_is_silent_about_policies_that_the_middleware_does_not_take(limits: Limits) -> None:
    """Those of no URL; and those of API views, whose own throttle knows a token's user."""
    limits({"policies": {"p": {"key": "user", "max_concurrent": 1}}}, middleware=[OURS])
    assert ids() == []
    with override_settings(ROOT_URLCONF="tests.drf_urls"):
        policy = {"url_names": ["throttled"], "key": "user", "max_concurrent": 1}
        limits({"policies": {"p": policy}}, middleware=[OURS])
        assert "W014" not in ids()
        limits({"policies": {"p": {**policy, "url_names": ["throttled", "bare"]}}}, middleware=[OURS])
        assert "W014" in ids()


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse()
