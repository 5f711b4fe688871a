"""The memory store: exact under threads, all or nothing, bounded by what is in flight."""

from __future__ import annotations

import gc
import os
import sys
import threading
from itertools import count
from time import monotonic, sleep
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_concurrency_mw.backends import BackendConfig, memory
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken

from .chaos import LONG
from .striking import struck_at
from .support import SOON, exit_code


def slot(
    policy: str = "p", key: str = "k", limit: int = 1, token: str = "t", ttl: float = 60, block: bool = True
) -> Slot:
    return Slot(policy, make_key(key), limit, ttl, token, block)


@pytest.fixture
def store() -> MemoryBackend:
    return MemoryBackend(BackendConfig("default", "memory"))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(memory, "monotonic", clock)
    return clock


def test_a_semaphore_admits_up_to_its_limit_and_counts(store: MemoryBackend) -> None:
    assert store.take([slot(limit=2, token="a")]) == Taken((True,), (1,))
    assert store.take([slot(limit=2, token="b")]) == Taken((True,), (2,))
    assert store.take([slot(limit=2, token="c")]) == Full((True,), (2,))
    assert list(store.give([slot(token="a")])) == [True]
    assert store.take([slot(limit=2, token="c")]) == Taken((True,), (2,))


def test_a_cost_counts_from_the_first_holder_to_the_last(store: MemoryBackend) -> None:
    def dear(token: str, cost: int = 3, block: bool = True) -> Slot:
        return Slot("p", make_key("k"), 5, 60, token, block, cost=cost)

    assert store.take([dear("a", 6)]) == Full((True,), (0,))
    assert store.take([dear("a", 6, block=False)]) == Taken((False,), (0,))
    assert store.take([dear("a")]) == Taken((True,), (3,))
    assert store.take([dear("b")]) == Full((True,), (3,))
    assert store.take([dear("b", 2)]) == Taken((True,), (5,))
    assert store.take([dear("b", 2)]) == Taken((True,), (5,)), "asking twice is asking once"
    assert list(store.give([dear("a")])) == [True]
    assert store.take([dear("c")]) == Taken((True,), (5,))


def test_a_limit_of_0_admits_nobody(store: MemoryBackend) -> None:
    assert store.take([slot(limit=0)]) == Full((True,), (0,))
    assert store.snapshot() == []


def test_policies_and_keys_are_counted_apart(store: MemoryBackend) -> None:
    for policy, key in [("p", "a"), ("p", "b"), ("q", "a")]:
        assert isinstance(store.take([slot(policy, key)]), Taken)


def test_several_slots_are_all_or_none(store: MemoryBackend) -> None:
    store.take([slot("full", token="other")])
    reply = store.take([slot("free", limit=3), slot("full")])
    assert reply == Full((False, True), (0, 1))
    assert [holder.policy for holder in store.snapshot()] == ["full"]


def test_a_slot_that_does_not_block_is_held_where_one_is_free(store: MemoryBackend) -> None:
    assert store.take([slot("a"), slot("shadow", block=False)]) == Taken((True, True), (1, 1))
    assert store.take([slot("b", token="u"), slot("shadow", token="u", block=False)]) == Taken((True, False), (1, 1))


def test_what_does_not_block_is_not_asked_when_the_others_are_full(store: MemoryBackend) -> None:
    store.take([slot("full", token="other")])
    assert store.take([slot("full"), slot("shadow", limit=3, block=False)]) == Full((True, False), (1, 0))
    assert [holder.policy for holder in store.snapshot()] == ["full"]


def test_asking_twice_with_one_token_is_asking_once(store: MemoryBackend) -> None:
    store.take([slot(limit=1)])
    assert store.take([slot(limit=1)]) == Taken((True,), (1,))


def test_giving_back_twice_does_nothing_more(store: MemoryBackend) -> None:
    store.take([slot(limit=2, token="a")])
    store.take([slot(limit=2, token="b")])
    assert list(store.give([slot(token="a")])) == [True]
    assert list(store.give([slot(token="a")])) == [False]
    assert [holder.token for holder in store.snapshot()] == ["b"]


def test_each_caller_applies_its_own_limit_to_the_common_count(store: MemoryBackend) -> None:
    store.take([slot(limit=3, token="a")])
    store.take([slot(limit=3, token="b")])
    assert isinstance(store.take([slot(limit=2, token="c")]), Full)
    assert isinstance(store.take([slot(limit=3, token="c")]), Taken)


def test_a_lapsed_holder_makes_room_and_never_comes_back(store: MemoryBackend, clock: Clock) -> None:
    store.take([slot(token="old", ttl=10)])
    clock.now += 9.9
    assert isinstance(store.take([slot(token="new")]), Full)
    clock.now += 0.2
    assert list(store.renew([(slot(token="old"), 10)])) == [False]
    assert isinstance(store.take([slot(token="new")]), Taken)
    assert list(store.give([slot(token="old")])) == [False]
    assert [holder.token for holder in store.snapshot()] == ["new"]


def test_a_renewed_holder_stays(store: MemoryBackend, clock: Clock) -> None:
    store.take([slot(token="old", ttl=10)])
    for _ in range(5):
        clock.now += 8
        assert list(store.renew([(slot(token="old"), 10)])) == [True]
    clock.now += 9.9
    assert isinstance(store.take([slot(token="new")]), Full)


def test_a_shorter_lease_does_not_end_a_longer_one(store: MemoryBackend, clock: Clock) -> None:
    store.take([slot(token="long", ttl=60, limit=2)])
    store.take([slot(token="short", ttl=5, limit=2)])
    clock.now += 10
    assert store.take([slot(token="new", limit=2)]) == Taken((True,), (2,))
    assert isinstance(store.take([slot(token="more", limit=2)]), Full)


