"""What a `key` may say, and what is said about one that is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_concurrency_mw.keyspec import Part, parse_key


@pytest.mark.parametrize(
    ("text", "kind", "normalised"),
    [
        ("ip", "ip", "ip"),
        ("user", "user", "user"),
        ("user_or_ip", "user", "user"),
        ("session", "session", "session"),
        ("global", "global", "global"),
        ("header:X-Api-Key", "header", "header:X-Api-Key"),
        ("get:page", "get", "get:page"),
        ("param:page", "get", "get:page"),
        ("get:filter[a].b:c", "get", "get:filter[a].b:c"),
        ("shop.limits.team", "callable", "shop.limits.team"),
        ("team:{user.team_id}", "template", "team:{user.team_id}"),
    ],
)
def test_every_form_is_read_and_synonyms_are_replaced(text: str, kind: str, normalised: str) -> None:
    spec = parse_key(text)
    assert (spec.kind, spec.text) == (kind, normalised)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{ip}:{kwargs.pk}", (Part("ip", ()), ":", Part("kwargs", ("pk",)))),
        ("{header.X-Tenant}", (Part("header", ("X-Tenant",), "HTTP_X_TENANT"),)),
        ("{header.Content-Type}", (Part("header", ("Content-Type",), "CONTENT_TYPE"),)),
        ("{header.content-length}", (Part("header", ("content-length",), "CONTENT_LENGTH"),)),
        ("{user}", (Part("user", ()),)),
        ("{user.profile.team_id}", (Part("user", ("profile", "team_id")),)),
        ("{session}/{session.cart-id}", (Part("session", ()), "/", Part("session", ("cart-id",)))),
        ("{get.a.b[c]}", (Part("get", ("a.b[c]",)),)),
        ("{method}{host}", (Part("method", ()), Part("host", ()))),
        ("{{{user.pk}}}", ("{", Part("user", ("pk",)), "}")),
        ("a{{b}}c{ip}", ("a{b}c", Part("ip", ()))),
    ],
)
def test_a_template_is_its_literals_and_placeholders(text: str, parts: tuple[object, ...]) -> None:
    assert parse_key(text).parts == parts


def test_a_header_key_carries_its_meta_key() -> None:
    assert parse_key("header:X-Api-Key").parts == (Part("header", ("X-Api-Key",), "HTTP_X_API_KEY"),)


@pytest.mark.parametrize(
    ("text", "user", "session", "ip"),
    [
        ("ip", False, False, True),
        ("user", True, False, True),
        ("session", False, True, False),
        ("global", False, False, False),
        ("header:X", False, False, False),
        ("{user.pk}", True, False, False),
        ("{session.cart}", False, True, False),
        ("{ip}", False, False, True),
        ("{kwargs.user}", False, False, False),
    ],
)
def test_a_key_says_what_it_needs(text: str, user: bool, session: bool, ip: bool) -> None:
    spec = parse_key(text)
    assert (spec.needs_user, spec.needs_session, spec.needs_ip) == (user, session, ip)


def test_a_callable_is_kept_as_it_is() -> None:
    def team(request: object) -> str:
        return "a"

    spec = parse_key(team)
    assert spec.kind == "callable"
    assert spec.function is team
    assert spec.text.endswith("team")


@pytest.mark.parametrize(
    ("value", "cure"),
    [
        ("usr", "did you mean 'user'?"),
        ("User", "did you mean 'user'?"),
        ("usr", "a constant bucket is 'global'"),
        ("heder:X-Key", "did you mean 'header:X-Key'?"),
        ("user:42", "a template needs at least one {...}"),
        ("", "the key is empty"),
        ("   ", "the key is empty"),
        ("header:", "'header:X-Tenant'"),
        ("param: ", "'param:page'"),
        ("header:X Key", "such as 'X-Api-Key'"),
        ("header:X-Schlüssel", "such as 'X-Api-Key'"),
        ("header:HTTP_X_API_KEY", "'X-Api-Key'"),
        ("{}", "empty placeholder"),
        ("{ }", "empty placeholder"),
        ("{usr.pk}", "did you mean 'user'?"),
        ("{request.user}", "starts with one of ip, user"),
        ("{user.pk", "'{{'"),
        ("user.pk}", "'}}'"),
        ("{user.{ip}}", "without its partner"),
        ("{{user.pk}}", "no placeholder"),
        ("{user.pk!r}", "no conversion"),
        ("{user.pk:>10}", "no format"),
        ("{get.a:b}", "'get:a:b'"),
        ("{user[0]}", "no [...]"),
        ("{user.get_team()}", "no calls"),
        ("{user._state}", "private"),
        ("{user.__class__}", "private"),
        ("{user.}", "a name is missing"),
        ("{user..pk}", "is no name"),
        ("{user.a b}", "is no name"),
        ("{kwargs}", "{kwargs.pk}"),
        ("{get}", "{get.page}"),
        ("{header}", "{header.X-Tenant}"),
        ("{kwargs.a.b}", "exactly one name"),
        ("{header.X.Y}", "exactly one name"),
        ("{session.a.b}", "exactly one name"),
        ("{ip.version}", "write {ip}"),
        ("{method.lower}", "write {method}"),
        ("a\x00{ip}", "control character"),
        ("header:X\n", "control character"),
        (5, "expected text such as 'user'"),
        (None, "got null"),
        ({"user.pk": None}, '"{user.pk}"'),
    ],
)
def test_a_wrong_key_is_refused_with_the_cure(value: object, cure: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is what the test is about
        parse_key(value)
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="{}.!:[]()_-*abuser iphdgt\x00é") | st.text())
def test_any_text_is_read_or_refused_in_a_short_message(text: str) -> None:
    message = ""
    try:
        parse_key(text)
    except ValueError as error:
        message = str(error)
    assert len(message) < 600
