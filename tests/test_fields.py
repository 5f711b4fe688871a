"""The table of fields: what each accepts, what it says about the rest, and that it fits the policy."""

from __future__ import annotations

import json
from dataclasses import MISSING
from dataclasses import fields as fields_of
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_concurrency_mw.exceptions import ConfigurationError, DecoratorUsageError
from django_concurrency_mw.fields import (
    DECORATOR_FIELDS,
    FIELDS,
    FieldError,
    check_fields,
    check_policy,
    override,
    policy_from,
)
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.policies import Policy

ORDER = [
    "url_names",
    "exclude",
    "methods",
    "when",
    "except_ips",
    "except_users",
    "key",
    "missing",
    "max_concurrent",
    "per_key",
    "cost",
    "ttl",
    "renew",
    "max_age",
    "wait",
    "max_waiting",
    "block",
    "backend",
    "on_backend_error",
    "status",
    "response_callback",
    "overridable",
]


def busy(request: object) -> None:
    """Any callable."""


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_the_rows_are_the_fields_of_the_format_in_its_order() -> None:
    assert list(FIELDS) == ORDER
    assert {name for name, row in FIELDS.items() if row.required} == {"key", "max_concurrent"}
    assert {name for name, row in FIELDS.items() if not row.decorator} == {"url_names", "exclude"}


def test_every_row_is_a_field_of_the_policy_with_the_same_default() -> None:
    own = {each.name: each.default for each in fields_of(Policy) if each.name not in ("name", "place")}
    assert set(own) == set(FIELDS)
    for name, default in own.items():
        if default is not MISSING:
            assert FIELDS[name].default == default, name


def test_every_row_is_documented_in_one_line_and_has_a_schema() -> None:
    for row in FIELDS.values():
        assert row.doc.endswith(".")
        assert "\n" not in row.doc
        json.dumps(row.schema)


