"""Which policies a request has: by the name of its view, its method and who asks; and what several of them do together."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, ClassVar, TypeVar

import pytest
from django.contrib.auth.models import User
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory, override_settings
from django.utils import translation

from django_concurrency_mw import conf, health
from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.backends.base import PROBE, BackendConfig
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.outcomes import Slot, TakeReply

from .asgi_driver import fetch
from .support import OURS, SOON, Limits, named, nothing_held, run_async, stores_work, wait_until, works_again
from .views import Deliberate, held, switch

pytestmark = pytest.mark.urls("tests.matching_urls")

_numbers = count()
SESSIONS = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
both_halves = pytest.mark.parametrize("half", ["wsgi", "asgi"])


@pytest.fixture(autouse=True)
def _language() -> Iterator[None]:
    """LocaleMiddleware leaves its language active in the thread, which here is that of the tests."""
    translation.deactivate()
    yield
    translation.deactivate()


A = TypeVar("A")
R = TypeVar("R")


def ask(half: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, header fields (their names in lower case) and body of one request."""
    if half == "wsgi":
        client = Client(raise_request_exception=False, headers=headers)
        response = client.generic(method, path, REMOTE_ADDR="203.0.113.9")
        body = b"".join(response)
        response.close()
        return response.status_code, {n.lower(): v for n, v in response.headers.items()}, body

    async def main() -> tuple[int, dict[str, str], bytes]:
        exchange = await fetch(path, method=method, headers=headers)
        return exchange.status, exchange.headers, exchange.body

    return run_async(main)  # type: ignore[no-any-return]


def told(half: str, path: str, method: str = "GET", **headers: str) -> list[str]:
    """The names of the policies that the view was told of."""
    status, _headers, body = ask(half, path, method, **headers)
    assert status == 200, body
    return [result[0] for result in json.loads(body)["policies"]]


def table(**policies: Any) -> dict[str, Any]:
    """A table of policies that count everybody together, five at most, unless they say otherwise."""
    return {"policies": {name: {"key": "global", "max_concurrent": 5, **policy} for name, policy in policies.items()}}


@both_halves
class TestNames:
    @pytest.mark.parametrize(
        ("patterns", "exclude", "path", "matches"),
        [
            (["told"], [], "/told/", True),
            (["tol"], [], "/told/", False),
            (["TOLD"], [], "/told/", False),
            (["report-*"], [], "/report-a/", True),
            (["report-*"], ["report-status"], "/status/", False),
            (["report-*"], ["report-s*"], "/report-b/", True),
            (["report-[ab]"], [], "/report-b/", True),
            (["report-[!a]"], [], "/report-a/", False),
            (["report-?"], [], "/status/", False),
            (["nothing", "*-a"], [], "/report-a/", True),
            (["shop:list"], [], "/shop/list/", True),
            (["second:list"], [], "/second/list/", True),
            (["shop:list"], [], "/second/list/", False),
            (["list"], [], "/shop/list/", False),
            (["shop:*"], [], "/shop/deep/end/", True),
            (["*:end"], [], "/second/deep/end/", True),
            (["shop:deep:end"], [], "/shop/deep/end/", True),
            (["*"], ["shop:*"], "/shop/deep/end/", False),
            (["*"], ["shop:*"], "/second/deep/end/", True),
            (["tests.views.told"], [], "/unnamed/", True),
            (["tests.views.*"], [], "/told/", False),
            (["shop:tests.views.told"], [], "/shop/unnamed/", True),
            (["tests.matching_urls.Unnamed"], [], "/unnamed-class/", True),
            (["tests.matching_urls.Callable"], [], "/unnamed-callable/", True),
            (["greeting"], [], "/en/greeting/", True),
            (["greeting"], [], "/de/greeting/", True),
            (["page"], [], "/page/7/", True),
        ],
    )
    def test_globs(
        self, limits: Limits, half: str, patterns: list[str], exclude: list[str], path: str, matches: bool
    ) -> None:
        rule = {"url_names": patterns, **({"exclude": exclude} if exclude else {})}
        limits(table(p=rule), middleware=["django.middleware.locale.LocaleMiddleware", OURS])
        assert told(half, path) == (["p"] if matches else [])
        assert nothing_held()

    def test_the_urlconf_of_the_request(self, limits: Limits, half: str) -> None:
        """Set by a middleware further in than ours: the name is that of the view which is really called."""
        limits(
            table(here={"url_names": ["told"]}, there={"url_names": ["told-elsewhere"]}),
            middleware=[OURS, named(Elsewhere)],
        )
        assert told(half, "/told/") == ["here"]
        assert told(half, "/told/", host="localhost") == ["there"]

    def test_a_page_that_is_not_there(self, limits: Limits, half: str) -> None:
        """A 404 takes nothing, whatever `*` matches."""
        limits(table(p={"url_names": ["*"], "max_concurrent": 0}))
        assert ask(half, "/nowhere/")[0] == 404
        assert ask(half, "/told/")[0] == 429

    def test_all_that_match_apply_in_the_order_of_the_table(self, limits: Limits, half: str) -> None:
        limits(table(z={"url_names": ["*"]}, a={"url_names": ["told"]}, m={"url_names": ["other"]}, only_by_name={}))
        assert told(half, "/told/") == ["z", "a"]


