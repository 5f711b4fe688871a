"""A request's key: the text that is specified, the same in both halves, and nobody else's whatever a client sends."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.contenttypes.models import ContentType
from django.contrib.sessions.backends import signed_cookies
from django.contrib.sessions.backends.base import SessionBase
from django.contrib.sessions.backends.db import SessionStore
from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.core.signals import got_request_exception
from django.db import DataError
from django.db.backends.utils import CursorWrapper
from django.http import HttpRequest
from django.test import Client, RequestFactory, override_settings
from django.utils.functional import SimpleLazyObject
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_concurrency_mw import keys
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.client import MOST_HOPS, TrustedProxies, parse_address
from django_concurrency_mw.drivers import run
from django_concurrency_mw.keys import Resolver, callable_of, digest_text, known_session, make_key, masked
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.outcomes import Asked, Key, KeyMissing, Slot
from django_concurrency_mw.policies import Policy

from .asgi_driver import Exchange
from .chaos import LONG
from .support import OURS, Limits, _Middleware, await_until, held, named, nothing_held, run_async, wait_until
from .views import Deliberate, switch

pytestmark = [
    # How a server reads a stream is not the subject here.
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
    # ASGIHandler leaves the request's body file to the collector where it cannot read the request.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function SpooledTemporaryFile"),
]

PEER = "203.0.113.9"
BY_IP = f"ip:{PEER}"
FALLBACK = f"missing:ip:{PEER}"
DIGEST = "{session}"  # in an expected text: the digest of the logged-in session's key
BASE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]


class RecordingBackend(MemoryBackend):
    """Keeps the keys that it was asked for."""

    asked: list[Key] = []  # noqa: RUF012  # one list for all, emptied by each test

    def take(self, slots: Sequence[Slot]) -> Any:
        RecordingBackend.asked.extend(slot.key for slot in slots)
        return super().take(slots)


RECORDING = {"default": {"BACKEND": f"{__name__}.RecordingBackend"}}


# -- one request, in three ways -----------------------------------------------------------------------------------------


@dataclass
class Sent:
    """What a client sends. `view` is without the `a` that the async one has."""

    view: str = "told"
    pk: str = ""
    query: str = ""
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    peer: str | None = PEER


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    keys: list[Key]

    @property
    def texts(self) -> list[str]:
        return [key.text for key in self.keys]


def environ_of(sent: Sent) -> dict[str, Any]:
    environ = RequestFactory()._base_environ(
        PATH_INFO=path_of(sent, sent.view), QUERY_STRING=sent.query, REQUEST_METHOD=sent.method
    )
    environ.pop("REMOTE_ADDR")
    environ.pop("HTTP_COOKIE", None)
    if sent.peer is not None:
        environ["REMOTE_ADDR"] = sent.peer
    for name, value in sent.headers.items():
        meta = name.upper().replace("-", "_")
        environ[meta if meta in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{meta}"] = value
    return environ


def django_reads(sent: Sent, way: Way) -> bool:
    """Django's own request classes fail over some charsets, before any middleware is called."""
    content_type = sent.headers.get("Content-Type", "").encode("latin1")
    scope = {
        "path": "/",
        "method": sent.method,
        "query_string": sent.query.encode(),
        "headers": [(b"content-type", content_type)],
    }
    try:
        WSGIRequest(environ_of(sent)) if way is by_wsgi else ASGIRequest(scope, BytesIO())
    except (LookupError, ValueError, SuspiciousOperation):
        return False
    return True


def by_wsgi(sent: Sent) -> Answer:
    answer: dict[str, Any] = {}

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        answer.update(status=int(status.split()[0]), headers=headers)

    RecordingBackend.asked = asked = []
    response = WSGIHandler()(environ_of(sent), start_response)
    body = b"".join(response)
    response.close()
    return Answer(answer["status"], answer["headers"], body, asked)


def _by_asgi(sent: Sent, view: str) -> Answer:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope["client"] = None if sent.peer is None else (sent.peer, 4711)
        await ASGIHandler()(scope, receive, send)

    async def main() -> Answer:
        RecordingBackend.asked = asked = []
        headers = {name.lower(): value for name, value in sent.headers.items()}
        path = path_of(sent, view) + (f"?{sent.query}" if sent.query else "")
        exchange = Exchange(app, path, method=sent.method, headers=headers)
        await exchange.end()
        start = exchange.events[0]
        sent_back = [(name.decode(), value.decode()) for name, value in start["headers"]]
        return Answer(exchange.status, sent_back, exchange.body, asked)

    return run_async(main)  # type: ignore[no-any-return]  # what main returns


def by_asgi(sent: Sent) -> Answer:
    return _by_asgi(sent, sent.view)


def by_asgi_to_an_async_view(sent: Sent) -> Answer:
    return _by_asgi(sent, f"a{sent.view}")


def path_of(sent: Sent, view: str) -> str:
    return f"/{view}/{sent.pk}/" if sent.pk else f"/{view}/"


WAYS = {"wsgi": by_wsgi, "asgi": by_asgi, "asgi, async view": by_asgi_to_an_async_view}
Way = Callable[[Sent], Answer]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@dataclass
class Login:
    user: User
    session: str

    @property
    def cookie(self) -> dict[str, str]:
        return {"Cookie": f"sessionid={self.session}"}


def log_in(username: str, **fields: Any) -> Login:
    """A user with a session in the database."""
    user = User.objects.create_user(username, **fields)
    client = Client()
    client.force_login(user)
    session = client.session
    session["color"] = "blue"
    session.save()
    return Login(user, str(session.session_key))