@pytest.mark.parametrize(
    ("name", "value", "normalised"),
    [
        ("url_names", ["a", "b:*", "a"], ("a", "b:*", "a")),
        ("exclude", ("a",), ("a",)),
        ("methods", ["post"], frozenset({"POST"})),
        ("methods", ["get", "Purge"], frozenset({"GET", "HEAD", "PURGE"})),
        ("when", "staff", "staff"),
        ("when", "shop.limits.is_partner", "shop.limits.is_partner"),
        ("when", busy, busy),
        ("key", "user_or_ip", parse_key("user")),
        ("missing", "skip", "skip"),
        ("max_concurrent", 0, 0),
        ("max_concurrent", 5, 5),
        ("ttl", 90, 90.0),
        ("ttl", 0.5, 0.5),
        ("ttl", "90s", 90.0),
        ("ttl", "5m", 300.0),
        ("ttl", "1h", 3600.0),
        ("ttl", "250ms", 0.25),
        ("ttl", "1.5m", 90.0),
        ("max_age", None, None),
        ("max_age", "2h", 7200.0),
        ("wait", 0, 0.0),
        ("wait", 2, 2.0),
        ("wait", "0s", 0.0),
        ("wait", "250ms", 0.25),
        ("max_waiting", 1000, 1000),
        ("renew", False, False),
        ("block", True, True),
        ("backend", "fast", "fast"),
        ("on_backend_error", None, None),
        ("on_backend_error", "deny", "deny"),
        ("status", 503, 503),
        ("response_callback", None, None),
        ("response_callback", busy, busy),
        ("response_callback", "shop.limits.busy", "shop.limits.busy"),
        ("except_ips", ["10.0.0.0/8", "::1"], (ip_network("10.0.0.0/8"), ip_network("::1/128"))),
        ("except_ips", ["::ffff:10.0.0.0/104"], (ip_network("10.0.0.0/8"),)),
        ("except_users", [1, "abc"], (1, "abc")),
        ("per_key", {"user:42": 50, "ip:1": None}, {"user:42": 50, "ip:1": None}),
        ("cost", 1000, 1000),
        ("max_concurrent", None, None),
        ("max_concurrent", "shop.limits.seats", "shop.limits.seats"),
        ("max_concurrent", busy, busy),
        ("cost", "shop.limits.cost", "shop.limits.cost"),
        ("max_waiting", 0, 0),
    ],
)
def test_a_good_value_is_normalised(name: str, value: object, normalised: object) -> None:
    assert FIELDS[name].check(value) == normalised


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("url_names", "reports:*", 'write ["reports:*"]'),
        ("url_names", [], "at least one"),
        ("url_names", {"a": 1}, "expected a list of view names"),
        ("exclude", [""], "expected a view name"),
        ("exclude", [" a"], 'write "a"'),
        ("url_names", [None], "got null"),
        ("methods", "POST", 'write ["POST"]'),
        ("methods", ["PO ST"], "an HTTP method such as 'POST'"),
        ("methods", [1], "an HTTP method such as 'POST'"),
        ("when", "authentic", "did you mean 'authenticated'?"),
        ("when", True, "got true"),
        ("key", "usr", "did you mean 'user'?"),
        ("missing", "IP", "did you mean 'ip'?"),
        ("missing", None, "expected 'ip', 'skip' or 'reject', got null"),
        ("missing", [], "expected 'ip', 'skip' or 'reject'"),
        (
            "max_concurrent",
            "ten",
            "expected an integer >= 0, null, or a dotted path such as 'shop.limits.of_plan', got 'ten'",
        ),
        ("max_concurrent", True, "expected an integer >= 0, or null, got true"),
        ("max_concurrent", -1, "expected an integer >= 0, or null, got -1"),
        ("max_concurrent", 5.0, "expected an integer >= 0, or null, got 5.0"),
        pytest.param("max_concurrent", 10**5000, "expected at most", id="an integer too long to print"),
        ("ttl", 0, "expected seconds > 0"),
        ("ttl", -1, "no negative number of seconds"),
        ("ttl", True, "expected seconds"),
        ("ttl", None, "expected seconds"),
        ("ttl", float("nan"), "finite"),
        ("ttl", float("inf"), "finite"),
        ("ttl", 10**400, "ten years"),
        ("ttl", "9" * 15 + "h", "ten years"),
        ("ttl", "0s", "expected seconds > 0"),
        ("ttl", "90", "'90s'"),
        ("ttl", "5 minutes", "'5m'"),
        ("ttl", "\u0665s", "'5m'"),
        ("max_age", 0, "expected seconds > 0"),
        ("wait", -0.1, "no negative number of seconds"),
        ("wait", True, "expected seconds such as 90"),
        ("wait", None, "expected seconds such as 90"),
        ("block", "no", "expected true or false, got 'no'"),
        ("renew", 1, "expected true or false, got 1"),
        ("overridable", None, "expected true or false, got null"),
        ("backend", "", "the name of a backend"),
        ("backend", None, "the name of a backend"),
        ("on_backend_error", "allw", "did you mean 'allow'?"),
        ("status", 500, "expected 429 or 503, got 500"),
        ("status", "429", "expected 429 or 503, got '429'"),
        ("status", 429.0, "expected 429 or 503"),
        ("response_callback", "busy", "expected a dotted path such as 'shop.limits.busy'"),
        ("except_ips", ["10.0.0.1/8"], 'write "10.0.0.0/8"'),
        ("except_ips", ["ten"], "expected a network"),
        ("except_users", [True], "the primary key of a user"),
        ("per_key", {1: 2}, "'user:42'"),
        ("per_key", {"user:1": "x"}, "expected an integer >= 0, or null"),
        ("cost", 0, "from 1 to 1000"),
        ("cost", 1001, "from 1 to 1000"),
        ("max_waiting", -1, "expected an integer >= 0"),
        ("max_waiting", None, "expected an integer >= 0, got null"),
        ("max_waiting", 1.0, "expected an integer >= 0, got 1.0"),
        ("max_concurrent", Unprintable(), "got <Unprintable>"),
        ("max_concurrent", "x" * 100_000, "..."),
    ],
)
def test_a_wrong_value_is_refused_with_the_cure(name: str, value: object, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        FIELDS[name].check(value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_every_wrong_entry_of_a_list_is_named_by_its_position() -> None:
    with pytest.raises(FieldError) as caught:
        FIELDS["url_names"].check(["a", 1, "b", ""])
    assert [path for path, _ in caught.value.found] == [(1,), (3,)]


def test_max_age_follows_a_longer_ttl() -> None:
    key = {"key": parse_key("ip"), "max_concurrent": 1}
    assert policy_from("p", key).max_age == 3600
    assert policy_from("p", {**key, "ttl": 7200.0}).max_age == 7200
    assert policy_from("p", {**key, "ttl": 7200.0, "max_age": None}).max_age is None
    assert policy_from("p", {**key, "ttl": 7200.0, "max_age": 60.0}).max_age == 60


def test_a_policy_takes_what_it_does_not_say_from_the_defaults() -> None:
    defaults = check_fields({"ttl": 10, "key": "ip"}, FIELDS)
    values, findings = check_policy({"max_concurrent": 3, "ttl": "20s"}, defaults)
    assert not findings
    assert (values["ttl"], values["key"].kind, values["max_concurrent"]) == (20.0, "ip", 3)


def test_a_wrong_value_does_not_also_count_as_a_missing_or_contradicting_one() -> None:
    defaults = check_fields({"block": False}, FIELDS)
    _, findings = check_policy({"key": "usr", "max_concurrent": "ten", "block": "yes", "missing": "reject"}, defaults)
    assert [finding.path for finding in findings] == [("key",), ("max_concurrent",), ("block",)]


def make(base: Policy | None = None, name: str = "view", **keywords: object) -> Policy:
    return override(base, name, keywords, "shop/views.py:7")


def test_the_decorator_builds_a_policy_of_its_keywords() -> None:
    made = make(key="user", max_concurrent=5, ttl="5m", methods=["get"], backend=None)
    assert (made.name, made.key.kind, made.max_concurrent, made.ttl) == ("view", "user", 5, 300.0)
    assert made.methods == {"GET", "HEAD"}
    assert made.backend == "default"
    assert made.place == "shop/views.py:7"


def test_the_decorator_overrides_only_what_was_given() -> None:
    base = Policy(
        "exports", parse_key("ip"), 3, url_names=("a",), exclude=("b",), ttl=7200.0, max_age=7200.0, backend="fast"
    )
    made = make(base, "exports", max_concurrent=1, ttl=30, backend=None)
    assert (made.name, made.max_concurrent, made.key, made.backend) == ("exports", 1, base.key, "fast")
    assert (made.url_names, made.exclude) == ((), ())
    assert made.max_age == 3600, "the base's was the default for its ttl"
    assert make(base, "exports", max_age=None).max_age is None


def test_a_decorator_names_everything_that_is_wrong_at_its_place() -> None:
    with pytest.raises(DecoratorUsageError) as caught:
        make(max_concurent=5, url_names=["a"], exclude=["b"], ttl="x", wait=-2)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems) == 6
    assert all(line.startswith("shop/views.py:7: @concurrency_limit: ") for line in lines)
    for piece in ("did you mean 'max_concurrent'?", "key is required", "remove it", "no negative number"):
        assert piece in str(caught.value)
    assert "max_concurrent is required" not in str(caught.value), "a misspelt field is one mistake, not two"
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ConfigurationError)


def test_a_decorator_cannot_reject_in_the_shadow() -> None:
    base = Policy("exports", parse_key("ip"), 3, on_backend_error="deny")
    with pytest.raises(DecoratorUsageError, match="on_backend_error: deny; remove on_backend_error"):
        make(base, block=False)


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "a\n"])
def test_a_name_that_no_store_could_keep_is_refused(name: str) -> None:
    with pytest.raises(DecoratorUsageError, match="the name of a policy is letters"):
        make(name=name, key="ip", max_concurrent=1)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FIELDS)), ANYTHING)
def test_any_value_is_accepted_or_refused_in_words(name: str, value: object) -> None:
    for rows in (FIELDS, DECORATOR_FIELDS):
        checked = check_fields({name: value}, rows)
        assert (name in checked.values) != bool(checked.findings)