class Elsewhere:
    """Another URLconf for another host."""

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        if request.get_host() == "localhost":
            request.urlconf = "tests.other_urls"
        return self.get_response(request)


@both_halves
class TestMethods:
    @pytest.mark.parametrize(
        ("methods", "method", "matches"),
        [
            (["GET"], "GET", True),
            (["GET"], "HEAD", True),
            (["get"], "HEAD", True),
            (["GET"], "POST", False),
            (["HEAD"], "GET", False),
            (["POST", "PUT"], "PUT", True),
            (["POST"], "post", True),  # Django says it in upper case
            (["PROPFIND"], "PROPFIND", True),
            (["PROPFIND"], "PROPPATCH", False),
        ],
    )
    def test_methods(self, limits: Limits, half: str, methods: list[str], method: str, matches: bool) -> None:
        """By exact method; a policy for GET is one for HEAD too."""
        limits(table(p={"url_names": ["*"], "methods": methods, "max_concurrent": 0}), middleware=[OURS])
        assert ask(half, "/told/", method)[0] == (429 if matches else 200)

    def test_a_made_up_method_is_limited_by_policies_for_all(self, limits: Limits, half: str) -> None:
        limits(table(p={"url_names": ["*"], "max_concurrent": 0}), middleware=[OURS])
        assert ask(half, "/told/", "BREW")[0] == 429


def test_made_up_methods_take_no_memory(limits: Limits) -> None:
    """Ten thousand different ones share one entry."""
    limits(table(p={"url_names": ["*"]}, q={"url_names": ["*"], "methods": ["PROPFIND"]}))
    found = conf.current().table
    sizes = []
    for number in range(10_000):
        assert [policy.name for policy in found.match("told", f"M{number}")] == ["p"]
        if number in (0, 9_999):
            sizes.append(sum(map(len, filter(None, found.known.values()))))
    assert sizes[0] == sizes[1]
    assert len(found.known) == 1


def is_partner(request: HttpRequest) -> bool:
    return "partner" in request.headers


async def ais_partner(request: HttpRequest) -> bool:
    await asyncio.sleep(0)
    return "partner" in request.headers


def breaks(request: HttpRequest) -> bool:
    raise Deliberate("the predicate")


@both_halves
class TestWhen:
    @pytest.mark.django_db(transaction=True)
    @pytest.mark.parametrize(
        ("who", "expected"),
        [
            ("nobody", ["anonymous"]),
            ("somebody", ["authenticated"]),
            ("staff", ["authenticated", "staff"]),
            ("superuser", ["authenticated", "superuser"]),
        ],
    )
    def test_words(self, limits: Limits, half: str, who: str, expected: list[str]) -> None:
        words = ["anonymous", "authenticated", "staff", "superuser"]
        limits(table(**{word: {"url_names": ["*"], "when": word} for word in words}))
        headers = {}
        if who != "nobody":
            flags: dict[str, Any] = {"staff": {"is_staff": True}, "superuser": {"is_superuser": True}}.get(who, {})
            client = Client()
            client.force_login(User.objects.create_user(who, **flags))
            headers["cookie"] = f"sessionid={client.cookies['sessionid'].value}"
        assert told(half, "/told/", **headers) == expected

    @pytest.mark.parametrize("predicate", ["is_partner", "ais_partner"])
    def test_a_predicate(self, limits: Limits, half: str, predicate: str) -> None:
        limits(table(p={"url_names": ["*"], "when": f"tests.test_matching.{predicate}"}), middleware=[OURS])
        assert told(half, "/told/") == []
        assert told(half, "/told/", partner="yes") == ["p"]

    def test_a_predicate_that_raises(self, limits: Limits, half: str) -> None:
        """As if the view had: and what was taken before it is given back."""
        limits(
            table(first={"url_names": ["*"]}, p={"url_names": ["*"], "when": "tests.test_matching.breaks"}),
            middleware=[OURS],
        )
        assert ask(half, "/told/")[0] == 500
        assert nothing_held()


