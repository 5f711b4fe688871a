"""The host store: exact among the processes of a machine, and nothing that goes wrong with its file goes unsaid."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.host import access, alone, layout, locking, opening, table, visiting
from django_concurrency_mw.backends.host import store as host_store
from django_concurrency_mw.backends.host.layout import Header
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .host_file import consistent, held_by_state
from .support import SOON, exit_code, wait_until

NEVER = float("inf")
#: How often the threads take and give that are to find a cap that is passed.
TURNS = 2000 if LONG else 700
#: Of policy report-exports and key user:42.
SEMAPHORE = (0x02EF6E75251E40D1, 0xD54AD1E2BD2861D0)
#: Of policy report-exports alone, and the digits of one that is called by 105 times x.
PEAK, LONG_PEAK = (0xBAC2061CA71227C6, 0x0A429E9AFF7A9937), b"d4f5d2df640f"


def slot(
    policy: str = "p", key: str = "k", limit: int = 1, token: str = "t", ttl: float = 60, block: bool = True
) -> Slot:
    return Slot(policy, make_key(key), limit, ttl, token, block)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


def made(path: Path, slots: int = 256) -> HostBackend:
    return HostBackend(BackendConfig("default", "host", options={"path": path, "slots": slots}))


@pytest.fixture
def store(path: Path) -> Iterator[HostBackend]:
    store = made(path)
    yield store
    opened = store._access._table
    if opened is not None and opening.is_at(path, store._access._fd):
        assert consistent(opened) == []
    store.close()


@pytest.fixture
def other(path: Path) -> Iterator[HostBackend]:
    """Another process's store, for all that the kernel and the table know."""
    other = made(path)
    yield other
    other.close()


class Clock:
    now = 10**18

    def __call__(self) -> int:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (access, opening, table, visiting):
        monkeypatch.setattr(module, "monotonic_ns", clock)
    return clock


def policies(store: HostBackend) -> list[str]:
    return sorted(holder.policy for holder in store.snapshot())


def take_and_give(store: HostBackend, *slots: Slot) -> None:
    store.take(slots)
    store.give(slots)


def look_again(store: HostBackend) -> None:
    """As if a second had passed since the file was looked at."""
    store._access._looked -= access.LOOK_EVERY + 1


def opened(store: HostBackend) -> table.Table:
    assert store._access._table is not None
    return store._access._table


