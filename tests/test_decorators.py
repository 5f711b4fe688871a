"""The decorator takes its slot where it stands, in every form it can be written, with the middleware and without it."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, iscoroutinefunction, sync_to_async
from django.contrib.auth.models import User
from django.core.cache import cache
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.test import Client, RequestFactory, override_settings
from django.utils.decorators import method_decorator
from django.views import View

from django_concurrency_mw import concurrency_limit, concurrency_limit_exempt
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.decorators import limits as all_limits
from django_concurrency_mw.exceptions import DecoratorUsageError
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.signals import slot_acquired

from .asgi_driver import Exchange, fetch
from .chaos import LONG
from .decorated_urls import FORMS, ainner
from .support import OURS, SOON, Limits, await_until, everything, nothing_held, run_async, wait_until
from .views import Deliberate, held, switch, told

pytestmark = [
    pytest.mark.urls("tests.decorated_urls"),
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
    # ASGIHandler leaves the request's body file to the collector when a stream raises.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function SpooledTemporaryFile"),
    pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile"),
]

HERE = "tests.decorated_urls"
SESSIONS = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
with_and_without = pytest.mark.parametrize("ours", [[OURS], []], ids=["with the middleware", "without"])
both_halves = pytest.mark.parametrize("half", ["wsgi", "asgi"])


class Answer:
    """Status, header fields and body of a request that has been made, whichever way."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def policies(self) -> list[list[Any]]:
        return json.loads(self.body)["policies"]  # type: ignore[no-any-return]


