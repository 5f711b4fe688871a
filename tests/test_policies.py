"""Which policies a view name and a method have, and that finding out stays cheap."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from dataclasses import FrozenInstanceError
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.policies import Policy, PolicyTable, left_out

IP = parse_key("ip")


def policy(name: str, *url_names: str, exclude: tuple[str, ...] = (), methods: str = "") -> Policy:
    wanted = frozenset(methods.split()) if methods else None
    return Policy(name, IP, 1, url_names=url_names, exclude=exclude, methods=wanted)


def names(found: tuple[Policy, ...]) -> list[str]:
    return [each.name for each in found]


def test_all_matching_policies_are_found_in_table_order() -> None:
    table = PolicyTable([policy("b", "reports:*"), policy("no", "shop:*"), policy("a", "reports:export")])
    assert names(table.match("reports:export", "GET")) == ["b", "a"]
    assert names(table.match("reports:export", "GET")) == ["b", "a"]


def test_exclude_leaves_views_out() -> None:
    table = PolicyTable([policy("a", "reports:*", exclude=("*:status", "reports:health"))])
    assert table.match("reports:status", "GET") == ()
    assert table.match("reports:health", "GET") == ()
    assert names(table.match("reports:export", "GET")) == ["a"]


def test_methods_are_matched() -> None:
    table = PolicyTable(
        [policy("post", "a", methods="POST"), policy("all", "a"), policy("purge", "a", methods="PURGE")]
    )
    assert names(table.match("a", "POST")) == ["post", "all"]
    assert names(table.match("a", "GET")) == ["all"]
    assert names(table.match("a", "PURGE")) == ["all", "purge"]
    assert names(table.match("a", "BREW")) == ["all"]


def test_a_policy_without_url_names_matches_no_view() -> None:
    table = PolicyTable([policy("by-name")])
    assert table.match("anything", "GET") == ()
    assert left_out(table.policies[0], "anything", "GET") == "url_names"
    assert table.get("by-name") is table.policies[0]
    assert table.get("other") is None


@given(
    st.lists(st.text("ab:*?[!].", max_size=6), max_size=4),
    st.lists(st.text("ab:*?[!].", max_size=6), max_size=2),
    st.text("ab:.\n", max_size=6),
)
def test_patterns_mean_what_fnmatchcase_says(wanted: list[str], exclude: list[str], name: str) -> None:
    one = policy("p", *wanted, exclude=tuple(exclude))
    expected = any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in exclude)
    assert bool(PolicyTable([one]).match(name, "GET")) is expected
    assert (left_out(one, name, "GET") is None) is expected


def test_matching_is_case_sensitive() -> None:
    assert PolicyTable([policy("a", "Reports:*")]).match("reports:export", "GET") == ()


def test_unknown_methods_take_no_memory() -> None:
    """A client may send any word as its method; the table remembers none of them."""
    table = PolicyTable([policy("a", "view", methods="GET HEAD"), policy("b", "view")])
    first = table.match("view", "BREW")
    before = sys.getsizeof(table.known) + sum(map(sys.getsizeof, table.known.values()))
    for number in range(10_000):
        assert table.match("view", f"M{number}") is first
    assert sys.getsizeof(table.known) + sum(map(sys.getsizeof, table.known.values())) == before


def test_a_view_without_a_policy_costs_one_look_up() -> None:
    table = PolicyTable([policy("a", "view")])
    assert table.match("free", "GET") == ()
    assert table.known["free"] == {}
    table._globs = None  # type: ignore[assignment]  # nothing is compared any more
    assert table.match("free", "GET") == ()


def test_a_look_up_is_as_quick_in_a_large_table() -> None:
    """From 10 to 10,000 policies the time after first sight stays the same (a generous factor, for busy machines)."""

    def seconds(size: int) -> float:
        table = PolicyTable([policy(f"p{n}", f"app{n}:*", f"x*{n}?") for n in range(size)])
        assert names(table.match("app7:view", "GET")) == ["p7"]
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(2_000):
                table.match("app7:view", "GET")
                table.match("free", "GET")
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(10_000) < 5 * seconds(10)


def test_threads_that_meet_a_new_view_at_once_get_the_same_answer() -> None:
    table = PolicyTable([policy("a", "v*"), policy("b", "*1")])
    wrong: list[str] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        for number in range(300):
            expected = ["a", "b"] if str(number).endswith("1") else ["a"]
            if names(table.match(f"v{number}", "GET")) != expected:
                wrong.append(f"v{number}")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_policy_is_frozen_equal_to_itself_alone_and_weakly_referable() -> None:
    one, other = policy("a", "v"), policy("a", "v")
    with pytest.raises(FrozenInstanceError):
        one.name = "b"  # type: ignore[misc]
    assert one != other
    assert len({one, other}) == 2
    assert weakref.ref(one)() is one


def test_a_table_is_a_sized_iterable() -> None:
    table = PolicyTable([policy("a"), policy("b")])
    assert len(table) == 2
    assert names(tuple(table)) == ["a", "b"]
    assert len(PolicyTable()) == 0
