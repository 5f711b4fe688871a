"""The host store's short way for one slot: it does what the long way does, and may be cut short anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.host import access, alone, opening, ours, table
from django_concurrency_mw.backends.host.layout import HELD, Header, semaphore
from django_concurrency_mw.backends.host.ours import Ours
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.host.table import Name, Table
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import UNLIMITED, Slot, Taken

from .chaos import LONG
from .host_file import consistent, held_by_state
from .striking import struck_at

CELLS = 64
#: Steps of one history, and how many of those.
STEPS, HISTORIES = 300, 200 if LONG else 4


def slot(policy: str = "p", limit: int = 3, token: str = "t", ttl: float = 60, cost: int = 1, **more: Any) -> Slot:
    return Slot(policy, make_key("k"), limit, ttl, token, cost=cost, **more)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., HostBackend]]:
    stores: list[HostBackend] = []

    def make(name: str = "table") -> HostBackend:
        options = {"path": tmp_path / name, "slots": CELLS}
        stores.append(HostBackend(BackendConfig("default", "host", options=options)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def table_of(store: HostBackend) -> Table:
    assert store._access._table is not None
    return store._access._table


# -- the same as the long way -----------------------------------------------------------------------------------------


class Clock:
    now = 10**18

    def __call__(self) -> int:
        return self.now


def neighbours() -> list[str]:
    """Policies of which two share one place of the index, and the third has the place behind it, with this number of cells."""
    seen: dict[int, list[str]] = {}
    for number in range(10_000):
        name = f"n{number}"
        home = semaphore(name, make_key("k").digest)[0] & 2 * CELLS - 1
        seen.setdefault(home, []).append(name)
        if len(seen[home]) > 1 and seen.get(home + 1):
            return [*seen[home][:2], seen[home + 1][0]]
    raise AssertionError("a hash that never meets")


POLICIES = (*neighbours(), *"abcdefgh")
#: Some that fit and some that do not, some in more bytes than characters, some in no UTF-8 at all.
PATHS = ("/", "/reports/export/", "/" + "é" * 60, "/x" * 56, "/x" * 56 + "y", "/\udcff", "")
TOKENS = (*"abcdefghijkl", "t" * 40, "x" + "é" * 20, "\udcff")


KINDS = ("take", "give", "take two", "give two", "queue", "evict", "detach", "time")


def any_slot(chance: random.Random) -> Slot:
    limit = chance.choice((1, 2, 3, 5, 8, 200, UNLIMITED, 0, -1, 2**70))
    cost = chance.choice((1, 1, 1, 2, 3))
    ttl = chance.choice((60.0, 60.0, 0.5))
    token = chance.choice(TOKENS) if chance.random() < 0.4 else f"{chance.getrandbits(64):x}"
    block, path = chance.random() < 0.8, chance.choice(PATHS)
    return slot(chance.choice(POLICIES), limit, token, ttl, cost, block=block, path=path)


def told(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BackendError as error:
        return str(error)


def step(
    chance: random.Random, stores: Sequence[HostBackend], clock: Clock, taken: list[Slot], fill: bool
) -> tuple[str, list[Any]]:
    """Something that is done with each of these stores, and what each says of it. `taken`: what was taken before."""
    kind = chance.choices(KINDS, (40, 36, 6, 4, 4, 2, 2, 8))[0]
    one, two = any_slot(chance), any_slot(chance)
    if kind == "take" and fill:
        one = slot("filling", UNLIMITED, f"f{chance.randrange(80)}", path="/")
    if kind == "time":
        clock.now += int(chance.choice((0.001, 0.03, 0.6)) * 1e9)
        return kind, [None] * len(stores)
    if kind == "take":
        taken.append(one)
    elif kind.startswith("give") and taken and chance.random() < 0.7:
        one = taken.pop(chance.randrange(len(taken)))
    calls: dict[str, Callable[[HostBackend], Any]] = {
        "take": lambda store: store.take([one]),
        "give": lambda store: store.give([one]),
        "take two": lambda store: store.take([one, two]),
        "give two": lambda store: store.give([one, two]),
        "queue": lambda store: store.queue([one], [3], Bell()),
        "evict": lambda store: store.evict(one.token),
        "detach": lambda store: store.detach([one]),
    }
    return kind, [told(lambda store=store: calls[kind](store)) for store in stores]  # type: ignore[misc]


@pytest.mark.parametrize("number", range(HISTORIES))
def test_both_ways_say_and_write_the_same(
    number: int, make: Callable[..., HostBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any history the two files are the same, byte for byte."""
    clock = Clock()
    for module in (access, opening, table):
        monkeypatch.setattr(module, "monotonic_ns", clock)
    short, long = make("short"), make("long")
    long._ours.take, long._ours.give = long._ours._take_any, long._ours._give_any  # type: ignore[method-assign]
    went_long = {"take": 0, "give": 0}

    def counted(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            went_long[name] += 1
            return whole(*arguments)

        return count

    for name in went_long:
        monkeypatch.setattr(short._ours, f"_{name}_any", counted(name, getattr(short._ours, f"_{name}_any")))
    seed = random.randrange(2**32)
    chance, taken, went_short = random.Random(seed), [], {"take": 0, "give": 0}
    for at in range(STEPS):
        before = dict(went_long)
        kind, (one, other) = step(chance, (short, long), clock, taken, fill=number % 2 == 1)
        assert one == other, (seed, at, kind)
        assert short._access._table is None or consistent(table_of(short)) == [], (seed, at, kind)
        if kind in went_short:
            went_short[kind] += went_long == before
            assert table_of(short).map[:] == table_of(long).map[:], (seed, at, kind)
    assert short._ours.places == long._ours.places
    print(f"the short way: {went_short}, the long one: {went_long}")
    assert min(went_short.values()) > 0


#: Two words that share an entry's place: with another first word, another second one, and at the end of the index.
MEETING = {
    "place": ((5, 1), (5 + 2 * CELLS, 1)),
    "word": ((5, 1), (5, 2)),
    "end": ((2 * CELLS - 1, 1), (2 * CELLS - 1, 2)),
}


@pytest.mark.parametrize("names", MEETING.values(), ids=list(MEETING))
@pytest.mark.parametrize("first", ["a", "b"])
def test_two_whose_entries_meet_are_counted_apart(
    names: tuple[Name, Name], first: str, make: Callable[..., HostBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = dict(zip("ab", names, strict=True))
    for module in (alone, ours):
        monkeypatch.setattr(module, "named", lambda policy, digest, text: (*words[policy], bytes(168)))
    store = make()
    for policy in ("a", "b"):
        for count in (1, 2):
            assert store.take([slot(policy, token=f"{policy}{count}")]) == Taken((True,), (count,))
    assert store.give([slot(first, token=f"{first}1")]) == [True]
    assert store.give([slot(first, token=f"{first}2")]) == [True]
    assert consistent(table_of(store)) == []
    last = "ab".replace(first, "")
    assert table_of(store).total(*words[last]) == 2
    for count in (1, 2):
        assert store.give([slot(last, token=f"{last}{count}")]) == [True]
    assert consistent(table_of(store)) == []


def test_what_nearly_all_do_goes_the_short_way(
    make: Callable[..., HostBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()

    def long(*arguments: object) -> None:
        raise AssertionError("it went the long way")

    for name in ("_take_any", "_give_any"):
        monkeypatch.setattr(Ours, name, long)
    for count in (1, 2, 3):
        assert store.take([slot(token=str(count))]) == Taken((True,), (count,))
    for count in (2, 1, 3):
        assert list(store.give([slot(token=str(count))])) == [True]
    assert consistent(table_of(store)) == []
    assert held_by_state(table_of(store)) == {}


def test_who_gives_nothing_back_is_forgotten_in_the_end(
    make: Callable[..., HostBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lapses is freed by others; who took it must not remember more and more."""
    clock = Clock()
    for module in (access, opening, table):
        monkeypatch.setattr(module, "monotonic_ns", clock)
    store, other = make(), make()
    other.take([slot("warm", ttl=10**6)])
    for number in range(3 * CELLS):
        assert store.take([slot(token=str(number), ttl=0.5)]) == Taken((True,), (1,))
        clock.now += 10**9
        assert [holder.policy for holder in other.snapshot()] == ["warm"]  # which looks for what is lapsed
    assert len(store._ours.places) <= 2 * CELLS + 1


def test_behind_the_last_cell_there_is_none(make: Callable[..., HostBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the byte that comes there is 0, as that of a free one is."""
    for module in (alone, ours):
        monkeypatch.setattr(module, "named", lambda policy, digest, text: (256, 1, bytes(168)))
    store = make()
    for number in range(CELLS):
        store.take([slot(limit=UNLIMITED, token=str(number))])
    with pytest.raises(BackendError, match="slots"):
        store.take([slot(limit=UNLIMITED, token="one more")])
    assert held_by_state(table_of(store)) == {HELD: CELLS}
    assert consistent(table_of(store)) == []


# -- cut short --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 1])
def test_a_take_that_is_cut_short_anywhere_is_undone_by_a_release(
    others: int, make: Callable[..., HostBackend]
) -> None:
    store, other = make(), make()
    other.take([slot("warm")])
    for number in range(others):
        other.take([slot(token=f"other{number}")])
    point = 1
    while struck_at(point, alone, lambda: store.take([slot(token="mine", cost=2)])):
        other.counts([slot()])  # whoever comes next mends what is half done
        assert consistent(table_of(other)) == [], point
        store.give([slot(token="mine", cost=2)])
        assert other.counts([slot()]) == [others], point
        assert held_by_state(table_of(other)) == {HELD: 1 + others}, point
        assert store._ours.places == {}, point
        assert consistent(table_of(other)) == [], point
        point += 1
    assert point > 150
    assert other.counts([slot()]) == [others + 2]


@pytest.mark.parametrize("others", [0, 1])
def test_a_release_that_is_cut_short_anywhere_has_given_all_or_nothing(
    others: int, make: Callable[..., HostBackend]
) -> None:
    """The slot is free before anything counts it as free, and by whoever comes next; giving it once more is no harm."""
    store, other = make(), make()
    other.take([slot("warm")])
    for number in range(others):
        other.take([slot(token=f"other{number}")])
    mine, point, free = [slot(token="mine", cost=2)], 1, False
    while True:
        store.take(mine)
        if not struck_at(point, alone, lambda: store.give(mine)):
            break
        its = table_of(store)
        is_held, total = held_by_state(its)[HELD] == 2 + others, its.total(*semaphore(*slot().semaphore))
        assert is_held is False or total == others + 2, f"{point}: it is held, and was counted as free"
        assert is_held or its.words[Header.DIRTY] or total == others, point
        assert not (free and is_held), f"{point}: it was free at an earlier point"
        free = not is_held
        assert other.counts([slot()]) == [others + 2 * is_held], point
        assert consistent(table_of(other)) == [], point
        assert list(store.give(mine)) == [is_held], point
        assert store._ours.places == {}, point
        assert consistent(table_of(other)) == [], point
        point += 1
    assert point > 100
    assert free
    assert other.counts([slot()]) == [others]
