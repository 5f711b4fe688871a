"""The soak itself: a short one runs and finds nothing, one without limits finds that, and its verdict tells what is excused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .chaos import LONG
from .soak.__main__ import main
from .soak.day import one_day
from .soak.events import Event, inside, read
from .soak.fleet import Fleet
from .soak.report import LONG_ENOUGH, Report
from .soak.sampling import JUDGED, WARM_UP, Life
from .soak.stages import Change
from .soak.verdict import Count, Known, judge, never_left


def test_a_short_one_finds_every_promise_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a Cluster that fails over under load; CHAOS=long takes a minute, and both stores."""
    options = ["--seconds", "60"] if LONG else ["--only", "cluster", "--seconds", "2", "--clients", "6"]
    status = main([*options, "--json", str(tmp_path / "report.json"), "--files", str(tmp_path / "files")])
    said = capsys.readouterr().out
    print(said)
    assert status == 0, said
    assert said.count("every promise was kept") == (2 if LONG else 1)
    for report in json.loads((tmp_path / "report.json").read_text()):
        assert report["broken"] == []
        assert report["answers"]["200"] > 0
        assert report["happened"]
        assert all(count["admitted"] and "held" in count["states"] for count in report["counts"].values())


class Nowhere:
    """A store that holds nothing, and to which nothing happens."""

    name = "nowhere"
    changes: tuple[str, ...] = ()
    backend: dict[str, Any] = {"BACKEND": "memory"}  # noqa: RUF012  # nobody changes it

    def change(self, what: str) -> Change:
        raise NotImplementedError

    def held(self) -> int:
        return 0


def test_without_limits_it_finds_broken_caps(tmp_path: Path) -> None:
    report = Report("nowhere", 1.0, 6.0)
    fleet = Fleet(tmp_path, Nowhere.backend, 6.0, limits=False, kinds=("gunicorn",))
    try:
        fleet.start()
        one_day(Nowhere(), fleet, 16, report)
    finally:
        fleet.close()
    assert any("a cap was broken" in said and "the limit is 5" in said for said in report.broken), report.as_text()
    assert report.counts["cap"].above["broken"] > 0
    assert report.counts["cap"].most > 5
    assert 429 not in report.answers


def stays(
    request: str, since: float, until: float | None, state: str = "held", pid: int = 1, units: int = 1
) -> list[Event]:
    entry = Event(since, pid, request, units, "cap", state)
    return [entry] if until is None else [entry, Event(until, pid, request, -units, "cap", state)]


def judged(*requests: Sequence[Event], **known: Any) -> Count:
    """At a limit of 2 and leases of 6 s."""
    events = sorted((event for each in requests for event in each), key=lambda event: (event.at, event.units))
    return judge(events, Known({"cap": 2}, 6.0, **known))["cap"]


TWO = (stays("a", 0, 20), stays("b", 1, 20))


def test_up_to_the_limit_nothing_is_said() -> None:
    count = judged(*TWO, stays("c", 20, 21))
    assert (count.admitted, count.most, count.broken, dict(count.above)) == (3, 2, [], {})


@pytest.mark.parametrize("state", ["held", "none"])
def test_one_more_breaks_the_cap(state: str) -> None:
    """Also where no limit was applied at all."""
    count = judged(*TWO, stays("c", 3, 5, state), stays("d", 6, 7))
    assert count.most == 3
    assert dict(count.above) == {"broken": 3.0}
    assert [said.split(" (")[0] for said in count.broken] == ["cap: 3 in flight, and the limit is 2"] * 2


def test_slots_are_counted_and_not_requests() -> None:
    assert judged(stays("a", 0, 9), stays("b", 1, 2, units=2)).broken


def test_what_the_store_lost_may_be_admitted_once_more_and_runs_to_the_end() -> None:
    """But nobody comes in beside it once the heartbeat is over."""
    lost = {"lost": [(2.0, 4.0)]}
    count = judged(*TWO, stays("c", 3, 9), **lost)
    assert (count.broken, dict(count.above)) == ([], {"a": 6.0})
    assert judged(*TWO, stays("c", 3, 9), stays("d", 5, 6), **lost).broken
    assert judged(*TWO, stays("c", 1.9, 9), **lost).broken


def test_a_process_that_counts_by_itself_does_so_beside_the_others_up_to_its_limit() -> None:
    three = (stays("c", 3, 5, "local", pid=2), stays("d", 3, 5, "local", pid=2))
    count = judged(*TWO, *three)
    assert (count.broken, dict(count.above)) == ([], {"d": 2.0})
    assert (count.most, count.most_of_the_store) == (4, 2)
    assert judged(*TWO, *three, stays("e", 4, 5, "local", pid=2)).broken
    assert judged(*TWO, stays("c", 3, 5, "local", pid=1)).broken, "it counts what it held before, too"