@pytest.fixture
def login(transactional_db: None) -> Login:
    return log_in("anna", last_name="red")


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The SQL of all threads."""
    seen: list[str] = []
    execute = CursorWrapper.execute

    def counted(self: Any, sql: str, params: Any = None) -> Any:
        seen.append(sql)
        return execute(self, sql, params)

    monkeypatch.setattr(CursorWrapper, "execute", counted)
    return seen


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    keys._warn_no_address.cache_clear()
    keys._warn_callable.cache_clear()


def one(key: Any, **fields: Any) -> dict[str, Any]:
    """A table with one policy for all views."""
    return {"policies": {"p": {"url_names": ["*"], "key": key, "max_concurrent": 5, **fields}}}


# -- the text of a key --------------------------------------------------------------------------------------------------


def by_path(request: HttpRequest) -> str:
    return f"path:{request.path[-6:]}"


async def aby_path(request: HttpRequest) -> str:
    await asyncio.sleep(0)
    return f"path:{request.path[-6:]}"


class Instance:
    """Callable, and only its method tells that it is async."""

    async def __call__(self, request: HttpRequest) -> str:
        return "instance"


an_instance = Instance()


def none(request: HttpRequest) -> None:
    return None


def returns_a_coroutine(request: HttpRequest) -> Any:
    return aby_path(request)


HERE = __name__
BIG = "x" * 1_000_000
NOBODY = {"Cookie": "sessionid=0123456789abcdef0123456789abcdef"}

#: what is sent, the key, and the text; None: the policy does not apply; "-": it has no key and is skipped
ANONYMOUS: dict[str, tuple[Sent, dict[str, Any], str | None]] = {
    "ip": (Sent(), one("ip"), BY_IP),
    "ip in IPv6": (Sent(peer="2001:db8:1:2:aaaa::1"), one("ip"), "ip:2001:db8:1:2::/64"),
    "no address": (Sent(peer=None), one("ip"), "-"),
    "nor for a part": (Sent(peer=None), one("{header.X-Tenant}"), "-"),
    "nor for a part to skip": (Sent(peer=None), one("{ip}:{method}", missing="skip"), "-"),
    "user": (Sent(), one("user"), BY_IP),
    "user, though missing says skip": (Sent(), one("user", missing="skip"), BY_IP),
    "user, though missing says reject": (Sent(), one("user", missing="reject"), BY_IP),
    "user_or_ip": (Sent(), one("user_or_ip"), BY_IP),
    "a user's part": (Sent(), one("user:{user.pk}"), FALLBACK),
    "a user's part, skipped": (Sent(), one("user:{user.pk}", missing="skip"), "-"),
    "an attribute that anonymous users have": (Sent(), one("{user.is_active}"), FALLBACK),
    "session": (Sent(), one("session"), FALLBACK),
    "a session that the store does not know": (Sent(headers=NOBODY), one("session"), FALLBACK),
    "nor its content": (Sent(headers=NOBODY), one("{session.color}"), FALLBACK),
    "a session with a NUL byte": (Sent(headers={"Cookie": "sessionid=0123456789\0abcdef"}), one("session"), FALLBACK),
    "a session of one megabyte": (Sent(headers={"Cookie": f"sessionid={BIG}"}), one("session"), FALLBACK),
    "global": (Sent(), one("global"), "global"),
    "header": (
        Sent(headers={"X-Api-Key": "secret"}),
        one("header:X-Api-Key"),
        f"header:X-Api-Key:{digest_text('secret')}",
    ),
    "header, absent": (Sent(), one("header:X-Api-Key"), FALLBACK),
    "header, empty": (Sent(headers={"X-Api-Key": ""}), one("header:X-Api-Key"), FALLBACK),
    "header, skipped": (Sent(), one("header:X-Api-Key", missing="skip"), "-"),
    "header, not ASCII": (
        Sent(headers={"X-Api-Key": "\xe9\xff\x00"}),
        one("header:X-Api-Key"),
        f"header:X-Api-Key:{digest_text(chr(0xE9) + chr(0xFF) + chr(0))}",
    ),
    "header, one megabyte": (
        Sent(headers={"X-Api-Key": BIG}),
        one("header:X-Api-Key"),
        f"header:X-Api-Key:{digest_text(BIG)}",
    ),
    "header, in a template": (
        Sent(headers={"X-Tenant": "acme"}),
        one("t-{header.X-Tenant}"),
        f"t-{digest_text('acme')}",
    ),
    "the content type": (
        Sent(headers={"Content-Type": "text/plain"}),
        one("header:Content-Type"),
        f"header:Content-Type:{digest_text('text/plain')}",
    ),
    "get": (Sent(query="page=2&x=y"), one("get:page"), "get:page:2"),
    "param": (Sent(query="page=2"), one("param:page"), "get:page:2"),
    "get, the last of two": (Sent(query="page=2&page=3"), one("get:page"), "get:page:3"),
    "get, absent": (Sent(query="pages=2"), one("get:page"), FALLBACK),
    "get, empty": (Sent(query="page="), one("get:page"), "get:page:"),
    "get, NUL byte": (Sent(query="page=%00"), one("get:page"), "get:page:\0"),
    "get, invalid UTF-8": (Sent(query="page=%FF"), one("get:page"), "get:page:\ufffd"),
    "get, too many": (Sent(query="&".join(["page=1"] * 1001)), one("get:page"), FALLBACK),
    "get, one megabyte": (
        Sent(query=f"page={BIG}"),
        one("get:page"),
        f"get:page:{BIG[:470]}~{make_key('get:page:' + BIG).digest.hex()}",
    ),
    "get, in the fallback's words": (Sent(query=f"page={FALLBACK}"), one("{get.page}"), f"%6D{FALLBACK[1:]}"),
    "kwargs": (Sent(pk="7"), one("{ip}:{kwargs.pk}"), f"{PEER}:7"),
    "kwargs, not all ASCII": (Sent(pk="7:8"), one("{ip}:{kwargs.pk}"), f"{PEER}:7%3A8"),
    "kwargs, absent": (Sent(), one("{ip}:{kwargs.pk}"), FALLBACK),
    "method": (Sent(), one("{method}"), "GET"),
    "a method of the client's own": (Sent(method="FOO%:"), one("{method}:{ip}"), f"FOO%25%3A:{PEER}"),
    "host": (Sent(headers={"Host": "LocalHost"}), one("{host}"), "localhost"),
    "host, with a port": (Sent(headers={"Host": "localhost:81"}), one("{host}"), "localhost"),
    "host, with a dot": (Sent(headers={"Host": "localhost."}), one("{host}"), "localhost"),
    "host, in brackets": (Sent(headers={"Host": "[::1]:81"}), one("h:{host}"), "h:[::1]"),
    "host, not allowed": (Sent(headers={"Host": "evil.example"}), one("{host}"), FALLBACK),
    "host, no host at all": (Sent(headers={"Host": "a b\0"}), one("{host}"), FALLBACK),
    "literal braces": (Sent(), one("{{{method}}}"), "{GET}"),
    "callable": (Sent(pk="callable"), one(by_path), "path:lable/"),
    "async callable": (Sent(pk="callable"), one(aby_path), "path:lable/"),
    "an instance with an async __call__": (Sent(), one(an_instance), "instance"),
    "a sync callable that returns a coroutine": (Sent(pk="callable"), one(returns_a_coroutine), "path:lable/"),
    "its dotted path": (Sent(pk="callable"), one(f"{HERE}.by_path"), "path:lable/"),
    "its dotted path, async": (Sent(pk="callable"), one(f"{HERE}.aby_path"), "path:lable/"),
    "callable that says None": (Sent(), one(none), None),
    "when anonymous": (Sent(), one("global", when="anonymous"), "global"),
    "when authenticated": (Sent(), one("global", when="authenticated"), None),
    "when staff": (Sent(), one("global", when="staff"), None),
    "when a predicate says so": (Sent(), one("global", when=f"{HERE}.by_path"), "global"),
    "when a predicate says no": (Sent(), one("global", when=f"{HERE}.none"), None),
}
LOGGED_IN: dict[str, tuple[Sent, dict[str, Any], str | None]] = {
    "user": (Sent(), one("user"), "user:{pk}"),
    "user_or_ip": (Sent(), one("user_or_ip"), "user:{pk}"),
    "pk": (Sent(), one("user:{user.pk}"), "user:{pk}"),
    "id": (Sent(), one("user:{user.id}"), "user:{pk}"),
    "the user by itself": (Sent(), one("u{user}"), "u{pk}"),
    "an attribute": (Sent(), one("team:{user.last_name}"), "team:red"),
    "an attribute that is not there": (Sent(), one("team:{user.team_id}"), FALLBACK),
    "an attribute that is None": (Sent(), one("{user.nothing}"), FALLBACK),
    "an attribute of None": (Sent(), one("{user.nothing.more}"), FALLBACK),
    "a property": (Sent(), one("{user.shout}"), "ANNA"),
    "a method": (Sent(), one("{user.get_full_name}"), FALLBACK),
    "a method of a method": (Sent(), one("{user.get_full_name.x}"), FALLBACK),
    "a manager": (Sent(), one("{user.groups}"), FALLBACK),
    "a related row": (Sent(), one("{user.row}"), "{row}"),
    "its attribute": (Sent(), one("{user.row.model}"), "session"),
    "a related row that is gone": (Sent(), one("{user.gone}"), FALLBACK),
    "its attribute, gone": (Sent(), one("{user.gone.model}"), FALLBACK),
    "a lazy value": (Sent(), one("{user.lazy}"), "{row}"),
    "session": (Sent(), one("session"), f"session:{DIGEST}"),
    "in a template": (Sent(), one("{session}/{user.pk}"), f"{DIGEST}/{{pk}}"),
    "the session's content": (Sent(), one("{session.color}"), digest_text("blue")),
    "content that is not there": (Sent(), one("{session.colour}"), FALLBACK),
    "when anonymous": (Sent(), one("global", when="anonymous"), None),
    "when authenticated": (Sent(), one("global", when="authenticated"), "global"),
    "when staff": (Sent(), one("global", when="staff"), None),
}


def check(way: Way, sent: Sent, expected: str | None) -> bytes | None:
    """Send it; the key's digest."""
    answer = way(sent)
    assert answer.status == 200
    told = answer.body
    if expected in (None, "-"):
        assert answer.texts == []
        assert (b'"skipped"' in told) == (expected == "-")
        return None
    assert answer.texts == [expected]
    return answer.keys[0].digest


