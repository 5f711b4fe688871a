"""The report: what the replays found, as figures for people and programs.

A figure has a median, a lowest and a highest value. Of an exact log all three are one. Of whole seconds they are those of the
draws (see `spreading`), and the range goes as far as one more draw would in 999 of 1,000 cases, and to the figures of requests
that come evenly and in batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil, floor, sqrt
from statistics import median_low, stdev
from typing import Any

from ..keys import masked
from ..keyspec import KeySpec, Part
from ..outcomes import UNLIMITED
from ..policies import Policy
from .replay import Figures, Replay
from .slots import Slots
from .spreading import AT_ONCE, BATCHES, SEEDS
from .stamps import SECOND, readable

Figure = dict[str, int]
#: Keys that are listed, of each policy.
KEYS = 10
#: Windows of a log that a report should have about, and has at most.
ABOUT, MOST_WINDOWS = 60, 20_000
#: Student's t with 8 degrees of freedom, 99.9 %, for one more draw than the nine. The truth is such a draw where requests come
#: independently of each other.
_WIDTH = 5.041 * sqrt(1 + 1 / SEEDS)

#: Seconds that windows are made of by default.
_NICE = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def default_window(span: int) -> int:
    """About 60 windows for this span; both in microseconds."""
    fitting = (seconds for seconds in _NICE if seconds * SECOND * ABOUT >= span)
    return next(fitting, ceil(span / (ABOUT * 86_400 * SECOND)) * 86_400) * SECOND


def figure(values: Sequence[int], most: int | None = None, least: int = 0) -> Figure:
    """Of one replay, or of all ways of spreading, in their order. Never above `most`, nor below `least`."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    drawn, all_ways = values[:SEEDS], values[: BATCHES + 1]
    low, high = min(all_ways), max(all_ways)
    mean, spread = sum(drawn) / SEEDS, stdev(drawn) * _WIDTH
    low, high = max(least, min(low, floor(mean - spread))), max(high, ceil(mean + spread))
    return {"median": median_low(drawn), "low": low, "high": high if most is None else min(high, most)}


def policies(
    table: Sequence[Policy], replays: Sequence[Replay], slots: Slots, window: int, origin: int, share: float | None
) -> list[dict[str, Any]]:
    """One entry for each policy that was replayed; `share` is of the keys, for what is suggested."""
    found = []
    wanted = _suggestions(table, replays, slots, share) if share is not None else {}
    for number, policy in enumerate(table):
        figures = [replay.figures[number] for replay in replays]
        requests = figures[0].requests
        entry: dict[str, Any] = {
            "policy": policy.name,
            "place": policy.place,
            "limit": policy.max_concurrent,
            "shadow": not policy.block,
            "wait": policy.wait,
            "requests": requests,
            "peak": figure([one.peak for one in figures], least=min(requests, 1)),
            "peak_in_total": figure([one.total for one in figures], least=min(requests, 1)),
            "peak_admitted": figure([one.admitted for one in figures]),
            "rejected": figure([one.over for one in figures], requests),
        }
        if len(figures) > 1:
            together = figures[AT_ONCE]
            entry["if_each_second_came_at_once"] = {"peak": together.peak, "rejected": together.over}
        entry["windows"] = _windows(figures, window, origin)
        entry["keys"] = _keys(policy, figures, slots)
        if share is not None:
            entry["suggested"] = wanted.get(number)
        found.append(entry)
    return found


def _windows(figures: Sequence[Figures], window: int, origin: int) -> list[dict[str, Any]]:
    """Those in which requests began, in order."""
    numbers = sorted(set().union(*(one.windows for one in figures)))
    nothing = [0, 0]
    return [
        {
            "start": readable(origin + number * window),
            "rejected": figure([one.windows.get(number, nothing)[0] for one in figures]),
            "peak": figure([one.windows.get(number, nothing)[1] for one in figures]),
        }
        for number in numbers
    ]


def _keys(policy: Policy, figures: Sequence[Figures], slots: Slots) -> list[dict[str, Any]]:
    """For whom it would have been rejections most often."""
    means: dict[int, int] = defaultdict(int)
    for one in figures[:SEEDS]:
        for slot, count in one.keys.items():
            means[slot] += count
    most = sorted(means, key=lambda slot: (-means[slot], slot))[:KEYS]
    return [
        {
            "key": shown_key(policy.key, slots.text(slot)),
            "limit": None if slots.limits[slot] == UNLIMITED else slots.limits[slot],
            "rejected": figure([one.keys.get(slot, 0) for one in figures]),
        }
        for slot in most
    ]


def shown_key(spec: KeySpec, text: str) -> str:
    """A key as people see it: masked where a session or a header is in it."""
    secret = spec.kind in ("session", "header") or any(
        isinstance(part, Part) and part.root in ("session", "header") for part in spec.parts
    )
    return masked(text) if secret and not text.startswith("missing:ip:") else text


def _suggestions(
    table: Sequence[Policy], replays: Sequence[Replay], slots: Slots, share: float
) -> Mapping[int, dict[str, Any]]:
    """The smallest limit under which that share of a policy's keys would never have been rejected, by policy."""
    found: dict[int, list[int]] = defaultdict(list)
    keys: dict[int, int] = {}
    for replay in replays:
        assert replay.peaks is not None
        counts: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for policy, peak, own in zip(slots.policies, replay.peaks, slots.own, strict=True):
            if not own:  # `per_key` speaks for these
                counts[policy][peak] += 1
        for policy, of_peak in counts.items():
            keys[policy] = sum(of_peak.values())
            found[policy].append(_smallest(of_peak, share * keys[policy]))
    return {
        policy: {"limit": figure(limits), "share": share, "keys": keys[policy], "now": table[policy].max_concurrent}
        for policy, limits in found.items()
    }


def _smallest(of_peak: Mapping[int, int], wanted: float) -> int:
    reached, limit = 0, 0
    for limit in sorted(of_peak):
        reached += of_peak[limit]
        if reached >= wanted - 1e-9:
            break
    return limit
