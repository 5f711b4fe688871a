"""Random histories of lines, the same for every store and for a model: who stands where, who holds what, what each one is told.

The rules are in the model: first come, first served, in each line; all of one's slots or none; whoever is the first and cannot
use what is free leaves it to the next one. The order of calls is what is random, not time: no lease ends here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.backends import lines as memory_lines
from django_concurrency_mw.backends.host import ours
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, LineFull, Queued, Slot, Taken

from ..support import SOON
from ..test_steps import BACKENDS
from . import LONG

#: How many histories of each store.
EXAMPLES: Final = {"memory": 5000, "host": 2000, "redis": 500} if LONG else {"memory": 60, "host": 20, "redis": 10}

#: Seconds.
AGES: Final = 3600.0
KEY: Final = make_key("global")
PLACES: Final = ("a", "b")
#: Of a take that leaves nothing behind and does not care what there is.
HEARD: Final = (Slot("heard", KEY, 0, 1.0, "t"),)
TOKENS: Final = tuple(f"t-{number}" for number in range(5))


class Want(NamedTuple):
    """One slot that is asked for."""

    place: str
    limit: int
    cost: int
    block: bool


@dataclass
class Line:
    """The model: one who is the first in a line, or stands in none where none is, may take what has room."""

    held: dict[str, dict[str, int]] = field(default_factory=lambda: {place: {} for place in PLACES})
    lines: dict[str, list[str]] = field(default_factory=lambda: {place: [] for place in PLACES})
    wants: dict[str, tuple[Want, ...]] = field(default_factory=dict)
    #: Who was given slots or left a line without having asked.
    told: set[str] = field(default_factory=set)

    def count(self, place: str) -> int:
        return sum(self.held[place].values())

    def total(self, but: str) -> int:
        """What all others hold."""
        return sum(cost for there in self.held.values() for token, cost in there.items() if token != but)

    def counts(self, wants: Sequence[Want]) -> tuple[int, ...]:
        return tuple(self.count(want.place) for want in wants)

    def stands_in(self, token: str) -> list[str]:
        return [place for place in PLACES if token in self.lines[place]]

    def fits(self, token: str, want: Want) -> bool:
        if token in self.held[want.place]:
            return True
        is_turn = self.lines[want.place][:1] in ([], [token])
        return is_turn and self.count(want.place) + want.cost <= want.limit

    def fit(self, token: str, wants: Sequence[Want]) -> list[bool]:
        return [self.fits(token, want) for want in wants]

    def hold(self, token: str, wants: Sequence[Want], fit: Sequence[bool]) -> None:
        for want, fits in zip(wants, fit, strict=True):
            if fits:
                self.held[want.place][token] = want.cost

    def take(self, token: str, wants: tuple[Want, ...]) -> Any:
        self.wants[token] = wants
        fit = self.fit(token, wants)
        full = tuple(want.block and not fits for want, fits in zip(wants, fit, strict=True))
        if any(full):
            return Full(full, self.counts(wants))
        self.hold(token, wants, fit)
        return Taken(tuple(fit), self.counts(wants))

    def queue(self, token: str, wants: tuple[Want, ...], most: int | None) -> Any:
        self.told.discard(token)
        self.wants[token] = wants
        fit = self.fit(token, wants)
        full = tuple(want.block and not fits for want, fits in zip(wants, fit, strict=True))
        if not any(full):
            self.hold(token, wants, fit)
            self.grant(self.leave(token))
            return Taken(tuple(fit), self.counts(wants))
        places = [want.place for want, is_full in zip(wants, full, strict=True) if is_full]
        if most is None:
            self.grant(self.leave(token))
            return Full(full, self.counts(wants))
        if any(token not in self.lines[place] and len(self.lines[place]) >= most for place in places):
            self.grant(self.leave(token))
            return LineFull(full, self.counts(wants))
        for place in places:
            if token not in self.lines[place]:
                self.lines[place].append(token)
        self.grant(self.leave(token, but=places))
        ahead = max(self.lines[place].index(token) for place in places)
        return Queued(full, self.counts(wants), ahead, 0.0)

    def leave(self, token: str, but: Sequence[str] = ()) -> list[str]:
        left = [place for place in self.stands_in(token) if place not in but]
        for place in left:
            self.lines[place].remove(token)
        return left

    def give(self, token: str) -> None:
        left = self.leave(token)
        self.grant(self.drop(token) + left)
        self.told.discard(token)

    def evict(self, token: str) -> None:
        self.grant(self.drop(token))

    def holds(self, token: str) -> bool:
        return any(token in there for there in self.held.values())

    def drop(self, token: str) -> list[str]:
        """It holds nothing any more. Returns what it held, in the order in which it asked for it."""
        return [want.place for want in self.wants[token] if self.held[want.place].pop(token, 0)]

    def grant(self, places: Iterable[str]) -> None:
        """Something may have become free there."""
        due = deque(places)
        while due:
            place = due.popleft()
            while line := self.lines[place]:
                first, wants = line[0], self.wants[line[0]]
                fit = self.fit(first, wants)
                if all(fits or not want.block for want, fits in zip(wants, fit, strict=True)):
                    self.hold(first, wants, fit)
                    due.extend(self.leave(first))
                elif next(fits for want, fits in zip(wants, fit, strict=True) if want.place == place):
                    line.remove(first)  # another one is full: it joins that line when it asks
                else:
                    break
                self.told.add(first)


class Rig:
    """A store, asked in the words of the model."""

    def __init__(self, name: str, store: BaseBackend) -> None:
        self.name, self.store = name, store
        self.bells: dict[str, Bell] = {}
        self.slots: dict[str, tuple[Slot, ...]] = {}

    def slots_of(self, token: str, wants: tuple[Want, ...]) -> tuple[Slot, ...]:
        found = self.slots.get(token)
        if found is None:
            found = self.slots[token] = tuple(
                Slot(want.place, KEY, want.limit, 3600.0, token, want.block, "/x", want.cost, True) for want in wants
            )
        return found

    def take(self, token: str, wants: tuple[Want, ...]) -> Any:
        reply = self.store.take(self.slots_of(token, wants))
        if isinstance(reply, Full):
            del self.slots[token]
        return reply

    def queue(self, token: str, wants: tuple[Want, ...], most: int | None) -> Any:
        slots = self.slots_of(token, wants)
        if token not in self.bells:
            self.bells[token] = self.store.bell()
        bell = self.bells[token]
        bell.wait(0)  # what rang before
        reply = self.store.queue(slots, [most if slot.block else None for slot in slots], bell)
        if isinstance(reply, Full | LineFull):
            self.forget(token)
        return reply

    def wakes(self, token: str) -> bool:
        """Does its bell ring?"""
        began = monotonic()
        self.bells[token].wait(SOON)
        return monotonic() - began < SOON

    def give(self, token: str) -> None:
        self.store.give(self.slots[token])
        self.forget(token)
        assert isinstance(self.store.take(HEARD), Full)  # on the same connection: now the give is done

    def forget(self, token: str) -> None:
        del self.slots[token]
        if bell := self.bells.pop(token, None):
            bell.close()


tokens = st.sampled_from(TOKENS)
wants = st.lists(
    st.builds(
        Want,
        st.sampled_from(PLACES),
        st.sampled_from((1, 1, 1, 2, 3)),
        st.sampled_from((1, 1, 1, 2)),
        st.sampled_from((True, True, True, False)),
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda want: want.place,
).map(
    lambda drawn: tuple(
        want._replace(block=want.block or not place, limit=max(want.limit, want.cost))
        for place, want in enumerate(drawn)
    )
)


class Histories(RuleBasedStateMachine):
    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rig, self.model = rig, Line()
        #: What each one asks for until it gives back.
        self.wants: dict[str, tuple[Want, ...]] = {}
        self.woken: set[str] = set()

    @rule(token=tokens, wanted=wants)
    def take(self, token: str, wanted: tuple[Want, ...]) -> None:
        if token not in self.wants:
            self.same(self.rig.take(token, wanted), self.model.take(token, wanted))
            if self.model.holds(token):
                self.wants[token] = wanted

    @rule(token=tokens, wanted=wants, most=st.sampled_from((100, 100, 100, 1, 0)))
    def join(self, token: str, wanted: tuple[Want, ...], most: int) -> None:
        if token not in self.wants:
            self.queue(token, wanted, most)

    def queue(self, token: str, wanted: tuple[Want, ...], most: int | None) -> None:
        self.wants[token] = wanted
        held = self.model.total(but=token)
        expected = self.model.queue(token, wanted, most)
        self.same(self.rig.queue(token, wanted, most), expected, self.model.total(but=token) - held)
        if isinstance(expected, Full | LineFull):
            del self.wants[token]

    @precondition(lambda self: self.wants)
    @rule(data=st.data(), most=st.sampled_from((100, 100, None)))
    def ask_again(self, data: st.DataObject, most: int | None) -> None:
        token = data.draw(st.sampled_from(sorted(self.wants)))
        self.queue(token, self.wants[token], most)

    @precondition(lambda self: self.wants)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.wants)))
        del self.wants[token]
        self.rig.give(token)
        self.model.give(token)

    def holding_one(self) -> list[str]:
        return sorted(token for token, wanted in self.wants.items() if len(wanted) == 1 and self.model.holds(token))

    @precondition(lambda self: self.holding_one())
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """Of one slot: nobody says in which order several become free."""
        token = data.draw(st.sampled_from(self.holding_one()))
        assert self.rig.store.evict(token)
        self.model.evict(token)

    @rule()
    def all_who_were_told_ask(self) -> None:
        for token in sorted(self.model.told):
            self.queue(token, self.wants[token], 100)

    def same(self, reply: Any, expected: Any, let_in: int = 0) -> None:
        """`let_in`: what those cost who come in because the asker leaves a line. A count may be from before that."""
        assert type(reply) is type(expected), f"{self.rig.name} says {reply}, and {expected} was expected"
        fits = "held" if isinstance(reply, Taken) else "full"
        assert getattr(reply, fits) == getattr(expected, fits)
        for count, most in zip(reply.in_flight, expected.in_flight, strict=True):
            assert most - let_in <= count <= most
        if isinstance(reply, Queued):
            assert reply.ahead >= expected.ahead
            assert 0 < reply.again <= 1

    @invariant()
    def agree(self) -> None:
        holders = sorted((one.policy, one.token, one.cost) for one in self.rig.store.snapshot())
        assert holders == sorted(
            (place, token, cost) for place, there in self.model.held.items() for token, cost in there.items()
        )
        waiters = [(one.policy, one.token, one.place) for one in self.rig.store.waiters()]
        assert sorted(waiters) == sorted(
            (name, token, place) for name, line in self.model.lines.items() for place, token in enumerate(line, 1)
        )
        for token in sorted(self.model.told - self.woken):
            if self.model.holds(token) or not self.model.stands_in(token):  # else it waits on, in another line
                assert self.rig.wakes(token), "it was not woken"
        self.woken = set(self.model.told)

    def teardown(self) -> None:
        for token in list(self.rig.slots):
            self.rig.give(token)
        assert list(self.rig.store.snapshot()) == []
        assert list(self.rig.store.waiters()) == []


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's place lapses, however slow the machine. To ask for it in time would make what happens next depend on the clock,
    and Hypothesis refuses a history that goes on in another way than it did before."""
    monkeypatch.setattr(memory_lines, "PLACE_FOR", AGES)
    monkeypatch.setattr(ours, "STANDS_FOR", int(AGES * 1e9))
    for name in ("PLACE_FOR", "DEAF_PLACE_FOR"):
        monkeypatch.setattr(wire, name, AGES)


@pytest.fixture(params=list(BACKENDS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param, BACKENDS[request.param](request))
    yield rig
    close = getattr(rig.store, "close", None)
    if close is not None:
        close()


def test_every_line_is_what_the_model_says(rig: Rig) -> None:
    class OfThis(Histories):
        def __init__(self) -> None:
            super().__init__(rig)

    run_state_machine_as_test(
        OfThis,
        settings=hypothesis_settings(
            max_examples=EXAMPLES[rig.name],
            stateful_step_count=30,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],  # to shrink is to wait again and again for what does not ring
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
