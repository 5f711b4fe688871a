"""Django REST framework: policies by the user of a token, the true end of its responses, and the decorator on its views."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from io import BytesIO
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.checks import run_checks
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.db import connection, connections
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings
from rest_framework.authtoken.models import Token
from rest_framework.response import Response
from rest_framework.views import exception_handler

from django_concurrency_mw import middleware
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.signals import slot_acquired

from .asgi_driver import Exchange, fetch
from .conftest import Run
from .redis_server import RedisServer
from .support import OURS, SOON, Limits, Replaces, await_until, everything, named, nothing_held, run_async, wait_until
from .views import Deliberate, held, switch

pytestmark = [
    pytest.mark.urls("tests.drf_urls"),
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
]

HERE = "tests.drf_urls"
SESSIONS = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
with_and_without = pytest.mark.parametrize("ours", [[*SESSIONS, OURS], []], ids=["with the middleware", "without"])
both_halves = pytest.mark.parametrize("half", ["wsgi", "asgi"])
_numbers = count()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Django logs each 500 with its traceback, which would keep the response alive."""
    monkeypatch.setattr(logging.getLogger("django.request"), "disabled", True)


@pytest.fixture
def alice() -> str:
    return Token.objects.create(user=User.objects.create_user("alice", pk=1)).key


@pytest.fixture
def bob() -> str:
    return Token.objects.create(user=User.objects.create_user("bob", pk=2)).key


