"""Was a cap broken? Replays what the views wrote down, and tells what the promise excepts from what it does not.

An entry that brings those whom the store let in above the limit is a broken cap, unless the store may have lost its state just
then: (a) of the promise. Not counted beside it are (b) holders whose process stood still past their lease, and (d) those whom
their process let in by itself while the store failed; of those a process may have as many as the limit says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .events import Event

#: Seconds that a busy machine takes to do what is due.
SLACK = 1.5


@dataclass
class Known:
    """What the soak did. Times are seconds of CLOCK_MONOTONIC."""

    bounds: Mapping[str, int]
    ttl: float
    #: From when to when it may show that the store has lost something.
    lost: Sequence[tuple[float, float]] = ()
    #: pid -> from when to when it stood still, each time.
    stopped: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)
    #: pid -> when it was dead, or was last seen.
    ended: Mapping[int, float] = field(default_factory=dict)


@dataclass
class Count:
    """Of one policy."""

    admitted: int = 0
    #: By the word with which they were let in.
    states: dict[str, int] = field(default_factory=dict)
    #: Slots in use at once: all together, and those that the store counted.
    most: int = 0
    most_of_the_store: int = 0
    #: Seconds with more than the limit, by the exception of the promise that says so: a, b, d, or broken.
    above: dict[str, float] = field(default_factory=dict)
    #: What nothing excuses.
    broken: list[str] = field(default_factory=list)


@dataclass
class _Policy:
    limit: int
    count: Count = field(default_factory=Count)
    inside: dict[str, Event] = field(default_factory=dict)
    #: Why there are more than the limit of the store's, once an entry has brought them there.
    why: str = ""


def never_left(events: Sequence[Event], ended: Mapping[int, float]) -> int:
    """Slots that somebody entered with whose process lives, and who did not leave."""
    inside = Counter[tuple[str, str]]()
    for event in events:
        if event.pid not in ended:
            inside[event.request, event.policy] += 1 if event.units > 0 else -1
    return sum(inside.values())


def judge(events: Sequence[Event], known: Known) -> dict[str, Count]:
    """Policy -> what was counted. `events` are in their order."""
    policies = {name: _Policy(limit) for name, limit in known.bounds.items()}
    before = events[0].at if events else 0.0
    for event in _with_deaths(events, known):
        for policy in policies.values():
            _pass_time(policy, before, event.at, known)
        before = event.at
        _step(policies[event.policy], event, known)
    return {name: policy.count for name, policy in policies.items()}


def _with_deaths(events: Sequence[Event], known: Known) -> list[Event]:
    """Who died inside has left with its process."""
    entered: dict[tuple[str, str], Event] = {}
    for event in events:
        if event.units > 0:
            entered[event.request, event.policy] = event
        else:
            entered.pop((event.request, event.policy), None)
    exits = [
        Event(max(known.ended[event.pid], event.at), event.pid, event.request, -event.units, event.policy, event.state)
        for event in entered.values()
        if event.pid in known.ended
    ]
    return sorted([*events, *exits], key=lambda event: (event.at, event.units))


def _step(policy: _Policy, event: Event, known: Known) -> None:
    count = policy.count
    if event.units < 0:
        policy.inside.pop(event.request, None)
    else:
        policy.inside[event.request] = event
        count.admitted += 1
        count.states[event.state] = count.states.get(event.state, 0) + 1
        count.most = max(count.most, _sum(list(policy.inside.values())))
        _enter(policy, event, known)
    if _sum(_of_the_store(policy, event.at, known)) <= policy.limit:
        policy.why = ""


def _enter(policy: _Policy, event: Event, known: Known) -> None:
    if event.state in ("local", "unprotected"):
        # A local count has the slots that the process held before; a stopped one may have lost those.
        own = _sum([each for each in policy.inside.values() if each.pid == event.pid])
        if own > policy.limit and not _is_late(event, event.at, known) and event.state == "local":
            policy.count.broken.append(_told(policy, event, own, " of one process, which counts by itself,"))
        return
    counted = _sum(_of_the_store(policy, event.at, known))
    policy.count.most_of_the_store = max(policy.count.most_of_the_store, counted)
    if counted <= policy.limit or _is_late(event, event.at, known):
        return
    if any(first <= event.at <= last for first, last in known.lost):
        policy.why = policy.why or "a"
    else:
        policy.why = "broken"
        policy.count.broken.append(_told(policy, event, counted, ""))


def _told(policy: _Policy, event: Event, units: int, of: str) -> str:
    return (
        f"{event.policy}: {units}{of} in flight, and the limit is {policy.limit} (at {event.at:.3f}, {event.request})"
    )


def _pass_time(policy: _Policy, since: float, until: float, known: Known) -> None:
    """Whose are the seconds between two events?"""
    everybody = list(policy.inside.values())
    if _sum(everybody) <= policy.limit:
        return
    of_the_store = _of_the_store(policy, since, known)
    if _sum(of_the_store) > policy.limit:
        why = policy.why or "a"
    elif any(_is_late(each, since, known) for each in everybody):
        why = "b"
    else:
        why = "d"
    policy.count.above[why] = policy.count.above.get(why, 0.0) + until - since


def _sum(entries: Sequence[Event]) -> int:
    return sum(each.units for each in entries)


def _of_the_store(policy: _Policy, at: float, known: Known) -> list[Event]:
    """Those that it counts."""
    return [
        each
        for each in policy.inside.values()
        if each.state not in ("local", "unprotected") and not _is_late(each, at, known)
    ]


def _is_late(entry: Event, at: float, known: Known) -> bool:
    """Has its lease ended while its process stood still? It may have been let in just before, and come in just after."""
    # Renewed a third of a lease before, it has two thirds left.
    left = known.ttl * 2 / 3
    return any(
        entry.at <= ended + SLACK and at >= began + left and ended - began > left
        for began, ended in known.stopped.get(entry.pid, ())
    )
