"""Simulate: the figures are those of the limiter on the same arrivals; what a log lacks is said and never made up."""

from __future__ import annotations

import gc
import gzip
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from time import process_time
from typing import Any
from urllib.parse import unquote_to_bytes

import apachelogs
import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from django_concurrency_mw.backends import BackendConfig, memory
from django_concurrency_mw.keys import make_key, masked
from django_concurrency_mw.loader import load_policies
from django_concurrency_mw.outcomes import UNLIMITED, Full, Slot
from django_concurrency_mw.simulation import matching, reading, report, running, text_lines
from django_concurrency_mw.simulation.formats import FORMATS, FormatError, Wanted, recognise
from django_concurrency_mw.simulation.slots import Slots
from django_concurrency_mw.simulation.sorting import Sorter
from django_concurrency_mw.simulation.spreading import EVENLY, Spreader, offsets
from django_concurrency_mw.simulation.stamps import duration, microseconds, upstream

START = 1_780_000_000_000  # milliseconds


@dataclass(frozen=True)
class Arrival:
    """A request of a known pattern, in milliseconds after START."""

    start: int
    took: int
    ip: str = "203.0.113.1"
    target: str = "/told/1/"
    method: str = "GET"

    @property
    def end(self) -> int:
        return self.start + self.took


def second(moment: int) -> str:
    at = datetime.fromtimestamp((START + moment) // 1000, UTC)
    return at.strftime("%d/%b/%Y:%H:%M:%S +0000")


def combined(arrival: Arrival, moment: int, tail: str) -> str:
    return f'{arrival.ip} - - [{second(moment)}] "{arrival.method} {arrival.target} HTTP/1.1" 200 12 "-" "curl/8.1"{tail}\n'


def in_order(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """As a server writes them: when they end."""
    return sorted(arrivals, key=lambda arrival: arrival.end)


def msec_log(arrivals: Sequence[Arrival]) -> str:
    return "".join(
        combined(one, one.end, f" {one.took / 1000:.3f} - {(START + one.end) / 1000:.3f}") for one in in_order(arrivals)
    )


def seconds_log(arrivals: Sequence[Arrival]) -> str:
    return "".join(combined(one, one.end, f" {one.took / 1000:.3f}") for one in in_order(arrivals))


def apache_log(arrivals: Sequence[Arrival]) -> str:
    return "".join(combined(one, one.start, f" {one.took * 1000}") for one in in_order(arrivals))


Simulate = Callable[..., dict[str, Any]]


@pytest.fixture
def simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """The report's document on a log of this text, for these policies."""
    numbers = count()

    def run(log: str | bytes, policies: dict[str, Any], *options: str) -> dict[str, Any]:
        path = tmp_path / f"access-{next(numbers)}.log"
        path.write_bytes(log if isinstance(log, bytes) else log.encode())
        out = io.StringIO()
        with override_settings(CONCURRENCY_LIMIT={"POLICIES": {"policies": policies}}):
            call_command("concurrency", "simulate", str(path), *options, "--json", stdout=out)
        return dict(json.loads(out.getvalue()))

    return run


def told(**fields: Any) -> dict[str, Any]:
    """One policy, by address unless the fields say otherwise."""
    return {"told": {"url_names": ["told*"], "key": "ip", "max_concurrent": 3} | fields}


def exact(figure: dict[str, int]) -> int:
    assert figure["low"] == figure["median"] == figure["high"]
    return figure["median"]


def pattern(seed: int, requests: int = 600, ips: int = 3, every: float = 20, took: float = 80) -> list[Arrival]:
    """Arrivals at random, on whole milliseconds; many of them at the very millisecond in which another one ends."""
    draw = random.Random(seed)
    found, at = [], 0.0
    for _ in range(requests):
        at += draw.expovariate(1 / every)
        length = max(1, round(draw.expovariate(1 / took)))
        if draw.random() < 0.3 and found:
            at = max(at, float(found[-1].end))
        target = f"/told/{draw.randrange(4)}/" if draw.random() < 0.8 else "/plain/"
        found.append(Arrival(int(at), length, f"203.0.113.{draw.randrange(ips)}", target))
    return found


# Arrivals of a known pattern


def brute_force(arrivals: Sequence[Arrival], limit: int) -> tuple[int, int, int]:
    """Peak on one address, peak in total, rejections: by looking at everybody for everybody."""
    limited = [one for one in in_order(arrivals) if one.target.startswith("/told/")]
    limited.sort(key=lambda one: one.start)  # at equal starts in the order of the log

    def living(among: Sequence[Arrival], number: int) -> list[Arrival]:
        here = limited[number]
        return [one for one in among if one.start <= here.start < one.end]

    peak = total = rejected = 0
    inside: list[Arrival] = []
    for number, one in enumerate(limited):
        alive = living(limited[: number + 1], number)
        total = max(total, len(alive))
        peak = max(peak, sum(other.ip == one.ip for other in alive))
        if sum(other.ip == one.ip for other in living(inside, number)) < limit:
            inside.append(one)
        else:
            rejected += 1
    return peak, total, rejected


@pytest.mark.parametrize("seed", range(4))
def test_a_known_pattern_on_whole_milliseconds_gives_the_exact_peaks_and_rejections(
    seed: int, simulate: Simulate
) -> None:
    arrivals = pattern(seed, every=8)
    (entry,) = simulate(msec_log(arrivals), told())["policies"]
    found = (exact(entry["peak"]), exact(entry["peak_in_total"]), exact(entry["rejected"]))
    assert found == brute_force(arrivals, 3)
    assert found[2] > 20
    assert entry["requests"] == sum(one.target != "/plain/" for one in arrivals)


def test_ends_come_before_starts_at_equal_stamps(simulate: Simulate) -> None:
    after_each_other = [Arrival(100 * number, 100) for number in range(20)]
    (entry,) = simulate(msec_log(after_each_other), told(max_concurrent=1))["policies"]
    assert (exact(entry["peak"]), exact(entry["rejected"])) == (1, 0)


def test_what_would_be_rejected_frees_its_time(simulate: Simulate) -> None:
    """The second would be turned away, so the third finds the place free that the second had."""
    arrivals = [Arrival(0, 100), Arrival(50, 200), Arrival(120, 50)]
    (entry,) = simulate(msec_log(arrivals), told(max_concurrent=1))["policies"]
    assert exact(entry["rejected"]) == 1
    assert exact(entry["peak"]) == 2
    assert exact(entry["peak_admitted"]) == 1


TABLE = {
    "by-ip": {"url_names": ["told*"], "key": "ip", "max_concurrent": 3, "per_key": {"ip:203.0.113.1": 1}, "cost": 1},
    "by-row": {"url_names": ["told-pk"], "key": "row:{kwargs.pk}", "max_concurrent": 4, "cost": 2},
    "all": {"url_names": ["*"], "key": "global", "max_concurrent": 9},
    "counted": {"url_names": ["*"], "key": "global", "max_concurrent": None},
    "shadow": {"url_names": ["told*"], "key": "global", "max_concurrent": 5, "block": False},
}


def of_the_store(arrivals: Sequence[Arrival], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many times each policy of TABLE says no, by the memory store itself."""
    now = 0.0
    monkeypatch.setattr(memory, "monotonic", lambda: now)
    store = memory.MemoryBackend(BackendConfig("default", "memory"))
    over = dict.fromkeys(TABLE, 0)
    events: list[tuple[int, int, int]] = []
    ordered = sorted(in_order(arrivals), key=lambda one: one.start)
    for number, one in enumerate(ordered):
        events += [(one.start, 1, number), (one.end, 0, number)]
    holding: dict[int, list[Slot]] = {}
    for moment, starts, number in sorted(events):
        now = moment / 1000
        if not starts:
            store.give(holding.pop(number, []))
            continue
        one, asked = ordered[number], []
        for name, fields in TABLE.items():
            if one.target == "/plain/" and fields["url_names"] != ["*"]:
                continue
            key = {"ip": f"ip:{one.ip}", "global": "global"}.get(str(fields["key"]), f"row:{one.target[6:7]}")
            limit: Any = fields.get("per_key", {}).get(key, fields["max_concurrent"])
            asked.append(
                Slot(
                    name,
                    make_key(key),
                    UNLIMITED if limit is None else limit,
                    60.0,
                    f"token-{number}",
                    bool(fields.get("block", True)),
                    cost=fields.get("cost", 1),
                )
            )
        reply = store.take(asked)
        if isinstance(reply, Full):
            refused = [slot for slot, full in zip(asked, reply.full, strict=True) if full]
        else:
            holding[number] = asked
            refused = [slot for slot, held in zip(asked, reply.held, strict=True) if not held]
        for slot in refused:
            over[slot.policy] += 1
    assert store.snapshot() == []
    return over


@pytest.mark.parametrize("seed", range(3))
def test_the_memory_store_turns_away_the_same_requests(
    seed: int, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several policies at once: all or nothing, a shadow, costs, a limit of a key's own, none."""
    arrivals = pattern(seed, every=10, ips=4, took=120)
    document = simulate(msec_log(arrivals), TABLE)
    found = {entry["policy"]: exact(entry["rejected"]) for entry in document["policies"]}
    assert found == of_the_store(arrivals, monkeypatch)
    assert all(found[name] for name in ("by-ip", "by-row", "all", "shadow"))
    assert found["counted"] == 0


def test_a_cost_that_no_limit_allows_and_a_limit_of_nothing(simulate: Simulate) -> None:
    table = told(max_concurrent=2, cost=3) | {"none": {"url_names": ["told*"], "key": "global", "max_concurrent": 0}}
    document = simulate(msec_log([Arrival(0, 10), Arrival(50, 10)]), table)
    assert [exact(entry["rejected"]) for entry in document["policies"]] == [2, 0], (
        "it is turned away before anything is asked"
    )
    assert exact(document["rejected"]) == 2
    (entry,) = simulate(msec_log([Arrival(0, 10)]), told(max_concurrent=2, cost=3, block=False))["policies"]
    assert exact(entry["rejected"]) == 1
    only = simulate(msec_log([Arrival(0, 10)]), told(max_concurrent=2, cost=3) | {"all": TABLE["all"]})["policies"]
    assert [exact(entry["rejected"]) for entry in only] == [1, 0], "what can never be let in asks no other policy"


def test_peaks_are_sums_of_costs(simulate: Simulate) -> None:
    after_each_other = [Arrival(100 * number, 50) for number in range(5)]
    (entry,) = simulate(msec_log(after_each_other), told(cost=3))["policies"]
    assert [exact(entry[name]) for name in ("peak", "peak_in_total", "peak_admitted")] == [3, 3, 3]


def test_a_slot_ends_with_its_lease_where_nobody_renews_it(simulate: Simulate) -> None:
    arrivals = [Arrival(0, 5000), Arrival(2500, 100)]
    fixed = told(max_concurrent=1, ttl=2, renew=False)
    assert exact(simulate(msec_log(arrivals), fixed)["rejected"]) == 0
    assert exact(simulate(msec_log(arrivals), told(max_concurrent=1, ttl=2))["rejected"]) == 1
    assert exact(simulate(msec_log(arrivals), told(max_concurrent=1, ttl=2, max_age=2))["rejected"]) == 0


def test_who_was_turned_away_is_forgotten_when_the_slot_would_have_ended(simulate: Simulate) -> None:
    arrivals = [Arrival(0, 5000), Arrival(500, 5000), Arrival(2600, 300), Arrival(2700, 100)]
    assert exact(simulate(msec_log(arrivals), told(max_concurrent=1, ttl=2, max_age=2))["rejected"]) == 2


# Whole seconds


def independent(seed: int, batches: float = 0.0) -> list[Arrival]:
    """Requests that know nothing of each other; or so many of them in batches of two to four, as the parts of a page come."""
    draw = random.Random(seed)
    found: list[Arrival] = []
    at = 0.0
    while len(found) < 1500:
        at += draw.expovariate(1 / 8)
        for _ in range(draw.randrange(2, 5) if draw.random() < batches else 1):
            found.append(Arrival(int(at), 1 + round(draw.expovariate(1 / 60)), f"203.0.113.{draw.randrange(2)}"))
    return found


def evenly(every: int, took: int) -> list[Arrival]:
    return [Arrival(number * every, took, f"203.0.113.{number % 2}") for number in range(1200)]


PATTERNS = {
    **{f"independent {seed}": independent(seed) for seed in range(3)},
    "in batches": independent(3, 0.2),
    "after each other": pattern(4, requests=1000, ips=2, every=8, took=60),
    "evenly": evenly(10, 40),
    "evenly, long": evenly(20, 300),
    "rush": pattern(7, 500, 2, 40, 100)
    + [Arrival(10_000 + one.start, one.took, one.ip, one.target) for one in pattern(8, 1000, 2, 5, 60)],
}


@pytest.mark.parametrize("name", PATTERNS)
def test_from_whole_seconds_the_truth_lies_within_the_printed_range(name: str, simulate: Simulate) -> None:
    arrivals = PATTERNS[name]
    limit = 5
    truth = simulate(msec_log(arrivals), told(max_concurrent=limit))
    spread = simulate(seconds_log(arrivals), told(max_concurrent=limit))
    assert spread["log"]["whole_seconds"]
    assert not truth["log"]["whole_seconds"]
    for figure in ("peak", "peak_in_total", "peak_admitted", "rejected"):
        really, said = exact(truth["policies"][0][figure]), spread["policies"][0][figure]
        assert said["low"] <= really <= said["high"], (figure, really, said)
        assert said["low"] <= said["median"] <= said["high"]


def test_taken_as_they_stand_whole_seconds_would_be_far_off(simulate: Simulate) -> None:
    """What spreading is for, and that its range is narrow enough to say something."""
    arrivals = independent(1)
    (truth,) = simulate(msec_log(arrivals), told())["policies"]
    (spread,) = simulate(seconds_log(arrivals), told())["policies"]
    really, at_once = exact(truth["rejected"]), spread["if_each_second_came_at_once"]["rejected"]
    assert at_once > 2 * really
    assert 4 * abs(spread["rejected"]["median"] - really) < at_once - really
    assert spread["rejected"]["high"] < at_once


def test_the_order_of_the_lines_is_that_of_the_ends(simulate: Simulate) -> None:
    """A long request ends before a short one begins, in the same second: drawn at random they would overlap half the time."""
    arrivals = [Arrival(2000 * number + start, took) for number in range(30) for start, took in ((50, 700), (900, 1))]
    (entry,) = simulate(seconds_log(arrivals), told(max_concurrent=1))["policies"]
    assert entry["rejected"]["median"] == 0


@pytest.mark.parametrize("first", ["the older", "the newer", "the newer, in one stream", "one of two hosts"])
def test_the_order_of_the_logs_does_not_matter(first: str, simulate: Simulate, tmp_path: Path) -> None:
    """The range has the truth in it, and is about as narrow as that of one log in order."""
    arrivals = PATTERNS["rush"]
    truth, usual = (simulate(log(arrivals), told(max_concurrent=5))["policies"][0] for log in (msec_log, seconds_log))
    ends = in_order(arrivals)
    older, newer = ends[:700], ends[700:]
    if first == "one of two hosts":
        draw = random.Random(5)
        on_the_other = [draw.random() < 0.5 for _ in ends]
        older, newer = (
            [one for one, there in zip(ends, on_the_other, strict=True) if there is other] for other in (True, False)
        )
    logs = [seconds_log(older), seconds_log(newer)]
    if first.startswith("the newer"):
        logs.reverse()
    if first.endswith("stream"):
        found = simulate("".join(logs), told(max_concurrent=5))
    else:
        other = tmp_path / "other.log"
        other.write_text(logs[1])
        found = simulate(logs[0], told(max_concurrent=5), str(other))
    (entry,) = found["policies"]
    for figure in ("peak", "rejected"):
        really, said, in_one = exact(truth[figure]), entry[figure], usual[figure]
        assert said["low"] <= really <= said["high"], (figure, really, said)
        assert said["high"] - said["low"] < 1.5 * (in_one["high"] - in_one["low"]), (figure, said, in_one)


def test_a_second_that_went_by_is_one_group_when_its_lines_come_again() -> None:
    """However far back a log goes; what is open keeps its order."""
    spreader = Spreader(ordered=True)
    seconds = [*range(100, 110), *range(50, 60), *range(55, 60)]
    lines = [(second, number) for number, second in enumerate(second for second in seconds for _ in range(10))]
    records = [record for second, number in lines for record in spreader.add(second, (second, number))]
    records += spreader.rest()
    assert sorted(number for _, number, _ in records) == list(range(len(lines)))
    of_number = {number: offsets(packed) for _, number, packed in records}
    for group in range(len(seconds)):
        instants = [of_number[number] for number in range(10 * group, 10 * group + 10)]
        assert [one[EVENLY] for one in instants] == list(range(50_000, 1_000_000, 100_000))
        assert all(list(way) == sorted(way) for way in list(zip(*instants, strict=True))[:EVENLY])


def test_the_same_second_of_two_logs_is_two_groups(tmp_path: Path) -> None:
    """Short ones that hold nothing but this second: each host's ten requests come evenly, and beside the other's."""
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    for log in logs:
        log.write_text(seconds_log([Arrival(100 * number + 10, 1) for number in range(10)]))
    layout = recognise([("a.log:1", logs[0].read_text().splitlines()[0])], Wanted())
    slots, kept = Slots(tmp_path), Sorter(tmp_path)
    sources = [reading.Source(str(log)) for log in logs]
    reading.read(sources, layout, matching.Matcher(load_policies({"policies": told()}), layout.available, slots), kept)
    evenly = [offsets(packed)[EVENLY] for _, number, _, _, packed in sorted(kept, key=lambda record: record[1])]
    assert evenly == 2 * list(range(50_000, 1_000_000, 100_000))
    for opened in (*sources, slots):
        opened.close()


def test_a_range_goes_as_far_as_one_more_draw_might_and_covers_the_other_ways() -> None:
    drawn = [100, 101, 99, 100, 102, 98, 100, 101, 99]
    found = report.figure([*drawn, 100, 100, 10_000])
    assert (found["median"], found["low"], found["high"]) == (100, 93, 107)
    assert report.figure([*drawn, 80, 130, 10_000]) == {"median": 100, "low": 80, "high": 130}
    assert report.figure([*drawn, 100, 100, 10_000], 103)["high"] == 103
    assert report.figure([7] * 12) == {"median": 7, "low": 7, "high": 7}


def test_of_bursts_within_a_second_the_truth_lies_at_or_below_what_comes_at_once(simulate: Simulate) -> None:
    """The one kind of pattern that spreading hides; the page on simulate says so."""
    bursts = [Arrival(1000 * number + 500, 10) for number in range(30) for _ in range(20)]
    (truth,) = simulate(msec_log(bursts), told())["policies"]
    (spread,) = simulate(seconds_log(bursts), told())["policies"]
    assert exact(truth["peak"]) == 20 > spread["peak"]["high"]
    assert spread["if_each_second_came_at_once"]["peak"] == 20


def test_apaches_stamp_is_the_start(simulate: Simulate) -> None:
    """Ten requests of a minute each that began in ten different minutes; by their ends all would have been together."""
    arrivals = [Arrival(60_000 * number, 60_000 * (20 - number)) for number in range(10)]
    document = simulate(apache_log(arrivals), told(), "--format", "apache", "--window", "1m")
    assert document["log"]["stamp"] == "start"
    starts = [window["start"] for window in document["policies"][0]["windows"]]
    assert len(starts) == 10


# Reading


def test_one_regular_expression_reads_what_the_apachelogs_package_reads() -> None:
    """Lines made at random: the same address, stamp, request, status, agent and duration."""
    theirs = apachelogs.LogParser(apachelogs.COMBINED + " %D")

    @settings(max_examples=100, deadline=None)
    @given(
        ip=st.ip_addresses(),
        user=st.sampled_from(["-", "ada", "ada@example.com"]),
        moment=st.datetimes(datetime(2001, 1, 1), datetime(2037, 1, 1)),
        zone=st.sampled_from(["+0000", "-0330", "+1245"]),
        method=st.sampled_from(["GET", "POST", "HEAD"]),
        path=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40),
        agent=st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30),
        status=st.integers(100, 599),
        took=st.integers(0, 10**8),
    )
    def check(
        ip: Any, user: str, moment: datetime, zone: str, method: str, path: str, agent: str, status: int, took: int
    ) -> None:
        path = f"/{path}"
        line = (
            f'{ip} - {user} [{moment:%d/%b/%Y:%H:%M:%S} {zone}] "{method} {_escape(path)} HTTP/1.1" {status} 5 "-" '
            f'"{_escape(agent)}" {took}'
        )
        entry = theirs.parse(line)
        layout = recognise([("here:1", line)], Wanted(format="apache"))
        raw = layout.parser(["header.user-agent"])(line)
        assert raw is not None
        stamp, verb, target, address, length, _, code, name = raw
        assert address == entry.remote_host
        assert microseconds(stamp) == round(entry.request_time.timestamp()) * 1_000_000
        assert f"{verb} {path} HTTP/1.1" == entry.request_line
        assert unquote_to_bytes(target) == unquote_to_bytes(path)
        assert int(code) == entry.final_status
        assert duration(length, layout.unit) == entry.request_duration_microseconds
        assert name == (entry.headers_in["User-Agent"] if agent not in ("", "-") else None)

    check()


def _escape(text: str) -> str:
    """As Apache writes it."""
    return "".join(
        f"\\{one}" if one in '"\\' else one if 32 <= ord(one) < 127 else f"\\x{ord(one):02x}" for one in text
    )


LINE = '203.0.113.9 - - [28/May/2026:20:26:40 +0000] "POST /told/7/?page=2 HTTP/1.1" 200 12 "-" "curl/8.1"'

USUAL_JSON = {
    "msec": 1780000000.123,
    "request_time": 0.1,
    "remote_addr": "203.0.113.9",
    "request_uri": "/told/7/",
    "request_method": "GET",
    "status": 200,
}


@pytest.mark.parametrize(
    ("tail", "options", "format_name", "took", "served"),
    [
        (" 0.250", (), "nginx", 250_000, None),
        (" 0.250 0.100", (), "nginx", 250_000, 100_000),
        (" 0.250 0.100, 0.050", (), "nginx", 250_000, 150_000),
        (" 0.250 0.100 : 0.050", (), "nginx", 250_000, 150_000),
        (" 0.250 -, 0.050", (), "nginx", 250_000, 50_000),
        (" 0.250 -", (), "nginx", 250_000, None),
        (' "-" rt=0.250 uct="0.000" urt="0.100" uid=7', (), "nginx", 250_000, 100_000),
        (" 0.250 0.100 1780000000.123", (), "nginx-msec", 250_000, 100_000),
        (" 0.250000", (), "gunicorn", 250_000, None),
        (" 250000", ("gunicorn-us",), "gunicorn-us", 250_000, None),
        (" 250", ("gunicorn-ms",), "gunicorn-ms", 250_000, None),
        (" 250000", ("apache",), "apache", 250_000, None),
    ],
)
def test_a_format_is_known_by_its_first_line(
    tail: str, options: tuple[str, ...], format_name: str, took: int, served: int | None
) -> None:
    layout = recognise([("access.log:1", LINE + tail)], Wanted(*options))
    raw = layout.parser(())(LINE + tail)
    assert raw is not None
    assert layout.format is FORMATS[format_name]
    assert layout.stamp == ("start" if format_name == "apache" else "end")
    assert layout.whole == (format_name != "nginx-msec")
    assert (raw[1], raw[2], raw[3]) == ("POST", "/told/7/?page=2", "203.0.113.9")
    assert duration(raw[4], layout.unit) == took
    assert (None if raw[5] is None else upstream(raw[5], layout.served_unit)) == served
    assert microseconds(raw[0]) == 1_780_000_000_000_000 + (123_000 if format_name == "nginx-msec" else 0)


def test_a_first_line_may_have_a_hundred_values_or_a_very_long_one() -> None:
    def first(tail: str) -> Any:
        line = f"{LINE} 0.250{tail}"
        return recognise([("access.log:1", line)], Wanted(format="nginx")).parser(())(line)

    assert first(" 1" * 99)[4] == "0.250"
    with pytest.raises(FormatError, match=r"access\.log:1: more than 100 values behind the combined format"):
        first(" 1" * 5_000)
    began = process_time()
    for tail in (f" {'x' * 100_000}", f' "{"x" * 100_000}"', f" 0.1{', 0.1' * 20_000}", f" name={'1' * 100_000}"):
        assert first(tail)[4] == "0.250"
    assert process_time() - began < 5


@pytest.mark.parametrize("tail", [f'{" " * 70}x"', f' 0.1{" : 0.1" * 300} "x'], ids=["spaces", "times"])
def test_a_line_that_does_not_fit_is_given_up_at_once(tail: str) -> None:
    parse = recognise([("access.log:1", f"{LINE} 0.250 0.100 a b c")], Wanted()).parser(())
    began = process_time()
    assert parse(LINE + tail) is None
    assert process_time() - began < 1
    assert parse(f"{LINE}   0.250  0.1 : 0.2, -  a  b c  \n") is not None


@pytest.mark.parametrize(
    "stamp",
    [
        *("28/May/2026:20:26:40 +0000", "28/May/2026:22:26:40 +0200", "2026-05-28T20:26:40+00:00"),
        *("2026-05-28T20:26:40Z", "2026-05-28 20:26:40,000", 1780000000, 1780000000.0, "1780000000.000"),
        *(1780000000000, "1780000000000000", 1780000000000000000),
    ],
)
def test_stamps_as_logs_write_them(stamp: Any) -> None:
    assert microseconds(stamp) == 1_780_000_000_000_000


def test_the_servers_own_time_begins_when_nginx_had_the_request(simulate: Simulate) -> None:
    """Three slow clients that fetch for ten seconds what took the site 100 ms each: never two of them in a view at once."""
    lines = "".join(
        combined(Arrival(0, 0), 0, f" 10.000 0.100 {(START + 10_000 + 100 * number) / 1000:.3f}") for number in range(3)
    )
    lines += combined(Arrival(0, 0), 0, f" 5.000 0.100 {(START + 10_250) / 1000:.3f}")
    (entry,) = simulate(lines, told())["policies"]
    assert exact(entry["peak"]) == 1


def test_json_lines_by_their_usual_names_and_by_others(simulate: Simulate) -> None:
    arrivals = [Arrival(0, 1000), Arrival(500, 1000), Arrival(900, 30, target="/plain/")]
    usual = "".join(
        json.dumps(
            {
                "msec": (START + one.end) / 1000,
                "request_time": one.took / 1000,
                "upstream_response_time": f"{one.took / 1000:.3f}",
                "remote_addr": one.ip,
                "request_method": "GET",
                "request_uri": one.target,
                "status": 200,
            }
        )
        + "\n"
        for one in in_order(arrivals)
    )
    others = "".join(
        json.dumps(
            {"ts": START + one.start, "took_ms": one.took, "who": {"ip": one.ip}, "what": f"GET {one.target} HTTP/2"}
        )
        + "\n"
        for one in arrivals
    )
    fields = ("--field", "duration=took_ms", "--field", "ip=who.ip", "--field", "path=what", "--stamp", "start")
    for document in (simulate(usual, told()), simulate(others, told(), *fields)):
        (entry,) = document["policies"]
        assert (document["log"]["format"], document["log"]["whole_seconds"]) == ("json", False)
        assert (entry["requests"], exact(entry["peak"])) == (2, 2)


def test_a_compressed_log_and_what_comes_in(
    simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = msec_log(pattern(1, 50)).encode()
    plain = simulate(log, told())["policies"]
    assert simulate(gzip.compress(log), told())["policies"] == plain
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(log))))  # type: ignore[arg-type]
    out = io.StringIO()
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": {"policies": told()}}):
        call_command("concurrency", "simulate", "-", "--json", stdout=out)
    assert json.loads(out.getvalue())["policies"] == plain