class TestSemaphores:
    """The same words as for the memory store, which counts in the same way."""

    def test_it_admits_up_to_its_limit_and_counts(self, store: HostBackend, other: HostBackend) -> None:
        assert store.take([slot(limit=2, token="a")]) == Taken((True,), (1,))
        assert other.take([slot(limit=2, token="b")]) == Taken((True,), (2,))
        assert store.take([slot(limit=2, token="c")]) == Full((True,), (2,))
        assert list(store.give([slot(token="a")])) == [True]
        assert other.take([slot(limit=2, token="c")]) == Taken((True,), (2,))

    def test_a_limit_of_0_admits_nobody(self, store: HostBackend) -> None:
        assert store.take([slot(limit=0)]) == Full((True,), (0,))
        assert store.snapshot() == []

    def test_policies_and_keys_are_counted_apart(self, store: HostBackend) -> None:
        for policy, key in [("p", "a"), ("p", "b"), ("q", "a"), ("pa", ""), ("", "pa")]:
            assert isinstance(store.take([slot(policy, key)]), Taken)

    def test_several_slots_are_all_or_none(self, store: HostBackend, other: HostBackend) -> None:
        other.take([slot("full", token="other")])
        assert store.take([slot("free", limit=3), slot("full")]) == Full((False, True), (0, 1))
        assert policies(store) == ["full"]

    def test_a_slot_that_does_not_block_is_held_where_one_is_free(self, store: HostBackend) -> None:
        assert store.take([slot("a"), slot("shadow", block=False)]) == Taken((True, True), (1, 1))
        reply = store.take([slot("b", token="u"), slot("shadow", token="u", block=False)])
        assert reply == Taken((True, False), (1, 1))

    def test_what_does_not_block_is_not_asked_when_the_others_are_full(self, store: HostBackend) -> None:
        store.take([slot("full", token="other")])
        assert store.take([slot("full"), slot("shadow", limit=3, block=False)]) == Full((True, False), (1, 0))
        assert policies(store) == ["full"]

    def test_asking_twice_with_one_token_is_asking_once(self, store: HostBackend) -> None:
        store.take([slot(limit=1)])
        assert store.take([slot(limit=1)]) == Taken((True,), (1,))
        assert store.take([slot("twice"), slot("twice")]) == Taken((True, True), (1, 1))
        assert policies(store) == ["p", "twice"]
        # Also where the caller's limit is smaller by now.
        assert store.take([slot(limit=0)]) == Taken((True,), (1,))

    def test_two_holders_in_one_take_stay_below_the_limit(self, store: HostBackend) -> None:
        assert isinstance(store.take([slot(token="a"), slot(token="b")]), Full)

    def test_giving_back_twice_does_nothing_more(self, store: HostBackend) -> None:
        store.take([slot(limit=2, token="a")])
        store.take([slot(limit=2, token="b")])
        assert list(store.give([slot(token="a"), slot(token="never")])) == [True, False]
        assert list(store.give([slot(token="a")])) == [False]
        assert [holder.token for holder in store.snapshot()] == ["b"]

    def test_each_caller_applies_its_own_limit_to_the_common_count(self, store: HostBackend) -> None:
        store.take([slot(limit=3, token="a")])
        store.take([slot(limit=3, token="b")])
        assert isinstance(store.take([slot(limit=2, token="c")]), Full)
        assert isinstance(store.take([slot(limit=3, token="c")]), Taken)

    def test_a_lapsed_holder_makes_room_and_never_comes_back(
        self, store: HostBackend, other: HostBackend, clock: Clock
    ) -> None:
        store.take([slot(token="old", ttl=10)])
        clock.pass_by(9.9)
        assert isinstance(other.take([slot(token="new")]), Full)
        clock.pass_by(0.2)
        assert list(store.renew([(slot(token="old"), 10)])) == [False]
        assert isinstance(other.take([slot(token="new")]), Taken)
        assert list(store.renew([(slot(token="old"), 10)])) == [False]
        assert list(store.give([slot(token="old")])) == [False]
        assert [holder.token for holder in store.snapshot()] == ["new"]

    def test_a_lapsed_holder_that_asks_again_asks_anew(self, store: HostBackend, clock: Clock) -> None:
        store.take([slot(token="old", ttl=10, limit=3)])
        clock.pass_by(11)
        assert store.take([slot(token="old", ttl=10, limit=3)]) == Taken((True,), (1,))
        assert list(store.renew([(slot(token="old"), 10)])) == [True]

    def test_a_renewed_holder_stays(self, store: HostBackend, clock: Clock) -> None:
        store.take([slot(token="old", ttl=10)])
        for _ in range(5):
            clock.pass_by(8)
            assert list(store.renew([(slot(token="old"), 10)])) == [True]
        clock.pass_by(9.9)
        assert isinstance(store.take([slot(token="new")]), Full)

    def test_the_cap_holds_among_threads(self, store: HostBackend) -> None:
        inside: list[int] = []
        most: list[int] = []
        admitted: list[int] = []
        errors: list[BaseException] = []
        end = monotonic() + 60

        def work() -> None:
            while len(admitted) < TURNS and monotonic() < end:
                one = slot(limit=3, token=new_token())
                try:
                    if isinstance(store.take([one]), Taken):
                        inside.append(1)
                        most.append(len(inside))
                        admitted.append(1)
                        sleep(0)
                        inside.pop()
                        store.give([one])
                except BaseException as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=work) for _ in range(16)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert errors == []
        assert max(most) == 3
        assert len(admitted) >= TURNS
        assert store.snapshot() == []

    def test_both_drivers_count_together(self, store: HostBackend) -> None:
        async def main() -> None:
            assert await store.atake([slot(token="loop")]) == Taken((True,), (1,))
            assert store.take([slot(token="thread")]) == Full((True,), (1,))
            assert list(await store.agive([slot(token="loop")])) == [True]

        asyncio.run(main())

    def test_nothing_is_kept_of_many_keys(self, store: HostBackend) -> None:
        for number in range(20_000):
            one = slot(key=str(number))
            assert isinstance(store.take([one]), Taken)
            store.give([one])
        assert store._ours.places == {}
        words, plan = opened(store).words, opened(store).layout
        assert not any(words[plan.index_word : plan.index_word + plan.entries * 8 : 8])

    def test_many_keys_come_and_go_in_any_order(self, path: Path) -> None:
        """Their entries stand in each other's way, and move when one goes."""
        store, chance, held = made(path, 64), random.Random(5), list[Slot]()
        for turn in range(3000):
            if held and (len(held) == 60 or chance.random() < 0.5):
                assert list(store.give([held.pop(chance.randrange(len(held)))])) == [True]
            else:
                held.append(slot(key=str(chance.randrange(100)), limit=100, token=new_token()))
                same = sum(one.key == held[-1].key for one in held)
                assert store.take(held[-1:]) == Taken((True,), (same,))
            if turn % 20 == 0:
                assert consistent(opened(store)) == []
        store.close()


