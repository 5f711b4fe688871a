"""Lines in any weather: random questions, releases and evictions, and leases that lapse in between, on every store.

No model says what each answer has to be, as nobody knows when a store finds that a lease has lapsed. What must never be: more
than a limit in flight, a slot or a place of one who was turned away, or anything left in the end.
"""

from __future__ import annotations

import random
from collections import Counter
from time import sleep

import pytest

from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Queued, Slot, Taken
from django_concurrency_mw.tokens import new_token

from ..test_steps import BACKENDS
from ..test_waiting import settled
from . import LONG

LIMITS = {"a": 2, "b": 3, "c": 1}
HISTORIES = 200 if LONG else 4
STEPS = 120
#: Seconds of a lease that may lapse.
SHORT = 0.05


class Weather:
    def __init__(self, store: BaseBackend, seed: int) -> None:
        self.store, self.random = store, random.Random(seed)
        self.holders: dict[str, tuple[Slot, ...]] = {}
        self.waiting: dict[str, tuple[tuple[Slot, ...], Bell]] = {}

    def newcomer(self) -> tuple[Slot, ...]:
        token, chance = new_token(), self.random
        policies = chance.sample(sorted(LIMITS), chance.choice([1, 1, 2, 3]))
        return tuple(
            Slot(
                policy,
                make_key("global"),
                LIMITS[policy],
                chance.choice([60, 60, 60, SHORT]),
                token,
                block=number == 0 or chance.random() < 0.85,
                cost=min(LIMITS[policy], chance.choice([1, 1, 2])),
                waits=True,
            )
            for number, policy in enumerate(policies)
        )

    def take(self) -> None:
        slots = self.newcomer()
        if isinstance(self.store.take(slots), Taken):
            self.holders[slots[0].token] = slots

    def join(self) -> None:
        if len(self.waiting) < 8:
            slots, bell = self.newcomer(), self.store.bell()
            self.waiting[slots[0].token] = slots, bell
            self.ask_of(slots[0].token)

    def ask(self) -> None:
        if self.waiting:
            self.ask_of(self.random.choice(list(self.waiting)))

    def ask_of(self, token: str) -> None:
        slots, bell = self.waiting[token]
        reply = self.store.queue(slots, [20 if slot.block else None for slot in slots], bell)
        if isinstance(reply, Taken):
            self.came_in(token)
        else:
            assert isinstance(reply, Queued)

    def came_in(self, token: str) -> None:
        self.holders[token], bell = self.waiting.pop(token)
        bell.close()

    def give_up(self) -> None:
        if not self.waiting:
            return
        token = self.random.choice(list(self.waiting))
        slots, bell = self.waiting[token]
        if isinstance(self.store.queue(slots, [None] * len(slots), bell), Taken):
            self.came_in(token)
            return
        del self.waiting[token]
        bell.close()
        assert token not in {holder.token for holder in self.store.snapshot()}, "turned away, and holds"
        assert token not in {waiter.token for waiter in self.store.waiters()}, "turned away, and waits"

    def give(self) -> None:
        if self.holders:
            self.store.give(self.holders.pop(self.random.choice(list(self.holders))))

    def evict(self) -> None:
        if self.holders:
            self.store.evict(self.random.choice(list(self.holders)))

    def lapse(self) -> None:
        sleep(1.2 * SHORT)

    def look(self) -> None:
        held: Counter[str] = Counter()
        for holder in self.store.snapshot():
            held[holder.policy] += holder.cost
        assert all(count <= LIMITS[policy] for policy, count in held.items()), held

    def end(self) -> None:
        for slots, bell in self.waiting.values():
            self.store.give(slots)
            bell.close()
        for slots in self.holders.values():
            self.store.give(slots)
        settled(self.store)
        self.lapse()
        assert list(self.store.snapshot()) == []
        assert list(self.store.waiters()) == []


@pytest.mark.parametrize("kind", BACKENDS)
def test_no_weather_breaks_a_cap_or_loses_a_slot(request: pytest.FixtureRequest, kind: str) -> None:
    first = random.randrange(10**6) if LONG else 0
    for seed in range(first, first + HISTORIES):
        weather = Weather(BACKENDS[kind](request), seed)
        steps = {
            weather.take: 20,
            weather.join: 25,
            weather.ask: 25,
            weather.give_up: 10,
            weather.give: 15,
            weather.lapse: 2,
            weather.evict: 3,
        }
        try:
            for step in weather.random.choices(list(steps), list(steps.values()), k=STEPS):
                step()
                weather.look()
            weather.end()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