def test_several_logs_are_one(tmp_path: Path, simulate: Simulate) -> None:
    arrivals = pattern(3, 200)
    whole = simulate(msec_log(arrivals), told())
    older = tmp_path / "older.log.gz"
    older.write_bytes(gzip.compress(msec_log(in_order(arrivals)[:120]).encode()))
    both = simulate(msec_log(in_order(arrivals)[120:]), told(), str(older))
    assert both["policies"][0]["peak"] == whole["policies"][0]["peak"]
    assert both["policies"][0]["rejected"] == whole["policies"][0]["rejected"]


# What is wrong with a log


def test_a_line_without_a_duration_names_the_line_to_add(simulate: Simulate) -> None:
    with pytest.raises(CommandError) as error:
        simulate(f"{LINE}\n", told())
    message = str(error.value)
    assert message.startswith("access-0.log:1: no duration")
    assert "--assume-duration SECONDS" in message
    assert "log_format timed '$remote_addr" in message
    assert "$request_time $upstream_response_time $msec'" in message
    with pytest.raises(CommandError) as error:
        simulate(f"{LINE}\n", told(), "--format", "gunicorn")
    assert [line.strip()[:20] for line in str(error.value).splitlines()[1:]] == ["--access-logformat '"]
    assert simulate(f"{LINE}\n", told(), "--assume-duration", "0.5")["log"]["assumed_durations"] == 1


