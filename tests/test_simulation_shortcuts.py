"""Shortcuts of the simulation: each comes to what the long way comes to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpRequest
from django.urls import Resolver404, URLResolver, get_resolver, include, path, re_path
from django.urls.resolvers import RegexPattern
from django.utils.functional import lazy
from django.utils.translation import get_language, gettext_lazy, override
from hypothesis import given, settings
from hypothesis import strategies as st

from django_concurrency_mw.client import TrustedProxies
from django_concurrency_mw.keys import Resolver
from django_concurrency_mw.loader import load_policies
from django_concurrency_mw.outcomes import Asked
from django_concurrency_mw.simulation import sorting, stamps, text_lines
from django_concurrency_mw.simulation.formats import Wanted, recognise
from django_concurrency_mw.simulation.paths import _finder, resolving
from django_concurrency_mw.simulation.quick_keys import asked_for, quick_key
from django_concurrency_mw.simulation.sorting import Sorter

from . import views

POLICIES = load_policies(
    {
        "policies": {
            name: {"url_names": ["*"], "max_concurrent": 2, **fields}
            for name, fields in {
                "ip": {"key": "ip", "per_key": {"ip:10.0.0.1": 5, "ip:10.0.0.2": None}},
                "one": {"key": "row:{kwargs.pk}", "per_key": {"row:1": 7}},
                "bare": {"key": "{kwargs.pk}"},
                "two": {"key": "a%{kwargs.pk}:{kwargs.other}", "missing": "ip"},
                "touching": {"key": "{kwargs.pk}{kwargs.other}", "missing": "reject"},
            }.items()
        }
    }
)
TEXTS = st.sampled_from(["1", "", "missing:ip:10.0.0.1", "%6Dissing:", "a:b", "%", "\x1f", "é", "x" * 600])
VALUES = st.none() | st.integers() | st.uuids() | st.text() | TEXTS
ADDRESSES = (
    st.sampled_from(
        ["10.0.0.1", "10.0.0.2", "unix:", "-", "", "[2001:db8::1]:80", "1.2.3.4:80", "::ffff:10.0.0.1", "1." * 40]
    )
    | st.ip_addresses().map(str)
    | st.text()
)


def _asked(policy: Any, ip: str, kwargs: dict[str, Any]) -> Asked | None:
    """The long way: None where it has no key."""
    request = HttpRequest()
    request.META["REMOTE_ADDR"] = ip
    steps = Resolver(request, kwargs, TrustedProxies(), "HTTP_X_FORWARDED_FOR").resolve([policy])
    with pytest.raises(StopIteration) as stop:
        next(steps)
    (found,) = stop.value.value
    return found if isinstance(found, Asked) else None


@settings(max_examples=60)
@given(ADDRESSES, st.fixed_dictionaries({}, optional={"pk": VALUES, "other": VALUES}))
def test_a_quick_key_is_that_of_the_request(ip: str, kwargs: dict[str, Any]) -> None:
    for policy in POLICIES:
        quick = quick_key(policy)
        assert quick is not None
        key = quick(ip, kwargs)
        if key is not None:
            assert asked_for(policy, key) == _asked(policy, ip, kwargs)


def test_the_usual_keys_are_quick() -> None:
    """Else nothing would be won; and the test above would compare nothing."""
    found = {policy.name: quick_key(policy) for policy in POLICIES}
    assert all(quick is not None and quick("10.0.0.1", {"pk": 1, "other": "x"}) for quick in found.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "ip", "except_ips": ["10.0.0.0/8"]},
        {"key": "ip", "when": "anonymous"},
        {"key": "row:{kwargs.pk}", "except_users": [1]},
        {"key": "{kwargs.pk}:{ip}"},
        {"key": "user"},
        {"key": "global"},
    ],
)
def test_what_more_than_an_address_or_a_path_decides_is_not_quick(fields: dict[str, Any]) -> None:
    (policy,) = load_policies({"policies": {"some": {"url_names": ["*"], "max_concurrent": 2, **fields}}})
    assert quick_key(policy) is None


SHOP = [path("<int:pk>/", views.told, name="pk"), re_path(r"^(?P<word>[a-z]+)/$", views.told, {"more": 1}, name="word")]
PATTERNS = [
    path("shop/", include((SHOP, "shop"), namespace="first")),
    path("shop/<str:word>/", views.told, name="behind"),
    path("<str:shop>/in/", include((SHOP, "shop"), namespace="second"), {"extra": 2}),
    path(gettext_lazy("translated/"), views.told, name="translated"),
    re_path(r"^(?P<year>[0-9]{4})/$", views.told, name="year"),
    path("a<b/", views.told, name="odd"),
    path("", views.told, name="root"),
]
PATHS = st.lists(
    st.sampled_from(["shop", "in", "7", "2026", "abc", "translated", "a<b", "", "é", "shop ", "\n"]), max_size=4
).map(lambda parts: "/" + "".join(f"{part}/" for part in parts))


def _seen(found: Any) -> Any:
    return None if found is None else (found.func, found.view_name, found.args, found.kwargs)


@settings(max_examples=100)
@given(PATHS)
def test_a_path_leads_where_djangos_resolver_leads(target: str) -> None:
    resolver = URLResolver(RegexPattern(r"^/"), PATTERNS)
    try:
        expected = resolver.resolve(target)
    except Resolver404:
        expected = None
    assert _seen(_finder(resolver)(target)) == _seen(expected)


def test_the_urls_of_the_site_lead_where_djangos_resolver_leads() -> None:
    resolve, resolver = resolving(), get_resolver()
    for target in ("/told/", "/told/7/", "/shop/inner/7/", "/shop2/inner/7/", "/decorated/"):
        assert _seen(resolve(target)) == _seen(resolver.resolve(target))
    assert resolve("/nowhere/") is None
    assert resolve("nowhere") is None


WORDS = st.sampled_from(
    ["-", "0.250", "0.1, 0.2", "0.1 : 0.2", "0.1,", "a", 'a"b', "a\\x22b", "a b", "[x]", "é", ":", "", "\t", "HTTP/1.1"]
)
REQUESTS = st.sampled_from(
    ["GET /a/?b=c HTTP/1.1", "GET /a\\x22/ HTTP/1.0", "-", "", '"GET /a HTTP/1.1', "GET /é/ HTTP/1.1"]
)
LINE = '203.0.113.9 - - [28/May/2026:20:26:40 +0000] "GET /told/1/ HTTP/1.1" 200 5 "-" "curl/8"'


@settings(max_examples=100)
@given(st.data())
def test_a_usual_line_is_read_as_the_full_expression_reads_it(data: st.DataObject) -> None:
    tail = data.draw(
        st.sampled_from([" 0.250 0.250 1780000000.123", ' rt=0.250 urt="0.250" msec=1780000000.123', " 0.250"])
    )
    layout = recognise([("here:1", LINE + tail)], Wanted())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "_quick_parser", lambda tokens, places, full: full)
        full = recognise([("here:1", LINE + tail)], Wanted()).parser(())

    def word(usual: str) -> str:
        return data.draw(WORDS) if data.draw(st.integers(0, 5)) == 0 else usual

    pieces = ["203.0.113.9", "-", "-", "[28/May/2026:20:26:40 +0000]", "", word("200"), word("5")]
    pieces[:3] = [word(piece) for piece in pieces[:3]]
    pieces[4] = f'"{data.draw(REQUESTS)}"'
    line = f'{" ".join(pieces)} "{word("-")}" "{word("curl/8")}"' + tail.replace("0.250", word("0.250"))
    line += data.draw(st.sampled_from(["\n", "\r\n", "", " x\n"]))
    assert layout.parser(())(line) == full(line)


def test_the_times_of_several_servers_are_no_usual_line() -> None:
    layout = recognise([("here:1", f"{LINE} 0.250 0.250 1780000000.123")], Wanted())
    for times in ("0.1, 0.2", "0.1 : 0.2"):
        raw = layout.parser(())(f"{LINE} 0.300 {times} 1780000000.123\n")
        assert raw is not None
        assert raw[4:6] == ("0.300", times)
    several = f"{LINE} 0.1, 0.2 1780000000.123\n"
    full = text_lines.re.compile(text_lines._COMBINED + rf"(?:\s+({text_lines._BARE}))" * 3 + r"\s*$").match(several)
    raw = layout.parser(())(several)
    assert full is not None
    assert raw is not None
    assert (raw[4], raw[5], raw[0]) == full.groups()[-3:]


def test_a_translated_route_is_looked_at_in_the_language_of_the_moment() -> None:
    route = lazy(lambda: f"in-{get_language()}/", str)()
    find = _finder(URLResolver(RegexPattern(r"^/"), [path(route, views.told, name="translated")]))
    for language in ("en", "de"):
        with override(language):
            assert find(f"/in-{language}/").view_name == "translated"


def test_what_is_remembered_of_durations_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "REMEMBERED", 10)
    remembered = stamps.Remembered(stamps.duration, 1_000.0)
    for number in [*range(100), 5]:
        assert remembered[str(number)] == number * 1_000
    assert len(remembered) <= 10


def test_a_usual_line_does_not_need_the_full_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "_parser", lambda regex, places: pytest.fail)
    line = f"{LINE} 0.250 - 1780000000.123"
    raw = recognise([("here:1", line)], Wanted()).parser(())(f"{line}\n")
    assert raw == ("1780000000.123", "GET", "/told/1/", "203.0.113.9", "0.250", "-", "200")


@pytest.mark.parametrize(("shift", "most"), [(30, 3), (100_000, 64)])
def test_runs_are_merged_in_order_and_opened_when_they_are_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int, most: int
) -> None:
    """`shift`: how far from its place a record may be; runs are of 50."""
    opened: set[Path] = set()
    together = 0

    def read(file: Path) -> Iterator[list[sorting.Record]]:
        nonlocal together
        opened.add(file)
        together = max(together, len(opened))
        yield from actual(file)
        opened.discard(file)

    actual = sorting._read
    monkeypatch.setattr(sorting, "_read", read)
    monkeypatch.setattr(sorting, "CHUNK", 7)
    draw = random.Random(1)
    records = [(number + draw.randrange(shift), number, ()) for number in range(3_000)]
    sorter = Sorter(tmp_path, 50)
    for record in records:
        sorter.add(record)
    lists = list(sorter.lists())
    assert [record for one in lists for record in one] == sorted(records)
    assert len(lists) > 100
    assert 1 < together <= most
    assert not opened