def ask(half: str, path: str, *, method: str = "GET", cookies: dict[str, str] | None = None) -> Answer:
    """One whole request through WSGI or ASGI."""
    if half == "wsgi":
        client = Client(raise_request_exception=False)
        client.cookies.load(cookies or {})
        response = client.generic(method, path)
        return Answer(response.status_code, response.headers, response.getvalue())
    sent = {"cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())} if cookies else {}

    async def main() -> Answer:
        exchange = await fetch(path, method=method, headers=sent)
        return Answer(exchange.status, exchange.headers, exchange.body)

    return run_async(main)  # type: ignore[no-any-return]


class Occupied:
    """Somebody is inside a view, at its gate, for the length of the block."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.answers: list[Answer] = []

    def __enter__(self) -> Occupied:
        switch.stop_at = 0
        self.thread = threading.Thread(target=lambda: self.answers.append(ask("wsgi", self.path)))
        self.thread.start()
        assert switch.entered.wait(SOON)
        switch.stop_at = None
        return self

    def __exit__(self, *args: object) -> None:
        switch.go.set()
        self.thread.join(SOON)


def request(method: str = "GET", **attributes: Any) -> HttpRequest:
    made = RequestFactory().generic(method, "/")
    vars(made).update(attributes)
    return made


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @with_and_without
    @both_halves
    def test_takes_its_slots_under_its_default_names(
        self, limits: Limits, half: str, ours: list[str], form: str
    ) -> None:
        """Held while the view runs, given back after it, and the table's overridable policies are left out."""
        limits(middleware=ours)
        number = list(FORMS).index(form)
        answer = ask(half, f"/form/{number}/")
        assert answer.status == 200
        names = [f"{HERE}.{name}" for name in FORMS[form][1]]
        assert switch.seen[0] == sorted(names)
        assert answer.policies[0][0] == names[0], "the innermost takes last"
        assert answer.policies[0][2:4] == ["held", 1]
        assert wait_until(nothing_held)

    @pytest.mark.parametrize("form", FORMS)
    @both_halves
    def test_rejects_when_it_is_full(self, limits: Limits, half: str, form: str) -> None:
        """While one is inside, the next one over the lowest limit is turned away, and leaves no slot behind."""
        limits(middleware=[])
        number = list(FORMS).index(form)
        with Occupied(f"/form/{number}/") as occupied:
            before = held()
            assert ask(half, f"/form/{number}/").status == 429
            assert wait_until(lambda: held() == before)
        assert [answer.status for answer in occupied.answers] == [200]
        assert wait_until(nothing_held)

    def test_a_method_without_the_decorator_takes_none(self, limits: Limits) -> None:
        limits()
        number = list(FORMS).index("on a method")
        assert ask("wsgi", f"/form/{number}/", method="POST").status == 200
        assert switch.seen == [[]]

    def test_a_function_in_a_function(self, limits: Limits) -> None:
        """`<locals>` and whatever else no policy's name may have become `_`."""
        limits()

        @concurrency_limit(key="global", max_concurrent=1)
        def view(request: HttpRequest) -> HttpResponse:
            return told(request)

        concurrency = request()
        view(concurrency)
        assert [result.policy for result in concurrency.concurrency.policies] == [  # type: ignore[attr-defined]
            "tests.test_decorators.TestForms.test_a_function_in_a_function._locals_.view"
        ]

    def test_types_and_attributes_are_kept(self) -> None:
        """Function stays function, coroutine function stays coroutine function, as do name, doc and attributes."""

        def view(request: HttpRequest) -> HttpResponse:
            """Doc."""
            return HttpResponse()

        async def aview(request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        view.csrf_exempt = True  # type: ignore[attr-defined]
        for decorate in (concurrency_limit(key="ip", max_concurrent=1), concurrency_limit_exempt):
            made: Any = decorate(view)
            assert (made.__name__, made.__doc__, made.csrf_exempt) == ("view", "Doc.", True)
            assert not iscoroutinefunction(made)
            assert iscoroutinefunction(decorate(aview))
        assert iscoroutinefunction(FORMS["async as_view"][0])
        assert FORMS["async as_view"][0].view_class.__name__ == "APlain"

    def test_a_plain_function_answers_plainly_on_an_event_loop(self, limits: Limits) -> None:
        """Somebody's async test calls a sync view: it gets the response, not something to await."""
        limits()

        async def main() -> HttpResponse:
            return FORMS["function"][0](request())  # type: ignore[no-any-return]

        assert run_async(main).status_code == 200
        assert switch.seen == [[f"{HERE}.function"]]
        assert nothing_held()

    def test_rest_framework_view_names(self) -> None:
        """All classes that `api_view` makes share one `__qualname__`, and must not share a semaphore."""
        from django_concurrency_mw.naming import path_of

        for name in ("first", "second"):
            made: Any = type("WrappedAPIView", (View,), {})
            made.__name__, made.__module__ = name, "shop.api"
            assert path_of(made.as_view()) == f"shop.api.{name}"

    def test_a_request_of_rest_framework(self, limits: Limits) -> None:
        """Below `api_view`, and on a ViewSet's action, the request is a wrapper around Django's."""
        limits()

        class Wrapper:
            def __init__(self, inside: HttpRequest) -> None:
                self._request = inside

        class Reports:
            @concurrency_limit(key="global", max_concurrent=1)
            def export(self, request: Any) -> HttpResponse:
                return told(request._request)

        inside = request()
        Reports().export(Wrapper(inside))
        assert [result.policy.rpartition(".")[0] for result in inside.concurrency.policies] == [  # type: ignore[attr-defined]
            "tests.test_decorators.TestForms.test_a_request_of_rest_framework._locals_.Reports"
        ]
        assert inside.concurrency.policies[0].policy.endswith(".Reports.export")  # type: ignore[attr-defined]
        assert nothing_held()

    def test_a_request_by_keyword(self, limits: Limits) -> None:
        limits()
        assert FORMS["function"][0](request=request()).status_code == 200
        assert switch.seen == [[f"{HERE}.function"]]

    def test_no_request_at_all(self, limits: Limits) -> None:
        """Says what to write instead."""
        limits()
        with pytest.raises(TypeError, match="method_decorator"):
            FORMS["function"][0]("not a request")


class TestOrder:
    """After the decorators above it: what those turn away, or answer, takes no slot."""

    @with_and_without
    @pytest.mark.django_db(transaction=True)
    def test_login_comes_first(self, limits: Limits, ours: list[str]) -> None:
        limits(middleware=[*SESSIONS, *ours])
        assert Client().get("/private/").status_code == 302
        assert switch.seen == []
        client = Client()
        user = User.objects.create_user("ann")
        client.force_login(user)
        assert client.get("/private/").json()["policies"] == [[f"{HERE}.private", f"user:{user.pk}", "held", 1, 1]]

    @with_and_without
    def test_a_cached_page_takes_no_slot(self, limits: Limits, ours: list[str]) -> None:
        limits(middleware=ours)
        cache.clear()
        taken: list[str] = []

        def note(policy: Any, **kwargs: Any) -> None:
            taken.append(policy.name)

        slot_acquired.connect(note)
        try:
            first, second = ask("wsgi", "/cached/"), ask("wsgi", "/cached/")
        finally:
            slot_acquired.disconnect(note)
            cache.clear()
        assert first.body == second.body
        assert taken == [f"{HERE}.cached"]

    @with_and_without
    @both_halves
    def test_the_keywords_of_the_url(self, limits: Limits, half: str, ours: list[str]) -> None:
        limits(middleware=ours)
        assert ask(half, "/by-keyword/blue/").policies == [[f"{HERE}.by_keyword", "blue", "held", 1, 1]]

    @pytest.mark.django_db(transaction=True)
    @both_halves
    def test_same_key_with_the_middleware_and_without(self, limits: Limits, half: str) -> None:
        """A user of a database session, in both halves."""
        user = User.objects.create_user("ben")
        client = Client()
        client.force_login(user)
        cookies = {"sessionid": client.cookies["sessionid"].value}
        seen = []
        for ours in ([OURS], []):
            limits(middleware=[*SESSIONS, *ours])
            seen.append(ask(half, "/private/", cookies=cookies).policies)
        assert seen[0] == seen[1] == [[f"{HERE}.private", f"user:{user.pk}", "held", 1, 1]]


class TestNames:
    def test_one_explicit_name_is_one_semaphore_with_a_limit_for_each(self, limits: Limits) -> None:
        limits(middleware=[])
        with Occupied("/shared/"):
            assert held() == ["shared"]
            assert ask("wsgi", "/shared-too/").status == 429, "its own limit is 1"
            second = ask("wsgi", "/shared/")
            assert second.policies == [["shared", "global", "held", 2, 2]]
        assert nothing_held()

    def test_every_class_has_a_semaphore_of_its_own(self, limits: Limits) -> None:
        """`View.dispatch` is one function for all of them."""
        limits(middleware=[])
        first, second = (list(FORMS).index(form) for form in ("on a class", "two on a class"))
        with Occupied(f"/form/{first}/"):
            assert ask("wsgi", f"/form/{second}/").status == 200

    def test_a_parents_limit_counts_beside_the_childs(self, limits: Limits) -> None:
        """Both dispatch methods are limited by the same key; the inner, lower limit is not forgotten."""
        limits(middleware=[])
        number = list(FORMS).index("on dispatch and on the parent's")
        with Occupied(f"/form/{number}/"):
            answer = ask("wsgi", f"/form/{number}/")
        assert answer.status == 429
        assert b'decorated_urls.DispatchTwice"' in answer.body

    def test_the_name_of_a_policy_of_the_table(self, limits: Limits) -> None:
        """An error when the view is called, which names the cure."""
        limits({"policies": {"shared": {"key": "ip", "max_concurrent": 1}}})
        with pytest.raises(ImproperlyConfigured, match=r"decorated_urls\.py:\d+: .*use policy='shared'"):
            Client().get("/shared/")
        assert nothing_held()

    @pytest.mark.parametrize("form", ["on a method", "two on an async class", *(["on a class"] if LONG else [])])
    def test_two_thousand_requests_leave_nothing_behind(self, limits: Limits, form: str) -> None:
        """`method_decorator` decorates anew on every request: nothing may be registered by that.

        Two thousand in the long run, and fewer of each in the short one; either way less than 10 bytes of each are left.
        """
        number = (2000 if "async" not in form else 500) // (1 if LONG else 3)
        limits(middleware=[])
        url = f"/form/{list(FORMS).index(form)}/"
        client = Client()
        for _ in range(50):
            client.get(url)
        gc.collect()
        before = len(all_limits)
        switch.seen.clear()
        tracemalloc.start()
        try:
            started = tracemalloc.take_snapshot()
            for _ in range(number):
                client.get(url)
                switch.seen.clear()
            gc.collect()
            ours = [tracemalloc.Filter(True, "*/django_concurrency_mw/*")]
            grown = tracemalloc.take_snapshot().filter_traces(ours).compare_to(started.filter_traces(ours), "filename")
        finally:
            tracemalloc.stop()
        assert len(all_limits) == before
        assert sum(entry.size_diff for entry in grown) < (20_000 if LONG else 7_000)


class TestPolicyKeyword:
    TABLE = {  # noqa: RUF012  # read only
        "policies": {
            "from-table": {
                "url_names": ["from-table-view"],
                "key": "global",
                "max_concurrent": 1,
                "ttl": 7,
                "status": 503,
                "missing": "skip",
            }
        }
    }

    @with_and_without
    def test_starts_from_the_tables_policy(self, limits: Limits, ours: list[str]) -> None:
        """What was given overrides, what was not does not; one semaphore with the table's own requests; its place."""
        limits(self.TABLE, middleware=ours)
        assert ask("wsgi", "/from-table/").policies == [["from-table", "global", "held", 1, 3]]
        assert ask("asgi", "/afrom-table/").policies == [["from-table", "global", "held", 1, 1]]
        with Occupied("/from-table/"):
            full = ask("asgi", "/afrom-table/")
            assert full.status == 503, "its status is the table's"

    def test_not_given_fields_are_the_tables(self, limits: Limits) -> None:
        limits(self.TABLE)
        from django_concurrency_mw import conf

        made = _limit_of(concurrency_limit(policy="from-table", status=429)).policy("any", conf.current())
        assert (made.ttl, made.status, made.missing, made.max_concurrent) == (7.0, 429, "skip", 1)
        assert made.url_names == ()

    def test_null_is_not_given(self, limits: Limits) -> None:
        """`backend=None` and `response_callback=None` are the defaults, and leave the table's alone."""
        table = {"policies": {"p": {"key": "ip", "max_concurrent": 1, "backend": "other", "response_callback": "a.b"}}}
        limits(table)
        from django_concurrency_mw import conf

        made = _limit_of(concurrency_limit(policy="p", backend=None, response_callback=None)).policy("", conf.current())
        assert (made.backend, made.response_callback) == ("other", "a.b")

    def test_follows_the_settings(self, limits: Limits) -> None:
        """Another table is in force at once."""
        limits(self.TABLE, middleware=[])
        assert ask("asgi", "/afrom-table/").policies[0][4] == 1
        limits({"policies": {"from-table": {"key": "ip", "max_concurrent": 9}}}, middleware=[])
        assert ask("asgi", "/afrom-table/").policies == [["from-table", "ip:203.0.113.9", "held", 1, 9]]

    @pytest.mark.parametrize("policies", [{}, {"from-tables": {"key": "ip", "max_concurrent": 1}}])
    def test_an_unknown_one_is_an_error_at_the_call(self, limits: Limits, policies: dict[str, Any]) -> None:
        """Not at import: the table may come later."""
        limits({"policies": policies})
        with pytest.raises(ImproperlyConfigured, match=r"decorated_urls\.py:\d+: .*no policy 'from-table'") as caught:
            Client().get("/from-table/")
        assert ("did you mean 'from-tables'" in str(caught.value)) is bool(policies)
        assert nothing_held()

    @both_halves
    def test_taken_once_where_the_middleware_took_it_already(self, limits: Limits, half: str) -> None:
        """One slot per policy and key: the middleware's stands, as the table does not let it be replaced."""
        table = {"policies": {"from-table": {**self.TABLE["policies"]["from-table"], "overridable": False}}}
        limits(table, middleware=[OURS])
        assert ask(half, "/from-table/").policies == [["from-table", "global", "held", 1, 1]]
        assert switch.seen == [["from-table"]]


class TestFields:
    @pytest.mark.parametrize("name", ["url_names", "exclude"])
    def test_what_a_decorator_refuses(self, name: str) -> None:
        keyword: dict[str, Any] = {name: ["a"]}
        with pytest.raises(DecoratorUsageError, match=rf"{name}: a decorator stands on its view already"):
            concurrency_limit(key="ip", max_concurrent=1, **keyword)
        with pytest.raises(DecoratorUsageError, match=rf"{name}: a decorator stands on its view already"):
            concurrency_limit(policy="p", **keyword)

    @with_and_without
    @both_halves
    def test_methods(self, limits: Limits, half: str, ours: list[str]) -> None:
        limits(middleware=ours)
        assert ask(half, "/only-post/").policies == []
        assert switch.seen == [[]]
        assert ask(half, "/only-post/", method="POST").policies == [[f"{HERE}.only_post", "global", "held", 1, 4]]

    @pytest.mark.django_db(transaction=True)
    @both_halves
    def test_when(self, limits: Limits, half: str) -> None:
        limits(middleware=SESSIONS)
        assert ask(half, "/only-users/").policies == []
        client = Client()
        client.force_login(User.objects.create_user("cleo"))
        cookies = {"sessionid": client.cookies["sessionid"].value}
        assert ask(half, "/only-users/", cookies=cookies).policies[0][2] == "held"

    def test_switched_off(self, limits: Limits) -> None:
        limits(middleware=[], ENABLED=False)
        assert ask("wsgi", "/closed/").status == 500, "the view is called, and says that it should not be"
        assert ask("wsgi", f"/form/{list(FORMS).index('function')}/").policies == []

    @with_and_without
    @both_halves
    def test_a_shadow_runs_over_its_capacity_without_a_slot(self, limits: Limits, half: str, ours: list[str]) -> None:
        limits(middleware=ours)
        with Occupied("/shadow/"):
            assert ask(half, "/shadow/").policies == [[f"{HERE}.shadow", "global", "over", 1, 1]]
            assert held() == [f"{HERE}.shadow"]
        assert nothing_held()

    def test_a_decorator_that_does_not_apply_still_tells(self, limits: Limits) -> None:
        """`request.concurrency` is there, and empty."""
        limits(middleware=[])
        asked = request()
        from .decorated_urls import only_post

        only_post(asked)
        assert asked.concurrency.limited is False  # type: ignore[attr-defined]

    @both_halves
    def test_an_unknown_store_is_an_error_at_the_call(self, limits: Limits, half: str) -> None:
        limits(middleware=[], BACKENDS={"main": {"BACKEND": "memory"}})
        with pytest.raises(ImproperlyConfigured, match="unknown backend 'default'"):
            FORMS["function"][0](request())
        assert ask(half, "/shared/").status == 500


class TestUsage:
    """Mistakes are found where the decorator stands, with its place."""

    def test_bare(self) -> None:
        with pytest.raises(DecoratorUsageError, match="needs arguments") as caught:

            @concurrency_limit
            def view(request: HttpRequest) -> HttpResponse:
                return HttpResponse()

        assert _named_here(caught.value)

    def test_bare_on_a_class(self) -> None:
        with pytest.raises(DecoratorUsageError, match="needs arguments") as caught:

            @method_decorator(concurrency_limit, name="dispatch")
            class Bare(View):
                pass

        assert _named_here(caught.value), "the place is not inside Django"

    def test_nothing_given(self) -> None:
        with pytest.raises(DecoratorUsageError) as caught:
            concurrency_limit()
        assert len(caught.value.problems) == 2, "key and max_concurrent, both at once"

    def test_a_callable_key_without_a_limit(self) -> None:
        with pytest.raises(DecoratorUsageError, match="max_concurrent is required"):
            concurrency_limit(key=lambda request: "x", ttl=5)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"key": "usr"}, "usr"),
            ({"max_concurrent": -1}, "expected an integer >= 0, or null, got -1"),
            ({"max_concurent": 3}, "unknown field; did you mean 'max_concurrent'"),
            ({"ttl": 0}, "ttl"),
            ({"block": "no"}, "expected true or false"),
            ({"status": 418}, "expected 429 or 503"),
            ({"name": "a b"}, "name="),
            ({"name": ""}, "name="),
            ({"name": "n", "policy": "p"}, "not both"),
            ({"policy": 5}, "name"),
            ({"wait": -1}, "expected no negative number of seconds"),
            ({"wait": 2, "block": False}, "contradicts"),
            ({"missing": "reject", "block": False}, "contradicts"),
        ],
    )
    def test_bad_keywords(self, keywords: dict[str, Any], message: str) -> None:
        """Each an error at once, a TypeError and ImproperlyConfigured alike, with the file and the line."""
        with pytest.raises(DecoratorUsageError) as caught:
            concurrency_limit(**{"key": "ip", "max_concurrent": 1, **keywords})
        assert message in str(caught.value)
        assert _named_here(caught.value)
        assert isinstance(caught.value, (TypeError, ImproperlyConfigured))

    @pytest.mark.parametrize("decorate", [concurrency_limit(key="ip", max_concurrent=1), concurrency_limit_exempt])
    def test_a_class_or_no_view(self, decorate: Callable[[Any], Any]) -> None:
        with pytest.raises(DecoratorUsageError, match=r"method_decorator\(concurrency_limit") as caught:
            decorate(View)
        assert _named_here(caught.value)
        with pytest.raises(DecoratorUsageError, match="it decorates views, got null"):
            decorate(None)