class TestRestoring:
    def test_who_was_lost_is_counted_again_whatever_the_limit(self, store: HostBackend) -> None:
        store.take([slot(token="new")])
        assert list(store.restore([Restore(slot(token="lost"), 60, monotonic() + 60)])) == [True]
        assert store.take([slot(token="third", limit=3)]) == Taken((True,), (3,))
        assert list(store.give([slot(token="lost")])) == [True]

    def test_who_is_there_is_renewed(self, store: HostBackend, clock: Clock) -> None:
        store.take([slot(ttl=10)])
        clock.pass_by(5)
        assert list(store.restore([Restore(slot(), 60, NEVER)])) == [True]
        clock.pass_by(50)
        assert list(store.renew([(slot(), 1)])) == [True]

    def test_who_is_lapsed_is_not(self, store: HostBackend, clock: Clock) -> None:
        store.take([slot(ttl=10)])
        clock.pass_by(11)
        assert list(store.restore([Restore(slot(), 60, NEVER)])) == [False]
        assert list(store.restore([Restore(slot(token="other"), 60, clock.now / 1e9 - 1)])) == [False]
        assert store.snapshot() == []

    def test_who_was_evicted_by_another_process_is_not(self, store: HostBackend, other: HostBackend) -> None:
        both = [slot("a", token="evicted"), slot("b", token="evicted")]
        store.take(both)
        store.take([slot("a", token="other", limit=2)])
        assert other.evict("evicted")
        assert not other.evict("evicted")
        assert policies(store) == ["a"]
        assert other.take([slot("b", token="next")]) == Taken((True,), (1,))
        assert list(store.renew([(one, 60) for one in both])) == [False, False]
        assert list(store.restore([Restore(one, 60, monotonic() + 60) for one in both])) == [False, False]
        assert list(store.give(both)) == [False, False]
        assert store.take([slot("a", token="more", limit=9)]) == Taken((True,), (2,))

    def test_what_an_eviction_leaves_goes_with_the_lease(
        self, store: HostBackend, other: HostBackend, clock: Clock
    ) -> None:
        store.take([slot(token="evicted", ttl=10)])
        other.evict("evicted")
        assert held_by_state(opened(store)) == {layout.EVICTED: 1}
        clock.pass_by(11)
        store.snapshot()
        assert held_by_state(opened(store)) == {}

    def test_or_with_its_holder_who_gives_back_or_takes_again(self, store: HostBackend, other: HostBackend) -> None:
        evicted = slot(token="evicted")
        store.take([evicted])
        other.evict("evicted")
        assert store.take([evicted]) == Taken((True,), (1,))
        assert held_by_state(opened(store)) == {layout.HELD: 1}
        other.evict("evicted")
        assert list(store.give([evicted])) == [False]
        assert held_by_state(opened(store)) == {}