def test_holders_say_what_people_want_to_know(store: MemoryBackend, clock: Clock) -> None:
    store.take([Slot("p", make_key("user:42"), 5, 60, "t", True, "/reports/")])
    clock.now += 3
    (holder,) = store.snapshot()
    assert (holder.policy, holder.key, holder.token, holder.path) == ("p", "user:42", "t", "/reports/")
    assert (holder.age, holder.lease_left) == (3, 57)


def test_evicting_takes_all_of_a_holders_slots(store: MemoryBackend) -> None:
    store.take([slot("a"), slot("b")])
    assert store.evict("t")
    assert not store.evict("t")
    assert store.snapshot() == []


def test_unknown_options_are_an_error() -> None:
    with pytest.raises(ImproperlyConfigured, match="'slots'"):
        MemoryBackend(BackendConfig("default", "memory", options={"slots": 5}))


def test_the_cap_holds_among_threads(store: MemoryBackend) -> None:
    """16 threads take and give 2,000 times, 400 in the short run: the most ever inside is the limit, and nothing is left."""
    inside: list[str] = []
    most: list[int] = []
    admitted: list[str] = []
    end = monotonic() + 60

    def work(number: int) -> None:
        for turn in count():
            if len(admitted) >= (2000 if LONG else 400) or monotonic() > end:
                return
            token = f"{number}-{turn}"
            if isinstance(store.take([slot(limit=3, token=token)]), Taken):
                inside.append(token)
                most.append(len(inside))
                admitted.append(token)
                sleep(0)
                inside.remove(token)
                store.give([slot(token=token)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of everything
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert max(most) == 3
    assert len(admitted) >= (2000 if LONG else 400)
    assert store.snapshot() == []


def test_nothing_is_kept_of_many_keys(store: MemoryBackend) -> None:
    """10^6 keys in the long run, a twelfth of them in the short one: each held full by one, rejected for another and given
    back. Under 5 bytes of each are left, or 16 in the short run, by the process's own size."""

    def through(number: int) -> None:
        one = slot(key=str(number), token="a")
        assert type(store.take([one])) is Taken
        assert type(store.take([slot(key=str(number), token="b")])) is Full
        store.give([one])

    through(0)
    before = resident()
    for number in range(1_000_000 if LONG else 80_000):
        through(number)
    assert store.snapshot() == []
    assert resident() - before < (5_000_000 if LONG else 1_280_000)


def test_nothing_is_kept_of_many_keys_at_once(store: MemoryBackend) -> None:
    """The dictionary that held 20,000 semaphores at once is made anew when they are gone: Python's own never shrink."""
    slots = [slot(key=str(number), token="a") for number in range(20_000)]
    for one in slots:
        store.take([one])
    assert sys.getsizeof(store._semaphores) > 500_000
    for one in slots:
        store.give([one])
    assert sys.getsizeof(store._semaphores) < 150_000


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_lapsed_holder_and_a_refusal_leave_no_empty_semaphore(store: MemoryBackend, clock: Clock) -> None:
    store.take([slot("lapsed", token="old", ttl=1), slot("full", token="old", ttl=60)])
    clock.now += 2
    assert isinstance(store.take([slot("lapsed", token="new"), slot("full", token="new")]), Full)
    assert len(store._semaphores) == 1


def test_a_forked_child_starts_empty(store: MemoryBackend) -> None:
    """The parent's requests are not in flight in the child, and its lock may have been held when it forked."""
    store.take([slot(token="parent")])
    with store._lock:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if isinstance(store.take([slot(token="child")]), Taken) else 1)
    assert exit_code(pid) == 0
    assert [holder.token for holder in store.snapshot()] == ["parent"]


def test_two_that_a_garbage_collection_gives_back_are_free_at_once(
    store: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of both lines takes both: it is not asked about the one while the other one is not free yet."""
    old = [slot("a", token="old"), slot("b", token="old")]
    store.take(old)
    both, behind = [slot("a", token="both"), slot("b", token="both")], [slot("a", token="behind")]
    for waiter in (both, behind):
        store.queue(waiter, [9] * len(waiter), store.bell())

    class Collected(memory.Held):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            store.give(old)

    monkeypatch.setattr(memory, "Held", Collected)
    store.take([slot("c", token="new")])
    assert sorted(holder.token for holder in store.snapshot()) == ["both", "both", "new"]


def test_a_garbage_collection_inside_a_call_may_give_back(
    store: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abandoned stream that is collected while its own thread is inside the store gives back: without waiting for itself,
    and without taking away the semaphore that is just being worked on."""
    store.take([slot(limit=2, token="old")])

    class Collected(memory.Held):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert list(store.give([slot(token="old")])) == [True]
            store.snapshot()  # as a receiver of `slot_released` may

    monkeypatch.setattr(memory, "Held", Collected)
    thread = threading.Thread(target=store.take, args=([slot(limit=2, token="new")],), daemon=True)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive(), "it waits for its own lock"
    assert [holder.token for holder in store.snapshot()] == ["new"]


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("cost", [1, 2])
def test_what_is_cut_short_anywhere_leaves_nothing_that_a_release_does_not_undo(
    store: MemoryBackend, cost: int, others: int
) -> None:
    mine = Slot("p", make_key("k"), 9, 60, "mine", True, cost=cost)
    if others:
        store.take([slot(limit=9, token="other")])

    def both() -> None:
        store.take([mine])
        store.give([mine])

    point = 1
    while struck_at(point, memory, both, by_signals=True):
        store.give([mine])
        assert store.counts([mine]) == [others], point
        assert len(store._semaphores) == others, point
        assert store._lock.depth == 0, point
        point += 1
    assert point > 10
