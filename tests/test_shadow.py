"""Shadow policies beside blocking ones: who is admitted is the same as without them, and they count exactly."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from django_concurrency_mw import ConcurrencyLimitExceeded, conf, hold, signals
from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.backends.base import PROBE
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.limiter import store_of
from django_concurrency_mw.outcomes import Slot, Taken, TakeReply

from .chaos import LONG
from .support import SOON, Limits
from .test_limits import Site
from .test_limits import backend as backend
from .test_limits import drive as drive
from .test_limits import site as site

BLOCKING = {
    "per-user": {"key": "user", "max_concurrent": 2},
    "site": {"key": "global", "max_concurrent": 6},
}
SHADOW = {
    "site-shadow": {"key": "global", "max_concurrent": 3, "block": False},
    "user-shadow": {"key": "user", "max_concurrent": 1, "block": False},
}


class Step(NamedTuple):
    """A request of this user begins; or, without one, the live request of that number (modulo how many there are) ends."""

    user: int | None
    number: int = 0


def history(seed: int, length: int) -> list[Step]:
    """More begin than end until it is full, as under load."""
    dice = random.Random(seed)
    return [
        Step(dice.randrange(1, 6)) if dice.random() < 0.6 else Step(None, dice.randrange(1000)) for _ in range(length)
    ]


class Live(NamedTuple):
    user: int
    shadows: frozenset[str]


def replay(steps: Sequence[Step]) -> tuple[list[bool], Counter[str]]:
    """Who is admitted, and how often each shadow policy would have rejected: by a model of a few lines."""
    live: list[Live] = []
    admitted: list[bool] = []
    over: Counter[str] = Counter()
    for step in steps:
        if step.user is None:
            if live:
                live.pop(step.number % len(live))
            continue
        fits = sum(one.user == step.user for one in live) < 2 and len(live) < 6
        admitted.append(fits)
        if fits:
            taken = {
                "site-shadow": sum("site-shadow" in one.shadows for one in live) < 3,
                "user-shadow": sum("user-shadow" in one.shadows for one in live if one.user == step.user) < 1,
            }
            over.update(name for name, has_room in taken.items() if not has_room)
            live.append(Live(step.user, frozenset(name for name, has_room in taken.items() if has_room)))
    return admitted, over


def play(site: Site, steps: Sequence[Step]) -> tuple[list[bool], Counter[str]]:
    """The same on a store: who is admitted, and what the requests were told of their shadow policies."""
    live: list[Lease] = []
    admitted: list[bool] = []
    over: Counter[str] = Counter()
    for step in steps:
        if step.user is None:
            if live:
                site.end(live.pop(step.number % len(live)))
            continue
        found = site.ask(step.user)
        admitted.append(found.rejection is None)
        if found.rejection is None:
            over.update(result.policy for result in found.policies if result.state == "over")
            live.append(site.leases[-1])
    for lease in live:
        site.end(lease)
    return admitted, over


@pytest.fixture
def told() -> Iterator[Counter[str]]:
    """What the signal says: how often each policy would have rejected."""
    counts: Counter[str] = Counter()

    def receiver(policy: Any, shadow: bool, **arguments: Any) -> None:
        if shadow:
            counts[policy.name] += 1

    signals.request_rejected.connect(receiver)
    yield counts
    signals.request_rejected.disconnect(receiver)


@pytest.mark.parametrize("seed", range(3 if LONG else 1))
def test_admissions_are_those_without_it_and_its_counts_those_of_a_replay(
    site: Site, told: Counter[str], seed: int
) -> None:
    steps = history(seed, 300)
    expected, over = replay(steps)
    assert expected.count(False) > 30
    assert min(over.values()) > 30
    site.table(BLOCKING)
    without, nothing = play(site, steps)
    assert (without, nothing) == (expected, Counter())
    site.table({**SHADOW, **BLOCKING})
    beside, counted = play(site, steps)
    assert beside == expected
    assert counted == over
    assert told == over


class Recorded:
    """What a store was asked and what it answered, in the order in which it happened, under many threads."""

    def __init__(self, store: BaseBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock = threading.Lock()
        self.log: list[tuple[Sequence[Slot], TakeReply | None]] = []
        take, give = store.take, store.give

        def taking(slots: Sequence[Slot]) -> TakeReply:
            with self.lock:
                reply = take(slots)
                if slots[0].policy != PROBE:
                    self.log.append((slots, reply))
            return reply

        def giving(slots: Sequence[Slot]) -> Sequence[bool]:
            with self.lock:
                given = give(slots)
                self.log.append((slots, None))
            return given

        monkeypatch.setattr(store, "take", taking)
        monkeypatch.setattr(store, "give", giving)

    def replay(self) -> Counter[str]:
        """Each answer is the one that plain counting gives. How often a shadow policy had no room."""
        held: dict[tuple[str, bytes], set[str]] = {}
        over: Counter[str] = Counter()
        for slots, reply in self.log:
            if reply is None:
                for slot in slots:
                    held.get(slot.semaphore, set()).discard(slot.token)
                continue
            room = [len(held.setdefault(slot.semaphore, set())) < slot.limit for slot in slots]
            if all(fits or not slot.block for slot, fits in zip(slots, room, strict=True)):
                for slot, fits in zip(slots, room, strict=True):
                    if fits:
                        held[slot.semaphore].add(slot.token)
                    else:
                        over[slot.policy] += 1
                assert isinstance(reply, Taken)
                assert list(reply.held) == room
            else:
                assert not isinstance(reply, Taken)
            assert list(reply.in_flight) == [len(held[slot.semaphore]) for slot in slots]
        return over


@pytest.mark.parametrize("backend", ["memory", "host"], indirect=True)
def test_under_many_threads_it_counts_what_a_replay_counts(
    limits: Limits, backend: dict[str, Any], told: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release on Redis is sent and not waited for, so only these two say in which order things happened."""
    shadow = {"key": "global", "max_concurrent": 2, "block": False}
    limits(
        {"policies": {"cap": {"key": "global", "max_concurrent": 6}, "shadow": shadow}}, BACKENDS={"default": backend}
    )
    config = conf.current()
    recorded = Recorded(store_of(config.table.policies[0], config), monkeypatch)
    start = threading.Barrier(16)
    turned_away: list[int] = []

    def client(pause: Callable[[], None]) -> None:
        start.wait(SOON)
        for _ in range(60):
            try:
                with hold("cap"), hold("shadow"):
                    pause()
            except ConcurrencyLimitExceeded:
                turned_away.append(1)

    pause = threading.Event()
    threads = [threading.Thread(target=client, args=(lambda: pause.wait(0.001),)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    over = recorded.replay()
    assert turned_away
    assert over["shadow"] > 20
    assert told == over