class TestText:
    def test_holders_say_what_people_want_to_know(self, store: HostBackend, other: HostBackend, clock: Clock) -> None:
        token = new_token()
        store.take([Slot("reports.export", make_key("user:42"), 5, 60, token, True, "/reports/")])
        clock.pass_by(3)
        (holder,) = other.snapshot()
        assert holder.pid == os.getpid()
        assert (holder.policy, holder.key, holder.token) == ("reports.export", "user:42", token)
        assert (holder.path, holder.age, holder.lease_left) == ("/reports/", 3, 57)
        assert (holder.host, holder.ttl) == (os.uname().nodename, 60)

    def test_what_is_too_long_is_cut_between_two_characters(self, store: HostBackend) -> None:
        store.take([Slot("ü" * 100, make_key("k" * 500), 5, 60, new_token(), True, "x" + "€" * 200)])
        (holder,) = store.snapshot()
        assert holder.policy == "ü" * (layout.POLICY_ROOM // 2)
        assert holder.key == "k" * layout.KEY_ROOM
        assert holder.path == "x" + "€" * ((layout.PATH_ROOM - 1) // 3)

    def test_no_text_does_any_harm(self, store: HostBackend) -> None:
        nasty = Slot("p", make_key("\x00\n\ud800"), 2**70, 60, new_token(), True, "/\ud800\x00")
        assert isinstance(store.take([nasty]), Taken)
        (holder,) = store.snapshot()
        assert holder.token == nasty.token
        assert list(store.give([nasty])) == [True]


def test_the_layout_of_version_1_never_changes() -> None:
    """Another one needs another VERSION: processes of two releases share the file while one replaces the other."""
    plan = layout.Layout(16_384)
    assert layout.VERSION == 1
    assert (plan.states_at, plan.cells_at, plan.index_at, plan.size) == (167_936, 184_320, 7_524_352, 9_621_504)
    assert (layout.Cell.TICKET, layout.Cell.OWNER, layout.Cell.EXPIRES, layout.Cell.WAKE) == (2, 3, 5, 9)
    assert layout.CELL.size == 448
    assert (plan.peaks_at, layout.PEAKS, layout.Peak.WORDS) == (36_864, 1024, 16)
    assert (layout.Peak.HI, layout.Peak.LO, layout.Peak.MOST, layout.Peak.TEXT) == (0, 1, 2, 3)
    assert layout.peak_name("report-exports") == (*PEAK, b"report-exports")
    assert layout.peak_name("x" * 105)[2] == b"x" * 91 + b"~" + LONG_PEAK
    assert layout.semaphore("report-exports", make_key("user:42").digest) == SEMAPHORE
    names = [value for name, value in vars(layout.Header).items() if name.isupper()]
    assert sorted(names) == list(range(13))


class TestVisits:
    """Who only looks, as an operator's command does, is none of the table's processes, and disturbs nobody."""

    @pytest.fixture
    def look(self, path: Path) -> Iterator[HostBackend]:
        """A store that nothing was ever taken by."""
        look = made(path)
        yield look
        assert look._access._fd == -1, "it is one of the table's processes"
        look.close()

    def test_without_a_file_there_is_nobody_and_none_is_made(self, look: HostBackend, path: Path) -> None:
        assert list(look.snapshot()) == []
        assert list(look.counts([slot(), slot("q")])) == [0, 0]
        assert dict(look.peaks()) == {}
        assert look.evict("t") is False
        look.reset_peaks()
        assert not path.exists()

    def test_an_empty_file_is_nobody_s(self, look: HostBackend, path: Path) -> None:
        path.touch(0o600)
        assert list(look.snapshot()) == []
        assert path.stat().st_size == 0

    def test_all_of_it_works_and_leaves_no_process_behind(
        self, look: HostBackend, store: HostBackend, path: Path
    ) -> None:
        store.take([slot("p", limit=3, token="a"), slot("q", token="a")])
        store.take([slot("p", limit=3, token="b")])
        store.note({"p": 2})
        with path.open("r+b") as file:
            before = living(file.fileno())
            descriptors = opened_here(path)
            assert sorted(one.token for one in look.snapshot()) == ["a", "a", "b"]
            assert {one.pid for one in look.snapshot()} == {os.getpid()}
            assert list(look.counts([slot("p"), slot("q"), slot("r")])) == [2, 1, 0]
            assert dict(look.peaks()) == {"p": 2}
            assert look.evict("a") is True
            assert list(look.counts([slot("p"), slot("q")])) == [1, 0]
            look.reset_peaks()
            assert dict(store.peaks()) == {}
            assert living(file.fileno()) == before
            gc.collect()
            assert opened_here(path) == descriptors
        assert isinstance(store.take([slot("q")]), Taken)
        assert list(store.give([slot("p", token="a")])) == [False]
        assert list(store.give([slot("p", token="b")])) == [True]

    def test_when_all_are_dead_nothing_is_wiped(self, look: HostBackend, path: Path) -> None:
        """And the dead do not count, but what was handed over does."""
        dead = made(path)
        dead.take([slot(limit=5, token="mine"), slot("q", token="mine")])
        dead.take([slot(limit=5, token="handed")])
        dead.detach([slot(token="handed")])
        dead.note({"p": 3})
        dead.close()
        before = path.read_bytes()
        assert [(one.token, one.pid) for one in look.snapshot()] == [("handed", None)]
        assert list(look.counts([slot(), slot("q")])) == [1, 0]
        assert dict(look.peaks()) == {"p": 3}
        assert path.read_bytes() == before
        assert look.evict("handed") is True
        assert list(look.counts([slot()])) == [0]

    def test_a_table_of_another_run_of_the_machine_is_nobody_s(
        self, look: HostBackend, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = made(path)
        old.take([slot(token="handed")])
        old.detach([slot(token="handed")])
        old.close()
        monkeypatch.setattr(opening, "_boot", lambda: 7)
        assert list(look.snapshot()) == []
        assert list(look.counts([slot()])) == [0]

    def test_another_number_of_slots_is_said_as_long_as_somebody_lives(self, look: HostBackend, path: Path) -> None:
        large = made(path, slots=1024)
        large.take([slot()])
        with pytest.raises(PermanentBackendError, match="another layout"):
            look.snapshot()
        large.close()
        assert list(look.snapshot()) == []

    def test_a_file_of_something_else_is_refused(self, look: HostBackend, path: Path) -> None:
        path.write_bytes(b"something else" * 1000)
        path.chmod(0o600)
        with pytest.raises(PermanentBackendError, match="a file of something else"):
            look.counts([slot()])

    def test_what_others_may_write_is_refused(self, look: HostBackend, store: HostBackend, path: Path) -> None:
        store.take([slot()])
        path.chmod(0o666)
        with pytest.raises(PermanentBackendError, match="others may use it"):
            look.snapshot()
        path.chmod(0o600)

    def test_a_locked_table_is_an_error_in_time(
        self, look: HostBackend, store: HostBackend, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.take([slot()])
        monkeypatch.setattr(visiting, "TIMEOUT", 0.02)
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(BackendError, match="stayed locked"):
                look.snapshot()
        assert len(look.snapshot()) == 1

    def test_half_an_index_is_made_anew_before_somebody_is_evicted(self, look: HostBackend, store: HostBackend) -> None:
        store.take([slot(limit=3, token="a")])
        store.take([slot(limit=3, token="b")])
        words = opened(store).words
        plan = opened(store).layout
        words[plan.index_word : plan.index_word + 8 * plan.entries] = memoryview(bytes(64 * plan.entries)).cast("Q")
        words[Header.DIRTY], words[Header.HIGH] = 1, 0
        assert look.evict("a") is True
        assert list(look.counts([slot()])) == [1]
        assert consistent(opened(store)) == []

    def test_a_full_table_and_a_full_semaphore_are_no_obstacle(self, look: HostBackend, path: Path) -> None:
        full = made(path, slots=64)
        look._layout = layout.Layout(64)
        for number in range(64):
            assert isinstance(full.take([slot(limit=64, token=f"t{number}")]), Taken)
        with pytest.raises(BackendError, match="`slots`"):
            full.take([slot("q")])
        assert list(look.counts([slot()])) == [64]
        assert look.evict("t7") is True
        assert len(look.snapshot()) == 63
        assert look.evict("t7") is False
        full.close()

    def test_when_all_1024_processes_are_there(self, look: HostBackend, store: HostBackend, path: Path) -> None:
        """Nobody else can take part, but everybody can look, and evict."""
        store.take([slot(token="a")])
        with path.open("r+b") as file:
            assert opened(store).number == 0
            others = locking._RANGE.pack(fcntl.F_WRLCK, 0, locking.LIVE + 1, layout.PROCESSES - 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, others)
            late = made(path)
            with pytest.raises(BackendError, match="1024 processes use"):
                late.take([slot("q")])
            late.close()
            assert [one.token for one in look.snapshot()] == ["a"]
            assert list(look.counts([slot()])) == [1]
            assert look.evict("a") is True
            assert list(look.counts([slot()])) == [0]


def living(fd: int) -> list[int]:
    return [number for number in range(layout.PROCESSES) if locking.any_alive(fd, number)]


def opened_here(path: Path) -> int:
    """How many descriptors and mappings of it this process has."""
    links = [f"/proc/self/{kind}/{name}" for kind in ("fd", "map_files") for name in os.listdir(f"/proc/self/{kind}")]
    found = 0
    for link in links:
        with contextlib.suppress(OSError):  # it was that of the list itself, or another thread's
            found += os.readlink(link) == str(path)
    return found


class TestPeaks:
    def test_a_reset_that_was_cut_short_leaves_no_peak_too_low(self, store: HostBackend) -> None:
        """Two policies of one place; the first is reset, the second not, and then stands there twice."""
        names = same_place()
        store.note({names[0]: 1, names[1]: 8})
        table, first = opened(store), layout.peak_name(names[0])[0] % layout.PEAKS
        at = table.layout.peaks_word + first * layout.Peak.WORDS
        table.words[at] = 0
        store.note({names[1]: 3})
        assert dict(store.peaks()) == {names[1]: 8}
        store.note({names[1]: 9, names[0]: 2})
        assert dict(store.peaks()) == {names[1]: 9, names[0]: 2}

    def test_they_stay_when_the_last_process_ends(self, store: HostBackend, path: Path) -> None:
        store.note({"p": 4})
        store.close()
        assert store.take([slot()]) == Taken((True,), (1,))
        assert dict(store.peaks()) == {"p": 4}

    def test_states_and_processes_are_not_touched(self, store: HostBackend) -> None:
        store.take([slot()])
        plan, table = opened(store).layout, opened(store)
        around = [bytes(table.map[4096 : plan.peaks_at]), bytes(table.map[plan.states_at : plan.size])]
        store.note({f"policy-{number}": 2**40 for number in range(layout.PEAKS)})
        store.reset_peaks()
        assert [bytes(table.map[4096 : plan.peaks_at]), bytes(table.map[plan.states_at : plan.size])] == around
        assert not any(table.map[plan.peaks_at : plan.states_at])


def same_place() -> tuple[str, str]:
    """Two policies whose peaks belong to one place, that is not the last."""
    seen: dict[int, str] = {}
    for number in range(10_000):
        place = layout.peak_name(f"n{number}")[0] % layout.PEAKS
        if place in seen and place < layout.PEAKS - 2:
            return seen[place], f"n{number}"
        seen[place] = f"n{number}"
    raise AssertionError("a hash that never meets")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"slot": 64}, r"\['default'\]\['OPTIONS'\]: unknown option 'slot'.*did you mean 'slots'"),
            ({"slots": 63}, r"\['slots'\]: expected an integer from 64 to 1048576, got 63"),
            ({"slots": 2_000_000}, r"\['slots'\]"),
            ({"slots": True}, r"\['slots'\].*got true"),
            ({"slots": "many"}, r"\['slots'\]"),
            ({"path": 5}, r"\['path'\]: expected the absolute path"),
            ({"path": "table"}, r"\['path'\]: expected the absolute path"),
        ],
    )
    def test_an_unusable_one_is_an_error_of_the_constructor(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ImproperlyConfigured, match=message):
            HostBackend(BackendConfig("default", "host", options=options))

    def test_slots_are_rounded_up_to_a_power_of_two(self, path: Path) -> None:
        assert made(path, 65)._access._layout.cells == 128
        assert made(path, 64)._access._layout.cells == 64

    def test_the_constructor_opens_nothing(self, path: Path) -> None:
        made(path)
        assert not path.exists()

    def test_another_platform_is_an_error_of_the_constructor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host_store.sys, "platform", "darwin")
        with pytest.raises(ImproperlyConfigured, match=r"needs 64-bit Linux.*'memory' or 'redis'"):
            HostBackend(BackendConfig("default", "host"))

    def test_two_prefixes_two_modules_and_two_users_are_two_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = opening.default_path("concurrency")
        assert first == opening.default_path("concurrency")
        assert first.parent == Path("/dev/shm")
        assert first.name.startswith(f"concurrency-{os.geteuid()}-")
        assert first.name.endswith(".v1")
        names = {first.name, opening.default_path("other").name}
        with monkeypatch.context() as patch:
            patch.setenv("DJANGO_SETTINGS_MODULE", "other.settings")
            names.add(opening.default_path("concurrency").name)
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 12345)
            names.add(opening.default_path("concurrency").name)
        assert len(names) == 4
        monkeypatch.setattr(opening, "SHARED_MEMORY", "/nowhere")
        assert opening.default_path("concurrency").parent != first.parent

    def test_two_prefixes_count_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening, "SHARED_MEMORY", str(tmp_path))
        stores = [HostBackend(BackendConfig("default", "host", key_prefix=name)) for name in ("a", "b", "a")]
        assert isinstance(stores[0].take([slot(token="0")]), Taken)
        assert isinstance(stores[1].take([slot(token="1")]), Taken)
        assert isinstance(stores[2].take([slot(token="2")]), Full)
        for store in stores:
            store.close()


