"""Waiting in line on a Redis Cluster: who waits is told at the master of the slot, wherever that is or moves to.

What the lines of every store promise is in test_waiting, which runs on a Cluster, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.outcomes import Full, Queued, Slot, Taken

from .chaos import LONG
from .cluster_load import CAP, Load
from .redis_cluster import Node, RedisCluster
from .support import wait_until
from .test_redis_waiting import ask_from_the_grave, without_wait
from .test_waiting import Client, Make, client, settled

__all__ = ["client"]

HALVES = ["threads", "loop"]


@pytest.fixture
def store(redis_cluster: RedisCluster, prefix: str) -> Iterator[RedisBackend]:
    options = {"cluster": True, "socket_timeout": 5}
    store = RedisBackend(BackendConfig("default", "redis", redis_cluster.urls, prefix, options))
    yield store
    settled(store)


def asks(half: str, one: Client) -> Any:
    if half == "threads":
        return one.ask()
    return asyncio.run(one.store.aqueue(one.slots, one.most, one.bell))  # type: ignore[arg-type]  # a coroutine


def places(store: RedisBackend) -> dict[str, int]:
    return {one.token: one.place for one in store.waiters()}


def listens_at(store: RedisBackend, node: Node) -> bool:
    conn = store._ear._conn
    return conn is not None and store._ear._hears and conn.port == node.port


@pytest.mark.parametrize("half", HALVES)
def test_when_the_slot_has_moved_who_waits_is_told_at_the_new_node(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str, half: str
) -> None:
    holder, first, second = client("a"), client("a"), client("a")
    holder.ask()
    for one in (first, second):
        assert isinstance(one.ask(), Queued)
    move = redis_cluster.begin_move(prefix)
    assert listens_at(store, move.source)
    move.all_keys()
    move.finish()
    assert isinstance(asks(half, second), Queued)  # it is by this that its process learns of it
    assert wait_until(lambda: listens_at(store, move.target))
    assert isinstance(
        first.ask(), Queued
    )  # as it is rung for then: until its process listened there it was passed over
    assert places(store) == {first.slots[0].token: 1, second.slots[0].token: 2}
    for one, other in ((holder, first), (first, second)):
        other.bell.wait(0)
        one.give()
        other.hear()
        assert isinstance(other.ask(), Taken)


@pytest.mark.parametrize("half", HALVES)
def test_while_it_moves_nobody_joins_a_line_and_who_asks_first_has_what_is_free(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str, half: str
) -> None:
    """A line that began at the new node would be in the way of the one that comes; and who was in line before still is."""
    holder, first = client("a"), client("a")
    holder.ask()
    assert isinstance(first.ask(), Queued)
    late = client("a")
    move = redis_cluster.begin_move(prefix)
    for key in ["", *move.left()]:
        if key:
            move.key(key)
        assert isinstance(store.take(client("a").slots), Full)
        reply = asks(half, late)
        assert isinstance(reply, Queued)
        assert reply.again <= 0.05
        assert isinstance(late.ask_for_the_last_time(), Full)
        assert places(store) == {first.slots[0].token: 1}
    move.finish()
    # What `late` has given back may reach the new node before our process listens there: then `first` is passed over, and comes
    # back to its place when it asks.
    assert places(store) in ({}, {first.slots[0].token: 1})
    assert isinstance(late.ask(), Queued)
    assert wait_until(lambda: listens_at(store, move.target))
    assert isinstance(first.ask(), Queued)  # as above
    assert places(store) == {first.slots[0].token: 1, late.slots[0].token: 2}
    holder.give()
    assert wait_until(first.holds)


@pytest.mark.parametrize("half", HALVES)
def test_who_was_let_in_while_it_moved_leaves_the_line_afterwards(
    redis_cluster: RedisCluster,
    store: RedisBackend,
    client: Make,
    prefix: str,
    half: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strays: list[str] = []
    monkeypatch.setattr(store._ear, "_stray", strays.append)
    holder, first, second = client("a"), client("a", ttl=60), client("a")
    holder.ask()
    for one in (first, second):
        assert isinstance(one.ask(), Queued)
    move = redis_cluster.begin_move(prefix)
    holder.give()
    try:
        assert wait_until(lambda: isinstance(asks(half, first), Taken))
        first.bell.close()
    finally:
        move.all_keys()
        move.finish()
    assert isinstance(second.ask(), Queued)
    assert wait_until(lambda: listens_at(store, move.target))
    second.ask()
    assert places(store) == {second.slots[0].token: 1}
    (held,) = store.snapshot()
    assert held.token == first.slots[0].token
    assert held.lease_left > 30, "its lease has been cut to that of one who is let in"
    second.bell.wait(0)
    first.give()
    assert wait_until(second.holds)
    assert strays == [], "it was called once more, as if what it holds were to be taken back"


@pytest.mark.parametrize("half", HALVES)
def test_who_came_and_went_while_it_moved_is_not_let_in_afterwards(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str, half: str
) -> None:
    """Its line hears of both only then, and of who left before it: it is let in once more, and that is taken back with it."""
    stays, holder, gone = [client("a", limit=2) for _ in range(3)]
    for one in (stays, holder):
        one.ask()
    assert isinstance(gone.ask(), Queued)
    store._delivering = True  # what is left over waits until it is all there
    move = redis_cluster.begin_move(prefix)
    try:
        for key in move.left():
            if "!waiter:" in key:
                move.key(key)
        holder.give()
        assert wait_until(lambda: isinstance(asks(half, gone), Taken))
        gone.bell.close()
        gone.give()
        store._lines.hear_all()
        work = store._leftovers.pick_up()
        assert len(work.releases) == 2
    finally:
        move.all_keys()
        move.finish()
    other = client("b")
    other.ask()
    assert wait_until(lambda: listens_at(store, move.target))
    assert store.waiters()
    store._leftovers.put_back(work)
    store._deliver()
    assert wait_until(lambda: redis_cluster.held(prefix) == 2, 3), "until the lease of one who is let in has ended"


@pytest.mark.parametrize("half", HALVES)
def test_whose_time_was_over_while_it_moved_leaves_the_line_afterwards(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str, half: str
) -> None:
    """Without another word, long before its place would lapse, and though its line is not where it is turned away."""
    holder, late = client("a"), client("a")
    holder.ask()
    assert isinstance(late.ask(), Queued)
    late.most = (None,)
    move = redis_cluster.begin_move(prefix)
    try:
        for key in move.left():
            if ":1:a:" in key:
                move.key(key)
        assert isinstance(asks(half, late), Full)
        assert places(store) == {late.slots[0].token: 1}
    finally:
        move.all_keys()
        move.finish()
    assert isinstance(client("b").ask(), Taken)  # by which its process learns of it
    assert wait_until(lambda: places(store) == {}, 3)


@pytest.mark.parametrize("half", HALVES)
def test_several_policies_wait_until_it_has_moved(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str, half: str
) -> None:
    """Their semaphores are at two nodes: nobody fails for that who may ask again."""
    store._recipe.timeout = 0.2
    holder = client("a")
    holder.ask()
    move = redis_cluster.begin_move(prefix)
    try:
        reply = asks(half, both := client("a", "b"))
        assert isinstance(reply, Queued)
        assert reply.again <= 0.05
        with pytest.raises(BackendError):
            both.ask_for_the_last_time()
    finally:
        move.all_keys()
        move.finish()
    store._recipe.timeout = 5
    assert isinstance(both.ask(), Queued)
    holder.give()
    assert wait_until(lambda: isinstance(both.ask(), Taken))


def test_nobody_is_let_in_by_others_where_a_semaphore_may_be_missing(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str
) -> None:
    """To let in who waits for two at the new node, while one is at the old node still, would make that one there, too."""
    holder, other, both = client("a"), client("b"), client("a", "b")
    holder.ask()
    other.ask()
    assert isinstance(both.ask(), Queued)
    move = redis_cluster.begin_move(prefix)
    for key in move.left():
        if ":1:b:" not in key:
            move.key(key)
    holder.give()
    store._lines.hear_all()
    assert wait_until(lambda: bool(store._leftovers)), "who is next is not let in now, but later"
    assert move.target.held(prefix) == 0
    move.all_keys()
    move.finish()
    assert isinstance(both.ask(), Queued)
    other.give()
    assert wait_until(lambda: isinstance(both.ask(), Taken))


def test_while_it_moves_nobody_comes_back_and_nothing_is_taken_back(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str
) -> None:
    """Who was passed over has its place afterwards, and who knows nothing of its slot loses it by its lease."""
    holder, gone, deaf, behind = [client("a") for _ in range(4)]
    for one in (holder, gone):
        one.ask()
    ask_from_the_grave(deaf)
    assert isinstance(behind.ask(), Queued)
    holder.give()
    gone.hear()  # and does not ask
    behind.ask()
    assert places(store) == {behind.slots[0].token: 1}
    back = store._keys.back(gone.slots[0].token.encode()).packed
    move = redis_cluster.begin_move(prefix)
    assert store._call(back, (), lambda: back) == 0
    for key in sorted(move.left(), key=lambda name: ":1:!" in name):  # the line comes after what stands in it
        move.key(key)
        assert isinstance(deaf.ask(), Queued)
        assert places(store) in ({}, {behind.slots[0].token: 1})
    move.finish()
    assert isinstance(deaf.ask(), Queued)
    assert wait_until(lambda: listens_at(store, move.target))
    for one in (deaf, behind, gone):
        one.ask()
    assert places(store) == {deaf.slots[0].token: 1, behind.slots[0].token: 2}


def test_while_it_moves_a_slot_is_claimed_whoever_waits(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str
) -> None:
    """What says that somebody does is at the other node."""
    holder, heir = client("a"), without_wait(client("a"))
    holder.take()
    move = redis_cluster.begin_move(prefix)
    for key in move.left():
        if "!waits" in key:
            move.key(key)
    assert store.claim([*zip(holder.slots, heir.slots, strict=True)])
    assert len(store._keys.give(heir.slots)) > 1
    move.all_keys()
    move.finish()
    assert heir.holds()


def test_while_it_moves_what_one_has_to_give_up_is_for_whoever_asks_first(
    redis_cluster: RedisCluster, store: RedisBackend, client: Make, prefix: str
) -> None:
    """It was let in to both, and the shorter lease ended before it asked; the line of the other one is at another node."""
    first, second, third, behind = client("a"), *[client("b", limit=2) for _ in range(3)]
    both, other = client("a", "b"), client("a")
    both.slots = (replace(both.slots[0], ttl=0.05, memo=[]), replace(both.slots[1], limit=2, memo=[]))
    for one in (first, second, third, both):
        one.ask()
    first.give()
    third.give()
    assert wait_until(both.holds)
    assert isinstance(behind.ask(), Queued)
    assert wait_until(lambda: isinstance(other.take(), Taken))
    move = redis_cluster.begin_move(prefix)
    for key in move.left():
        if "!queue" in key:
            move.key(key)
    assert isinstance(both.ask_for_the_last_time(), Full)
    assert both.slots[0].token not in {holder.token for holder in store.snapshot()}
    assert isinstance(behind.ask(), Taken)
    move.all_keys()
    move.finish()


def test_moving_to_and_fro_under_a_load_that_waits(
    redis_cluster: RedisCluster, store: RedisBackend, prefix: str
) -> None:
    """Whoever finds it full waits until it is let in: no call fails, nobody is turned away, never above the cap."""

    def waiting(slots: Sequence[Slot]) -> list[Slot]:
        return [replace(slot, waits=True, memo=[]) for slot in slots]

    def take(slots: Sequence[Slot]) -> Any:
        slots, bell = waiting(slots), store.bell()
        reply: Any = store.take(slots)
        while not isinstance(reply, Taken):
            if isinstance(reply, Queued):
                bell.wait(reply.again)
            reply = store.queue(slots, (1000,), bell)
        bell.close()
        return reply

    async def atake(slots: Sequence[Slot]) -> Any:
        slots, bell = waiting(slots), store.bell()
        reply: Any = await store.atake(slots)
        while not isinstance(reply, Taken):
            if isinstance(reply, Queued):
                await bell.await_(reply.again)
            reply = await store.aqueue(slots, (1000,), bell)
        bell.close()
        return reply

    give, agive = (partial(lambda call, slots: call(waiting(slots)), call) for call in (store.give, store.agive))
    with Load(take, give, atake, agive) as load:
        assert load.goes_on()
        for _ in range(20 if LONG else 2):
            move = redis_cluster.begin_move(prefix)
            assert load.goes_on()
            move.all_keys(between=lambda: load.goes_on(5))
            assert load.goes_on()
            move.finish()
            assert load.goes_on()
    assert load.errors == []
    assert load.full == 0
    assert 0 < load.most <= CAP
    # One who was let in while it moved may be let in once more before its line has heard that it left: until then.
    assert wait_until(lambda: store.snapshot() == [], 20), store.snapshot()
    assert wait_until(lambda: store.waiters() == [])
