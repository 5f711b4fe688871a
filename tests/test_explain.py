"""`explain` says what the server does: compared with real requests, on every store, for tables and sites of many kinds."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory
from django.urls import resolve
from rest_framework.authtoken.models import Token

from django_concurrency_mw import concurrency_limit, conf, pace
from django_concurrency_mw.backends import BaseBackend, get_backend
from django_concurrency_mw.explaining import Explanation, Finding, explain
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot, Taken
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.routes import routes
from django_concurrency_mw.signals import slot_acquired
from django_concurrency_mw.testing import hold_slots
from django_concurrency_mw.tokens import new_token

from .queued import WAITING, standing
from .support import OURS, Limits, backend_entry, named, nothing_held, wait_until
from .test_matching import table

pytestmark = pytest.mark.urls("tests.matching_urls")

USERS = {"7": User(pk=7, username="ada"), "8": User(pk=8, username="bob", is_staff=True)}


def user_by_header(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """A site's own way to know its users."""

    def middleware(request: HttpRequest) -> HttpResponse:
        request.user = USERS.get(request.headers.get("X-User", ""), AnonymousUser())
        return get_response(request)

    return middleware


@pytest.fixture(params=["memory", "host", "redis"])
def backend(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    """An entry of BACKENDS."""
    return backend_entry(request.param, request, prefix, tmp_path)


def explained(path: str, method: str = "GET", user: str = "", ip: str = "203.0.113.9", **headers: str) -> Explanation:
    request = RequestFactory().generic(method, path, headers=headers, REMOTE_ADDR=ip)
    request.resolver_match = resolve(request.path_info)
    request.user = USERS.get(user, AnonymousUser())
    return explain(request, conf.current())


def served(path: str, method: str = "GET", user: str = "", ip: str = "203.0.113.9", **headers: str) -> tuple[int, Any]:
    """Status and body of the real request."""
    client = Client(raise_request_exception=True, headers={"X-User": user, **headers})
    response = client.generic(method, path, REMOTE_ADDR=ip)
    body = b"".join(response)  # type: ignore[call-overload]  # both kinds of responses; the client closes it
    return response.status_code, json.loads(body)


def applied(found: Explanation) -> list[Finding]:
    return [finding for finding in found.findings if not finding.why_not]


def as_told(finding: Finding) -> list[Any]:
    """As the request itself is told of it: with its own slot in the count."""
    own = finding.cost if finding.state == "held" else 0
    count = None if finding.in_flight is None else finding.in_flight + own
    return [finding.policy.name, finding.key, finding.state, count, finding.limit]


def some_policy(chance: random.Random) -> dict[str, Any]:
    policy: dict[str, Any] = {
        "url_names": [chance.choice(["*", "told", "report-*", "shop:*", "page", "nothing"])],
        "key": chance.choice(["global", "ip", "user", "header:X-Tenant", "{user.id}:{method}", "get:page"]),
        "max_concurrent": chance.choice([0, 1, 2, 3, None]),
        "block": chance.random() < 0.7,
    }
    maybe: dict[str, list[Any]] = {
        "methods": [["POST"], ["GET"], ["GET", "POST"]],
        "exclude": [["told"], ["report-a"]],
        "when": ["authenticated", "anonymous", "staff"],
        "except_ips": [["203.0.113.0/24"], ["10.0.0.0/8"]],
        "except_users": [[7], [8]],
        "missing": ["skip", "reject"],
        "cost": [2, 3],
        "status": [503],
    }
    for field, values in maybe.items():
        if chance.random() < 0.2:
            policy[field] = chance.choice(values)
    if not policy["block"] and policy.get("missing") == "reject":
        del policy["missing"]
    if policy["key"] in ("global", "ip", "user") and "missing" in policy:
        del policy["missing"]
    return policy


@pytest.mark.parametrize("seed", range(12))
def test_a_random_table_and_what_a_real_request_is_told(limits: Limits, backend: dict[str, Any], seed: int) -> None:
    """Status, reason, violated policies; and of those let in each policy's key, state, limit and count."""
    chance = random.Random(seed)
    policies = {f"p{number}": some_policy(chance) for number in range(chance.randint(2, 6))}
    limits({"policies": policies}, middleware=[named(user_by_header), OURS], BACKENDS={"default": backend})
    for _ in range(8):
        path = chance.choice(["/told/", "/report-a/", "/shop/list/", "/page/7/", "/told/?page=3"])
        about = {"user": chance.choice(["", "7", "8"]), "method": chance.choice(["GET", "POST"])}
        headers = chance.choice([{}, {"X-Tenant": "acme"}])
        with contextlib.ExitStack() as held:
            for name in policies:
                for finding in applied(explained(path, **about, **headers)):
                    if finding.policy.name == name and finding.key is not None and chance.random() < 0.5:
                        held.enter_context(hold_slots(name, finding.key, chance.randint(1, 2)))
            found = explained(path, **about, **headers)
            status, body = served(path, **about, **headers)
        OUTCOMES.add((found.rejection is None, len(applied(found)) > 0))
        if found.rejection is None:
            assert status == 200, (found, body)
            assert [one for one in body["policies"] if one[2] != "skipped"] == list(map(as_told, applied(found)))
        else:
            assert status == found.rejection.status
            assert body["reason"] == found.rejection.reason
            assert tuple(body["violated-policies"]) == found.rejection.violated
    assert nothing_held()


#: What came up in those: let in or not, by some policy or by none.
OUTCOMES: set[tuple[bool, bool]] = set()


def test_both_outcomes_came_up() -> None:
    """The random tables above would prove nothing if they always let in, or never."""
    assert {(True, True), (False, True), (True, False)} <= OUTCOMES


@pytest.mark.parametrize("site", ["tests.decorated_urls", "tests.urls", "tests.drf_urls"])
@pytest.mark.django_db(transaction=True)
def test_every_form_of_a_decorated_view(settings: Any, limits: Limits, site: str) -> None:
    """Which policies a request of each view takes, in their order: the table's, the decorators', the throttle's."""
    settings.ROOT_URLCONF = site
    policies = table(all={"url_names": ["*"], "max_concurrent": 50}, **{"from-table": {"max_concurrent": 9}})
    limits(policies, middleware=[named(user_by_header), OURS])
    ada = User.objects.create(pk=7, username="ada")  # its views of Django REST framework know her by her token
    known = {"X-User": "7", "Authorization": f"Token {Token.objects.create(user=ada).key}"}
    taken: list[tuple[str, str]] = []

    def receive(policy: Policy, key: str, **_: Any) -> None:
        taken.append((policy.name, key))

    slot_acquired.connect(receive)
    patterns = [re.sub(r"[$^]", "", route.pattern) for route in routes()]
    paths = sorted({f"/{pattern}" for pattern in patterns if "<" not in pattern and "(" not in pattern})
    assert len(paths) > 20
    paths = [path for path in paths if not path.startswith("/another")]  # a throttle of the site's own turns these away
    seen, compared = set(), 0
    try:
        for path in paths:
            taken.clear()
            found = explained(path, user="7", ip="127.0.0.1")
            response = Client(raise_request_exception=False, headers=known).get(path)
            response.close()
            if response.status_code in (401, 403, 500):  # the site has turned it away before, or it is broken
                continue
            if response.status_code in (429, 503):
                assert found.rejection is not None, path
            else:
                assert found.rejection is None, path
                assert [(one.policy.name, one.key) for one in applied(found)] == taken, path
            seen.add((found.rejection is None, len(taken)))
            compared += 1
    finally:
        slot_acquired.disconnect(receive)
    assert {(True, 1)} <= seen
    assert compared >= 10
    assert nothing_held()


# -- in line -----------------------------------------------------------------------------------------------------------

#: A server of several threads.
THREADED = {"wsgi.multithread": True}


@pytest.fixture(params=WAITING)
def lining(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    """An entry of BACKENDS for a store that lets wait."""
    return backend_entry(request.param, request, prefix, tmp_path)


def current_store() -> BaseBackend:
    return get_backend("default", conf.current().backends)


def stands_at(path: str, places: dict[str, int]) -> bool:
    """Does the one request to that path wait, or come to wait, for these policies, at these places?"""
    return wait_until(
        lambda: {one.policy: one.place for one in current_store().waiters() if one.path == path} == places
    )


class Asking:
    """A real request in a thread."""

    def __init__(self, path: str) -> None:
        self.path, self.answers = path, [(0, {})]
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self) -> None:
        response = Client(raise_request_exception=True).get(self.path, REMOTE_ADDR="203.0.113.9", **THREADED)
        self.answers.append((response.status_code, json.loads(response.content)))

    def answer(self) -> tuple[int, Any]:
        self.thread.join(20)
        return self.answers[-1]


def waiting_policy(chance: random.Random) -> dict[str, Any]:
    wait = chance.choice([0, 5, 8])
    return {
        "url_names": ["told"],
        "key": chance.choice(["global", "ip"]),
        "max_concurrent": chance.choice([0, 1, 2, 2]),
        "wait": wait,
        "max_waiting": chance.choice([0, 1, 2, 100]),
        **({"cost": 2} if chance.random() < 0.2 else {}),
        **({"block": False} if not wait and chance.random() < 0.5 else {}),
    }


@pytest.mark.parametrize("seed", range(4))
def test_a_random_table_with_lines_and_what_a_real_request_does(
    limits: Limits, lining: dict[str, Any], seed: int
) -> None:
    """Rejected at once, or in the same lines at the same places; and let in when its turn has come."""
    chance = random.Random(seed)
    for number in range(6):
        policies = {f"p{number}-{each}": waiting_policy(chance) for each in range(chance.randint(1, 3))}
        limits({"policies": policies}, middleware=[OURS], BACKENDS={"default": lining})
        store = current_store()
        with contextlib.ExitStack() as busy:
            for finding in applied(explained("/told/")):
                if finding.limit and chance.random() < 0.7:
                    name, key = finding.policy.name, finding.key or ""
                    busy.enter_context(hold_slots(name, key, finding.limit))
                    if chance.random() < 0.7:
                        more = chance.randint(1, 2)
                        busy.enter_context(standing(store, name, key, more, limit=finding.limit))
            found = explained("/told/")
            asking = Asking("/told/")
            places = {one.policy.name: one.place for one in applied(found) if one.place is not None}
            LINES.add("waits" if places else "is let in" if found.rejection is None else found.rejection.reason)
            assert (found.waits > 0) == bool(places)
            if places:
                assert stands_at("/told/", places)
                assert asking.thread.is_alive()
                assert found.waits == min(policies[name]["wait"] for name in places)
            elif found.rejection is not None:
                status, body = asking.answer()
                assert (status, body["reason"]) == (429, found.rejection.reason)
                assert tuple(body["violated-policies"]) == found.rejection.violated
        if found.rejection is None:
            assert asking.answer()[0] == 200
        assert wait_until(nothing_held)
        assert store.waiters() == []


#: What came up in those.
LINES: set[str] = set()


def test_all_ends_came_up() -> None:
    """The random tables with lines would prove nothing otherwise."""
    assert {"waits", "is let in", "full", "queue_full", "cost_above_limit"} <= LINES


def test_nobody_is_said_to_overtake_a_line(limits: Limits, lining: dict[str, Any]) -> None:
    """One of three is free, and somebody waits for two: one who is not waited for is rejected, as the real one is."""
    limits(
        {
            "policies": {
                "three": {"url_names": ["told"], "key": "global", "max_concurrent": 3, "wait": 5},
                "impatient": {"url_names": ["report-a"], "key": "global", "max_concurrent": 3},
            }
        },
        middleware=[OURS],
        BACKENDS={"default": lining},
    )
    store = current_store()
    with hold_slots("three", n=2), standing(store, "three", "global", limit=3, cost=2):
        (finding,) = applied(explained("/told/"))
        assert (finding.in_flight, finding.waiting, finding.place) == (2, 1, 2)
    with hold_slots("impatient", n=2), standing(store, "impatient", "global", limit=3, cost=2):
        found = explained("/report-a/")
        assert found.rejection is not None
        assert served("/report-a/")[0] == found.rejection.status == 429
    assert explained("/told/").waits == 0


def test_it_never_stands_in_line_itself(
    limits: Limits, lining: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the pace of the line, which tells the rejected when to come back, is not changed by it."""
    limits(
        {"policies": {"one": {"url_names": ["told"], "key": "global", "max_concurrent": 1, "wait": 5}}},
        middleware=[OURS],
        BACKENDS={"default": lining},
    )
    seen: list[Any] = []
    monkeypatch.setattr(pace, "seen", lambda *sight: seen.append(sight))
    with hold_slots("one"):
        assert explained("/told/").waits == 5
        assert current_store().waiters() == []
    assert seen == []


def test_what_is_taken_further_in_is_seen_as_it_would_be_then(limits: Limits, lining: dict[str, Any]) -> None:
    """After the wait in the middleware the decorator is asked too, and waits or rejects on its own."""
    limits(
        {
            "policies": {
                "outer": {"url_names": ["*"], "key": "global", "max_concurrent": 1, "wait": 5, "overridable": False}
            }
        },
        middleware=[OURS],
        BACKENDS={"default": lining},
    )
    view = concurrency_limit(name="inner", key="global", max_concurrent=1, wait=2)(resolve("/told/").func)
    request = RequestFactory().get("/told/")
    request.resolver_match = resolve("/told/")
    request.resolver_match.func = view
    with hold_slots("outer"), hold_slots("inner"):
        found = explain(request, conf.current())
        assert [(one.policy.name, one.place) for one in applied(found)] == [("outer", 1), ("inner", 1)]
        assert found.waits == 7


def test_one_who_would_hold_a_slot_of_another_store_by_then_is_said_not_to_wait(limits: Limits) -> None:
    outer = {"url_names": ["*"], "key": "global", "max_concurrent": 1, "overridable": False}
    stores = {"default": {"BACKEND": "memory"}, "far": {"BACKEND": "memory", "KEY_PREFIX": "far"}}
    limits({"policies": {"outer": outer}}, middleware=[OURS], BACKENDS=stores)
    request = RequestFactory().get("/told/")
    request.resolver_match = resolve("/told/")
    view = request.resolver_match.func
    for backend, waits in (("far", 0), ("default", 2)):
        limit = concurrency_limit(name="inner", key="global", max_concurrent=1, wait=2, backend=backend)
        request.resolver_match.func = limit(view)
        store = get_backend(backend, conf.current().backends)
        slot = Slot("inner", make_key("global"), 1, 60.0, new_token())
        assert isinstance(store.take((slot,)), Taken)
        found = explain(request, conf.current())
        assert found.waits == waits
        assert (found.rejection is None) == bool(waits)
        store.give((slot,))
