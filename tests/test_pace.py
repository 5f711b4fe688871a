"""The pace of the lines: what waiters have seen of it, and what those are told who are turned away."""

from __future__ import annotations

import gc

import pytest

from django_concurrency_mw import pace
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.policies import Policy


def policy(name: str = "p") -> Policy:
    return Policy(name, parse_key("global"), 1)


def told(of: Policy, turns: int) -> set[int | None]:
    """All that is ever told."""
    return {pace.retry_after(of, turns) for _ in range(500)}


def test_nothing_is_told_where_nothing_was_seen() -> None:
    assert pace.retry_after(policy(), 5) is None


@pytest.mark.parametrize(
    ("places", "seconds", "turns", "soonest", "latest"),
    [
        (1, 2.0, 1, 2, 3),
        (4, 2.0, 8, 4, 6),  # half a second a turn
        (10, 1.0, 101, 11, 16),
        (1, 0.001, 1, 1, 2),  # a whole second at least, and not everybody in the same one
        (1, 0.0, 1, 1, 2),
        (1, 500.0, 3, 80, 120),
    ],
)
def test_the_time_of_a_turn_times_the_turns_spread_upwards(
    places: int, seconds: float, turns: int, soonest: int, latest: int
) -> None:
    seen = policy()
    pace.seen(seen, places, seconds)
    assert told(seen, turns) == set(range(soonest, latest + 1))


def test_the_latest_counts_for_a_part_and_the_rest_is_not_forgotten_at_once() -> None:
    seen = policy()
    pace.seen(seen, 1, 10.0)
    pace.seen(seen, 1, 20.0)
    assert min(told(seen, 1)) == 13  # type: ignore[type-var]  # numbers, as it was seen
    for _ in range(30):
        pace.seen(seen, 2, 40.0)
    assert min(told(seen, 1)) == 20  # type: ignore[type-var]


def test_who_did_not_come_forward_at_all_says_how_long_a_turn_takes_at_least() -> None:
    """Or a line that has stopped would go on to be told of as it was."""
    seen = policy()
    pace.seen(seen, 0, 4.0)
    assert min(told(seen, 1)) == 4  # type: ignore[type-var]
    pace.seen(seen, 0, 2.0)
    assert min(told(seen, 1)) == 4, "two seconds say nothing against four"  # type: ignore[type-var]
    pace.seen(seen, 0, 9.0)
    assert min(told(seen, 1)) == 9  # type: ignore[type-var]


def test_each_policy_has_its_own_and_one_that_is_gone_takes_no_memory() -> None:
    """A table that was loaded anew, or overridden settings, begin anew though the names be the same."""
    slow, quick = policy(), policy()
    pace.seen(slow, 1, 30.0)
    pace.seen(quick, 1, 3.0)
    assert min(told(slow, 1)) == 30  # type: ignore[type-var]
    assert min(told(quick, 1)) == 3  # type: ignore[type-var]
    before = len(pace._seconds)
    del slow, quick
    gc.collect()
    assert len(pace._seconds) == before - 2