@pytest.mark.parametrize("case", ANONYMOUS)
@pytest.mark.django_db(transaction=True)
def test_the_key_of_an_anonymous_request(limits: Limits, case: str) -> None:
    """Text and digest are the same in both halves."""
    sent, table, expected = ANONYMOUS[case]
    limits(table, BACKENDS=RECORDING)
    assert len({check(way, sent, expected) for way in WAYS.values()}) == 1


@pytest.mark.parametrize("case", LOGGED_IN)
def test_the_key_of_a_user(limits: Limits, login: Login, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and digest are the same in both halves, with the session and the user in the database."""
    row, _ = ContentType.objects.get_or_create(app_label="sessions", model="session")

    def lazy(user: User) -> Any:
        user.__dict__["lazy"] = SimpleLazyObject(lambda: ContentType.objects.get(pk=row.pk))

    monkeypatch.setattr(User, "nothing", None, raising=False)
    monkeypatch.setattr(User, "shout", property(lambda user: user.username.upper()), raising=False)
    monkeypatch.setattr(User, "row", property(lambda user: ContentType.objects.get(pk=row.pk)), raising=False)
    monkeypatch.setattr(User, "gone", property(lambda user: ContentType.objects.get(pk=-1)), raising=False)
    monkeypatch.setattr(User, "from_db", classmethod(_from_db_with(lazy)), raising=False)
    sent, table, expected = LOGGED_IN[case]
    sent = Sent(headers=login.cookie)
    if expected is not None:
        expected = expected.format(pk=login.user.pk, row=row.pk, session=digest_text(login.session))
    limits(table, BACKENDS=RECORDING)
    assert len({check(way, sent, expected) for way in WAYS.values()}) == 1


def _from_db_with(then: Callable[[User], None]) -> Any:
    inherited = User.__base__.from_db.__func__  # type: ignore[union-attr]  # AbstractUser has a base

    # Django 6.1 passes a fetch_mode as well.
    def from_db(cls: type[User], *args: Any, **options: Any) -> User:
        user: User = inherited(cls, *args, **options)
        then(user)
        return user

    return from_db


def test_an_empty_session_that_the_store_knows(limits: Limits, transactional_db: None) -> None:
    session = SessionStore()
    session.create()
    limits(one("session"), BACKENDS=RECORDING)
    for way in WAYS.values():
        sent = Sent(headers={"Cookie": f"sessionid={session.session_key}"})
        check(way, sent, f"session:{digest_text(str(session.session_key))}")


class Forgetful(SessionBase):
    """A third party's store that takes the client's word for the session key."""

    def load(self) -> dict[str, Any]:
        return {}

    def exists(self, session_key: str) -> bool:
        return False


@pytest.mark.parametrize("store", [Forgetful, signed_cookies.SessionStore])
def test_a_store_that_keeps_a_key_which_it_does_not_know(store: type[SessionBase]) -> None:
    assert not known_session(store("made-up-by-a-client"))


def test_a_session_that_the_store_does_not_know_costs_one_query(
    limits: Limits, transactional_db: None, way: Way, queries: list[str]
) -> None:
    limits(one("session"))
    assert way(Sent(headers=NOBODY)).status == 200
    assert len(queries) == 1


#: As a server lets it pass: Django reads the escape.
NUL = {"Cookie": 'sessionid="0123456789\\000abcdef"'}


@pytest.mark.parametrize("error", [ValueError, DataError])
def test_a_session_key_that_the_database_refuses(
    limits: Limits, transactional_db: None, way: Way, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """PostgreSQL's drivers raise for a NUL byte: the client then has no session and no user, and no error."""

    def refuse(self: SessionBase) -> Any:
        assert "\0" in str(self.session_key)
        raise error("cannot contain NUL (0x00) characters")

    async def arefuse(self: SessionBase) -> Any:
        refuse(self)

    monkeypatch.setattr(SessionStore, "_get_session_from_db", refuse)
    monkeypatch.setattr(SessionStore, "_aget_session_from_db", arefuse)
    policies = {
        str(number): {"url_names": ["*"], "key": key, "max_concurrent": 5, **when}
        for number, (key, when) in enumerate(
            [
                ("session", {}),
                ("{session.color}", {}),
                ("user", {}),
                ("{user.last_name}", {}),
                ("{user}", {}),
                ("{user}{session}", {}),
                ("global", {"when": "anonymous"}),
                ("global", {"when": "staff"}),
            ]
        )
    }
    limits({"policies": policies}, BACKENDS=RECORDING)
    answer = way(Sent(headers=NUL))
    assert answer.status == 200
    assert answer.texts == [FALLBACK, FALLBACK, BY_IP, FALLBACK, FALLBACK, FALLBACK, "global"]


def test_a_database_that_fails_is_an_error_all_the_same(
    limits: Limits, login: Login, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be for a view that reads the user; nobody is taken for somebody else."""

    def fails(self: SessionBase) -> Any:
        raise DataError("the database is down")

    async def afails(self: SessionBase) -> Any:
        fails(self)

    monkeypatch.setattr(SessionStore, "_get_session_from_db", fails)
    monkeypatch.setattr(SessionStore, "_aget_session_from_db", afails)
    limits(one("user"))
    assert way(Sent("plain", headers=login.cookie)).status == 500
    assert switch.seen == []
    assert nothing_held()


@pytest.fixture
def signing() -> Iterator[None]:
    """Sessions in signed cookies. Before `limits` in a test's arguments, as overrides are undone in their order."""
    with override_settings(SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies"):
        yield


def test_signed_cookies(signing: None, limits: Limits, rf: RequestFactory) -> None:
    """What they signed is known; what they did not sign is missing, in both halves."""
    session = signed_cookies.SessionStore()
    session["color"] = "blue"
    session.save()
    key = str(session.session_key)
    limits(one("session"), BACKENDS=RECORDING)
    for way in WAYS.values():
        check(way, Sent(headers={"Cookie": f"sessionid={key}"}), f"session:{digest_text(key)}")
        check(way, Sent(headers={"Cookie": f"sessionid={key}x"}), FALLBACK)


def test_without_sessions_and_users(limits: Limits, way: Way) -> None:
    """A project need not have them."""
    policies = {
        str(number): {"url_names": ["*"], "key": key, "max_concurrent": 5}
        for number, key in enumerate(["session", "user", "{session.x}", "{user.pk}", "{user}"])
    }
    limits({"policies": policies}, BACKENDS=RECORDING, middleware=[OURS])
    assert way(Sent()).texts == [FALLBACK, BY_IP, FALLBACK, FALLBACK, FALLBACK]


def test_a_missing_key_can_reject(limits: Limits, way: Way) -> None:
    limits(one("header:X-Api-Key", missing="reject"), BACKENDS=RECORDING)
    assert way(Sent()).status == 429
    assert way(Sent(headers={"X-Api-Key": "x"})).status == 200


@pytest.mark.parametrize("key", ["ip", "user"])
def test_without_an_address_reject_means_reject(
    limits: Limits, way: Way, key: str, db: None, caplog: pytest.LogCaptureFixture
) -> None:
    limits(one(key, missing="reject"), BACKENDS=RECORDING)
    assert way(Sent(peer=None)).status == 429


@pytest.mark.parametrize(
    ("key", "missing"), [("ip", "ip"), ("ip", "skip"), ("{ip}", "skip"), ("header:X", "ip"), ("user", "ip")]
)
def test_without_an_address_one_error_log_names_the_cure(
    limits: Limits, caplog: pytest.LogCaptureFixture, key: str, missing: str
) -> None:
    limits(one(key, missing=missing), BACKENDS=RECORDING)
    for _ in range(3):
        answer = by_wsgi(Sent(peer=""))
        assert (answer.status, answer.texts) == (200, [])
    (record,) = [record for record in caplog.records if record.name == "django_concurrency_mw"]
    assert record.levelno == logging.ERROR
    assert "policy p: the request has no client address" in record.getMessage()
    assert "TRUSTED_PROXIES" in record.getMessage()


# -- the user -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["user", "{user.last_name}", "session"])
def test_a_view_that_reads_the_user_pays_no_query_more(
    limits: Limits, login: Login, way: Way, queries: list[str], key: str
) -> None:
    """One for the session and one for the user, as without a limit."""
    limits()
    without = way(Sent("whoami", headers=login.cookie))
    expected = list(queries)
    assert len(expected) == 2
    queries.clear()
    limits(one(key))
    answer = way(Sent("whoami", headers=login.cookie))
    assert (answer.status, answer.body) == (without.status, without.body) == (200, b"anna")
    assert queries == expected


class _SetsUser(_Middleware):
    """Another way of authentication, after Django's own."""

    def __call__(self, request: HttpRequest) -> Any:
        request.user = self.user()
        return super().__call__(request)

    def user(self) -> Any:
        raise NotImplementedError


class Token:
    """A user that is no model."""

    is_authenticated = True
    last_name = "token"

    def __init__(self, pk: Any) -> None:
        self.pk = pk


class PlainUser(_SetsUser):
    def user(self) -> Any:
        return Token("t-1")


class PlainUserWithoutPk(_SetsUser):
    def user(self) -> Any:
        user = Token(None)
        del user.pk
        return user


class LazyUser(_SetsUser):
    def user(self) -> Any:
        return SimpleLazyObject(lambda: User.objects.get(username="berta"))


@pytest.mark.parametrize(
    ("middleware", "expected"),
    [
        (PlainUser, ["user:t-1", "token", "t-1"]),
        (PlainUserWithoutPk, [BY_IP, "token", FALLBACK]),
        (LazyUser, ["user:{berta}", "green", "{berta}"]),
    ],
)
def test_a_user_that_another_middleware_has_set_wins(
    limits: Limits, login: Login, way: Way, middleware: type, expected: list[str]
) -> None:
    berta = User.objects.create_user("berta", last_name="green")
    policies = {
        name: {"url_names": ["*"], "key": key, "max_concurrent": 5}
        for name, key in {"a": "user", "b": "{user.last_name}", "c": "{user.pk}"}.items()
    }
    limits({"policies": policies}, BACKENDS=RECORDING, middleware=[*BASE, named(middleware), OURS])
    assert way(Sent(headers=login.cookie)).texts == [text.format(berta=berta.pk) for text in expected]


@pytest.mark.parametrize("word", ["anonymous", "authenticated", "staff", "superuser"])
def test_when_and_a_user_that_knows_nothing_of_staff(limits: Limits, way: Way, word: str) -> None:
    limits(one("global", when=word), BACKENDS=RECORDING, middleware=[named(PlainUser), OURS])
    answer = way(Sent())
    assert (answer.status, answer.texts) == (200, ["global"] if word == "authenticated" else [])


def test_staff_and_superusers(limits: Limits, transactional_db: None, way: Way) -> None:
    policies = {
        word: {"url_names": ["*"], "key": "{method}", "max_concurrent": 5, "when": word}
        for word in ("staff", "superuser")
    }
    limits({"policies": policies}, BACKENDS=RECORDING)
    boss, helper = log_in("boss", is_superuser=True), log_in("helper", is_staff=True)
    assert [len(way(Sent(headers=who.cookie)).keys) for who in (boss, helper)] == [1, 1]
    assert b'"superuser"' in way(Sent(headers=boss.cookie)).body
    assert b'"staff"' in way(Sent(headers=helper.cookie)).body


# -- callables ----------------------------------------------------------------------------------------------------------


def raises(request: HttpRequest) -> str:
    raise Deliberate("in the callable")


async def araises(request: HttpRequest) -> str:
    raise Deliberate("in the callable")


def returns_a_number(request: HttpRequest) -> Any:
    return 42


@pytest.mark.parametrize(
    ("field", "function", "error"),
    [
        ("key", raises, Deliberate),
        ("key", araises, Deliberate),
        ("key", returns_a_number, TypeError),
        ("when", raises, Deliberate),
        ("when", araises, Deliberate),
    ],
)
def test_what_a_callable_raises_comes_as_from_the_view(
    limits: Limits, way: Way, function: Callable[..., Any], error: type[Exception], field: str
) -> None:
    """With no slot held, the one of an earlier policy included; and the view does not run."""
    raised: list[Any] = []

    def note(sender: Any, request: HttpRequest, **kwargs: Any) -> None:
        raised.append((sys.exc_info()[0], request.resolver_match is not None))

    mine = {"key": "global", "when": f"{HERE}.{function.__name__}"} if field == "when" else {"key": function}
    policies = {
        "first": {"url_names": ["*"], "key": "global", "max_concurrent": 5},
        "second": {"url_names": ["*"], "max_concurrent": 5, **mine},
    }
    limits({"policies": policies})
    got_request_exception.connect(note)
    try:
        assert way(Sent("plain")).status == 500
    finally:
        got_request_exception.disconnect(note)
    assert raised == [(error, True)]
    assert nothing_held()
    assert switch.seen == []


def test_under_asgi_a_sync_callable_runs_where_a_sync_view_does(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the loop, in the request's own thread-sensitive context."""
    threads = []

    def where(*args: Any) -> str:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        threads.append(threading.get_ident())
        return "x"

    monkeypatch.setattr(switch, "gate", where)
    limits(one(where))
    assert by_asgi(Sent("plain")).status == 200
    assert len(threads) == 2
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_a_dotted_path_that_cannot_be_imported_is_an_error_at_first_use(limits: Limits, way: Way) -> None:
    limits(one("nowhere.at_all"))
    assert way(Sent("plain")).status == 500
    for path in ("nowhere.at_all", f"{HERE}.nothing", f"{HERE}.FALLBACK"):
        with pytest.raises(ImproperlyConfigured, match=path):
            callable_of(path)


def test_a_module_that_fails_by_itself(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_keys.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImproperlyConfigured, match=r"'broken_keys\.key' cannot be imported: ZeroDivisionError"):
        callable_of("broken_keys.key")


# -- two teams ----------------------------------------------------------------------------------------------------------

TEAMS = one("team:{user.last_name}", max_concurrent=1)
PLACES: dict[str, tuple[str, dict[str, Any] | None, list[str]]] = {
    "through the table": (
        "plain",
        {"policies": {"teams": TEAMS["policies"]["p"] | {"max_concurrent": 1}}},
        [*BASE, OURS],
    ),
    "by the decorator": ("team", None, [*BASE, OURS]),
    "by the decorator, without the middleware": ("team", None, BASE),
}


@pytest.fixture
def teams(transactional_db: None) -> list[Login]:
    """Two users of one team and one of another."""
    return [log_in("anna", last_name="red"), log_in("bert", last_name="red"), log_in("cleo", last_name="blue")]


@pytest.mark.parametrize("place", PLACES)
class TestTeams:
    """Two teams both pass at once, two of one team do not."""

    def test_in_threads(self, limits: Limits, teams: list[Login], place: str) -> None:
        view, table, middleware = PLACES[place]
        limits(table, middleware=middleware)
        switch.stop_at = 0
        answers: dict[str, int] = {}

        def send(who: Login) -> None:
            from django.db import connections

            try:
                answers[who.user.username] = by_wsgi(Sent(view, headers=who.cookie)).status
            finally:
                connections.close_all()

        anna, bert, cleo = teams
        threads = [threading.Thread(target=send, args=(who,)) for who in (anna, cleo)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: len(switch.seen) == 2)
        assert held() == ["teams", "teams"]
        assert by_wsgi(Sent(view, headers=bert.cookie)).status == 429
        switch.go.set()
        for thread in threads:
            thread.join()
        assert answers == {"anna": 200, "cleo": 200}
        switch.stop_at = None
        assert by_wsgi(Sent(view, headers=bert.cookie)).status == 200
        assert nothing_held()

    @pytest.mark.parametrize("kind", ["", "a"], ids=["sync view", "async view"])
    def test_on_an_event_loop(self, limits: Limits, teams: list[Login], place: str, kind: str) -> None:
        view, table, middleware = PLACES[place]
        limits(table, middleware=middleware)
        switch.stop_at = 0
        anna, bert, cleo = teams

        async def main() -> None:
            app = ASGIHandler()

            def send(who: Login) -> Exchange:
                return Exchange(app, f"/{kind}{view}/", headers=who.cookie)

            inside = [send(anna), send(cleo)]
            assert await await_until(lambda: len(switch.seen) == 2)
            assert held() == ["teams", "teams"]
            outside = send(bert)
            await outside.end()
            assert outside.status == 429
            switch.go.set()
            for exchange in inside:
                await exchange.end()
                assert exchange.status == 200
            switch.stop_at = None
            again = send(bert)
            await again.end()
            assert again.status == 200
            assert await await_until(nothing_held)

        run_async(main)


# -- nothing is touched that is not needed --------------------------------------------------------------------------------

OTHERS = {
    "policies": {
        name: {"url_names": ["somewhere-else"], "key": key, "max_concurrent": 1}
        for name, key in {"a": "user", "b": "session", "c": "{user.pk}:{session.x}", "d": by_path}.items()
    }
}
FREE = {"policies": OTHERS["policies"] | one("{method}:{host}:{ip}:{get.x}:{header.X}")["policies"]}


@pytest.mark.parametrize("view", ["plain", "stream", "class"])
@pytest.mark.parametrize("table", [OTHERS, FREE], ids=["no policy matches", "none needs the user"])
@pytest.mark.parametrize("headers", ["rejected", "never"])
def test_a_view_that_needs_no_user_is_answered_as_without_us(
    limits: Limits, login: Login, way: Way, queries: list[str], view: str, table: Any, headers: str
) -> None:
    """No query, no `Vary`, and every byte the same."""
    sent = Sent(view, headers=login.cookie)
    limits(middleware=BASE)
    without = way(sent)
    limits(table, middleware=[*BASE, OURS], HEADERS=headers)
    answer = way(sent)
    assert (answer.status, answer.headers, answer.body) == (without.status, without.headers, without.body)
    assert answer.status == 200
    assert "vary" not in {name.lower() for name, _value in answer.headers}
    assert queries == []


# -- nobody reaches another's bucket --------------------------------------------------------------------------------------


def key_of(key: Any, kwargs: dict[str, Any] | None = None, query: str = "", **meta: Any) -> Key:
    """The key of a request by itself."""
    request = RequestFactory().get("/", query_params={} if not query else None, QUERY_STRING=query, **meta)
    policy = Policy("p", parse_key(key), 1)
    (asked,) = run(Resolver(request, kwargs or {}, TrustedProxies(), "HTTP_X_FORWARDED_FOR").resolve([policy]))
    assert isinstance(asked, Asked)
    return asked.key


TEMPLATES = [
    "{kwargs.a}:{kwargs.b}",
    "{kwargs.a}{kwargs.b}",
    "{kwargs.a}%{kwargs.b}",
    "%{kwargs.a}%%{kwargs.b}",
    "{kwargs.a}2{kwargs.b}5",
    "{kwargs.a}N\u4e2d{kwargs.b}",
    "{kwargs.a}\xe9{kwargs.b}",
    "missing:{kwargs.a}{kwargs.b}",
]
#: Few letters, and those that escapes are made of, so that two texts would often meet.
awkward = st.text(alphabet="ab:%25N2DE4\u4e2d\xe9\x1f\udc80", max_size=5)


@pytest.mark.parametrize("template", TEMPLATES)
@example(("a", "bc"), ("ab", "c"))
@example(("x", "25r%z"), ("x%r", "25z"))
@example(("N2D", ""), ("\u4e2d", ""))
@given(st.tuples(awkward, awkward), st.tuples(awkward, awkward))
@hypothesis_settings(max_examples=60, deadline=None)
def test_different_values_never_make_one_key(template: str, first: tuple[str, str], second: tuple[str, str]) -> None:
    one, other = (key_of(template, dict(zip("ab", values, strict=True))) for values in (first, second))
    assert (one.text == other.text) == (one.digest == other.digest) == (first == second)


@given(st.data())
@hypothesis_settings(max_examples=100, deadline=None)
def test_every_reading_of_a_template_is_the_only_one(data: st.DataObject) -> None:
    """The same, where the second values are cut out of the first text: what an attacker would try."""
    template = data.draw(st.sampled_from(TEMPLATES))
    first = data.draw(st.tuples(awkward, awkward))
    text = key_of(template, dict(zip("ab", first, strict=True))).text
    cut = data.draw(st.integers(0, len(text)))
    for second in [(text[:cut], text[cut:]), (text[:cut], text[cut + 1 :]), (first[0], text[cut:])]:
        other = key_of(template, dict(zip("ab", second, strict=True)))
        assert (other.text == text) == (second == first)


@pytest.mark.parametrize("text", [FALLBACK, "missing:", f"%6D{FALLBACK[1:]}", f"%256D{FALLBACK[1:]}", "%25", "%"])
@pytest.mark.parametrize("key", ["{kwargs.a}", "{kwargs.a}{kwargs.b}", lambda request: request.GET["a"]])
def test_the_fallback_cannot_be_reached_by_text(text: str, key: Any) -> None:
    fallback = key_of("{header.X}", REMOTE_ADDR=PEER)
    assert fallback.text == FALLBACK
    request = RequestFactory().get("/", {"a": text})
    policy = Policy("p", parse_key(key), 1)
    resolver = Resolver(request, {"a": text, "b": ""}, TrustedProxies(), "HTTP_X_FORWARDED_FOR")
    (asked,) = run(resolver.resolve([policy]))
    assert isinstance(asked, Asked)
    assert not asked.key.text.startswith("missing:")
    assert asked.key.digest != fallback.digest


@given(st.text(max_size=60), st.text(max_size=60))
@example(FALLBACK, f"%6D{FALLBACK[1:]}")
@example(f"%6D{FALLBACK[1:]}", f"%256D{FALLBACK[1:]}")
def test_texts_of_one_value_stay_different(first: str, second: str) -> None:
    one, other = (key_of("{kwargs.a}", {"a": text}) for text in (first, second))
    assert (one == other) == (first == second)
    assert (one.digest == other.digest) == (first == second)


def test_a_long_text_is_cut_and_its_digest_is_not() -> None:
    one, other = make_key("x" * 600 + "a"), make_key("x" * 600 + "b")
    assert len(one.text) == len(other.text) == 512
    assert one.text != other.text
    assert one.digest != other.digest


def test_masked_text_is_printable_and_tells_little() -> None:
    assert masked("user:42") == f"us~{digest_text('user:42')[:8]}"
    assert masked("\n\udc80x").startswith("??~")


def test_an_address_of_any_length_takes_no_memory() -> None:
    """What is no address is not remembered."""
    parse_address.cache_clear()
    request = RequestFactory().get("/", REMOTE_ADDR="10.0.0.1")
    trusted = TrustedProxies.parse(["10.0.0.0/8"])
    for number in range(20):
        request.META["HTTP_X_FORWARDED_FOR"] = f"{number}{BIG}"
        request.META["HTTP_FORWARDED"] = f"for={number}{BIG}"
        for header in ("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED"):
            policy = Policy("p", parse_key("ip"), 1)
            (asked,) = run(Resolver(request, {}, trusted, header).resolve([policy]))
            assert isinstance(asked, Asked)
            assert asked.key.text == "ip:10.0.0.1"
    assert parse_address.cache_info().currsize <= 2  # the peer, and the nothing that a cut-off element names
    assert MOST_HOPS <= 64


VICTIM = "198.51.100.1"
#: Policies whose bucket is nobody's choice; and those that a client may choose, but not into the fallback of another.
IDENTITY = [
    "ip",
    "user",
    "user:{user.pk}",
    "session",
    "{session.color}",
    "{ip}:{kwargs.pk}",
    "{ip}{get.page}{header.X}",
]
CHOICE = ["get:page", "{get.page}", "{kwargs.pk}", "header:X", "{header.X}", "{host}", "{method}", "{get.page}-{host}"]

interesting = st.sampled_from(
    [
        "",
        "\0",
        "\xff\xfe",
        f"missing:ip:{VICTIM}",
        f"ip:{VICTIM}",
        VICTIM,
        f"{VICTIM}, {VICTIM}",
        f"for={VICTIM}",
        "user:1",
        "1",
        "blue",
        digest_text("blue"),
        f"{VICTIM}:7",
        "%6Dissing:ip:1",
        "\x1f",
        "[::1",
        "x" * 1_000_000,
        ",".join(["10.0.0.1"] * 1000),
        "localhost:99999999",
        "a" * 300,
        "sessionid=a\0b" * 3,
    ]
)
raw = st.one_of(interesting, st.text(alphabet=st.characters(max_codepoint=255), max_size=40))
charsets = st.sampled_from(
    ["utf-8", "utf-16", "undefined", "hex", "idna", "punycode", "unicode_escape", "rot13", "zlib", "no-such", '"', "\0"]
)
in_query = st.one_of(
    st.sampled_from(["", "page=1", f"page=missing:ip:{VICTIM}", "page=%00", "page=%FF%FE", "page=\\ud800", "&" * 2000]),
    st.binary(max_size=30).map(lambda data: "page=" + "".join(f"%{byte:02x}" for byte in data)),
    st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=30).filter(
        lambda text: "#" not in text
    ),
)
#: What a path keeps when it is sent as it is.
in_path = st.one_of(
    st.sampled_from(["", "7", f"missing:ip:{VICTIM}", "x" * 10_000, "%6Dissing"]),
    st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/?#"), max_size=20),
)
sendable = st.builds(
    Sent,
    view=st.sampled_from(["told", "told", "plain"]),
    pk=in_path,
    query=in_query,
    method=st.one_of(
        st.sampled_from(
            ["GET", "get", "POST", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "A-B", "%", "X" * 10_000, "\xe9"]
        ),
        st.text(alphabet="!#$%&'*+-.^_`|~09AZaz", min_size=1, max_size=8),
    ),
    headers=st.fixed_dictionaries(
        {},
        optional={
            "Cookie": st.one_of(
                raw, raw.map(lambda text: f"sessionid={text}"), raw.map(lambda text: f"csrftoken={text}")
            ),
            "X": raw,
            "Host": st.one_of(raw, st.sampled_from(["testserver", "testserver.", "LOCALHOST:1", "[::1]", "a,b", "@"])),
            "X-Forwarded-For": raw,
            "X-Forwarded-Host": raw,
            "Forwarded": raw,
            "Accept": st.one_of(raw, st.sampled_from(["text/html", "*/*;q=x", "application/json;q=0.1,*/*", ";;,,"])),
            "Accept-Language": raw,
            "Authorization": raw,
            "Content-Type": charsets.map(lambda name: f"text/plain; charset={name}"),
            "Content-Length": st.one_of(raw, st.sampled_from(["-1", "1e9", "99999999999999999999"])),
            "X-Http-Method-Override": raw,
        },
    ),
    peer=st.sampled_from([PEER, "2001:db8::1", "fe80::1%eth0", "", None]),
)


@pytest.fixture
def attacked(limits: Limits, login: Login) -> dict[str, set[bytes]]:
    """Policies of all kinds of keys, and by policy the digests of what a stranger holds under each."""
    policies: dict[str, Any] = {}
    for number, key in enumerate([*IDENTITY, *CHOICE, "global", by_path, aby_path]):
        policies[f"p{number}"] = {"url_names": ["told*", "atold*"], "key": key, "max_concurrent": 5}
        policies[f"r{number}"] = {"url_names": ["*plain*"], "key": key, "max_concurrent": 0}
    limits({"policies": policies}, BACKENDS={"default": {"BACKEND": f"{HERE}.ByPolicy"}})
    strangers: dict[str, set[bytes]] = {}
    for headers in ({}, login.cookie):
        for pk in ("", "7"):
            # Without what clients choose, so that those policies count the stranger under the fallback.
            by_wsgi(Sent(pk=pk, headers={**headers, "Host": "not.allowed"}, peer=VICTIM))
            for policy, key in ByPolicy.seen:
                number = int(policy[1:])
                if number < len(IDENTITY) or key.text.startswith("missing:"):
                    strangers.setdefault(policy, set()).add(key.digest)
    assert {"p0", "p1", "p2", "p3", "p4", "p5", "p6"} <= set(strangers)
    assert len(strangers) >= len(IDENTITY) + len(CHOICE) - 2
    return strangers


class ByPolicy(MemoryBackend):
    """Keeps the policies and keys of the last take."""

    seen: list[tuple[str, Key]] = []  # noqa: RUF012  # one list for all

    def take(self, slots: Sequence[Slot]) -> Any:
        ByPolicy.seen = [(slot.policy, slot.key) for slot in slots]
        return super().take(slots)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some charsets that Python knows warn as Django decodes
@given(sent=sendable)
@hypothesis_settings(
    max_examples=150 if LONG else 90,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(sent=Sent(query="page=1", headers={"Content-Type": "text/plain; charset=undefined"}))
@example(sent=Sent(query="page=1", headers={"Content-Type": "text/plain; charset=hex"}))
@example(sent=Sent(query="page=\\ud800", headers={"Content-Type": "text/plain; charset=unicode_escape"}))
@example(sent=Sent(query="page=%5c%00", headers={"Content-Type": "text/plain; charset=unicode_escape"}))
@example(sent=Sent("plain", query="page=1", headers={"Accept": "text/html", "Cookie": "sessionid=a\0b"}))
def test_nothing_that_a_client_sends_is_an_error_or_reaches_a_stranger(
    attacked: dict[str, set[bytes]], sent: Sent
) -> None:
    for way in WAYS.values():
        if not django_reads(sent, way):
            continue
        ByPolicy.seen = []
        answer = way(sent)
        assert answer.status < 500
        for policy, key in ByPolicy.seen:
            assert key.digest not in attacked.get(policy, ()), (policy, key.text)
        if answer.status == 200 and sent.peer:
            assert len(ByPolicy.seen) >= len(CHOICE)
    assert nothing_held()


def test_a_resolver_says_what_is_missing(rf: RequestFactory) -> None:
    policy = Policy("p", parse_key("header:X"), 1, missing="skip")
    assert run(Resolver(rf.get("/"), {}, TrustedProxies(), "").resolve([policy])) == [
        KeyMissing(policy, "header:X", False)
    ]
