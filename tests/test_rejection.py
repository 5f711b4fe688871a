"""The answer that turns a request away, field by field and body by body."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core import mail
from django.core.cache import cache
from django.http.request import MediaType
from django.test import Client, RequestFactory, override_settings
from django.utils import translation
from django.utils.autoreload import file_changed
from django.utils.translation import trans_real
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_concurrency_mw import rejection
from django_concurrency_mw.outcomes import Rejection

from .asgi_driver import fetch
from .support import OURS, SOON, Limits, nothing_held, run_async

pytestmark = pytest.mark.urls("tests.rejecting_urls")

both_halves = pytest.mark.parametrize("half", ["wsgi", "asgi"])
PROBLEM = "application/problem+json"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
LOGGER = "django_concurrency_mw"


@pytest.fixture(autouse=True)
def _nothing_logged_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is sampled, so each test starts as a new process does."""
    monkeypatch.setattr(rejection, "_sampled", rejection._Sampled())


@pytest.fixture(autouse=True)
def _language() -> Iterator[None]:
    """LocaleMiddleware leaves its language active in the thread, which here is that of the tests."""
    translation.deactivate()
    yield
    translation.deactivate()


def ask(half: str, path: str = "/view/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, header fields (their names in lower case) and body of one request."""
    if half == "wsgi":
        client = Client(raise_request_exception=False, headers=headers)
        response = client.generic(method, path, REMOTE_ADDR="203.0.113.9")
        return response.status_code, {n.lower(): v for n, v in response.headers.items()}, response.getvalue()

    async def main() -> tuple[int, dict[str, str], bytes]:
        exchange = await fetch(path, method=method, headers=headers)
        return exchange.status, exchange.headers, exchange.body

    return run_async(main)  # type: ignore[no-any-return]


def table(**policies: Any) -> dict[str, Any]:
    """A table of policies for every view."""
    rule = {"url_names": ["*"], "key": "global", "max_concurrent": 5}
    return {"policies": {name: {**rule, **policy} for name, policy in policies.items()}}


def full(limits: Limits, policies: Any = None, **options: Any) -> None:
    """Put a table into force in which `full` is: its slots are held by somebody."""
    from django_concurrency_mw import conf
    from django_concurrency_mw.backends import get_backend
    from django_concurrency_mw.keys import make_key
    from django_concurrency_mw.outcomes import Slot, Taken

    limits(policies or table(full={"max_concurrent": 2}), middleware=options.pop("middleware", [OURS]), **options)
    config = conf.current()
    store = get_backend("default", config.backends)
    for policy in config.table:
        if policy.name.startswith("full"):
            for number in range(policy.max_concurrent):
                slot = Slot(policy.name, make_key("global"), policy.max_concurrent, 60, f"{policy.name}-{number}")
                assert isinstance(store.take([slot]), Taken)
                _occupied.append((store, slot))


_occupied: list[Any] = []


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    yield
    for store, slot in _occupied:
        store.give([slot])
    _occupied.clear()
    assert nothing_held(), "a rejected request has left a slot"


@both_halves
class TestFields:
    def test_of_a_full_policy(self, limits: Limits, half: str) -> None:
        full(limits)
        status, headers, _body = ask(half)
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 5
        assert headers["ratelimit-policy"] == '"full";q=2;qu="concurrent-requests"'
        assert headers["ratelimit"] == '"full";r=0'
        assert headers["cache-control"] == "no-store"
        assert headers["vary"] == "Accept"
        assert headers["content-type"] == PROBLEM

    def test_retry_after_is_spread(self, limits: Limits, half: str) -> None:
        """Whole seconds from 1 to 5 at random, so that those who were rejected together do not come back together."""
        full(limits)
        random.seed(1)
        assert {int(ask(half)[1]["retry-after"]) for _ in range(60)} == {1, 2, 3, 4, 5}

    def test_without_retry_after_where_waiting_cannot_help(self, limits: Limits, half: str) -> None:
        """A limit of 0, a missing key; and if any violated policy is of that kind."""
        full(limits, table(closed={"max_concurrent": 0}))
        status, headers, body = ask(half)
        assert (status, "retry-after" in headers) == (429, False)
        assert headers["ratelimit-policy"] == '"closed";q=0;qu="concurrent-requests"'
        full(limits, table(mine={"key": "header:X-Api-Key", "missing": "reject"}))
        status, headers, body = ask(half)
        assert (status, "retry-after" in headers) == (429, False)
        assert json.loads(body)["reason"] == "key_missing"
        assert "ratelimit" not in headers, "nobody was asked"
        full(limits, table(full={"max_concurrent": 1}, closed={"max_concurrent": 0}))
        assert "retry-after" not in ask(half)[1]

    def test_of_several(self, limits: Limits, half: str) -> None:
        """Status and reason of the first violated one, the names of all of those, the fields of all that were asked."""
        policies = table(
            open={},
            full={"max_concurrent": 1, "status": 503},
            shadow={"max_concurrent": 0, "block": False},
            full_too={"max_concurrent": 2},
        )
        full(limits, policies)
        status, headers, body = ask(half)
        assert status == 503
        answer = json.loads(body)
        assert answer["violated-policies"] == ["full", "full_too"]
        assert answer["status"] == 503
        assert answer["type"] == "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
        assert headers["ratelimit-policy"] == ", ".join(
            f'"{name}";q={limit};qu="concurrent-requests"'
            for name, limit in [("open", 5), ("full", 1), ("full_too", 2)]
        )
        assert headers["ratelimit"] == '"open";r=5, "full";r=0, "full_too";r=0'
        assert "retry-after" in headers

    def test_by_a_decorator_within_the_middleware(self, limits: Limits, half: str) -> None:
        """The table's policies that this request was asked before belong to the lists too."""
        limits(table(strict={"overridable": False}), middleware=[OURS])
        status, headers, _body = ask(half, "/closed-by-decorator/")
        assert status == 429
        assert headers["ratelimit"] == '"strict";r=4, "decorator";r=0'

    def test_head(self, limits: Limits, half: str) -> None:
        full(limits)
        status, headers, _body = ask(half, method="HEAD")
        assert (status, headers["content-type"]) == (429, PROBLEM)

    @pytest.mark.parametrize("mode", ["rejected", "always", "never"])
    def test_headers_setting(self, limits: Limits, half: str, mode: str) -> None:
        """RateLimit fields on rejections, always, or never; Retry-After is not one of them."""
        full(limits, HEADERS=mode)
        headers = ask(half)[1]
        assert ("ratelimit" in headers, "ratelimit-policy" in headers) == ((mode != "never"),) * 2
        assert "retry-after" in headers
        limits(table(open={}), middleware=[OURS], HEADERS=mode)
        headers = ask(half)[1]
        assert headers.get("ratelimit") == ('"open";r=4' if mode == "always" else None)
        assert headers.get("ratelimit-policy") == ('"open";q=5;qu="concurrent-requests"' if mode == "always" else None)
        assert "retry-after" not in headers

    @pytest.mark.parametrize(
        ("path", "there"),
        [
            ("/view/", True),
            ("/aview/", True),
            ("/private/", True),
            ("/redirect/", False),
            ("/public/", False),
            ("/max-age/", False),
            ("/s-maxage/", False),
            ("/dated/", False),
            ("/expires/", False),
            ("/cached/", False),
        ],
    )
    def test_always_but_on_redirects_and_what_a_cache_may_keep(
        self, limits: Limits, half: str, path: str, there: bool
    ) -> None:
        cache.clear()
        limits(table(open={}), middleware=[OURS], HEADERS="always")
        assert ("ratelimit" in ask(half, path)[1]) is there
        cache.clear()

    def test_a_page_that_django_caches(self, limits: Limits, half: str) -> None:
        """Replayed to others, so it has nobody's fields: neither when it is stored nor when it is replayed."""
        cache.clear()
        limits(
            table(open={}),
            middleware=[
                "django.middleware.cache.UpdateCacheMiddleware",
                "django.middleware.cache.FetchFromCacheMiddleware",
                OURS,
            ],
            HEADERS="always",
        )
        for _ in range(2):
            status, headers, body = ask(half)
            assert (status, body) == (200, b"fine")
            assert "ratelimit" not in headers
        cache.clear()

    def test_a_rejection_is_not_cached(self, limits: Limits, half: str) -> None:
        cache.clear()
        full(
            limits,
            middleware=[
                "django.middleware.cache.UpdateCacheMiddleware",
                "django.middleware.cache.FetchFromCacheMiddleware",
                OURS,
            ],
        )
        assert ask(half)[0] == 429
        limits(middleware=["django.middleware.cache.FetchFromCacheMiddleware", OURS])
        assert ask(half)[0] == 200
        cache.clear()


@both_halves
class TestBodies:
    @pytest.mark.parametrize(
        ("accept", "content_type"),
        [
            (None, PROBLEM),
            ("", PROBLEM),
            ("*/*", PROBLEM),
            (PROBLEM, PROBLEM),
            ("application/*", PROBLEM),
            ("application/json", "application/json"),
            ("application/json, */*;q=0.5", "application/json"),
            ("text/html", "text/html; charset=utf-8"),
            (BROWSER, "text/html; charset=utf-8"),
            ("text/plain", "text/plain; charset=utf-8"),
            ("text/plain, text/html;q=0.9", "text/plain; charset=utf-8"),
            ("text/*", "text/html; charset=utf-8"),
            ("image/png", PROBLEM),
            ("application/problem+json;q=0, application/json", "application/json"),
            ("nonsense", PROBLEM),
            (";;;,,,", PROBLEM),
            ("text/html;q=nan", None),
            ("text/html;q=" + "9" * 500, None),
            ("a/b," * 100_000, PROBLEM),
            ("text/html" + ";a=b" * 500, None),
        ],
    )
    def test_follow_what_the_client_accepts(
        self, limits: Limits, half: str, accept: str | None, content_type: str | None
    ) -> None:
        full(limits)
        status, headers, _body = ask(half, **({} if accept is None else {"accept": accept}))
        assert status == 429
        assert headers["vary"] == "Accept"
        if content_type is not None:
            assert headers["content-type"] == content_type

    def test_problem(self, limits: Limits, half: str) -> None:
        """RFC 9457, with the extension members reason and violated-policies."""
        full(limits)
        assert json.loads(ask(half)[2]) == {
            "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
            "title": "Too many requests at the same time",
            "status": 429,
            "detail": "As many of your requests as are allowed at once are in progress. "
            "Please wait for one of them to finish.",
            "reason": "full",
            "violated-policies": ["full"],
        }

    def test_json_is_the_same(self, limits: Limits, half: str) -> None:
        full(limits)
        assert ask(half, accept="application/json")[2] == ask(half)[2]

    def test_text(self, limits: Limits, half: str) -> None:
        full(limits)
        title, detail, rest = ask(half, accept="text/plain")[2].decode().split("\n")
        assert title == "Too many requests at the same time"
        assert detail.startswith("As many of your requests")
        assert rest == ""

    def test_our_own_page(self, limits: Limits, half: str) -> None:
        full(limits)
        page = ask(half, accept=BROWSER)[2].decode()
        assert page.startswith('<!doctype html>\n<html lang="en-us">')
        assert "<h1>Too many requests at the same time</h1>" in page
        assert "{{" not in page
        assert "{%" not in page

    def test_our_own_page_without_any_template_engine(self, limits: Limits, half: str) -> None:
        full(limits)
        with override_settings(TEMPLATES=[]):
            assert b"<h1>Too many" in ask(half, accept=BROWSER)[2]

    def test_the_projects_page(self, limits: Limits, half: str, tmp_path: Path) -> None:
        """Its 429.html as a TemplateResponse, with the request, the texts and the rejection in its context."""
        (tmp_path / "429.html").write_text(
            "{{ request.path }} {{ title }} {{ retry_after }} {{ rejection.policy }} {{ rejection.limit }}"
        )
        engine = {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "DIRS": [tmp_path],
            "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
        }
        full(limits)
        with override_settings(TEMPLATES=[engine]):
            status, headers, body = ask(half, accept=BROWSER)
        assert status == 429
        assert body.decode() == f"/view/ Too many requests at the same time {headers['retry-after']} full 2"
        assert headers["ratelimit"] == '"full";r=0'
        assert headers["vary"] == "Accept"

    def test_the_projects_page_passes_through_template_middleware(
        self, limits: Limits, half: str, tmp_path: Path
    ) -> None:
        """It is an unrendered TemplateResponse until Django renders it."""
        (tmp_path / "429.html").write_text("{{ added }}")
        engine = {"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": [tmp_path]}
        full(limits, middleware=[f"{__name__}.{AddsContext.__name__}", OURS])
        with override_settings(TEMPLATES=[engine]):
            assert ask(half, accept=BROWSER)[2] == b"by a middleware"

    @pytest.mark.parametrize(
        ("policy", "title", "detail"),
        [
            ({"max_concurrent": 0}, "Too many requests", "No request of this kind"),
            ({"key": "header:X-Api-Key", "missing": "reject"}, "Too many requests", "This request lacks"),
        ],
    )
    def test_texts_of_other_reasons(
        self, limits: Limits, half: str, policy: dict[str, Any], title: str, detail: str
    ) -> None:
        limits(table(p=policy), middleware=[OURS])
        answer = json.loads(ask(half)[2])
        assert answer["title"] == title
        assert answer["detail"].startswith(detail)

    @pytest.mark.parametrize("accept", [PROBLEM, "text/html", "text/plain"])
    def test_texts_are_translated(
        self, limits: Limits, half: str, accept: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Into the request's language, in any charset of the project."""
        full(limits, middleware=["django.middleware.locale.LocaleMiddleware", OURS])
        catalog: Any = trans_real.translation("he")
        known = dict(catalog._catalog._catalogs[0])
        known["Too many requests at the same time"] = "יותר מדי בקשות"
        monkeypatch.setattr(catalog._catalog, "_catalogs", [known, *catalog._catalog._catalogs[1:]])
        with override_settings(DEFAULT_CHARSET="latin-1" if accept == PROBLEM else "utf-8"):
            headers = {"accept": accept, "accept-language": "he"}
            page = ask(half, **headers)[2].decode()
        assert "יותר מדי בקשות" in page
        if accept == "text/html":
            assert '<html lang="he" dir="rtl">' in page
        assert "יותר" not in ask(half, accept=accept)[2].decode()


class AddsContext:
    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)

    def process_template_response(self, request: Any, response: Any) -> Any:
        response.context_data["added"] = "by a middleware"
        return response


_words = st.sampled_from(
    ["text/html", "*/*", "application/json", ";", ",", "q=", "=", '"', "\\", "0.5", "/", "*", " ", "é"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(accept=st.one_of(st.text(max_size=60), st.lists(_words, max_size=20).map("".join)))
def test_no_accept_header_breaks_the_answer(accept: str) -> None:
    """Whatever a client writes there: one of our bodies."""
    request = RequestFactory().get("/", HTTP_ACCEPT=accept)
    refused = Rejection("p", "global", "full", 1, 1, 3, 429, ("p",))
    response = rejection.answer(request, refused, (), "rejected")
    assert response.status_code == 429
    assert response.headers["Content-Type"].partition(";")[0] in rejection.MEDIA_TYPES


@both_halves
class TestCallback:
    @pytest.mark.parametrize("callback", ["busy", "abusy"])
    def test_answers_with_the_missing_fields_added(self, limits: Limits, half: str, callback: str) -> None:
        """Its own status and body; sync and async ones in both halves."""
        full(limits, table(full={"max_concurrent": 1, "response_callback": f"tests.rejecting_urls.{callback}"}))
        status, headers, body = ask(half)
        assert (status, body) == (418, b"busy /view/")
        assert 1 <= int(headers["retry-after"]) <= 5
        assert headers["ratelimit"] == '"full";r=0'
        assert headers["cache-control"] == "no-store"
        assert "vary" not in headers, "it did not ask what the client accepts"

    def test_its_own_fields_stay(self, limits: Limits, half: str) -> None:
        full(limits, table(full={"max_concurrent": 1, "response_callback": "tests.rejecting_urls.own_fields"}))
        headers = ask(half)[1]
        assert headers["retry-after"] == "77"
        assert headers["cache-control"] == "private"
        assert (headers["ratelimit"], headers["ratelimit-policy"]) == ("mine", "mine too")

    def test_a_redirect_has_no_ratelimit_fields(self, limits: Limits, half: str) -> None:
        full(limits, table(full={"max_concurrent": 1, "response_callback": "tests.rejecting_urls.elsewhere"}))
        status, headers, _body = ask(half)
        assert (status, headers["location"]) == (302, "/waiting-room/")
        assert "ratelimit" not in headers
        assert "ratelimit-policy" not in headers

    @pytest.mark.parametrize("callback", ["breaks", "abreaks", "no_response", "not_there"])
    def test_one_that_fails(self, limits: Limits, half: str, callback: str, caplog: pytest.LogCaptureFixture) -> None:
        """The built-in rejection is sent, and the failure logged, once in a while."""
        full(limits, table(full={"max_concurrent": 1, "response_callback": f"tests.rejecting_urls.{callback}"}))
        for _ in range(3):
            status, headers, _body = ask(half)
            assert (status, headers["content-type"]) == (429, PROBLEM)
        logged = [record for record in caplog.records if "response_callback failed" in record.getMessage()]
        assert [record.levelname for record in logged] == ["ERROR"]
        assert logged[0].exc_info is not None

    def test_of_several_policies_the_first_violated_ones(self, limits: Limits, half: str) -> None:
        policies = table(
            open={"response_callback": "tests.rejecting_urls.breaks"},
            full={"max_concurrent": 1},
            full_too={"max_concurrent": 1, "response_callback": "tests.rejecting_urls.busy"},
        )
        full(limits, policies)
        assert ask(half)[0] == 429


@both_halves
class TestLog:
    # How mail is set up and ADMINS are written changes from Django 6.0 on; what is tested here does not.
    @pytest.mark.filterwarnings("ignore:Django 2028 will not have a default mailer")
    @pytest.mark.filterwarnings("ignore:Using .name, address. pairs in the ADMINS setting")
    @pytest.mark.parametrize("callback", [None, "tests.rejecting_urls.busy"])
    def test_no_mail_and_nothing_in_djangos_log(
        self, limits: Limits, half: str, callback: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A 503 would be a mail to ADMINS each."""
        from django.utils.log import AdminEmailHandler

        handler = AdminEmailHandler()
        handler.setLevel(logging.WARNING)
        logger = logging.getLogger("django")
        logger.addHandler(handler)
        full(limits, table(full={"max_concurrent": 1, "status": 503, "response_callback": callback}))
        try:
            with override_settings(ADMINS=[("Ann", "ann@example.com")], DEBUG=False):
                mail.outbox.clear()
                assert ask(half)[0] == (503 if callback is None else 418)
                assert mail.outbox == []
                assert [record.name for record in caplog.records] == [LOGGER]
                assert ask(half, "/nowhere/")[0] == 404
                assert len(mail.outbox) == 1, "and the handler is at work"
        finally:
            logger.removeHandler(handler)

    def test_sampled_and_masked(
        self, limits: Limits, half: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One line for many rejections, with their number, and no key in clear."""
        now = [1000.0]
        monkeypatch.setattr(rejection, "monotonic", lambda: now[0])
        limits(table(p={"key": "ip", "max_concurrent": 0}), middleware=[OURS])
        for _ in range(5):
            ask(half)
        now[0] += rejection.LOG_EVERY
        ask(half)
        lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert [line.partition(" rejected")[0] for line in lines] == ["policy p: 1", "policy p: 5"]
        assert "203.0.113.9" not in "".join(lines)
        assert lines[0].rpartition(" ")[2].startswith("ip~")

    def test_a_shadow_is_told_apart(self, limits: Limits, half: str, caplog: pytest.LogCaptureFixture) -> None:
        limits(table(p={"max_concurrent": 0, "block": False}), middleware=[OURS])
        assert ask(half)[0] == 200
        assert "shadow" in caplog.records[-1].getMessage()


def test_the_log_does_not_grow_with_keys(limits: Limits) -> None:
    """What the sampling remembers is bounded by policies and reasons."""
    limits(table(p={"key": "get:k", "max_concurrent": 0}), middleware=[OURS])
    client = Client()
    for number in range(300):
        assert client.get(f"/view/?k={number}").status_code == 429
    assert list(rejection._sampled._seen) == [("p", "full")]


def test_a_garbage_collection_in_the_count_may_end_what_is_rejected_itself() -> None:
    """A stream that nobody has closed, whose own code asks for a slot."""
    sampled = rejection._Sampled()
    counted: list[int] = []

    class Collected(dict[Any, Any]):
        def get(self, *arguments: Any) -> Any:
            if not counted:
                counted.append(0)
                counted.append(sampled.count("q", "full"))
            return super().get(*arguments)

    sampled._seen = Collected()
    thread = threading.Thread(target=lambda: counted.append(sampled.count("p", "full")), daemon=True)
    thread.start()
    thread.join(SOON)
    assert counted == [0, 1, 1]


def test_request_knows_why(limits: Limits) -> None:
    """A callback can say more: `request.concurrency.rejection`."""
    seen: list[Any] = []

    def callback(request: Any) -> Any:
        from django.http import HttpResponse

        seen.append(request.concurrency.rejection)
        return HttpResponse(status=429)

    full(limits, table(full={"max_concurrent": 2, "response_callback": callback}))
    ask("wsgi")
    (told,) = seen
    assert (told.policy, told.key, told.reason, told.limit, told.in_flight) == ("full", "global", "full", 2, 2)
    assert told.violated == ("full",)
    assert told.retry_after in range(1, 6)


def test_texts_are_in_the_catalogue_of_no_language_by_themselves() -> None:
    """They are ordinary msgids: untranslated they read as written."""
    with translation.override(None):
        title, _detail = rejection.texts(Rejection("p", "k", "backend_unavailable", 1, None, 3, 503, ("p",)))
    assert title == "Service temporarily unavailable"


def test_what_clients_accept_takes_no_more_memory_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    monkeypatch.setattr(rejection, "_preferences", known)

    def preferred(accept: str) -> str:
        return rejection._preferred(RequestFactory().get("/", HTTP_ACCEPT=accept))

    for number in range(rejection.MOST_KNOWN + 2):
        assert preferred(f"text/html, x/{number}") == "text/html"
        assert 0 < len(known) <= rejection.MOST_KNOWN
    before = dict(known)
    assert preferred("text/html," + " " * rejection.LONGEST_KNOWN) == "text/html"
    assert preferred("text/html," + " " * rejection.LONGEST_ACCEPT) == PROBLEM
    assert known == before


def test_what_others_say_a_client_accepts_is_not_remembered_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A middleware's own word counts for its request alone; and so do headers that were read before META was changed."""
    monkeypatch.setattr(rejection, "_preferences", {})
    for _ in range(2):
        of_a_middleware = RequestFactory().get("/", HTTP_ACCEPT="*/*")
        of_a_middleware.accepted_types = [MediaType("text/html")]  # type: ignore[misc]  # a cached property
        assert rejection._preferred(of_a_middleware) == "text/html"
        assert rejection._preferred(RequestFactory().get("/", HTTP_ACCEPT="*/*")) == PROBLEM
        changed = RequestFactory().get("/", HTTP_ACCEPT="text/html")
        assert changed.headers["Accept"] == "text/html"
        changed.META["HTTP_ACCEPT"] = "application/json"
        assert rejection._preferred(changed) == "text/html"
        assert rejection._preferred(RequestFactory().get("/", HTTP_ACCEPT="application/json")) == "application/json"


class TestReady:
    """Answers that have been given before are kept ready, and are what they would be if they were made anew."""

    def ask(self, refused: Rejection, accept: str = "*/*", headers: rejection.Headers = "rejected") -> Any:
        request = RequestFactory().get("/", HTTP_ACCEPT=accept)
        return rejection.answer(request, refused, (("p", 5, 0),), headers)

    @pytest.mark.parametrize("accept", [PROBLEM, "application/json", "text/plain", "text/html"])
    def test_what_is_done_with_one_is_not_done_with_the_next(self, accept: str) -> None:
        refused = Rejection("p", "k", "full", 5, 5, 3, 429, ("p",))
        first = self.ask(refused, accept)
        before = list(first.headers.items()), first.content
        first.headers["Vary"] = "Cookie"
        del first.headers["Retry-After"]
        first.headers["X-Of-The-Project"] = "1"
        first.content = b"of the project"
        first.set_cookie("a", "b")
        second = self.ask(refused, accept)
        assert (list(second.headers.items()), second.content) == before
        assert not second.cookies

    @pytest.mark.parametrize("what", ["retry_after", "status", "reason", "violated"])
    def test_every_word_counts(self, what: str) -> None:
        refused = Rejection("p", "k", "full", 5, 5, 3, 429, ("p",))
        other = {"retry_after": 4, "status": 503, "reason": "key_missing", "violated": ("p", "q")}
        changed = replace(refused, **{what: other[what]})
        first, second = self.ask(refused), self.ask(changed)
        assert (first.status_code, first.content, list(first.headers.items())) != (
            second.status_code,
            second.content,
            list(second.headers.items()),
        )
        assert "RateLimit" not in self.ask(refused, headers="never").headers

    def test_other_translations_are_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a file that has changed under the development server, and under other settings."""
        refused = Rejection("p", "k", "full", 5, 5, 3, 429, ("p",))
        with translation.override("de"):
            untranslated = self.ask(refused).content
            catalog: Any = trans_real.translation("de")
            known = {**catalog._catalog._catalogs[0], "Too many requests at the same time": "Zu viele Anfragen"}
            monkeypatch.setattr(catalog._catalog, "_catalogs", [known, *catalog._catalog._catalogs[1:]])
            assert not any(done for _, done in file_changed.send(self, file_path=Path("of/no/interest")))
            assert "Zu viele Anfragen" in self.ask(refused).content.decode()
            with translation.override("fr"):
                assert self.ask(refused).content == untranslated
            with override_settings(LOCALE_PATHS=[]):  # Django itself reads its files again
                translation.activate("de")
                assert self.ask(refused).content == untranslated

    def test_there_are_only_so_many(self) -> None:
        for number in range(rejection.MOST_READY + 2):
            self.ask(Rejection("p", "k", "full", 5, 5, number, 429, ("p",)))
        assert rejection._ready.cache_info().currsize == rejection.MOST_READY

    def test_fields_are_set_by_the_public_way_where_djangos_own_is_gone(self) -> None:
        refused = Rejection("p", "k", "full", 5, 5, 3, 429, ("p",))
        known = dict(self.ask(refused).headers.items())
        elsewhere = SimpleNamespace(headers={})
        rejection._put(elsewhere, {name.lower(): (name, value) for name, value in known.items()})  # type: ignore[arg-type]
        assert elsewhere.headers == known