class TestMarks:
    TABLE = {  # noqa: RUF012  # read only
        "policies": {
            "loose": {"url_names": ["*"], "key": "global", "max_concurrent": 5},
            "strict": {"url_names": ["*"], "key": "global", "max_concurrent": 5, "overridable": False},
        }
    }

    @both_halves
    @pytest.mark.parametrize("path", ["/exempt/", "/aexempt/", "/exempt-class/"])
    def test_an_exemption_drops_what_can_be_replaced(self, limits: Limits, half: str, path: str) -> None:
        limits(self.TABLE)
        assert ask(half, path).policies == [["strict", "global", "held", 1, 5]]
        assert switch.seen == [["strict"]]

    @both_halves
    @pytest.mark.parametrize("form", ["function", "async function", "on a class", "two on an async class", "as_view"])
    def test_a_decorator_replaces_what_can_be_replaced(self, limits: Limits, half: str, form: str) -> None:
        limits(self.TABLE)
        ask(half, f"/form/{list(FORMS).index(form)}/")
        assert switch.seen == [sorted(["strict", *(f"{HERE}.{name}" for name in FORMS[form][1])])]

    @both_halves
    def test_a_mark_that_cannot_be_seen_only_adds(self, limits: Limits, half: str) -> None:
        limits(self.TABLE)
        ask(half, f"/form/{list(FORMS).index('on a method')}/")
        ask(half, "/hidden/")
        assert switch.seen == [
            sorted(["strict", "loose", f"{HERE}.OnMethod.get"]),
            sorted(["strict", "loose", f"{HERE}.with_option"]),
        ]

    @both_halves
    def test_without_either_the_table_is_in_force(self, limits: Limits, half: str) -> None:
        limits(self.TABLE)
        assert [result[0] for result in ask(half, "/plain/").policies] == ["loose", "strict"]

    @both_halves
    def test_what_the_request_is_told_is_the_decorators(self, limits: Limits, half: str) -> None:
        """Its take replaces the middleware's, whose slot is held all the same."""
        limits(self.TABLE)
        answer = ask(half, f"/form/{list(FORMS).index('function')}/")
        assert [result[0] for result in answer.policies] == [f"{HERE}.function"]


