"""The lines of a store: who waits stands in the right ones, comes forward in order, and takes nothing that it cannot use.

One suite for every store, on its own interface: `queue` is asked by hand, as if by a driver that is slow.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest

from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.backends.base import PLACE_FOR
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, LineFull, Queued, QueueReply, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .support import wait_until
from .test_steps import BACKENDS

GLOBAL = make_key("global")


class Client:
    """One who asks for slots: `a` and `b` are policies with a limit of 1, if nothing else is said."""

    def __init__(
        self,
        store: BaseBackend,
        *policies: str,
        limit: int = 1,
        cost: int = 1,
        ttl: float = 60,
        most: int | None = 100,
        block: bool = True,
    ) -> None:
        token = new_token()
        self.store, self.most = store, (most,) * len(policies)
        self.slots = tuple(
            Slot(policy, GLOBAL, limit, ttl, token, block=block, path="/x", cost=cost, waits=True)
            for policy in policies
        )
        self.bell = store.bell()

    def ask(self) -> QueueReply:
        return self.store.queue(self.slots, self.most, self.bell)

    def ask_for_the_last_time(self) -> QueueReply:
        return self.store.queue(self.slots, (None,) * len(self.slots), self.bell)

    def take(self) -> Taken | Full:
        return self.store.take(self.slots)

    def give(self) -> None:
        self.store.give(self.slots)

    def hear(self) -> None:
        """The bell rings, long before its place would lapse or others had a reason to look by themselves."""
        began = monotonic()
        self.bell.wait(PLACE_FOR)
        assert monotonic() - began < 0.8 * PLACE_FOR, "nobody rang"

    def holds(self) -> bool:
        settled(self.store)
        return any(holder.token == self.slots[0].token for holder in self.store.snapshot())


def settled(store: BaseBackend) -> None:
    """It has heard of all that it was sent."""
    if isinstance(store, RedisBackend):
        store.close()
        assert wait_until(lambda: not store._leftovers and not store._delivering)


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest) -> BaseBackend:
    return BACKENDS[request.param](request)


@pytest.fixture
def client(store: BaseBackend) -> Any:
    made: list[Client] = []

    def make(*policies: str, **options: Any) -> Client:
        made.append(Client(store, *policies, **options))
        return made[-1]

    yield make
    for one in made:
        one.give()
        one.bell.close()
    settled(store)
    assert store.snapshot() == []
    assert store.waiters() == []


Make = Callable[..., Client]


def places(store: BaseBackend, *clients: Client) -> list[list[tuple[str, int]]]:
    """In which lines each one stands, and where."""
    found = store.waiters()
    return [
        sorted((one.policy, one.place) for one in found if one.token == client.slots[0].token) for client in clients
    ]


def test_who_finds_it_full_stands_in_line_and_holds_when_it_is_free(store: BaseBackend, client: Make) -> None:
    holder, waiter = client("a"), client("a")
    assert holder.ask() == Taken((True,), (1,))
    reply = waiter.ask()
    assert isinstance(reply, Queued)
    assert (reply.full, reply.in_flight, reply.ahead) == ((True,), (1,), 0)
    assert 0 < reply.again <= 1
    assert not waiter.holds()
    holder.give()
    waiter.hear()
    assert waiter.ask() == Taken((True,), (1,))
    assert waiter.holds()


def test_it_is_given_the_slot_with_the_release_and_not_only_when_it_asks(store: BaseBackend, client: Make) -> None:
    holder, waiter = client("a"), client("a")
    holder.ask()
    waiter.ask()
    holder.give()
    assert wait_until(waiter.holds)
    assert places(store, waiter) == [[]]


def test_they_come_forward_in_the_order_in_which_they_joined(store: BaseBackend, client: Make) -> None:
    _, *waiters = clients = [client("a") for _ in range(6)]
    assert [type(one.ask()) for one in clients] == [Taken, *[Queued] * 5]
    assert [one.ask().ahead for one in waiters] == [0, 1, 2, 3, 4], "to ask again is to keep one's place"
    assert places(store, *waiters) == [[("a", place)] for place in range(1, 6)]
    for before, after in zip(clients, waiters, strict=False):
        before.give()
        after.hear()
        assert [type(one.ask()) for one in waiters if one is after] == [Taken]
        settled(store)
        assert [holder.token for holder in store.snapshot()] == [after.slots[0].token]


def test_a_newcomer_does_not_overtake_who_waits(store: BaseBackend, client: Make) -> None:
    """Though there be room: whoever waits for three may not be starved by those who want one."""
    holder, large, small = client("a", limit=3), client("a", limit=3, cost=3), client("a", limit=3)
    holder.ask()
    assert isinstance(large.ask(), Queued)
    assert small.take() == Full((True,), (1,))
    reply = small.ask()
    assert isinstance(reply, Queued)
    assert reply.ahead == 1
    large.give()
    small.hear()
    assert small.ask() == Taken((True,), (2,)), "the one before it has left"


def test_who_waits_for_one_takes_nothing_of_the_other(store: BaseBackend, client: Make) -> None:
    holder, both = client("b"), client("a", "b")
    holder.ask()
    reply = both.ask()
    assert isinstance(reply, Queued)
    assert (reply.full, reply.in_flight) == ((False, True), (0, 1))
    assert places(store, both) == [[("b", 1)]]
    other = client("a")
    assert other.take() == Taken((True,), (1,)), "all of it stays usable"
    other.give()
    settled(store)
    holder.give()
    both.hear()
    assert both.ask() == Taken((True, True), (1, 1))


def test_at_its_turn_it_takes_all_or_waits_for_what_is_full_now(store: BaseBackend, client: Make) -> None:
    of_a, of_b = client("a"), client("b")
    of_b.ask()
    both, behind = client("a", "b"), client("b")
    assert isinstance(both.ask(), Queued)
    assert isinstance(behind.ask(), Queued)
    assert of_a.ask() == Taken((True,), (1,))
    of_b.give()
    behind.hear()
    assert behind.ask() == Taken((True,), (1,)), "the one before it cannot use what is free, and keeps it for nobody"
    both.hear()
    reply = both.ask()
    assert isinstance(reply, Queued)
    assert reply.full == (True, True)
    assert places(store, both) == [[("a", 1), ("b", 1)]]
    of_a.give()
    assert isinstance(both.ask(), Queued)
    assert places(store, both) == [[("b", 1)]]
    behind.give()
    assert wait_until(both.holds)
    assert both.ask() == Taken((True, True), (1, 1))


def test_what_is_given_back_at_once_is_free_at_once(store: BaseBackend, client: Make) -> None:
    """The first of both lines takes both; it is not asked about the one while the other one still is full."""
    holder, both, of_a, of_b = client("a", "b"), client("a", "b"), client("a"), client("b")
    assert holder.ask() == Taken((True, True), (1, 1))
    assert [type(one.ask()) for one in (both, of_a, of_b)] == [Queued] * 3
    holder.give()
    assert wait_until(both.holds)
    assert both.ask() == Taken((True, True), (1, 1))
    assert places(store, both, of_a, of_b) == [[], [("a", 1)], [("b", 1)]]


def test_a_line_is_bounded_and_who_stands_in_it_keeps_the_place(store: BaseBackend, client: Make) -> None:
    holder, first, second, third = [client("a", most=2) for _ in range(4)]
    holder.ask()
    assert isinstance(first.ask(), Queued)
    assert isinstance(second.ask(), Queued)
    assert third.ask() == LineFull((True,), (1,))
    assert isinstance(second.ask(), Queued)
    assert places(store, first, second, third) == [[("a", 1)], [("a", 2)], []]
    first.give()
    settled(store)
    assert isinstance(third.ask(), Queued)


def test_nobody_waits_where_the_line_has_no_room_at_all(store: BaseBackend, client: Make) -> None:
    holder, other = client("a", most=0), client("a", most=0)
    holder.ask()
    assert other.ask() == LineFull((True,), (1,))
    assert places(store, other) == [[]]


def test_the_last_question_takes_or_leaves(store: BaseBackend, client: Make) -> None:
    holder, first, second = client("a"), client("a"), client("a")
    holder.ask()
    first.ask()
    second.ask()
    assert first.ask_for_the_last_time() == Full((True,), (1,))
    assert places(store, first, second) == [[], [("a", 1)]]
    holder.give()
    assert wait_until(second.holds)
    assert second.ask_for_the_last_time() == Taken((True,), (1,)), "it was granted before its time was over"


def test_one_that_is_not_waited_for_ends_the_wait(store: BaseBackend, client: Make) -> None:
    of_a, of_b, both = client("a"), client("b"), client("a", "b")
    both.most = (100, None)
    of_a.ask()
    assert isinstance(both.ask(), Queued)
    of_b.ask()
    assert both.ask() == Full((True, True), (1, 1))
    assert places(store, both) == [[]]


def test_to_give_is_to_leave_the_line(store: BaseBackend, client: Make) -> None:
    holder, first, second = client("a"), client("a"), client("a")
    holder.ask()
    first.ask()
    second.ask()
    first.give()
    settled(store)
    assert places(store, first, second) == [[], [("a", 1)]]
    holder.give()
    second.hear()
    assert second.ask() == Taken((True,), (1,))
    assert not first.holds()


def test_who_leaves_before_others_lets_those_have_what_it_could_not_use(store: BaseBackend, client: Make) -> None:
    holder, large, small = client("a", limit=3), client("a", limit=3, cost=3), client("a", limit=3)
    for one in (holder, large, small):
        one.ask()
    large.give()
    assert wait_until(small.holds)


def test_a_lease_that_ends_is_seen_by_the_first_in_the_line(store: BaseBackend, client: Make) -> None:
    """Nobody gives it back: its process is dead, say."""
    holder, waiter = client("a", ttl=0.4), client("a")
    holder.ask()
    reply = waiter.ask()
    assert isinstance(reply, Queued)
    assert reply.again <= 0.45
    waiter.bell.wait(reply.again)
    assert wait_until(lambda: isinstance(waiter.ask(), Taken))


def test_an_eviction_lets_the_next_one_in(store: BaseBackend, client: Make) -> None:
    holder, waiter = client("a"), client("a")
    holder.ask()
    waiter.ask()
    assert store.evict(holder.slots[0].token)
    waiter.hear()
    assert waiter.holds()


def test_a_shadow_policys_slot_is_taken_along_where_one_is_free(store: BaseBackend, client: Make) -> None:
    holder, waiter = client("a"), client("a", "shadow")
    waiter.slots = (waiter.slots[0], replace(waiter.slots[1], block=False, memo=[]))
    waiter.most = (100, None)
    holder.ask()
    reply = waiter.ask()
    assert isinstance(reply, Queued)
    assert reply.full == (True, False)
    assert places(store, waiter) == [[("a", 1)]]
    holder.give()
    waiter.hear()
    assert waiter.ask() == Taken((True, True), (1, 1))


def test_who_waits_is_told_of(store: BaseBackend, client: Make) -> None:
    holder, waiter = client("a", limit=2, cost=2), client("a", limit=2, cost=2)
    holder.ask()
    waiter.ask()
    (told,) = store.waiters()
    assert (told.policy, told.key, told.token, told.place, told.path, told.cost) == (
        "a",
        "global",
        waiter.slots[0].token,
        1,
        "/x",
        2,
    )
    assert 0 <= told.age < 10


def test_a_coroutine_waits_by_a_bell_of_its_loop(store: BaseBackend, client: Make) -> None:
    async def wait() -> Sequence[QueueReply]:
        holder, waiter = client("a"), client("a")
        waiter.bell = store.abell()
        first = await store.aqueue(holder.slots, holder.most, store.abell())
        second = await store.aqueue(waiter.slots, waiter.most, waiter.bell)
        await store.agive(holder.slots)
        await waiter.bell.await_(5)
        third = await store.aqueue(waiter.slots, waiter.most, waiter.bell)
        await store.agive(waiter.slots)
        waiter.bell.close()
        return first, second, third

    first, second, third = asyncio.run(wait())
    assert (type(first), type(second), type(third)) == (Taken, Queued, Taken)


def test_a_bell_that_rang_before_is_not_waited_for() -> None:
    bell = Bell()
    bell.ring()
    bell.wait(60)
    bell.ring()
    asyncio.run(asyncio.wait_for(bell.await_(60), 5))


def test_what_a_newcomer_lets_others_have_it_does_not_take_as_well(store: BaseBackend, client: Make) -> None:
    """A lease has ended without a word: the newcomer's own look gives both to the one that waits, though A was free before."""
    lapsing = [client("b", limit=2, ttl=0.5) for _ in range(2)]
    for one in lapsing:
        one.take()
    waiter, newcomer = client("a", "b"), client("a", "b")
    for one in (waiter, newcomer):
        one.slots = (one.slots[0], replace(one.slots[1], limit=2, memo=[]))
    assert isinstance(waiter.ask(), Queued)
    assert wait_until(lambda: list(store.counts(lapsing[0].slots)) == [0])
    newcomer.take()
    waiter.ask()
    assert (waiter.holds(), newcomer.holds()) == (True, False)
    assert list(store.counts(waiter.slots)) == [1, 1]


