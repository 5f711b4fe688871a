"""The checks of single policies: limits of 0, short leases, keys that do not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.sessions.backends.signed_cookies import SessionStore
from django.core import signing
from django.test import Client, override_settings

from django_concurrency_mw.checks.policies import FAILURES, STALL, _shortest_ttl
from django_concurrency_mw.renewals import RENEW_AGAIN

from .checking import HERE, Decorate, decorate, found, ids
from .support import Limits, everything

__all__ = ["decorate"]

SIGNED = "django.contrib.sessions.backends.signed_cookies"
BY = pytest.mark.parametrize("by", ["table", "decorator"])


def use(limits: Limits, decorate: Decorate, by: str, fields: dict[str, Any], **settings: Any) -> Any:
    """The policy of these fields, in the table or on a view."""
    fields = {"key": "global", "max_concurrent": 1, **fields}
    limits({"policies": {"p": fields}} if by == "table" else None, **settings)
    return decorate(**fields) if by == "decorator" else None


def only(id: str, by: str) -> Any:
    """The one message, of that id, which names the policy or the decorator's place."""
    (message,) = found()
    assert message.id == f"django_concurrency_mw.{id}"
    assert ("policies.p: policy p: " if by == "table" else f"{HERE}:") in message.msg.replace("']['", ".")
    return message


@BY
@pytest.mark.parametrize(("ttl", "fires"), [(1, True), ("2900ms", True), (3, False), (60, False)])
def test_w020_a_lease_that_is_short(limits: Limits, decorate: Decorate, ttl: Any, fires: bool, by: str) -> None:
    """On a store that answers at once."""
    view = use(limits, decorate, by, {"ttl": ttl})
    assert ids() == (["W020"] if fires else [])
    if fires:
        warning = only("W020", by)
        assert "at least 3 s" in warning.hint
    if ttl == 1:
        assert "a ttl of 1 s" in warning.msg
        assert "0.33 s after it began" in warning.msg
        assert "stalls for 0.67 s lets it lapse" in warning.msg
    view = use(limits, decorate, by, {"ttl": ttl, "renew": False})
    assert ids() == []
    del view


@pytest.mark.parametrize(
    ("ttl", "timeout", "fires"), [(4.4, 0.25, True), (4.5, 0.25, False), (4.5, 1, True), (9, 1, False)]
)
def test_w020_a_store_that_takes_its_time(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, ttl: float, timeout: float, fires: bool
) -> None:
    options = {"socket_timeout": timeout}
    limits(everything(ttl=ttl), BACKENDS={"default": {"BACKEND": "redis", "KEY_PREFIX": "p", "OPTIONS": options}})
    monkeypatch.setattr("django_concurrency_mw.backends.redis.store.RedisBackend.check", lambda store: [])
    assert ids() == (["W020"] if fires else [])
    if fires:
        assert f"twice takes its {timeout:g} s to fail" in found()[0].msg


@pytest.mark.parametrize("timeout", [0, 0.25, 1])
def test_a_ttl_that_is_long_enough_survives_what_it_is_said_to(timeout: float) -> None:
    """By the renewals' own rhythm: two that fail as slowly as they can, a stall, and the third still comes in time."""
    ttl = _shortest_ttl(timeout)
    now = ttl / 3
    for _ in range(FAILURES):
        now += timeout + min(RENEW_AGAIN, ttl / 6)
    assert now + STALL <= ttl + 1e-9


@BY
@pytest.mark.parametrize(
    ("key", "fires"), [("session", True), ("{session}/{method}", True), ("{session.cart}", False), ("user", False)]
)
def test_w021_a_session_that_has_no_key(limits: Limits, decorate: Decorate, key: str, fires: bool, by: str) -> None:
    view = use(limits, decorate, by, {"key": key})
    assert ids() == []
    with override_settings(SESSION_ENGINE=SIGNED):
        assert ids() == (["W021"] if fires else [])
        assert not fires or only("W021", by)
    del view


@pytest.fixture
def signed() -> Iterator[None]:
    """Before `limits` in a test's arguments, as overrides are undone in their order."""
    with override_settings(SESSION_ENGINE=SIGNED):
        yield


def test_what_w021_says_is_so(signed: None, limits: Limits) -> None:
    """Two cookies of one client, both valid, are counted apart; one that is made up is missing."""
    limits(everything(key="session"))

    def key(cookie: str) -> str:
        client = Client()
        client.cookies["sessionid"] = cookie
        return str(client.get("/told/").json()["policies"][0][1])

    cookies = [
        signing.dumps({"cart": n}, compress=True, salt=SIGNED, serializer=SessionStore().serializer) for n in (1, 2)
    ]
    assert {key(cookie)[:8] for cookie in cookies} == {"session:"}
    assert len({key(cookie) for cookie in cookies}) == 2
    assert key("made-up") == "missing:ip:127.0.0.1"


@BY
@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("header:X_Api", "'X-Api'"),
        ("{ip}:{header.X_Tenant_Id}", "'X-Tenant-Id'"),
        ("header:X-Api", ""),
        ("get:a_b", ""),
    ],
)
def test_w022_a_header_that_is_dropped(limits: Limits, decorate: Decorate, key: str, cure: str, by: str) -> None:
    view = use(limits, decorate, by, {"key": key})
    assert ids() == (["W022"] if cure else [])
    assert not cure or cure in only("W022", by).hint
    del view


@pytest.mark.parametrize(("header", "fires"), [("X_Real_Ip", True), ("X-Real-Ip", False)])
def test_w022_the_header_of_the_address(limits: Limits, header: str, fires: bool) -> None:
    limits(CLIENT_IP_HEADER=header)
    assert ids() == (["W022"] if fires else [])
    if fires:
        assert found()[0].msg.startswith("CONCURRENCY_LIMIT['CLIENT_IP_HEADER']: 'X_Real_Ip' has an underscore")


@BY
@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"max_concurrent": 0}, "max_concurrent: 0"),
        ({"key": "user", "per_key": {"user:1": 0, "user:2": 0, "user:3": 1}}, "2 keys are never admitted"),
        ({"key": "user", "per_key": {"user:1": 0}}, "one key is never admitted"),
        ({"max_concurrent": None}, ""),
        ({"max_concurrent": 0, "block": False}, ""),
        ({"key": "user", "per_key": {"user:1": None}}, ""),
    ],
    ids=str,
)
def test_i001_nobody_is_admitted(
    limits: Limits, decorate: Decorate, fields: dict[str, Any], what: str, by: str
) -> None:
    """For information, as it may be what is wanted; a key is not repeated, as it may be somebody's."""
    view = use(limits, decorate, by, fields)
    assert ids() == (["I001"] if what else [])
    if what:
        message = only("I001", by)
        assert what in message.msg
        assert "user:" not in message.msg
        with override_settings(SILENCED_SYSTEM_CHECKS=["django_concurrency_mw.I001"]):
            assert message.is_silenced()
    del view