class TestTheFile:
    def test_nobody_else_may_read_it(self, store: HostBackend, path: Path) -> None:
        store.take([slot()])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_blocks * 512 >= path.stat().st_size, "sparse: a full disk would be the process's end"

    @pytest.mark.parametrize("what", ["link", "directory", "fifo", "mode", "owner", "foreign"])
    def test_what_is_not_ours_is_refused_with_a_cure(
        self, store: HostBackend, path: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if what == "link":
            (tmp_path / "real").touch(0o600)
            path.symlink_to(tmp_path / "real")
        elif what == "directory":
            path.mkdir()
        elif what == "fifo":
            os.mkfifo(path, 0o600)
        elif what == "foreign":
            path.touch(0o600)
            path.write_text("somebody's own")
        else:
            path.touch(0o600)
        if what == "mode":
            path.chmod(0o644)
        if what == "owner":
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PermanentBackendError) as caught:
            store.take([slot()])
        assert str(path) in caught.value.cure
        assert "`path`" in caught.value.cure
        if what == "foreign":
            assert path.read_text() == "somebody's own"
        (found,) = store.check()
        assert found.id == "django_concurrency_mw.E005"
        assert path.name in found.hint

    @pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
    def test_a_network_file_system_is_refused(
        self, store: HostBackend, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        device = tmp_path.stat().st_dev
        mounts = tmp_path / "mountinfo"
        mounts.write_text(
            "1 2 0:999 / /other rw shared:1 - ext4 none rw\n"
            f"3 4 {os.major(device)}:{os.minor(device)} / /here rw shared:1 - {kind} server:/ rw\n"
        )
        monkeypatch.setattr(opening, "MOUNTS", str(mounts))
        with pytest.raises(PermanentBackendError, match=kind):
            store.take([slot()])

    def test_without_room_it_is_an_error_and_no_signal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a file system of 100 kB, where that may be mounted; and it goes on when there is room."""
        small = tmp_path / "small"
        small.mkdir()
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", small], capture_output=True)
        if mount.returncode:
            monkeypatch.setattr(os, "posix_fallocate", _no_space)
        store = made(small / "table")
        try:
            with pytest.raises(PermanentBackendError, match="there is no room") as caught:
                store.take([slot()])
            assert "`slots`" in caught.value.cure
            if not mount.returncode:
                subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)
            monkeypatch.undo()
            assert isinstance(store.take([slot()]), Taken)
        finally:
            store.close()
            if not mount.returncode:
                subprocess.run(["umount", "-l", small], check=True)

    def test_another_number_of_slots_is_another_layout_as_long_as_somebody_lives(
        self, store: HostBackend, path: Path
    ) -> None:
        store.take([slot()])
        for slots in (64, 1024):
            with pytest.raises(PermanentBackendError, match="another layout") as caught:
                made(path, slots).take([slot(token="u")])
            assert "same `slots`" in caught.value.cure
        assert policies(store) == ["p"]
        store.close()
        for slots in (1024, 64):
            changed = made(path, slots)
            assert isinstance(changed.take([slot()]), Taken)
            changed.close()

    def test_who_finds_nobody_alive_begins_anew(self, path: Path) -> None:
        """Whatever a crash has left there."""
        pid = os.fork()
        if pid == 0:
            made(path).take([slot(limit=5)])
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        with path.open("r+b") as file:
            file.seek(16)
            file.write(b"\xff" * (path.stat().st_size - 16))
        store = made(path)
        assert store.take([slot(limit=5)]) == Taken((True,), (1,))
        assert consistent(opened(store)) == []
        store.close()

    @pytest.mark.parametrize("how", ["removed", "replaced", "closed"])
    def test_a_lost_file_is_noticed_within_a_second_and_the_holders_go_along(
        self, store: HostBackend, other: HostBackend, path: Path, tmp_path: Path, how: str
    ) -> None:
        one, evicted = slot("one", token=new_token()), slot("two", token=new_token())
        store.take([one, slot("gone")])
        store.take([evicted])
        store.give([slot("gone")])
        other.take([slot("others", token="o")])
        other.evict(evicted.token)
        if how == "removed":
            path.unlink()
        elif how == "replaced":
            (tmp_path / "new").touch(0o600)
            (tmp_path / "new").rename(path)
        else:
            os.close(store._access._fd)
        look_again(store)
        look_again(other)
        assert list(store.renew([(one, 60)])) == [True]
        assert other.take([slot("one", token="more", limit=5)]) == Taken((True,), (2,))
        assert policies(store) == policies(other) == ["one", "one", "others"]
        assert list(store.restore([Restore(evicted, 60, monotonic() + 60)])) == [False]
        assert list(store.give([one])) == [True]
        assert policies(other) == ["one", "others"]
        assert consistent(opened(store)) == []

    def test_a_removed_file_is_found_again_without_help(
        self, store: HostBackend, other: HostBackend, path: Path
    ) -> None:
        one = slot()
        store.take([one])
        path.unlink()
        assert wait_until(lambda: list(store.renew([(one, 60)])) == [True] and path.exists())
        assert isinstance(other.take([slot(token="u")]), Full)

    def test_a_file_that_was_cut_short_is_left_without_a_signal(self, path: Path) -> None:
        pid = os.fork()
        if pid == 0:
            store = made(path)
            store.take([slot()])
            os.truncate(path, 0)
            look_again(store)
            ok = store.take([slot(token="u", limit=5)]) == Taken((True,), (1,))
            os._exit(0 if ok else 1)
        assert exit_code(pid) == 0

    def test_a_full_table_is_an_error_that_names_the_option(self, path: Path, clock: Clock) -> None:
        store = made(path, 64)
        for number in range(64):
            store.take([slot(token=str(number), limit=1000, ttl=10)])
        with pytest.raises(BackendError, match="`slots`"):
            store.take([slot("a", token="u"), slot("b", token="u")])
        assert len(store.snapshot()) == 64
        store.give([slot(token="7")])
        with pytest.raises(BackendError, match="`slots`"):
            store.take([slot("a", token="u"), slot("b", token="u")])
        assert isinstance(store.take([slot("a", token="u")]), Taken)
        clock.pass_by(11)  # lapsed holders make room without waiting for the next look at them
        assert isinstance(store.take([slot("a", token="v", limit=5), slot("b", token="v")]), Taken)
        assert consistent(opened(store)) == []
        store.close()


def _no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestProcesses:
    def test_a_forked_child_holds_nothing_and_gives_nothing_back(self, store: HostBackend) -> None:
        one = slot(token="parent", limit=2)
        store.take([one])
        with store._access._mutex:
            pid = os.fork()
            if pid == 0:
                ok = list(store.give([one])) == [False]
                ok = ok and store.take([slot(token="child", limit=2)]) == Taken((True,), (2,))
                os._exit(0 if ok else 1)
        assert exit_code(pid) == 0
        assert wait_until(lambda: [holder.token for holder in store.snapshot()] == ["parent"])

    def test_a_store_that_nobody_has_any_more_holds_nothing(self, store: HostBackend, path: Path) -> None:
        """Settings that changed make another store."""
        store.take([slot("own")])
        made(path).take([slot("gone")])
        gc.collect()
        assert wait_until(lambda: policies(store) == ["own"])

    def test_a_child_does_not_keep_its_dead_parent_alive(self, store: HostBackend) -> None:
        """The child goes on, and has used the store of the parent's, which dies with a slot held."""
        store.take([slot("own")])
        told, tell = os.pipe()
        parent = os.fork()
        if parent == 0:
            store.take([slot("parents", token="p")])
            child = os.fork()
            if child == 0:
                store.take([slot("childs", token="c")])
                os.write(tell, os.getpid().to_bytes(4, "little"))
                signal.pause()
            signal.pause()
        child = int.from_bytes(os.read(told, 4), "little")
        try:
            assert policies(store) == ["childs", "own", "parents"]
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            assert wait_until(lambda: isinstance(store.take([slot("parents", token="next")]), Taken))
            assert policies(store) == ["childs", "own", "parents"]
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(told)
            os.close(tell)
        assert wait_until(lambda: policies(store) == ["own", "parents"])

    def test_a_process_that_stands_still_inside_is_an_error_in_time_and_no_harm(
        self, store: HostBackend, path: Path
    ) -> None:
        store.take([slot("own")])
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            child = made(path)
            child.take([slot("childs")])

            def stop(*arguments: object) -> None:
                os.write(tell, b"x")
                os.kill(os.getpid(), signal.SIGSTOP)

            alone._pack = stop  # type: ignore[assignment]  # inside, with the lock
            child.take([slot("never")])
            os._exit(0)
        os.read(told, 1)
        try:
            start = monotonic()
            with pytest.raises(BackendError, match="stayed locked") as caught:
                store.take([slot("other")])
            assert caught.value.whole
            assert access.TIMEOUT <= monotonic() - start < 10
            with pytest.raises(BackendError, match="stayed locked"):
                asyncio.run(store.atake([slot("other")]))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(told)
            os.close(tell)
        assert isinstance(store.take([slot("other")]), Taken)
        assert wait_until(lambda: isinstance(store.take([slot("childs")]), Taken))

    def test_who_dies_half_way_leaves_a_table_that_the_next_one_mends(self, store: HostBackend, path: Path) -> None:
        store.take([slot(limit=9)])
        pid = os.fork()
        if pid == 0:
            child = made(path)
            child.take([slot("childs")])
            table.Table.count = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
            child.take([slot(token="never", limit=9), slot("neither")])
        os.waitpid(pid, 0)
        words = opened(store).words
        assert words[Header.DIRTY]
        assert wait_until(lambda: store.take([slot(token="next", limit=2)]) == Taken((True,), (2,)))
        assert not words[Header.DIRTY]
        assert consistent(opened(store)) == []

    def test_a_damaged_index_is_made_anew(self, store: HostBackend) -> None:
        one = slot()
        store.take([one])
        words, plan = opened(store).words, opened(store).layout
        for at in range(plan.index_word, plan.index_word + plan.entries * 8):
            words[at] = 77
        with pytest.raises(BackendError, match="damaged") as caught:
            store.take([slot("other")])
        assert not caught.value.whole
        assert isinstance(store.take([slot(token="u")]), Full)


class TestInside:
    def test_a_call_inside_a_call_of_the_same_thread(self, store: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A garbage collection in the middle of a take: a release is carried out afterwards, a take is an error."""
        store.take([slot(token="old", limit=2)])
        pack, raised = alone._pack, []

        def collected(*arguments: Any) -> Any:
            monkeypatch.undo()
            assert list(store.give([slot(token="old")])) == [True]
            with pytest.raises(BackendError) as caught:
                store.take([slot("inner")])
            raised.append(caught.value)
            return pack(*arguments)

        monkeypatch.setattr(alone, "_pack", collected)
        thread = threading.Thread(target=store.take, args=([slot(limit=2, token="new")],), daemon=True)
        thread.start()
        thread.join(SOON)
        assert not thread.is_alive(), "it waits for its own lock"
        assert not raised[0].whole
        assert held_by_state(opened(store)) == {layout.HELD: 1}, "it was not carried out at once"
        assert [holder.token for holder in store.snapshot()] == ["new"]

    @pytest.mark.parametrize("where", ["lock", "write", "commit", "drop", "count"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_an_exception_inside_leaves_neither_lock_nor_slot(
        self,
        store: HostBackend,
        other: HostBackend,
        monkeypatch: pytest.MonkeyPatch,
        where: str,
        error: type[BaseException],
    ) -> None:
        store.take([slot("warm")])
        mine = [slot(), slot("q")]
        holder: Any = access if where == "lock" else table.Table
        inner = getattr(holder, where)

        def interrupted(*arguments: Any) -> None:
            inner(*arguments)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(holder, where, interrupted)
            with pytest.raises(error):
                take_and_give(store, *mine)
        assert isinstance(other.take([slot("elsewhere")]), Taken), "it is still locked"
        thread = threading.Thread(target=store.give, args=(mine,), daemon=True)
        thread.start()
        thread.join(SOON)
        assert not thread.is_alive(), "the other threads are locked out"
        assert policies(store) == ["elsewhere", "warm"]
        assert consistent(opened(store)) == []

    def test_a_release_that_was_cut_short_has_released(
        self, store: HostBackend, other: HostBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if nobody repeats it, and before the index says so."""
        both = [slot(), slot("q")]
        store.take(both)

        def interrupted(*arguments: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(table.Table, "count", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.give(both)
        assert other.take([slot(token="next")]) == Taken((True,), (1,))


class TestEventLoops:
    def test_the_loop_goes_on_while_the_table_is_locked(self, store: HostBackend, path: Path) -> None:
        store.take([slot("warm")])
        fd = os.open(path, os.O_RDWR)

        async def main() -> tuple[int, float]:
            loop, gaps = asyncio.get_running_loop(), [0.0]

            async def watch() -> None:
                last = loop.time()
                while True:
                    await asyncio.sleep(0)
                    now = loop.time()
                    gaps.append(now - last)
                    last = now

            fcntl.flock(fd, fcntl.LOCK_EX)
            loop.call_later(0.1, fcntl.flock, fd, fcntl.LOCK_UN)
            watcher = asyncio.create_task(watch())
            assert isinstance(await store.atake([slot()]), Taken)
            watcher.cancel()
            return len(gaps), max(gaps)

        gc.collect()
        turns, stall = asyncio.run(main())
        os.close(fd)
        print(f"the loop turned {turns} times and stood still for {stall * 1000:.2f} ms at most")
        assert turns > 20, "it waited on the loop"

    def test_what_was_cancelled_while_it_waited_and_then_given_back_is_not_held(
        self, store: HostBackend, path: Path
    ) -> None:
        store.take([slot("warm")])
        fd = os.open(path, os.O_RDWR)

        async def main() -> None:
            fcntl.flock(fd, fcntl.LOCK_EX)
            tasks = {number: asyncio.create_task(store.atake([slot(str(number))])) for number in range(50)}
            await asyncio.sleep(0.01)
            for task in tasks.values():
                task.cancel()
            fcntl.flock(fd, fcntl.LOCK_UN)
            for number, task in tasks.items():
                with pytest.raises(asyncio.CancelledError):
                    await task
                await store.agive([slot(str(number))])

        asyncio.run(main())
        os.close(fd)
        assert policies(store) == ["warm"]

    def test_the_file_is_not_opened_on_the_loop(self, store: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: list[int] = []
        whole = access.open_table

        def seen(*arguments: Any) -> Any:
            threads.append(threading.get_ident())
            return whole(*arguments)

        monkeypatch.setattr(access, "open_table", seen)
        assert isinstance(asyncio.run(store.atake([slot()])), Taken)
        assert threads
        assert threading.get_ident() not in threads


class TestCheck:
    def test_a_good_one_says_nothing_and_makes_nothing(self, store: HostBackend, path: Path) -> None:
        assert store.check() == []
        assert not path.exists()
        store.take([slot()])
        assert store.check() == []

    def test_a_directory_that_is_not_there_is_said(self, path: Path) -> None:
        (found,) = made(path / "sub" / "table").check()
        assert found.id == "django_concurrency_mw.E005"


def test_without_the_c_library_s_flock_python_s_own_does(
    store: HostBackend, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django_concurrency_mw.backends.host import locking

    monkeypatch.setattr(locking, "_native", None)
    for module in (locking, access):
        monkeypatch.setattr(module, "lock", locking._flock)
    monkeypatch.setattr(access, "unlock", fcntl.flock)
    assert isinstance(store.take([slot()]), Taken)
    second = made(path)
    assert isinstance(second.take([slot(token="u")]), Full)
    second.take([slot("b")])
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BackendError, match="stayed locked"):
        store.take([slot()])
    os.close(fd)
    second.close()
    assert wait_until(lambda: isinstance(store.take([slot("b", token="u")]), Taken))
    with pytest.raises(BackendError, match="directory"):  # and there is nothing to unlock
        made(path.parent).take([slot()])