class Answer:
    """Status, header fields and body of a request that has been made, whichever way."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def headers_of(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Token {token}"}


def wsgi(path: str, token: str | None = None) -> Answer:
    """One request as a WSGI server makes it, closed at its end."""
    answer: dict[str, Any] = {}

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        answer.update(status=int(status.split()[0]), headers={name.lower(): value for name, value in headers})

    path, _, query = path.partition("?")
    extra = {f"HTTP_{name.upper()}": value for name, value in headers_of(token).items()}
    environ = RequestFactory()._base_environ(
        PATH_INFO=path, QUERY_STRING=query, REMOTE_ADDR="203.0.113.9", **{"wsgi.input": BytesIO()}, **extra
    )
    response = WSGIHandler()(environ, start_response)
    try:
        return Answer(body=b"".join(response), **answer)
    finally:
        response.close()


async def asgi(path: str, token: str | None = None) -> Answer:
    exchange = await fetch(path, headers=headers_of(token))
    return Answer(exchange.status, exchange.headers, exchange.body)


def ask(half: str, path: str, token: str | None = None) -> Answer:
    return wsgi(path, token) if half == "wsgi" else run_async(lambda: asgi(path, token))


def during(half: str, first: tuple[str, str], *others: tuple[str, str | None]) -> list[Answer]:
    """The answers to the first request, and to the others that come while it is in its view."""
    switch.stop_at = 0
    return _during_wsgi(first, others) if half == "wsgi" else run_async(lambda: _during_asgi(first, others))


def _during_wsgi(first: tuple[str, str], others: Any) -> list[Answer]:
    answers: list[Answer] = []

    def hold() -> None:
        try:
            answers.append(wsgi(*first))
        finally:
            connections.close_all()

    thread = threading.Thread(target=hold)
    thread.start()
    assert switch.entered.wait(SOON)
    switch.stop_at = None
    rest = [wsgi(*other) for other in others]
    switch.go.set()
    thread.join(SOON)
    return [*answers, *rest]


async def _during_asgi(first: tuple[str, str], others: Any) -> list[Answer]:
    path, token = first
    exchange = Exchange(ASGIHandler(), path, headers=headers_of(token))
    assert await await_until(switch.entered.is_set)
    switch.stop_at = None
    rest = [await asgi(*other) for other in others]
    switch.go.set()
    await exchange.end()
    return [Answer(exchange.status, exchange.headers, exchange.body), *rest]


@pytest.fixture(params=["memory", "redis"])
def backends(request: pytest.FixtureRequest) -> dict[str, Any]:
    prefix = f"drf-{os.getpid()}-{next(_numbers)}"
    if request.param == "memory":
        return {"default": {"BACKEND": "memory", "KEY_PREFIX": prefix}}
    server: RedisServer = request.getfixturevalue("redis_server")
    return {
        "default": {
            "BACKEND": "redis",
            "LOCATION": server.url,
            "KEY_PREFIX": prefix,
            "OPTIONS": {"socket_timeout": 5},
        }
    }


def per_user(limit: int = 1, **fields: Any) -> dict[str, Any]:
    return {"policies": {"mine": {"url_names": ["*"], "key": "user", "max_concurrent": limit, **fields}}}


# -- by the user of the token -------------------------------------------------------------------------------------


@with_and_without
@both_halves
def test_users_of_one_address_are_told_apart(
    limits: Limits,
    backends: dict[str, Any],
    half: str,
    ours: list[str],
    alice: str,
    bob: str,
    redis_server: RedisServer,
) -> None:
    """Cap 1 per user: two users at once pass; one of them twice is turned away, with the body of DRF."""
    limits(per_user(), middleware=ours, BACKENDS=backends)
    first, other, again = during(half, ("/throttled/", alice), ("/throttled/", bob), ("/throttled/", alice))
    assert first.json == {"limited": True, "policies": [["mine", "user:1", "held", 1, 1]]}
    assert other.json == {"limited": True, "policies": [["mine", "user:2", "held", 1, 1]]}
    assert again.status == 429
    assert again.headers["content-type"] == "application/json"
    seconds = again.headers["retry-after"]
    plural = "" if seconds == "1" else "s"
    assert again.json == {"detail": f"Request was throttled. Expected available in {seconds} second{plural}."}
    assert again.headers["ratelimit"] == '"mine";r=0'
    assert again.headers["ratelimit-policy"] == '"mine";q=1;qu="concurrent-requests"'
    assert again.headers["cache-control"] == "no-store"
    assert "Cookie" not in first.headers.get("vary", "")
    assert wait_until(lambda: nothing_held() and redis_server.held(backends["default"]["KEY_PREFIX"]) == 0)
    assert ask(half, "/throttled/", alice).status == 200


FORMS = ["throttled", "function", "given", "v1/reports", "v1/exports/run"]


@with_and_without
@both_halves
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("overridable", [True, False])
def test_wherever_the_throttle_is_named_the_table_is_taken_once_and_by_it(
    limits: Limits, half: str, ours: list[str], form: str, overridable: bool, alice: str
) -> None:
    taken = []
    slot_acquired.connect(receiver := lambda key, **_: taken.append(key))
    limits(per_user(overridable=overridable), middleware=ours)
    answer = ask(half, f"/{form}/", alice)
    assert answer.json == {"limited": True, "policies": [["mine", "user:1", "held", 1, 1]]}
    assert taken == ["user:1"]
    assert switch.seen == [["mine"]]
    assert wait_until(nothing_held)
    del receiver


@pytest.mark.parametrize("form", ["bare", "v1/reports/free", "v1/exports"])
def test_elsewhere_the_middleware_takes_it(limits: Limits, form: str, alice: str) -> None:
    limits(per_user(), middleware=[*SESSIONS, OURS])
    assert wsgi(f"/{form}/", alice).json["policies"] == [["mine", "ip:203.0.113.9", "held", 1, 1]]


ORDERS = ["rest_framework.views", "django_concurrency_mw.drf"]


@pytest.mark.parametrize("imported_first", ORDERS)
def test_as_the_default_of_all_views(run_python: Run, imported_first: str) -> None:
    """DEFAULT_THROTTLE_CLASSES, imported by DRF itself while its own views are."""
    done = run_python(
        "-c",
        "import django\nfrom django.conf import settings\n"
        "settings.configure(INSTALLED_APPS=['django.contrib.contenttypes', 'django.contrib.auth', 'rest_framework'],"
        " DATABASES={}, SECRET_KEY='x',"
        " REST_FRAMEWORK={'DEFAULT_THROTTLE_CLASSES': ['django_concurrency_mw.drf.ConcurrencyThrottle']})\n"
        f"django.setup()\nimport {imported_first}\n"
        "from rest_framework.views import APIView\nfrom rest_framework.decorators import api_view\n"
        "from django_concurrency_mw.middleware import throttles_itself\n"
        "class Free(APIView):\n    throttle_classes = ()\n"
        "print([throttles_itself(view) for view in"
        " (APIView.as_view(), api_view()(lambda request: None), Free.as_view(), lambda request: None)])",
    )
    assert done.stdout.strip() == "[True, True, False, False]", done.stderr


def test_what_only_looks_like_a_view_of_drf() -> None:
    """Other frameworks hang a `cls` on their views too."""
    assert not middleware.throttles_itself(SimpleNamespace(cls=object))
    assert not middleware.throttles_itself(SimpleNamespace(cls=SimpleNamespace(throttle_classes=None), initkwargs=None))


@with_and_without
def test_authentication_and_permissions_come_first(limits: Limits, ours: list[str]) -> None:
    """Who is refused takes no slot: a stranger cannot fill an address."""
    taken = []
    slot_acquired.connect(receiver := lambda key, **_: taken.append(key))
    limits(everything(0), middleware=ours)
    assert wsgi("/throttled/").status == 401
    assert wsgi("/throttled/", "no such token").status == 401
    assert taken == []
    del receiver


@with_and_without
def test_authentication_on_first_use(limits: Limits, ours: list[str], alice: str) -> None:
    """A view may leave authentication to whoever asks for the user first: here, the policy does."""
    limits(per_user(), middleware=ours)
    assert wsgi("/lazy/", alice).json["policies"] == [["mine", "user:1", "held", 1, 1]]
    assert wsgi("/lazy/", "no such token").status == 401
    limits(everything(), middleware=ours)
    assert wsgi("/lazy/", "no such token").status == 200, "nothing asked for the user"


@with_and_without
@both_halves
def test_keys_of_the_url_and_words_of_the_user(limits: Limits, half: str, ours: list[str], alice: str) -> None:
    table = {
        "policies": {
            "pk": {"url_names": ["throttled-pk"], "key": "{user.username}:{kwargs.pk}", "max_concurrent": 1},
            "known": {"url_names": ["*"], "key": "global", "when": "authenticated", "max_concurrent": 1},
            "unknown": {"url_names": ["*"], "key": "global", "when": "anonymous", "max_concurrent": 1},
        }
    }
    limits(table, middleware=ours)
    found = ask(half, "/throttled/7/", alice).json["policies"]
    assert [name[:2] for name in found] == [["pk", "alice:7"], ["known", "global"]]


@with_and_without
def test_a_view_without_a_policy_is_told_so(limits: Limits, ours: list[str], alice: str) -> None:
    limits(middleware=ours)
    assert wsgi("/throttled/", alice).json == {"limited": False, "policies": []}
    limits(per_user(0), middleware=ours, ENABLED=False)
    assert wsgi("/throttled/", alice).json == {"limited": False, "policies": []}


@with_and_without
@both_halves
def test_three_policies_are_one_round_trip(
    limits: Limits, half: str, ours: list[str], alice: str, redis_server: RedisServer
) -> None:
    names = ("a", "b", "c")
    table = {"policies": {name: {"url_names": ["*"], "key": "user", "max_concurrent": 1} for name in names}}
    prefix = f"drf-{os.getpid()}-{next(_numbers)}"
    options = {"socket_timeout": 5}
    entry = {"BACKEND": "redis", "LOCATION": redis_server.url, "KEY_PREFIX": prefix, "OPTIONS": options}
    backends = {"default": entry}
    limits(table, middleware=ours, BACKENDS=backends)
    assert ask(half, "/throttled/", alice).status == 200  # connected, and the script is known
    assert wait_until(lambda: redis_server.held(prefix) == 0)
    with redis_server.client() as client:
        client.config_resetstat()
        assert len(ask(half, "/throttled/", alice).json["policies"]) == 3
        assert wait_until(lambda: redis_server.held(prefix) == 0)
        stats = client.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 1
    assert "cmdstat_eval" not in stats
    assert stats["cmdstat_zrem"]["calls"] == 3


@with_and_without
def test_the_throttle_twice_takes_once(limits: Limits, ours: list[str], alice: str) -> None:
    limits(per_user(), middleware=ours)
    assert wsgi("/twice/", alice).json["policies"] == [["mine", "user:1", "held", 1, 1]]
    assert nothing_held()


# -- the true end -------------------------------------------------------------------------------------------------

ENDS = {
    "rendered/": (200, 2),
    "plain/": (200, 1),
    "stream/": (200, 2),
    "raises/?error=known": (404, 1),
    "raises/?error=unknown": (500, 1),
    "renderer-fails/": (500, 2),
    "finalize-raises/": (500, 2),
    "another/": (429, 1),
    "another-fails/": (500, 1),
}


@with_and_without
@both_halves
@pytest.mark.parametrize("path", ENDS)
def test_the_slot_is_held_to_the_end_and_no_longer(
    limits: Limits, half: str, ours: list[str], path: str, alice: str
) -> None:
    """Without a garbage collection: what comes back does so by itself."""
    limits(everything(), middleware=ours)
    status, gates = ENDS[path]
    gc.collect()
    gc.disable()
    try:
        assert ask(half, f"/{path}", alice).status == status
        assert switch.seen == [["all"]] * gates
        assert wait_until(nothing_held)
    finally:
        gc.enable()


@with_and_without
def test_a_stream_that_raises(limits: Limits, ours: list[str], alice: str) -> None:
    limits(everything(), middleware=ours)
    with pytest.raises(Deliberate):
        wsgi("/stream/?fail", alice)
    assert switch.seen == [["all"], ["all"]]
    assert nothing_held()


@with_and_without
@pytest.mark.parametrize("path", ["throttled", "stream", "plain"])
def test_a_response_that_nobody_finishes(limits: Limits, ours: list[str], path: str, alice: str) -> None:
    """A middleware further out puts another response in its place; or nobody renders it."""
    limits(everything(), middleware=[named(Replaces), *ours])
    assert wsgi(f"/{path}/", alice).body == b"instead"
    gc.collect()
    assert wait_until(nothing_held)


def test_a_response_that_nobody_renders(limits: Limits, alice: str) -> None:
    from .drf_urls import Throttled

    limits(everything())
    request = RequestFactory().get("/throttled/", headers=headers_of(alice))
    request.resolver_match = SimpleNamespace(view_name="throttled", func=None, kwargs={})  # type: ignore[assignment]
    response = Throttled.as_view()(request)
    assert held() == ["all"]
    del response, request
    gc.collect()
    assert wait_until(nothing_held)


@with_and_without
def test_what_drf_does_not_catch(limits: Limits, ours: list[str], alice: str) -> None:
    """gunicorn's worker timeout raises SystemExit inside the view."""
    limits(everything(), middleware=ours)
    with pytest.raises(SystemExit) as caught:
        wsgi("/raises/?error=exit", alice)
    assert switch.seen == [["all"]]
    caught.value.__traceback__ = None
    del caught
    from .drf_urls import Raises

    Raises.errors["exit"].__traceback__ = None
    gc.collect()
    assert wait_until(nothing_held)