def test_the_line_to_add_is_read_as_what_it_is() -> None:
    """Each server's own variables are put into its line, and the format is known at once."""
    values = {
        "nginx": (
            FORMATS["nginx"].line.split("timed '")[1].rstrip("';"),
            {
                "$remote_addr": "203.0.113.9",
                "$remote_user": "-",
                "$time_local": "28/May/2026:20:26:40 +0000",
                "$request_time": "0.250",
                "$request": "GET /told/7/ HTTP/1.1",
                "$status": "200",
                "$body_bytes_sent": "5",
                "$http_referer": "-",
                "$http_user_agent": "curl",
                "$upstream_response_time": "0.100",
                "$msec": "1780000000.123",
            },
            "nginx-msec",
            (),
        ),
        "apache": (
            FORMATS["apache"].line.removeprefix('LogFormat "').removesuffix('" timed').replace('\\"', '"'),
            {
                "%a": "203.0.113.9",
                "%l": "-",
                "%u": "-",
                "%{%d/%b/%Y:%H:%M:%S}t": "28/May/2026:20:26:40",
                "%{usec_frac}t": "123000",
                "%{%z}t": "+0000",
                "%r": "GET /told/7/ HTTP/1.1",
                "%>s": "200",
                "%b": "5",
                "%{Referer}i": "-",
                "%{User-Agent}i": "curl",
                "%D": "250000",
            },
            "apache",
            ("apache",),
        ),
    }
    for template, variables, name, options in values.values():
        line = template
        for variable, value in variables.items():
            line = line.replace(variable, value)
        layout = recognise([("here:1", line)], Wanted(*options))
        raw = layout.parser(())(line)
        assert raw is not None
        assert (layout.format.name, layout.whole) == (name, False)
        assert microseconds(raw[0]) == 1_780_000_000_123_000
        assert duration(raw[4], layout.unit) == 250_000


