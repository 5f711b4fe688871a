"""`explain` says what the server does: compared with real requests, on every store, for tables and sites of many kinds."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory
from django.urls import resolve
from rest_framework.authtoken.models import Token

from django_concurrency_mw import conf
from django_concurrency_mw.explaining import Explanation, Finding, explain
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.routes import routes
from django_concurrency_mw.signals import slot_acquired
from django_concurrency_mw.testing import hold_slots

from .support import OURS, Limits, backend_entry, named, nothing_held
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
    body = b"".join(response)  # type: ignore[call-overload]  # both kinds of responses
    response.close()
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
def test_every_form_of_a_decorated_view(limits: Limits, settings: Any, site: str) -> None:
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