class Untouchable:
    """Fails the test when anybody looks at it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"touched: {name}")


class PutsUntouchables:
    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        request.user = Untouchable()  # type: ignore[assignment]
        request.session = Untouchable()  # type: ignore[assignment]
        return self.get_response(request)


@both_halves
class TestUnlimited:
    def test_one_look_up(self, limits: Limits, half: str) -> None:
        limits(table(p={"url_names": ["report-*"], "when": "staff"}), middleware=[OURS])
        assert told(half, "/told/") == []
        found = conf.current().table
        assert found.known["told"] == {}
        found._globs = Untouchable()  # type: ignore[assignment]
        assert told(half, "/told/") == []

    def test_neither_user_nor_session(self, limits: Limits, half: str) -> None:
        """Nor under a policy that needs none of them."""
        limits(
            table(p={"url_names": ["report-*"], "when": "staff"}, q={"url_names": ["shop:*"], "key": "ip"}),
            middleware=[named(PutsUntouchables), OURS],
        )
        assert told(half, "/told/") == []
        assert told(half, "/shop/list/") == ["q"]
        assert ask(half, "/report-a/")[0] == 500, "and this one does touch the user"


# -- several stores, and stores that fail ------------------------------------------------------------------------------


class Switchable(BaseBackend):
    """A store with a switch: `down` does nothing, `lost` still takes and does not say so."""

    supports_semaphores: ClassVar[bool] = True
    is_local: ClassVar[bool] = False
    down: ClassVar[str | None] = None
    asked: ClassVar[list[str]] = []
    inner: ClassVar[MemoryBackend | None] = None

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        type(self).inner = MemoryBackend(BackendConfig("inner", "memory"))

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        if slots[0].policy != PROBE:
            self.asked.append(f"remote: {' '.join(slot.policy for slot in slots)}")
        if self.down == "lost":
            self._inner.take(slots)
            raise BackendError("no reply")
        return self._do(self._inner.take, slots)

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return self._do(self._inner.give, slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        return self._do(self._inner.renew, slots)

    def snapshot(self) -> Sequence[Any]:
        return self._inner.snapshot()

    @property
    def _inner(self) -> MemoryBackend:
        assert self.inner is not None
        return self.inner

    def _do(self, call: Callable[[A], R], slots: A) -> R:
        if self.down is not None:
            raise BackendError("connection refused")
        return call(slots)


class Local(MemoryBackend):
    """The memory store, telling that it is asked."""

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        Switchable.asked.append(f"local: {' '.join(slot.policy for slot in slots)}")
        return super().take(slots)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """BACKENDS with a local store and a remote one, new in each test; none is asked for by another one's settings."""
    Switchable.down = None
    Switchable.asked.clear()
    monkeypatch.setattr(health, "PROBE_EVERY", 0.02)
    prefix = f"stores-{next(_numbers)}"
    yield {
        "default": {"BACKEND": named(Local), "KEY_PREFIX": prefix},
        "remote": {"BACKEND": named(Switchable), "KEY_PREFIX": prefix},
    }
    Switchable.down = None
    for store in list(health._probes):
        assert not isinstance(store, Switchable) or works_again(store)