def test_what_may_be_two_formats_has_to_be_said(simulate: Simulate) -> None:
    with pytest.raises(CommandError, match=r"Say --format apache, gunicorn-us or gunicorn-ms"):
        simulate(f"{LINE} 250000\n", told())


@pytest.mark.parametrize(
    ("line", "options", "said"),
    [
        ("hello\n", (), r"access-0\.log:1: not a line of any format known: 'hello'"),
        ("", (), "the log is empty"),
        (f"{LINE} 0.250\n", ("--field", "user=uid"), r"access-0\.log:1: has no value called 'uid'"),
        (f"{LINE} 0.250\n", ("--field", "usr=uid"), r"unknown field 'usr'; did you mean 'user'\?"),
        (f"{LINE} 0.250\n", ("--field", "user"), "expected OURS=THEIRS"),
        ('{"ts": 1780000000.5, "path": "/", "took": 7}\n', (), "is 'took' in seconds or in milliseconds"),
        ('{"path": "/", "took_ms": 7}\n', (), "which field is the time"),
        ('{"ts": 1780000000.5, "path": "/"}\n', (), "no duration"),
        (f"{LINE} 0.250\n", ("--window", "soon"), "--window: expected seconds"),
        (f"{LINE} 0.250\n", ("--window", "0"), "--window: expected at least a millisecond, got '0'"),
        (f"{LINE} 0.250\n", ("--window", "0.0000001"), "--window: expected at least a millisecond"),
        (f"{LINE} 0.250\n", ("--window", "0.9ms"), "--window: expected at least a millisecond"),
        (f"{LINE} 0.250\n", ("--window", "9" * 400), "--window: expected at most 30 years"),
        (f"{LINE}\n", ("--assume-duration", "9" * 400), "--assume-duration: expected at most 30 years"),
        (f"{LINE} 0.250\n", ("--suggest", "most"), "--suggest: expected a share"),
        (f"{LINE} 0.250\n", ("--policies", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_errors_say_the_place_and_the_cure(line: str, options: tuple[str, ...], said: str, simulate: Simulate) -> None:
    with pytest.raises(CommandError, match=said) as error:
        simulate(line, told(), *options)
    assert error.value.returncode == 2


@pytest.mark.parametrize(
    "log",
    [
        json.dumps({"\x1b[31mred": 1, **{f"name-{number}": 1 for number in range(5_000)}}),
        json.dumps({**USUAL_JSON, "msec": f"\x1b[31m{'7' * 5_000}"}),
        json.dumps({**USUAL_JSON, "msec": "1780000000.5", "request_time": f"\x1b[31m{'7' * 5_000}"}),
        json.dumps({**USUAL_JSON, "remote_addr": {"\x1b[31m": "7" * 5_000}}),
        f"\x1b[31m{'7' * 5_000}",
        LINE.replace("28/May", "\x1b[31m/May") + " 0.250",
        f'{LINE} 0.250 \x1b[31m"{"7" * 5_000}',
        f'{LINE} name\x1b="7" 0.250',
        f"{LINE} " + " ".join(f"name{number}=7" for number in range(90)),
    ],
)
def test_an_error_repeats_little_of_the_log_and_nothing_that_a_terminal_obeys(log: str, simulate: Simulate) -> None:
    for options in (("--field", "ip=nothing"), ("--field", "ip=remote_addr")):
        with pytest.raises(CommandError) as error:
            simulate(f"{log}\n" * 12, told(), *options)
        assert str(error.value).replace("\n", "").isprintable()
        assert len(str(error.value)) < 2_500


def test_a_compressed_log_that_is_damaged(simulate: Simulate) -> None:
    whole = gzip.compress(f"{LINE} 0.250\n".encode() * 20_000)
    damaged = whole[:60] + bytes(20) + whole[80:]
    for log in (whole[:-100], damaged):
        with pytest.raises(CommandError, match="cannot be read to its end"):
            simulate(log, told())


def test_a_log_that_is_not_there() -> None:
    with pytest.raises(CommandError, match=r"/nowhere/access\.log: cannot be read: No such file"):
        call_command("concurrency", "simulate", "/nowhere/access.log")


def test_a_few_broken_lines_are_told_and_left_out_and_more_are_an_error(simulate: Simulate) -> None:
    good = f"{LINE} 0.250 - 1780000000.123\n"
    few = simulate(f"{good}rubbish\n{good}{LINE} 0.2x0 - 1780000000.123\n\n{good}", told())["log"]
    assert (few["lines"], few["broken_lines"]) == (5, 2)
    assert few["first_broken"][0].startswith("access-0.log:2: not a line of the format nginx-msec: 'rubbish'")
    assert few["first_broken"][1].startswith("access-0.log:4: a stamp or a duration that is none")
    assert simulate(good * 2000 + "rubbish\n" * 20, told())["log"]["broken_lines"] == 20
    with pytest.raises(CommandError, match=r"(?s)11 of 111 lines cannot be read.*access-2\.log:101: "):
        simulate(good * 100 + "rubbish\n" * 11, told())


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"remote_addr": ["1.2.3.4"]}, r"an address that is no text: \['1\.2\.3\.4'\]; --field ip=NAME"),
        ({"remote_addr": 7}, "an address that is no text: 7"),
        ({"request_time": 1e300}, "longer than 30 years"),
        ({"request_time": -1}, "less than nothing"),
        ({"request_time": "x" * 1_000}, "could not convert"),
        ({"msec": []}, "unhashable"),
        ({"msec": -5}, "a stamp or a duration that is none"),
        ({"msec": "0001-01-01T00:00:00Z"}, "before 1970"),
        ("[" * 100_000, "not a line of the format json"),
        ('{"msec": ' * 100_000, "not a line of the format json"),
    ],
)
def test_a_json_line_with_something_odd_is_a_broken_one_wherever_it_stands(
    odd: Any, why: str, simulate: Simulate
) -> None:
    line, good = (json.dumps(USUAL_JSON | one) if isinstance(one, dict) else one for one in (odd, {}))
    document = simulate(f"{good}\n{line}\n{good}\n" * 2, told())
    assert (document["log"]["broken_lines"], document["requests"]) == (2, 4)
    assert re.search(why, document["log"]["first_broken"][0])
    assert len(document["log"]["first_broken"][0]) < 250