def test_its_own_question_may_let_it_in(store: BaseBackend, client: Make) -> None:
    """Nobody else has looked since the leases ended: the last question finds its turn, behind one who is let in with it."""
    lapsing = [client("a", limit=2, ttl=0.5) for _ in range(2)]
    for one in lapsing:
        one.take()
    first, second = client("a", limit=2), client("a", limit=2)
    assert isinstance(first.ask(), Queued)
    assert isinstance(second.ask(), Queued)
    assert wait_until(lambda: list(store.counts(first.slots)) == [0])
    reply = second.ask_for_the_last_time()
    assert isinstance(reply, Taken) == second.holds()
    assert isinstance(reply, Taken)
    assert first.ask() == Taken((True,), (2,))


def test_who_asks_too_late_for_one_of_two_holds_neither(store: BaseBackend, client: Make) -> None:
    """It was let in, and the shorter one of its leases has ended before it asked: somebody else has that slot by now."""
    holder, waiter, other = client("a", "b"), client("a", "b"), client("a")
    waiter.slots = (replace(waiter.slots[0], ttl=0.5, memo=[]), waiter.slots[1])
    holder.take()
    assert isinstance(waiter.ask(), Queued)
    holder.give()
    assert wait_until(waiter.holds)
    assert wait_until(lambda: isinstance(other.take(), Taken))
    reply = waiter.ask_for_the_last_time()
    assert isinstance(reply, Full)
    assert reply.full == (True, False)
    settled(store)
    assert [holder.token for holder in store.snapshot()] == [other.slots[0].token]


def test_a_garbage_collection_in_the_middle_of_a_wait_may_ring_its_own_bell(store: BaseBackend, client: Make) -> None:
    """An abandoned stream, whose end gives the slot back: without waiting for a lock that the waiting thread itself holds."""
    for number in range(30):
        holder, waiter = client("a"), client("a")
        holder.take()
        waiter.ask()
        if not gives_within_a_wait(holder, waiter, number):
            break
        assert wait_until(waiter.holds)
        waiter.give()
    assert number > 1


def gives_within_a_wait(holder: Client, waiter: Client, number: int) -> bool:
    """The slot is given back at this call of C that the wait makes, as any of them may begin a collection. Was there one?"""
    calls: list[str] = []

    def collect(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and argument is not sys.setprofile:
            calls.append(argument.__name__)
            if len(calls) == number + 1:
                holder.give()

    def wait() -> None:
        sys.setprofile(collect)
        try:
            waiter.bell.wait(0.3)
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), f"it waits for itself, in {calls[number]}"
    return len(calls) > number