class Inside:
    """Somebody is inside a view for the length of the block."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        switch.entered.clear()
        switch.go.clear()
        switch.stop_at = 0
        self.thread = threading.Thread(target=ask, args=("wsgi", self.path))
        self.thread.start()
        assert switch.entered.wait(SOON)
        switch.stop_at = None

    def __exit__(self, *args: object) -> None:
        switch.go.set()
        self.thread.join(SOON)


@both_halves
@pytest.mark.urls("tests.urls")
class TestSeveralStores:
    def test_local_ones_first(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        """Whatever the order of the table; all of one store in one take."""
        limits(
            table(
                a={"url_names": ["*"], "backend": "remote"},
                b={"url_names": ["*"]},
                c={"url_names": ["*"], "backend": "remote"},
            ),
            middleware=[OURS],
            BACKENDS=stores,
        )
        assert told(half, "/told/") == ["a", "b", "c"]
        assert Switchable.asked == ["local: b", "remote: a c"]
        assert wait_until(nothing_held)

    def test_a_rejection_by_the_later_gives_the_earlier_back(
        self, limits: Limits, half: str, stores: dict[str, Any]
    ) -> None:
        limits(
            table(a={"url_names": ["told"], "backend": "remote", "max_concurrent": 0}, b={"url_names": ["*"]}),
            middleware=[OURS],
            BACKENDS=stores,
        )
        status, headers, body = ask(half, "/told/")
        assert status == 429
        assert json.loads(body)["violated-policies"] == ["a"]
        assert headers["ratelimit"] == '"b";r=4, "a";r=0'
        assert Switchable.asked == ["local: b", "remote: a"]
        assert nothing_held()

    def test_a_rejected_request_holds_none_while_it_is_answered(
        self, limits: Limits, half: str, stores: dict[str, Any]
    ) -> None:
        """Given back before the project's callback makes the answer, not with the response."""
        seen: list[list[str]] = []

        def callback(request: HttpRequest) -> HttpResponse:
            seen.append(held())
            return HttpResponse(status=429)

        closed = {"url_names": ["told"], "backend": "remote", "max_concurrent": 0, "response_callback": callback}
        limits(table(a=closed, b={"url_names": ["*"]}), middleware=[OURS], BACKENDS=stores)
        assert ask(half, "/told/")[0] == 429
        assert seen == [[]]

    def test_a_rejection_by_the_earlier_asks_the_later_nothing(
        self, limits: Limits, half: str, stores: dict[str, Any]
    ) -> None:
        limits(
            table(a={"url_names": ["*"], "backend": "remote"}, b={"url_names": ["*"], "max_concurrent": 0}),
            middleware=[OURS],
            BACKENDS=stores,
        )
        assert ask(half, "/told/")[0] == 429
        assert Switchable.asked == ["local: b"]