def test_a_json_line_whose_status_or_path_is_odd_is_read_all_the_same(simulate: Simulate) -> None:
    odd: list[dict[str, Any]] = [{"status": []}, {"status": {}}, {"status": "429"}, {"status": 429}]
    odd += [{"remote_addr": None}, {"request_uri": "/told/\ud800/"}]
    document = simulate("".join(json.dumps(USUAL_JSON | one) + "\n" for one in odd), told(key="{kwargs.pk}"))
    log = document["log"]
    assert (log["broken_lines"], document["requests"], log["already_turned_away"]) == (0, 6, 2)


def test_an_object_is_not_taken_for_the_address(simulate: Simulate) -> None:
    """Where the address is inside of it nobody knows, so the policy is listed with what to say."""
    line = json.dumps({**USUAL_JSON, "remote_addr": {"of": "203.0.113.9"}}) + "\n"
    (entry,) = simulate(line, told() | {"all": TABLE["all"]})["not_replayable"]
    assert entry == {"policy": "told", "missing": ["the client's address (--field ip=NAME)"]}
    document = simulate(line, told(max_concurrent=0), "--field", "ip=remote_addr.of")
    assert keys_of(document) == ["ip:203.0.113.9"]


def test_lines_without_a_request_and_paths_without_a_view_ask_nobody(simulate: Simulate) -> None:
    log = (
        f'203.0.113.9 - - [28/May/2026:20:26:40 +0000] "\\x16\\x03\\x01" 400 0 "-" "-" 0.000 - 1780000000.000\n'
        f"{LINE.replace('/told/7/', '/nowhere/')} 0.250 - 1780000000.123\n{LINE} 0.250 - 1780000000.123\n"
    )
    document = simulate(log, told())
    assert document["log"]["lines_without_a_request"] == 1
    assert document["log"]["requests_without_a_view"] == 1
    assert document["requests"] == 1