@with_and_without
def test_a_client_that_leaves(limits: Limits, ours: list[str], alice: str) -> None:
    """The view runs on in its thread, and its slot stays until it has ended."""
    limits(everything(), middleware=ours)
    switch.stop_at = 0

    async def main() -> None:
        exchange = Exchange(ASGIHandler(), "/throttled/", headers=headers_of(alice))
        assert await await_until(switch.entered.is_set)
        assert held() == ["all"]
        threading.Timer(0.2, switch.go.set).start()
        exchange.leave()
        await exchange.end()
        del exchange
        assert await await_until(lambda: len(switch.seen) == 2)
        gc.collect()
        assert await await_until(nothing_held)

    run_async(main)
    assert switch.seen == [["all"], ["all"]], "given back while the view still ran in its thread"


def raising_key(request: HttpRequest) -> str:
    raise Deliberate("in a key")


@with_and_without
def test_what_a_callable_of_the_project_raises_is_the_views(limits: Limits, ours: list[str], alice: str) -> None:
    limits(everything(key=f"{__name__}.raising_key"), middleware=ours)
    assert wsgi("/throttled/", alice).status == 500
    assert nothing_held()


@with_and_without
def test_atomic_requests(limits: Limits, ours: list[str], alice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    limits(per_user(), middleware=ours)
    assert wsgi("/atomic/?fail", alice).status == 404
    assert not User.objects.filter(username="made-inside").exists()
    assert wsgi("/atomic/", alice).json["policies"] == [["mine", "user:1", "held", 1, 1]]
    assert User.objects.filter(username="made-inside").exists()
    limits(per_user(0), middleware=ours)
    assert wsgi("/atomic/", alice).status == 429
    assert nothing_held()


# -- the rejection ------------------------------------------------------------------------------------------------


def our_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    response = exception_handler(error, context)
    if response is not None:
        response.data = {"error": response.data["detail"].code}
        response["X-Handled"] = "yes"
    return response


@with_and_without
@both_halves
def test_it_follows_the_projects_exception_handler(limits: Limits, half: str, ours: list[str], alice: str) -> None:
    limits(per_user(0), middleware=ours)
    with override_settings(REST_FRAMEWORK={"EXCEPTION_HANDLER": f"{__name__}.our_handler"}):
        answer = ask(half, "/throttled/", alice)
    assert (answer.status, answer.json) == (429, {"error": "throttled"})
    assert answer.headers["x-handled"] == "yes"
    assert answer.headers["ratelimit"] == '"mine";r=0'


def no_callback(request: HttpRequest) -> HttpResponse:
    raise AssertionError("response_callback does not apply")


@with_and_without
def test_where_waiting_cannot_help(limits: Limits, ours: list[str], alice: str) -> None:
    limits(per_user(0, response_callback=f"{__name__}.no_callback"), middleware=ours)
    answer = wsgi("/throttled/", alice)
    assert (answer.status, answer.json) == (429, {"detail": "Request was throttled."})
    assert "retry-after" not in answer.headers


@with_and_without
@both_halves
def test_a_503_is_an_exception_of_drf_too(limits: Limits, half: str, ours: list[str], alice: str) -> None:
    limits(per_user(status=503), middleware=ours)
    _first, answer = during(half, ("/throttled/", alice), ("/throttled/", alice))
    assert answer.status == 503
    assert answer.json["detail"].startswith("As many of your requests as are allowed")
    assert answer.headers["retry-after"] in "12345"
    assert answer.headers["ratelimit"] == '"mine";r=0'
    assert wait_until(nothing_held)


class Down(MemoryBackend):
    def take(self, slots: Any) -> Any:
        raise OSError("down")


@with_and_without
def test_a_store_that_fails_under_deny(limits: Limits, ours: list[str], alice: str) -> None:
    limits(
        per_user(),
        middleware=ours,
        ON_BACKEND_ERROR="deny",
        BACKENDS={"default": {"BACKEND": named(Down), "KEY_PREFIX": f"drf-{next(_numbers)}"}},
    )
    answer = wsgi("/throttled/", alice)
    assert answer.status == 503
    assert answer.json == {"detail": "This request cannot be admitted just now. Please try again soon."}


@with_and_without
@pytest.mark.parametrize("status", [429, 503])
def test_djangos_logger_does_not_hear_of_it(
    limits: Limits,
    ours: list[str],
    alice: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It would mail ADMINS for each 503."""
    monkeypatch.setattr(logging.getLogger("django.request"), "disabled", False)
    limits(per_user(0, status=status), middleware=ours)
    assert wsgi("/throttled/", alice).status == status
    assert [record for record in caplog.records if record.name == "django.request"] == []


@with_and_without
@pytest.mark.parametrize("headers", ["rejected", "always", "never"])
def test_the_fields_follow_the_setting(limits: Limits, ours: list[str], headers: str, alice: str) -> None:
    limits(per_user(3), middleware=ours, HEADERS=headers)
    admitted = wsgi("/throttled/", alice)
    assert admitted.headers.get("ratelimit") == ('"mine";r=2' if headers == "always" else None)
    limits(per_user(0), middleware=ours, HEADERS=headers)
    rejected = wsgi("/throttled/", alice)
    assert rejected.headers.get("ratelimit") == (None if headers == "never" else '"mine";r=0')
    assert rejected.headers["cache-control"] == "no-store"


# -- the decorator ------------------------------------------------------------------------------------------------

INSIDE = {
    "method": f"{HERE}.Method.get",
    "method-decorator": f"{HERE}.MethodDecorator.get",
    "below": f"{HERE}.below",
    "v1/actions": f"{HERE}.Actions.list",
    "v1/actions/inside": f"{HERE}.Actions.inside",
    "v1/actions/outside": f"{HERE}.Actions.outside",
}
OUTSIDE = {"dispatch": f"{HERE}.Dispatch", "above": f"{HERE}.above"}


@with_and_without
@both_halves
@pytest.mark.parametrize("path", INSIDE)
def test_a_decorator_inside_the_view_knows_the_user(
    limits: Limits, half: str, ours: list[str], path: str, alice: str, bob: str
) -> None:
    """On a method, an action or below @api_view it stands after authentication."""
    limits(middleware=ours)
    first, other, again = during(half, (f"/{path}/", alice), (f"/{path}/", bob), (f"/{path}/", alice))
    assert first.json["policies"] == [[INSIDE[path], "user:1", "held", 1, 1]]
    assert other.json["policies"] == [[INSIDE[path], "user:2", "held", 1, 1]]
    assert again.status == 429
    assert again.headers["ratelimit"] == f'"{INSIDE[path]}";r=0'
    assert wait_until(nothing_held)


@with_and_without
@both_halves
@pytest.mark.parametrize("path", OUTSIDE)
def test_a_decorator_outside_the_view_does_not(
    limits: Limits, half: str, ours: list[str], path: str, alice: str, bob: str
) -> None:
    """On dispatch or above @api_view it stands before authentication: who has a token is anonymous, counted by address."""
    limits(middleware=ours)
    first, other = during(half, (f"/{path}/", alice), (f"/{path}/", bob))
    assert first.json["policies"] == [[OUTSIDE[path], "ip:203.0.113.9", "held", 1, 1]]
    assert other.status == 429
    assert wait_until(nothing_held)


@with_and_without
@both_halves
def test_a_decorator_below_api_view_holds_while_rendering(
    limits: Limits, half: str, ours: list[str], alice: str
) -> None:
    limits(middleware=ours)
    assert ask(half, "/below/", alice).status == 200
    assert switch.seen == [[INSIDE["below"]]] * 2
    assert wait_until(nothing_held)


@with_and_without
def test_an_exemption_above_the_view_counts_for_the_throttle_too(limits: Limits, ours: list[str], alice: str) -> None:
    limits(per_user(0), middleware=ours)
    assert wsgi("/exempt/", alice).json == {"limited": False, "policies": []}
    limits(per_user(0, overridable=False), middleware=ours)
    assert wsgi("/exempt/", alice).status == 429


# -- the checks ---------------------------------------------------------------------------------------------------


def checked() -> list[Any]:
    messages = [m for m in run_checks(tags=["concurrency"]) if str(m.id)[-4:] in ("W001", "W004", "W005")]
    assert all(message.hint for message in messages)
    return messages


def policy(*url_names: str, **fields: Any) -> dict[str, Any]:
    return {"policies": {"p": {"url_names": [*url_names], "key": "global", "max_concurrent": 1, **fields}}}


@pytest.mark.parametrize(
    "fields",
    [{"key": "user"}, {"key": "team:{user.team_id}"}, {"when": "authenticated"}, {"when": "anonymous"}],
    ids=str,
)
def test_w004_a_policy_that_needs_the_user_on_a_view_without_the_throttle(
    limits: Limits, fields: dict[str, str]
) -> None:
    limits(policy("bare", "throttled", "sessions", "v1:exports-*", **fields))
    (warning,) = checked()
    assert warning.id == "django_concurrency_mw.W004"
    assert warning.msg.startswith("CONCURRENCY_LIMIT['POLICIES'].policies.p: policy p needs the user")
    assert warning.msg.endswith(": bare, v1:exports-list.")
    assert "django_concurrency_mw.drf.ConcurrencyThrottle" in warning.hint


def test_w004_names_a_few_of_many(limits: Limits) -> None:
    limits(policy("*", key="user"))
    assert re.search(r"here: (\S+, ){4}\S+ and \d more\.$", next(m.msg for m in checked() if m.id.endswith("W004")))


@pytest.mark.parametrize(
    "table",
    [
        policy("bare"),
        policy("bare", key="ip"),
        policy("bare", when=f"{__name__}.no_callback"),
        policy("bare", key="user", methods=["POST"]),
        policy("throttled", "function", "given", "v1:exports-run", "v1:reports-list", key="user"),
        policy("sessions", key="user"),
        policy("dispatch", "above", key="user"),
        policy("nowhere", key="user"),
    ],
    ids=str,
)
def test_w004_is_silent_where_all_is_well(limits: Limits, table: dict[str, Any]) -> None:
    limits(table)
    assert checked() == []


def test_w004_a_mark_does_not_help_against_a_policy_that_it_cannot_replace(limits: Limits) -> None:
    limits(policy("dispatch", key="user", overridable=False))
    assert [message.id for message in checked()] == ["django_concurrency_mw.W004"]


def test_w005_throttles_that_the_middleware_cannot_see(limits: Limits) -> None:
    limits(policy("hidden"))
    (warning,) = checked()
    assert warning.id == "django_concurrency_mw.W005"
    assert warning.msg.endswith(": hidden.")
    limits(policy("throttled", "hidden-free"))
    assert checked() == []


def test_w001_is_silent_where_the_throttle_stands_alone(limits: Limits, request: pytest.FixtureRequest) -> None:
    limits(policy("throttled"), middleware=[])
    assert checked() == []
    with override_settings(ROOT_URLCONF="tests.urls"):
        assert [message.id for message in checked()] == ["django_concurrency_mw.W001"]


def test_the_checks_do_without_drf(run_python: Run) -> None:
    """Not installed, it cannot be imported; nor does the package import it."""
    done = run_python(
        "-c",
        "import sys\nsys.modules['rest_framework'] = None\nimport django\nfrom django.conf import settings\n"
        "settings.configure(INSTALLED_APPS=['django_concurrency_mw'], SECRET_KEY='x', ROOT_URLCONF='tests.other_urls',"
        " MIDDLEWARE=['django_concurrency_mw.middleware.ConcurrencyLimitMiddleware'], DATABASES={},"
        " SILENCED_SYSTEM_CHECKS=['django_concurrency_mw.W014'],"  # there is no user, which is not what this is about
        " CONCURRENCY_LIMIT={'POLICIES': {'policies': {'p': {'url_names': ['*'], 'key': 'user', 'max_concurrent': 1}}}})\n"
        "django.setup()\nimport types\n"
        "urls = sys.modules['tests.other_urls'] = types.ModuleType('tests.other_urls'); urls.urlpatterns = []\n"
        "from django.core.management import call_command\ncall_command('check', fail_level='WARNING')",
    )
    assert done.returncode == 0, done.stderr


# -- the page of the documentation --------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "drf.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def documented() -> Iterator[dict[str, Any]]:
    """What the Python of the page makes, with its policies in a site of its own."""
    from django.urls import path

    names: dict[str, Any] = {"__name__": "documented"}
    for block in blocks("python"):
        exec(block, names)
    urls = [
        path("reports/", names["ReportView"].as_view(), name="reports"),
        path("export/", names["export"], name="export"),
        path("build/", names["BuildViewSet"].as_view({"get": "build"}), name="build"),
    ]
    module = ModuleType("documented_urls")
    vars(module)["urlpatterns"] = urls
    with override_settings(ROOT_URLCONF=module):
        yield names


@with_and_without
def test_the_examples_of_the_page_do_what_it_says(
    documented: dict[str, Any], limits: Limits, ours: list[str], alice: str, tmp_path: Path
) -> None:
    (yaml,) = blocks("yaml")
    (tmp_path / "policies.yaml").write_text(yaml)
    limits(tmp_path / "policies.yaml", middleware=ours)
    assert checked() == []
    for path in ("/reports/", "/export/", "/build/"):
        assert wsgi(path, alice).json["key"] == "user:1", path
    (tmp_path / "none.yaml").write_text(yaml.replace("max_concurrent: 2", "max_concurrent: 0"))
    limits(tmp_path / "none.yaml", middleware=ours)
    assert wsgi("/reports/", alice).status == 429
    assert documented["REST_FRAMEWORK"]["DEFAULT_THROTTLE_CLASSES"] == ["django_concurrency_mw.drf.ConcurrencyThrottle"]