def test_who_stood_still_past_the_lease_is_not_counted_beside_others() -> None:
    """From when its lease may have ended, and not before; nor one who was let in just before it stopped."""
    stopped = {"stopped": {1: [(2.0, 12.0)]}}
    others = (stays("c", 8, 20, pid=2), stays("d", 9, 20, pid=2))
    count = judged(*TWO, *others, stays("e", 12.5, 13), **stopped)
    assert (count.broken, set(count.above)) == ([], {"b"})
    assert judged(*TWO, stays("c", 3, 4, pid=2), **stopped).broken
    assert judged(*TWO, *others, stays("e", 10, 11, pid=2), **stopped).broken
    assert judged(*TWO, *others, stays("e", 15, 16), **stopped).broken
    assert judged(*TWO, stays("c", 8, 9, pid=2), stopped={1: [(2.0, 5.0)]}).broken, "not long enough"


def test_who_died_inside_is_there_until_then() -> None:
    dead = (stays("a", 0, None), stays("b", 1, None))
    assert judged(*dead, stays("c", 4, 5, pid=2), stays("d", 4, 5, pid=2), ended={1: 3.0}).broken == []
    assert judged(*dead, stays("c", 2, 5, pid=2), ended={1: 3.0}).broken


def test_who_enters_and_never_leaves_is_found() -> None:
    events = [*stays("a", 0, 1), *stays("b", 1, None), *stays("c", 1, None, pid=2)]
    assert never_left(events, {}) == 2
    assert never_left(events, {2: 3.0}) == 1


def test_what_views_write_down_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "events"
    assert read(path) == []
    with inside(str(path), {"cap": (1, "held")}), inside(str(path), {"cap": (2, "local"), "other": (2, "none")}):
        pass
    found = read(path)
    assert [(event.policy, event.units, event.state) for event in found] == [
        ("cap", 1, "held"),
        ("cap", 2, "local"),
        ("other", 2, "none"),
        ("cap", -2, "local"),
        ("other", -2, "none"),
        ("cap", -1, "held"),
    ]
    assert found[0].request == found[-1].request != found[1].request


@pytest.mark.parametrize(
    ("seconds", "megabytes", "descriptors", "says"),
    [
        (WARM_UP + JUDGED, (100.0, 103.0), (40, 44), ""),
        (WARM_UP + JUDGED, (100.0, 130.0), (40, 40), "grows"),
        (WARM_UP + JUDGED, (100.0, 100.0), (40, 80), "grows"),
        (WARM_UP, (100.0, 130.0), (40, 40), ""),
    ],
)
def test_workers_that_grow_are_found(
    seconds: float, megabytes: tuple[float, float], descriptors: tuple[float, float], says: str
) -> None:
    """Where they lived long enough to be judged."""
    report = kept()
    report.lives = [Life("gunicorn", (1, 2), seconds, megabytes, descriptors)]
    assert says in " ".join(report.broken)
    assert bool(report.broken) == bool(says)


def test_a_long_one_looks_at_workers_of_each_server() -> None:
    report = kept()
    report.lives = [
        Life("gunicorn", (1, 2), 200, (100, 100), (40, 40)),
        Life("uvicorn", (3, 4), 9, (100, 100), (40, 40)),
    ]
    assert report.broken == []
    report.seconds = LONG_ENOUGH
    assert report.broken == ["only of ['gunicorn'] workers lived long enough to be looked at"]


def kept() -> Report:
    return Report("cluster", 1.0, 6.0, counts={"cap": Count(admitted=1)})


def test_each_promise_that_is_broken_is_in_the_report_and_makes_the_exit_status() -> None:
    assert kept().broken == []
    for field, value, says in [
        ("answers", {200: 5, 500: 1, 0: 1}, "1 answers of 5xx"),
        ("held", (3, 1), "1 slots are held a lease after the end"),
        ("counts", {"cap": Count()}, "a policy has admitted nobody"),
        ("counts", {"cap": Count(admitted=9, broken=["6 in flight"])}, "a cap was broken 1 times: 6 in flight"),
        ("wrong", ["something could not be done"], "something could not be done"),
    ]:
        report = kept()
        setattr(report, field, value)
        assert says in " ".join(report.broken)
        assert f"BROKEN          {says}" in report.as_text()