# Which policies, which keys


def keys_of(document: dict[str, Any]) -> list[str]:
    return [key["key"] for entry in document["policies"] for key in entry["keys"]]


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"key": "user"}, "user (--field user=NAME)"),
        ({"key": "session"}, "session (--field session=NAME)"),
        ({"key": "header:X-Api-Key"}, "header.x-api-key (--field header.x-api-key=NAME)"),
        ({"key": "team:{user.team_id}"}, "user.team_id (--field user.team_id=NAME)"),
        ({"key": "{host}"}, "host (--field host=NAME)"),
        ({"key": "shop.limits.key"}, "its key is asked of shop.limits.key"),
        ({"when": "authenticated"}, "user (--field user=NAME)"),
        ({"when": "staff"}, "when: staff"),
        ({"when": "shop.limits.big"}, "when: shop.limits.big"),
        ({"except_users": [1]}, "user (--field user=NAME)"),
        ({"max_concurrent": "shop.limits.of_plan"}, "its max_concurrent is asked of shop.limits.of_plan"),
        ({"cost": "shop.limits.pages"}, "its cost is asked of shop.limits.pages"),
    ],
)
def test_a_policy_that_needs_what_the_log_lacks_is_listed_and_not_replayed(
    fields: dict[str, Any], missing: str, simulate: Simulate
) -> None:
    document = simulate(f"{LINE} 0.250\n", told(**fields) | {"other": {**told()["told"]}})
    assert document["not_replayable"] == [{"policy": "told", "missing": [missing]}]
    assert [entry["policy"] for entry in document["policies"]] == ["other"]


def test_a_policy_without_views_is_not_replayed(simulate: Simulate) -> None:
    document = simulate(f"{LINE} 0.250\n", {"bare": {"key": "ip", "max_concurrent": 1}})
    (entry,) = document["not_replayable"]
    assert "decorators and hold()" in entry["missing"][0]


@pytest.mark.parametrize(
    ("key", "options", "shown"),
    [
        ("ip", (), "ip:203.0.113.9"),
        ("global", (), "global"),
        ("get:page", (), "get:page:2"),
        ("get:nothing", (), "missing:ip:203.0.113.9"),
        ("{ip}-{kwargs.pk}-{method}", (), "203.0.113.9-7-POST"),
        ("user", ("--field", "user=uid"), "user:42"),
        ("user", ("--field", "user=nobody"), "ip:203.0.113.9"),
        ("{user.pk}/{user.team_id}", ("--field", "user=uid", "--field", "user.team_id=team"), "42/8"),
        ("host:{host}", ("--field", "host=vhost"), "host:example.com"),
    ],
)
def test_keys_are_those_of_the_site(key: str, options: tuple[str, ...], shown: str, simulate: Simulate) -> None:
    line = f"{LINE} 0.250 uid=42 nobody=- team=8 vhost=example.com\n"
    with override_settings(ALLOWED_HOSTS=["example.com"]):
        document = simulate(line, told(key=key, max_concurrent=0), *options)
    assert keys_of(document) == [shown]