@both_halves
class TestShadow:
    def test_over_capacity_it_runs_without_a_slot(self, limits: Limits, half: str) -> None:
        limits(
            table(p={"url_names": ["*"], "max_concurrent": 0, "block": False}, q={"url_names": ["*"]}),
            middleware=[OURS],
        )
        status, _headers, body = ask(half, "/told/")
        assert status == 200
        assert json.loads(body)["policies"] == [["p", "global", "over", 0, 0], ["q", "global", "held", 1, 5]]

    def test_of_a_rejected_request_it_counts_nothing(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(
            table(
                p={"url_names": ["*"], "block": False},
                q={"url_names": ["*"], "max_concurrent": 0, "backend": "remote"},
            ),
            middleware=[OURS],
            BACKENDS=stores,
        )
        assert ask(half, "/told/")[0] == 429
        assert Switchable.asked == ["remote: q"]

    def test_it_takes_a_slot_where_there_is_one(self, limits: Limits, half: str) -> None:
        limits(table(p={"url_names": ["*"], "max_concurrent": 1, "block": False}), middleware=[OURS])
        assert json.loads(ask(half, "/told/")[2])["policies"] == [["p", "global", "held", 1, 1]]
        assert nothing_held()


def remote(limit: int = 2, **fields: Any) -> dict[str, Any]:
    return {"url_names": ["*"], "backend": "remote", "max_concurrent": limit, **fields}


@both_halves
@pytest.mark.urls("tests.urls")
class TestOnBackendError:
    """Of a store that fails: `local` counts in this process, `allow` lets everybody in, `deny` nobody."""

    def test_deny(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="deny")
        assert told(half, "/told/") == ["p"]
        Switchable.down = "down"
        status, headers, body = ask(half, "/told/")
        assert status == 503
        assert 1 <= int(headers["retry-after"]) <= 5
        answer = json.loads(body)
        assert answer["reason"] == "backend_unavailable"
        assert answer["type"].endswith("#temporary-reduced-capacity")
        assert answer["violated-policies"] == ["p"]
        Switchable.down = None
        assert wait_until(stores_work)
        assert told(half, "/told/") == ["p"]

    def test_allow(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(table(p=remote(0)), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="allow")
        Switchable.down = "down"
        assert json.loads(ask(half, "/told/")[2])["policies"] == [["p", "global", "unprotected", None, 0]]

    def test_local_never_goes_above_the_limit(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        """What was taken while the store worked counts too."""
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores)
        with Inside("/plain/"):
            Switchable.down = "down"
            assert json.loads(ask(half, "/told/")[2])["policies"] == [["p", "global", "local", 2, 2]]
            with Inside("/plain/"):
                status, _headers, body = ask(half, "/told/")
                assert status == 429
                assert json.loads(body)["reason"] == "full"
            Switchable.down = None
        Switchable.down = "down"
        assert json.loads(ask(half, "/told/")[2])["policies"] == [["p", "global", "local", 1, 2]]

    def test_local_with_a_limit_of_none(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(table(p=remote(0)), middleware=[OURS], BACKENDS=stores)
        Switchable.down = "down"
        assert ask(half, "/told/")[0] == 429

    @pytest.mark.parametrize(
        ("modes", "status", "states"),
        [
            (["allow", "local", "deny"], 503, None),
            (["local", "deny"], 503, None),
            (["allow", "local"], 200, ["unprotected", "local"]),
            (["allow", "allow"], 200, ["unprotected", "unprotected"]),
            ([None, "allow"], 200, ["local", "unprotected"]),
        ],
    )
    def test_deny_beats_local_beats_allow(
        self,
        limits: Limits,
        half: str,
        stores: dict[str, Any],
        modes: list[str | None],
        status: int,
        states: list[str] | None,
    ) -> None:
        """A policy's own word goes before the setting."""
        policies = {f"p{number}": remote(on_backend_error=mode) for number, mode in enumerate(modes)}
        limits(table(**policies), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="local")
        Switchable.down = "down"
        answered, _headers, body = ask(half, "/told/")
        assert answered == status
        if states is not None:
            assert [result[2] for result in json.loads(body)["policies"]] == states
        else:
            assert json.loads(body)["violated-policies"] == [f"p{modes.index('deny')}"]

    def test_a_policys_own_word_goes_before_deny(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(table(p=remote(on_backend_error="allow")), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="deny")
        Switchable.down = "down"
        assert ask(half, "/told/")[0] == 200

    def test_deny_gives_back_what_another_store_gave(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(table(p=remote(), q={"url_names": ["*"]}), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="deny")
        Switchable.down = "down"
        assert ask(half, "/told/")[0] == 503
        assert Switchable.asked == ["local: q", "remote: p"]
        assert wait_until(nothing_held)

    def test_a_shadow_policy_is_never_rejected(self, limits: Limits, half: str, stores: dict[str, Any]) -> None:
        limits(table(p=remote(block=False)), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR="deny")
        Switchable.down = "down"
        assert json.loads(ask(half, "/told/")[2])["policies"][0][2] == "unprotected"

    @pytest.mark.parametrize("mode", ["local", "allow", "deny"])
    def test_a_reply_that_is_lost(
        self, limits: Limits, half: str, stores: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The store took a slot that nobody knows of: the keeper gives it back once the store answers again."""
        monkeypatch.setattr("django_concurrency_mw.keeper.RETRY_EVERY", 0.02)
        monkeypatch.setattr(health, "PROBE_EVERY", 0.02)
        limits(table(p=remote()), middleware=[OURS], BACKENDS=stores, ON_BACKEND_ERROR=mode)
        Switchable.down = "lost"
        assert ask(half, "/told/")[0] == (503 if mode == "deny" else 200)
        assert held() != [], "the store has it, though it did not say so"
        Switchable.down = None
        assert wait_until(nothing_held)
        assert wait_until(lambda: not keeper._owed)


@both_halves
def test_configuration_changes_at_once(limits: Limits, half: str) -> None:
    """`override_settings` works both ways, from one request to the next."""
    limits(table(p={"url_names": ["*"]}), middleware=[OURS])
    assert told(half, "/told/") == ["p"]
    with override_settings(CONCURRENCY_LIMIT={"ENABLED": False, "POLICIES": table(p={"url_names": ["*"]})}):
        assert told(half, "/told/") == []
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": table(q={"url_names": ["*"]})}):
        assert told(half, "/told/") == ["q"]
    assert told(half, "/told/") == ["p"]


def test_the_request_is_told_even_where_nothing_matches(limits: Limits) -> None:
    limits(table(), middleware=[OURS])
    handler = WSGIHandler()
    request = RequestFactory().get("/told/")
    handler.get_response(request)
    assert request.concurrency.limited is False  # type: ignore[attr-defined]
    assert request.concurrency.policies == ()  # type: ignore[attr-defined]


def test_an_anonymous_user_without_the_auth_middleware(limits: Limits) -> None:
    """No `request.user` at all counts as nobody."""
    limits(table(p={"url_names": ["*"], "when": "anonymous"}), middleware=[OURS])
    assert told("wsgi", "/told/") == ["p"]
    assert held() == []