class TestLife:
    """The decorator alone owns the slot: until the response is finished, however that comes about."""

    @both_halves
    @pytest.mark.parametrize("path", ["/page/", "/apage/"])
    def test_a_template_response_is_rendered_with_its_slot(self, limits: Limits, half: str, path: str) -> None:
        limits(middleware=[])
        assert b"decorated_urls" in ask(half, path).body
        assert wait_until(nothing_held)

    def test_a_template_response_that_nobody_renders(self, limits: Limits) -> None:
        from .decorated_urls import page

        limits(middleware=[])
        response = page(request())
        assert isinstance(response, TemplateResponse)
        assert held() == [f"{HERE}.page"]
        del response
        gc.collect()
        assert wait_until(nothing_held)

    @with_and_without
    @pytest.mark.parametrize("path", ["/stream/", "/astream/"])
    def test_a_stream_ends_it(self, limits: Limits, ours: list[str], path: str) -> None:
        """Held at each of its bytes, and given back when it is closed."""
        limits(middleware=ours)
        name = f"{HERE}.{path.strip('/')}"

        async def main() -> None:
            exchange = await fetch(path)
            assert exchange.body == b"one two three"
            assert switch.seen == [[name], [name]]
            assert await await_until(nothing_held)

        run_async(main)

    @pytest.mark.parametrize("path", ["/stream/", "/astream/"])
    def test_a_stream_that_nobody_reads(self, limits: Limits, path: str) -> None:
        limits(middleware=[])
        response = Client().get(path)
        assert response.streaming
        assert held() == [f"{HERE}.{path.strip('/')}"]
        del response
        gc.collect()
        assert wait_until(nothing_held)

    @pytest.mark.parametrize("path", ["/stream/", "/astream/"])
    def test_a_stream_that_raises(self, limits: Limits, path: str) -> None:
        limits(middleware=[])

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"{path}?fail")
            await exchange.end()
            assert switch.seen[0] == [f"{HERE}.{path.strip('/')}"]
            assert await await_until(nothing_held)

        run_async(main)

    @with_and_without
    @both_halves
    @pytest.mark.parametrize("path", ["/fails/", "/afails/"])
    def test_a_view_that_raises(self, limits: Limits, half: str, ours: list[str], path: str) -> None:
        limits(middleware=ours)
        assert ask(half, path).status == 500
        assert switch.seen == [[f"{HERE}.{path.strip('/')}"]]
        assert nothing_held()

    def test_a_view_that_raises_called_by_hand(self, limits: Limits) -> None:
        """What the view raised is what comes out, and the slot is back by then."""
        from .decorated_urls import afails, fails

        limits(middleware=[])
        with pytest.raises(Deliberate):
            fails(request())
        assert nothing_held()
        with pytest.raises(Deliberate):
            run_async(lambda: afails(request()))
        assert nothing_held()

    @pytest.mark.parametrize("form", ["function", "async function", "on a class", "on an async class", "async partial"])
    def test_a_client_that_leaves_while_the_view_runs(self, limits: Limits, form: str) -> None:
        """A sync view runs on in its thread and keeps its slot; an async one ends at its await."""
        limits(middleware=[])
        switch.stop_at = 0
        name = f"{HERE}.{FORMS[form][1][0]}"

        async def main() -> None:
            exchange = Exchange(ASGIHandler(), f"/form/{list(FORMS).index(form)}/")
            assert await await_until(switch.entered.is_set)
            assert held() == [name]
            threading.Timer(0.2, switch.go.set).start()
            exchange.leave()
            await exchange.end()
            assert await await_until(nothing_held)
            if form in ("function", "on a class"):
                assert switch.seen == [[name], [name]], "given back while the view still ran in its thread"

        run_async(main)

    def test_a_task_that_is_cancelled(self, limits: Limits) -> None:
        from .decorated_urls import afunction

        limits(middleware=[])
        switch.stop_at = 0

        async def main() -> None:
            task = asyncio.get_running_loop().create_task(afunction(request()))
            assert await await_until(switch.entered.is_set)
            assert held() == [f"{HERE}.afunction"]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await await_until(nothing_held)

        run_async(main)

    def test_a_task_that_is_cancelled_while_its_thread_runs(self, limits: Limits) -> None:
        """What the view does in a thread cannot be cancelled: the slot is given back behind it."""
        limits(middleware=[])
        switch.stop_at = 0

        @concurrency_limit(key="global", max_concurrent=1, name="threaded")
        async def view(request: HttpRequest) -> HttpResponse:
            await sync_to_async(switch.gate)(0)
            return HttpResponse()

        async def main() -> None:
            async with ThreadSensitiveContext():
                task = asyncio.get_running_loop().create_task(view(request()))
                assert await await_until(switch.entered.is_set)
                task.cancel()
                threading.Timer(0.1, switch.go.set).start()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await await_until(nothing_held)

        run_async(main)
        assert switch.seen == [["threaded"], ["threaded"]]

    def test_an_exception_keeps_no_event_loop_waiting(self, limits: Limits) -> None:
        """The store of an async view is given the slot back as stores are on a loop."""
        limits(middleware=[], BACKENDS={"default": {"BACKEND": f"{__name__}.NotOnALoop"}})

        @concurrency_limit(key="global", max_concurrent=1, name="raises")
        async def view(request: HttpRequest) -> HttpResponse:
            raise Deliberate("as it should")

        with pytest.raises(Deliberate):
            run_async(lambda: view(request()))
        assert nothing_held()

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_what_is_no_exception_of_djangos(
        self, limits: Limits, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits(middleware=[])
        seen: list[list[str]] = []

        def gate(number: int) -> None:
            seen.append(held())
            raise error

        monkeypatch.setattr(switch, "gate", gate)
        with pytest.raises(error):
            FORMS["function"][0](request())
        assert seen == [[f"{HERE}.function"]]
        assert nothing_held()

    def test_a_generator_exit_inside_a_view(self, limits: Limits) -> None:
        @concurrency_limit(key="global", max_concurrent=1, name="exits")
        async def view(request: HttpRequest) -> HttpResponse:
            await asyncio.sleep(0)
            return HttpResponse()

        limits(middleware=[])
        coroutine = view(request())
        coroutine.send(None)  # as far as its first await
        assert held() == ["exits"]
        coroutine.close()
        assert nothing_held()

    @pytest.mark.parametrize("path", ["/early/", "/aearly/"])
    @with_and_without
    @both_halves
    def test_given_back_early(self, limits: Limits, half: str, ours: list[str], path: str) -> None:
        limits(middleware=ours)
        answer = ask(half, path)
        assert answer.body.replace(b" ", b"") == f'{{"before":["{HERE}.{path.strip("/")}"],"after":[]}}'.encode()
        assert nothing_held()

    @both_halves
    def test_a_rejection_runs_no_view(self, limits: Limits, half: str) -> None:
        limits(middleware=[])
        answer = ask(half, "/closed/")
        assert answer.status == 429
        assert "retry-after" not in {name.lower() for name in answer.headers}
        assert nothing_held()

    def test_a_plain_function_that_returns_a_coroutine(self, limits: Limits) -> None:
        """In a thread and on a loop: the slot is held until that has been awaited."""

        @concurrency_limit(key="global", max_concurrent=1, name="later")
        def view(request: HttpRequest) -> Any:
            return ainner(request)

        limits(middleware=[])
        coroutine = view(request())
        assert held() == ["later"]
        assert run_async(lambda: _value_of(coroutine)).status_code == 200
        assert switch.seen == [["later"]]
        assert nothing_held()

        async def main() -> list[int]:
            first = asyncio.ensure_future(view(request()))
            await asyncio.sleep(0)
            second = await view(request())
            return [(await first).status_code, second.status_code]

        switch.stop_at = 0
        threading.Timer(0.1, switch.go.set).start()
        assert run_async(main) == [200, 429], "a rejection is to be awaited too"
        assert nothing_held()

    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
    def test_a_coroutine_that_nobody_awaits(self, limits: Limits) -> None:
        @concurrency_limit(key="global", max_concurrent=1, name="later")
        def view(request: HttpRequest) -> Any:
            return ainner(request)

        limits(middleware=[])
        coroutine = view(request())
        assert held() == ["later"]
        del coroutine
        gc.collect()
        assert wait_until(nothing_held)

    def test_the_coroutine_of_a_stream(self, limits: Limits) -> None:
        """Awaited, and gone: the stream that it answered goes on with its slot."""

        @concurrency_limit(key="global", max_concurrent=1, name="later")
        def view(request: HttpRequest) -> Any:
            async def answer() -> StreamingHttpResponse:
                return StreamingHttpResponse(iter([b"one", b"two"]))

            return answer()

        limits(middleware=[])
        response = run_async(lambda: _value_of(view(request())))
        gc.collect()
        assert not wait_until(nothing_held, 0.2)
        response.close()
        assert nothing_held()

    def test_two_thousand_times_one(self, limits: Limits) -> None:
        """The cap of 1 holds each time: were one slot lost, the next request would be rejected."""
        limits(middleware=[])
        for number in range(2000):
            assert FORMS["function"][0](request()).status_code == 200, number
            switch.seen.clear()


class TestOnce:
    def test_the_first_take_stands(self, limits: Limits) -> None:
        """Three times the same name and key in one request: one slot, and the first one's limit."""
        limits(middleware=[])
        seen: list[list[str]] = []

        @concurrency_limit(key="global", max_concurrent=2, name="same")
        @concurrency_limit(key="global", max_concurrent=1, name="same")
        def view(request: HttpRequest) -> HttpResponse:
            seen.append(held())
            return told(request)

        asked = request()
        view(asked)
        view(asked)
        assert seen == [["same"], ["same"]]
        (result,) = asked.concurrency.policies  # type: ignore[attr-defined]
        assert (result.limit, result.in_flight) == (2, 1)
        assert nothing_held()

    def test_another_key_is_another_slot(self, limits: Limits) -> None:
        limits(middleware=[])
        seen: list[list[str]] = []

        @concurrency_limit(key="global", max_concurrent=1, name="same")
        @concurrency_limit(key="ip", max_concurrent=1, name="same")
        def view(request: HttpRequest) -> HttpResponse:
            seen.append(held())
            return told(request)

        view(request())
        assert seen == [["same", "same"]]
        assert nothing_held()

    def test_a_rejection_by_the_inner_one_gives_the_outer_ones_back(self, limits: Limits) -> None:
        limits(everything(), middleware=[OURS])
        called = []

        @concurrency_limit(key="global", max_concurrent=1, name="outer")
        @concurrency_limit(key="global", max_concurrent=0, name="inner")
        def view(request: HttpRequest) -> HttpResponse:
            called.append(1)
            return told(request)

        response = view(request())
        assert response.status_code == 429
        assert called == []
        assert nothing_held()


def test_import_resolves_nothing(limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of decorated views can be imported while the settings are wrong, and its dotted paths are not there."""
    (tmp_path / "early_views.py").write_text(
        "from django_concurrency_mw import concurrency_limit\n"
        "@concurrency_limit(policy='nowhere', response_callback='no.where', when='no.where', backend='none')\n"
        "def view(request): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with override_settings(CONCURRENCY_LIMIT={"NONSENSE": 1}):
        module = importlib.import_module("early_views")
    del sys.modules["early_views"]
    limits({"policies": {"nowhere": {"key": "ip", "max_concurrent": 1}}})
    with pytest.raises(ImproperlyConfigured, match="none"):
        module.view(request())


class NotOnALoop(MemoryBackend):
    """Calls of its sync half on an event loop fail."""

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return super().give(slots)
        raise AssertionError("the event loop waits for the store")

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return super().give(slots)


async def _value_of(awaitable: Any) -> Any:
    return await awaitable


def _limit_of(decorate: Any) -> Any:
    """The `Limit` behind a decorator."""
    return decorate.__self__


def _named_here(error: DecoratorUsageError) -> bool:
    return all(problem.place.startswith(f"{__file__}:") for problem in error.problems)