@pytest.mark.parametrize(
    ("key", "field", "stored"),
    [
        ("header:X-Api-Key", "header.X-API-KEY=secret", "header:X-Api-Key:"),
        ("session", "session=secret", "session:"),
        ("key-{header.X-Api-Key}", "header.X-Api-Key=secret", "key-"),
        ("header:User-Agent", "header.User-Agent=http_user_agent", "header:User-Agent:"),
    ],
)
def test_header_and_session_values_are_masked(key: str, field: str, stored: str, simulate: Simulate) -> None:
    document = simulate(f'{LINE} 0.250 secret="gold\\x21"\n', told(key=key, max_concurrent=0), "--field", field)
    value = "curl/8.1" if "agent" in field else "gold!"
    from django_concurrency_mw.keys import digest_text

    assert keys_of(document) == [masked(f"{stored}{digest_text(value)}")]
    assert "gold" not in json.dumps(document)


def test_what_a_key_is_made_of_is_not_mixed_up(simulate: Simulate) -> None:
    """Each part of a key tells two lines apart, though all that was met is remembered."""
    lines = [
        LINE,
        LINE.replace(".9 ", ".8 "),
        LINE.replace("/7/", "/6/"),
        LINE.replace("POST", "GET"),
        LINE.replace("=2", "=3"),
    ]
    log = "".join(f"{line} 0.250 uid=1\n" for line in [*lines, *lines]) + f"{LINE} 0.250 uid=2\n"
    everything = told(key="{ip}/{kwargs.pk}/{method}/{get.page}/{user.pk}", max_concurrent=0)
    (entry,) = simulate(log, everything, "--field", "user=uid")["policies"]
    assert sorted(key["rejected"]["median"] for key in entry["keys"]) == [1, 2, 2, 2, 2, 2]
    assert [key["key"] for key in simulate(log, told(key="get:nothing", max_concurrent=0))["policies"][0]["keys"]] == [
        "missing:ip:203.0.113.9",
        "missing:ip:203.0.113.8",
    ]


def test_who_is_anonymous_is_told_by_the_field(simulate: Simulate) -> None:
    log = f"{LINE} 0.250 uid=42\n{LINE} 0.250 uid=7\n{LINE} 0.250 uid=-\n"

    def requests(**fields: Any) -> int:
        (entry,) = simulate(log, told(**fields), "--field", "user=uid")["policies"]
        return int(entry["requests"])

    assert requests(when="authenticated") == 2
    assert requests(when="anonymous") == 1
    assert requests(except_users=[42]) == 2
    assert requests(except_ips=["203.0.113.0/24"]) == 0


def test_a_missing_key_that_rejects_is_a_rejection(simulate: Simulate) -> None:
    table = {"all": TABLE["all"]} | told(key="get:nothing", missing="reject")
    document = simulate(f"{LINE} 0.250\n", table)
    assert exact(document["rejected"]) == 1
    assert [exact(entry["rejected"]) for entry in document["policies"]] == [0, 1]
    assert exact(simulate(f"{LINE} 0.250\n", told(key="get:nothing", missing="skip"))["rejected"]) == 0


def test_methods_globs_and_excluded_views_are_the_tables(simulate: Simulate) -> None:
    log = "".join(
        f"{LINE.replace('POST /told/7/', request)} 0.250\n"
        for request in (
            "GET /told/7/",
            "HEAD /told/7/",
            "POST /told/7/",
            "GET /told/",
            "GET /shop/inner/",
            "GET /unnamed/",
        )
    )

    def requests(**fields: Any) -> int:
        (entry,) = simulate(log, told(**fields))["policies"]
        return int(entry["requests"])

    assert requests(methods=["GET"]) == 3, "GET means HEAD too"
    assert requests(methods=["POST"]) == 1
    assert requests(exclude=["told-pk"]) == 1
    assert requests(url_names=["shop:*"]) == 1
    assert requests(url_names=["tests.views.told"]) == 1


def test_a_decorators_view_has_only_the_policies_that_it_cannot_replace(simulate: Simulate) -> None:
    line = f"{LINE.replace('/told/7/', '/decorated/')} 0.250\n"
    document = simulate(line, {"a": TABLE["all"], "b": {**TABLE["all"], "overridable": False}})
    assert [entry["requests"] for entry in document["policies"]] == [0, 1]


def test_escaped_and_encoded_paths_are_found(simulate: Simulate) -> None:
    paths = ("/told/caf%C3%A9/", "/told/caf\\xC3\\xA9/", "/told/café/", "http://example.com/told/caf%c3%a9/")
    log = "".join(f"{LINE.replace('/told/7/', path)} 0.250\n" for path in paths)
    (entry,) = simulate(log, told(key="{kwargs.pk}", max_concurrent=0))["policies"]
    assert [(key["key"], key["rejected"]["median"]) for key in entry["keys"]] == [("café", 4)]


# The report


def test_suggested_limits_cover_that_share_of_the_keys(simulate: Simulate) -> None:
    """Of ten addresses nine have at most two at once, and one has six; what has a limit of its own is not looked at."""
    arrivals = [Arrival(0, 100, f"203.0.113.{number}") for number in range(9) for _ in range(2)]
    arrivals += [Arrival(0, 100, "203.0.113.99")] * 6 + [Arrival(0, 100, "203.0.113.200")] * 30
    policies = told(max_concurrent=1, per_key={"ip:203.0.113.200": 50})

    def suggested(share: str) -> dict[str, Any]:
        (entry,) = simulate(msec_log(arrivals), policies, "--suggest", share)["policies"]
        return dict(entry["suggested"])

    assert (exact(suggested("P90")["limit"]), suggested("P90")["keys"], suggested("P90")["now"]) == (2, 10, 1)
    assert exact(suggested("p91")["limit"]) == exact(suggested("P100")["limit"]) == 6
    (entry,) = simulate(msec_log(arrivals), told(max_concurrent=2), "--suggest", "90")["policies"]
    assert [key["key"] for key in entry["keys"]] == ["ip:203.0.113.200", "ip:203.0.113.99"]


def test_windows_say_when(simulate: Simulate) -> None:
    quiet = [Arrival(600_000 * number, 10) for number in range(4)]
    rush = [Arrival(700_000 + number, 100) for number in range(5)]
    (entry,) = simulate(msec_log([*quiet, *rush]), told(), "--window", "10m")["policies"]
    assert [exact(window["rejected"]) for window in entry["windows"]] == [0, 2, 0, 0]
    assert [exact(window["peak"]) for window in entry["windows"]] == [1, 5, 1, 1]
    assert simulate(msec_log([*quiet, *rush]), told())["window_seconds"] == 60
    (entry,) = simulate(msec_log(rush), told(), "--window", "1ms")["policies"]
    assert [window["start"] for window in entry["windows"]] == 5 * ["2026-05-28T20:38:20Z"]


def test_the_text_has_the_figures_a_bar_per_window_and_what_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_text(msec_log([Arrival(100 * number, 1000) for number in range(8)]))
    out = io.StringIO()
    table = told() | {"by-user": {**told()["told"], "key": "user"}}
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": {"policies": table}}):
        call_command("concurrency", "simulate", str(log), "--window", "1m", "--suggest", "P99", stdout=out)
    text = out.getvalue()
    assert "access.log: nginx-msec, the stamp is the end of a request" in text
    assert f"2026-05-28T20:26:00Z {'#' * 40} 5" in text
    assert "ip:203.0.113.1" in text
    assert "by-user" in text
    assert "user (--field user=NAME)" in text
    assert "5 of 8 requests with a policy would have been rejected" in text
    assert "\x1b" not in text


def test_that_some_would_have_waited_is_said(tmp_path: Path) -> None:
    """A wait is not replayed: who comes on top counts as rejected."""
    log = tmp_path / "access.log"
    log.write_text(msec_log([Arrival(100 * number, 1000) for number in range(8)]))
    texts = []
    for wait in (0, 2):
        out = io.StringIO()
        table = {"told": {**told()["told"], "wait": wait}, "unmet": {**told()["told"], "max_concurrent": 9, "wait": 2}}
        with override_settings(CONCURRENCY_LIMIT={"POLICIES": {"policies": table}}):
            call_command("concurrency", "simulate", str(log), stdout=out)
        texts.append(out.getvalue())
    assert all("5 of 8 requests with a policy would have been rejected" in text for text in texts)
    assert "Waiting" not in texts[0]
    assert "some would have been let in after a wait in line (told)" in texts[1]


def test_a_file_of_policies_is_tried_in_the_sites_place(simulate: Simulate, tmp_path: Path) -> None:
    tried = tmp_path / "new.yaml"
    tried.write_text("policies: {tried: {url_names: ['told*'], key: ip, max_concurrent: 1}}")
    document = simulate(msec_log([Arrival(0, 10)] * 3), told(), "--policies", str(tried))
    assert [(entry["policy"], exact(entry["rejected"])) for entry in document["policies"]] == [("tried", 2)]


# Bounded memory


def test_what_does_not_fit_is_sorted_in_runs_that_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("django_concurrency_mw.simulation.sorting.MOST_RUNS", 4)
    records = [(random.Random(number).randrange(10**15), number, 7, (1, number)) for number in range(1001)]
    sorter = Sorter(tmp_path, 10)
    for record in records:
        sorter.add(record)
        assert len(sorter._records) < 10
        assert len(list(tmp_path.glob("run-*"))) < 20
    assert list(sorter) == sorted(records)
    assert sorter.runs > 100


def test_short_runs_and_a_short_memory_give_the_same_report(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = pattern(5, 400)
    for write in (msec_log, seconds_log):
        usual = simulate(write(arrivals), TABLE, "--suggest", "P99")
        with monkeypatch.context() as patch:
            patch.setattr(matching, "REMEMBERED", 2)
            patch.setattr(running, "Sorter", lambda directory, run: Sorter(directory, 13))
            assert simulate(write(arrivals), TABLE, "--suggest", "P99")["policies"] == usual["policies"]


def test_no_cycles_are_made_as_nobody_collects_them(tmp_path: Path) -> None:
    """Paths with and without a view, keys with and without a value. Of threads of earlier tests nothing is Django's."""
    slots = Slots(tmp_path)
    table = {**TABLE, "page": {"url_names": ["*"], "key": "get:page", "max_concurrent": 1}}
    matcher = matching.Matcher(load_policies({"policies": table}), frozenset({"ip"}), slots)
    gc.disable()
    try:
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        for number in range(50):
            for target in (f"/told/{number}/?page={number}", f"/nowhere/{number}/", f"/told/{number}-/"):
                matcher.ask("GET", target, f"203.0.113.{number}", ())
        gc.collect()
        made = [type(one) for one in gc.garbage if type(one).__module__.startswith(("django.", matching.__name__))]
        assert len(made) < 50, made
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    slots.close()


def test_a_method_of_a_clients_own_takes_no_memory(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    matcher = matching.Matcher(load_policies({"policies": told()}), frozenset({"ip"}), slots)
    for number in range(50):
        assert matcher.ask(f"M{number}", "/told/7/", "203.0.113.9", ()) == (0,)
    assert all(not route.plans for route in matcher._routes.values())
    slots.close()


@pytest.mark.parametrize("key", ["ip", "{kwargs.pk}", "{kwargs.pk}/{ip}", "get:page", "header:X-Api-Key"])
def test_what_clients_write_at_length_takes_no_memory(key: str, tmp_path: Path) -> None:
    """Paths to a view and to none, queries, headers and addresses: looked up each time, and always the same."""
    slots = Slots(tmp_path)
    log_has = frozenset({"ip", "header.x-api-key"})
    matcher = matching.Matcher(load_policies({"policies": told(key=key)}), log_has, slots)

    def asked(number: int) -> tuple[int, ...] | None:
        text = f"{number}{'x' * 4_000}"
        matcher.ask("GET", f"/nowhere/{text}/", "203.0.113.9", [text] * len(matcher.further))
        return matcher.ask("GET", f"/told/{text}/?page={text}", f"203.0.113.9{text}", [text] * len(matcher.further))

    first = [asked(number) for number in range(20)]
    for number in range(20):
        matcher.ask("GET", f"/told/{number}/", "203.0.113.9", ["7"] * len(matcher.further))
    held = [matcher._routes, *(keyed.known for keyed in matcher._keyed.values())]
    assert all(len(repr(made_of)) < 500 for remembered in held for made_of in remembered)
    assert len(matcher._routes) == 20
    assert [asked(number) for number in range(20)] == first
    slots.close()


def test_the_page_names_every_format_its_line_and_every_option(root: Path) -> None:
    page = (root / "docs" / "simulate.md").read_text()
    for row in FORMATS.values():
        assert f"`{row.name}`" in page
        assert f"\n{row.line}\n" in page
    for option in ("policies", "window", "suggest", "format", "field", "unit", "stamp", "assume-duration", "json"):
        assert f"--{option}" in page


def test_escapes_are_bytes() -> None:
    assert text_lines.unescaped(r"a\"b\\c\x41\n") == 'a"b\\cA\n'


def test_a_format_that_the_log_has_not(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_text('1.2.3.4 - - [28/May/2026:20:26:40 +0000] "GET /told/ HTTP/1.1" 200 5 "-" "-" 0.100\n')
    table = tmp_path / "policies.yaml"
    table.write_text('policies: {a: {url_names: ["*"], key: ip, max_concurrent: 2}}')
    with pytest.raises(CommandError, match=r"access\.log:1: --format nginx-msec, but the line has no \$msec"):
        call_command("concurrency", "simulate", str(log), "--policies", str(table), "--format", "nginx-msec")


def test_a_peak_of_requests_that_were_there_is_at_least_one() -> None:
    drawn = [1, 1, 3, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    assert report.figure(drawn)["low"] == 0
    assert report.figure(drawn, least=1)["low"] == 1
