"""The lines of the host store among processes that die, datagrams that are lost, and files that are replaced.

What holds for every store is in test_waiting.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, monotonic_ns
from types import FrameType
from typing import Any

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.host import access, bells, ours, watch
from django_concurrency_mw.backends.host.layout import ASKED, HELD, QUEUED, Header
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.host.table import Table
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.outcomes import Queued, Taken

from .host_file import consistent
from .support import wait_until
from .test_waiting import Client, places


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for seconds takes nobody's place."""
    monkeypatch.setattr(ours, "STANDS_FOR", 3600 * 10**9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


def made(path: Path, slots: int = 256) -> HostBackend:
    return HostBackend(BackendConfig("default", "host", options={"path": path, "slots": slots}))


@pytest.fixture
def store(path: Path) -> Iterator[HostBackend]:
    store = made(path)
    yield store
    if store._access._table is not None:
        assert consistent(opened(store)) == []
    store.close()


@pytest.fixture
def other(path: Path) -> Iterator[HostBackend]:
    """Another process's store, for all that the kernel and the table know."""
    other = made(path)
    yield other
    other.close()


def opened(store: HostBackend) -> Table:
    assert store._access._table is not None
    return store._access._table


def look_for_the_dead(store: HostBackend) -> None:
    """As if nobody had looked lately."""
    opened(store).words[Header.SWEPT] = 0


def states(client: Client) -> list[int]:
    """Of its cells, without asking for anything."""
    store: Any = client.store
    return [
        opened(store).state(store._ours.places.get((slot.token, slot.policy, slot.key.digest), (0, 0)))
        for slot in client.slots
    ]


@contextmanager
def process(path: Path, does: Callable[[HostBackend], object]) -> Iterator[int]:
    """Another one that has done this, and goes on until it is killed."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            does(made(path))
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(told, 1) == b"x"
    os.close(told)
    try:
        yield pid
    finally:
        kill(pid)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return  # it was killed before


def stands_in_line(store: HostBackend) -> None:
    waiter = Client(store, "a")
    assert isinstance(waiter.ask(), Queued)


class TestProcesses:
    def test_two_processes_stand_in_one_line(self, store: HostBackend, path: Path) -> None:
        """One gives back, and the other one hears of it at once."""
        holder = Client(store, "a")
        holder.ask()
        told, tell = os.pipe()

        def waits(childs: HostBackend) -> None:
            waiter = Client(childs, "a")
            reply = waiter.ask()
            os.write(tell, b"q")
            while isinstance(reply, Queued):
                waiter.bell.wait(30)
                reply = waiter.ask()
            os.write(tell, b"t")

        pid = os.fork()
        if pid == 0:
            try:
                waits(made(path))
                signal.pause()
            finally:
                os._exit(1)
        try:
            assert os.read(told, 1) == b"q"
            behind = Client(store, "a")
            reply = behind.ask()
            assert isinstance(reply, Queued)
            assert (reply.ahead, [(one.pid, one.place) for one in store.waiters()]) == (
                1,
                [(pid, 1), (os.getpid(), 2)],
            )
            start = monotonic()
            holder.give()
            assert os.read(told, 1) == b"t"
            assert monotonic() - start < 20, "it was not woken"
            assert states(behind) == [QUEUED]
        finally:
            kill(pid)
        assert wait_until(lambda: behind.ask() == Taken((True,), (1,))), "the holder is dead"
        behind.give()
        behind.bell.close()

    def test_a_dead_one_is_passed_over_by_who_gives_back(self, store: HostBackend, path: Path) -> None:
        holder, second = Client(store, "a"), Client(store, "a")
        holder.ask()
        with process(path, stands_in_line) as pid:
            assert second.ask().ahead == 1  # type: ignore[union-attr]
            kill(pid)
        holder.give()
        assert states(second) == [HELD], "it has to ask for it"
        second.give()

    def test_who_was_granted_it_and_died_leaves_it_to_the_next(self, store: HostBackend, path: Path) -> None:
        holder, second = Client(store, "a"), Client(store, "a")
        holder.ask()
        with process(path, stands_in_line) as pid:
            second.ask()
            holder.give()
            assert states(second) == [QUEUED]
            kill(pid)
        reply = second.ask()
        again = reply.again if isinstance(reply, Queued) else 0
        assert again <= 0.5
        assert wait_until(lambda: isinstance(second.ask(), Taken))
        second.give()

    def test_a_line_of_the_dead_is_in_nobodys_way(self, store: HostBackend, path: Path) -> None:
        holder, newcomer = Client(store, "a"), Client(store, "a")
        holder.ask()
        with process(path, stands_in_line) as pid:
            kill(pid)
        holder.give()
        assert newcomer.take() == Taken((True,), (1,))
        newcomer.give()

    def test_one_who_has_not_asked_for_long_has_no_place(
        self, store: HostBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        holder, first, second = (Client(store, "a") for _ in range(3))
        holder.ask()
        with monkeypatch.context() as patch:
            patch.setattr(ours, "STANDS_FOR", 1)
            first.ask()
        second.ask()
        holder.give()
        assert (states(first), states(second)) == ([0], [HELD])
        assert isinstance(first.ask(), Queued)
        second.give()
        assert states(first) == [HELD]
        first.give()

    def test_a_forked_child_has_no_place_and_hears_nothing(self, store: HostBackend) -> None:
        holder, waiter = Client(store, "a"), Client(store, "a")
        holder.ask()
        waiter.ask()
        fd = waiter.bell._post.socket.fileno()  # type: ignore[attr-defined]
        pid = os.fork()
        if pid == 0:
            ok = False
            try:
                os.fstat(fd)
            except OSError:
                ok = bells.number_of(waiter.bell) == 0 and not store._ours.places
                waiter.bell.wait(0.001)
                waiter.bell.close()
            os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
        holder.give()
        start = monotonic()
        waiter.bell.wait(30)
        assert monotonic() - start < 20
        assert states(waiter) == [HELD]
        waiter.give()

    def test_a_visitor_sees_the_lines_and_its_evicting_lets_the_next_one_in(
        self, store: HostBackend, path: Path
    ) -> None:
        holder, first, second = (Client(store, "a") for _ in range(3))
        for one in (holder, first, second):
            one.ask()
        visitor = made(path)
        told = visitor.waiters()
        assert [(one.token, one.place, one.pid) for one in told] == [
            (first.slots[0].token, 1, os.getpid()),
            (second.slots[0].token, 2, os.getpid()),
        ]
        assert all(0 <= one.age < 60 for one in told)
        assert visitor.evict(holder.slots[0].token)
        start = monotonic()
        first.bell.wait(30)
        assert monotonic() - start < 20
        assert states(first) == [HELD]
        assert not visitor._access.takes_part
        for one in (holder, first, second):
            one.give()

    def test_who_waits_is_no_holder(self, store: HostBackend) -> None:
        holder, both = Client(store, "a"), Client(store, "a", "b")
        holder.ask()
        both.ask()
        assert [one.token for one in store.snapshot()] == [holder.slots[0].token]
        assert list(store.counts(both.slots)) == [1, 0]
        assert list(store.renew([(slot, 60) for slot in both.slots])) == [False, False]
        both.give()
        holder.give()


class TestTheTable:
    def test_a_line_that_is_made_anew_is_in_its_order(self, store: HostBackend) -> None:
        """Whatever cells they have: who joined later may have an earlier cell."""
        holder, gone, *waiters = (Client(store, "a") for _ in range(7))
        for one in (holder, gone, *waiters):
            one.ask()
        gone.give()
        last = Client(store, "a")
        last.ask()
        waiters.append(last)
        assert opened(store).word(store._ours.places[_known(last)][0]) < opened(store).word(
            store._ours.places[_known(waiters[0])][0]
        )
        opened(store).words[Header.DIRTY] = 1
        assert [one.ask().ahead for one in waiters] == list(range(len(waiters)))  # type: ignore[union-attr]
        assert consistent(opened(store)) == []
        for before, after in zip([holder, *waiters], waiters, strict=False):
            before.give()
            assert states(after) == [HELD]
        last.give()

    def test_a_waiter_of_whom_a_part_is_gone_is_in_nobodys_way(self, store: HostBackend) -> None:
        """As after a leave that was cut short."""
        holder, half, behind = Client(store, "a"), Client(store, "b", "a"), Client(store, "a")
        for one in (holder, half, behind):
            one.ask()
        cell = store._ours.places[half.slots[0].token, "b", half.slots[0].key.digest][0]
        opened(store).drop([cell])
        holder.give()
        assert states(behind) == [HELD]
        reply = half.ask()
        assert isinstance(reply, Queued)
        assert (reply.full, states(half)) == ((False, True), [ASKED, QUEUED])
        half.give()
        behind.give()

    def test_who_cannot_use_what_is_free_leaves_it_to_the_next_at_once(self, store: HostBackend) -> None:
        of_a, of_b, both, behind = Client(store, "a"), Client(store, "b"), Client(store, "a", "b"), Client(store, "b")
        for one in (of_b, both, behind, of_a):
            one.ask()
        of_b.give()
        assert (states(both), states(behind)) == ([ASKED, ASKED], [HELD])
        reply = both.ask()
        assert isinstance(reply, Queued)
        assert (reply.full, states(both)) == ((True, True), [QUEUED, QUEUED])
        of_a.give()
        assert states(both) == [ASKED, QUEUED], "it is the first there, and the other one is full"
        behind.give()
        assert states(both) == [HELD, HELD]
        both.give()

    def test_what_a_giver_that_died_left_goes_to_the_first_whoever_asks(self, store: HostBackend) -> None:
        """It was killed between giving back and granting, which leaves no trace."""
        holder, first, second, third = (Client(store, "a") for _ in range(4))
        for one in (holder, first, second, third):
            one.ask()
        table = opened(store)

        def frees(one: Client) -> None:
            table.drop([store._ours.places[_known(one)][0]])
            table.due.clear()

        frees(holder)
        assert isinstance(second.ask(), Queued)
        assert states(first) == [HELD]
        frees(first)
        assert second.ask() == Taken((True,), (1,)), "nobody was let in beside it"
        assert states(third) == [QUEUED]
        for one in (second, third):
            one.give()

    def test_a_line_that_cannot_be_right_is_made_anew(self, store: HostBackend) -> None:
        holder, first, second = (Client(store, "a") for _ in range(3))
        for one in (holder, first, second):
            one.ask()
        table = opened(store)
        table.map[table.states_at + store._ours.places[_known(first)][0]] = 0
        with pytest.raises(BackendError, match="damaged") as caught:
            holder.give()
        assert not caught.value.whole
        holder.give()
        assert second.ask() == Taken((True,), (1,))
        second.give()

    def test_a_replaced_file_has_new_lines(self, store: HostBackend, path: Path) -> None:
        holder, waiter = Client(store, "a"), Client(store, "a")
        holder.ask()
        waiter.ask()
        path.unlink()
        store._access._looked -= 2_000_000_000
        assert isinstance(waiter.ask(), Queued), "the holder is counted there, too"
        assert places(store, waiter) == [[("a", 1)]]
        holder.give()
        assert states(waiter) == [HELD]
        waiter.give()

    @pytest.mark.parametrize("waiting", [1000])
    def test_a_give_does_not_look_at_those_who_wait_elsewhere(self, path: Path, waiting: int) -> None:
        store = made(path, 4096)
        one, holder = Client(store, "a"), Client(store, "elsewhere")
        holder.ask()
        one.ask()

        def steps() -> int:
            """Lines of Python that a take and a give are."""
            seen = 0

            def trace(frame: FrameType, event: str, argument: object) -> Any:
                nonlocal seen
                seen += event == "line"
                return trace

            sys.settrace(trace)
            try:
                one.give()
                one.take()
            finally:
                sys.settrace(None)
            return seen

        steps()
        before = steps()
        crowd = [Client(store, "elsewhere", most=waiting) for _ in range(waiting)]
        bell = store.bell()
        for each in crowd:
            each.bell.close()
            each.bell = bell
            assert isinstance(each.ask(), Queued)
        with_others = steps()
        print(f"{before} lines, {with_others} with {waiting} who wait elsewhere")
        assert with_others < 2 * before
        bell.close()
        store.close()


def _known(client: Client) -> tuple[str, str, bytes]:
    slot = client.slots[0]
    return slot.token, slot.policy, slot.key.digest


class Clock:
    """What time it is for the table (monotonic ns)."""

    def __init__(self) -> None:
        self.now = (monotonic_ns() // watch.TURN + 1) * watch.TURN

    def __call__(self) -> int:
        return self.now

    def goes_on(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(access, "monotonic_ns", clock)
    return clock


def asks(client: Client) -> float:
    """And is told in how many seconds to do so again."""
    reply = client.ask()
    assert isinstance(reply, Queued)
    return reply.again


class TestWhatNobodyTellsOf:
    """That a process was killed, or a lease has ended."""

    def test_one_of_each_process_looks_for_all(self, store: HostBackend, other: HostBackend, clock: Clock) -> None:
        """Ten times a second, one after the other. All others seldom ask, though each be the first in its line."""
        pairs = [
            (Client(one, name), Client(one, name))
            for one, policy in ((store, "a"), (other, "b"))
            for name in [f"{policy}{number}" for number in range(60)]
        ]
        for holder, _ in pairs:
            holder.ask()
        again = [asks(waiter) for _, waiter in pairs]
        for answers, late in ((again[:60], 0.0), (again[60:], watch.APART / 1e9)):
            late = (0.15 - late) % 0.1 - 0.05  # between this turn and the next one
            assert answers[:2] == pytest.approx([0.1 + late, 0.2 + late])
            assert 0.15 < min(answers[2:]) <= max(answers[2:]) <= 1.0
        assert max(again[:20]) <= 0.3, "where few wait, the first of a line looks for what its giver left"
        assert sum(1 / seconds for seconds in again[60:]) < 250
        for pair in reversed(pairs):
            for one in pair:
                one.give()
                one.bell.close()

    def test_the_turn_of_one_who_leaves_is_the_next_ones(
        self, store: HostBackend, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch, "random", lambda: 0.0)  # as late as may be
        holder, first, second, third = (Client(store, "a") for _ in range(4))
        holder.ask()
        assert [asks(one) for one in (first, second, third)] == pytest.approx([0.1, 0.2, 0.3])
        holder.give()  # to the first one
        assert asks(third) == pytest.approx(0.1)
        assert asks(second) == pytest.approx(0.2), "it keeps its own"
        clock.goes_on(0.101)
        assert asks(third) == pytest.approx(0.199)
        clock.goes_on(0.099 - 0.004)
        assert asks(second) == pytest.approx(0.204), "its timer was early, and the next turn is another one's"
        for one in (third, second, first):
            one.give()

    def test_one_who_waits_alone_looks_ten_times_a_second(self, store: HostBackend, clock: Clock) -> None:
        holder, waiter = Client(store, "a"), Client(store, "a")
        holder.ask()
        for _ in range(20):
            again = asks(waiter)
            assert 0.05 < again <= 0.15
            clock.goes_on(again + 0.003)
        waiter.give()
        holder.give()


class TestBells:
    def test_whose_datagram_is_lost_asks_soon(self, store: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[int] = []
        monkeypatch.setattr(bells, "_send", sent.append)
        holder, waiter = Client(store, "a"), Client(store, "a")
        holder.ask()
        reply = waiter.ask()
        holder.give()
        assert sent == [bells.number_of(waiter.bell)]
        assert isinstance(reply, Queued)
        waiter.bell.wait(reply.again)
        assert isinstance(waiter.ask(), Taken)
        assert reply.again <= 0.5
        waiter.give()

    def test_a_burst_wakes_all_coroutines_though_most_of_it_is_lost(self, store: HostBackend) -> None:
        """A queue has room for some ten datagrams."""

        async def main() -> list[list[int]]:
            pairs = [(Client(store, f"p{number}"), Client(store, f"p{number}")) for number in range(60)]
            waits = []
            for holder, waiter in pairs:
                holder.ask()
                waiter.bell.close()
                waiter.bell = store.abell()
                waiter.ask()
                waits.append(asyncio.ensure_future(waiter.bell.await_(60)))
            await asyncio.sleep(0)
            for holder, _ in pairs:
                store.give(holder.slots)
            await asyncio.wait_for(asyncio.gather(*waits), 20)
            found = [states(waiter) for _, waiter in pairs]
            for _, waiter in pairs:
                waiter.give()
                waiter.bell.close()
            return found

        assert asyncio.run(main()) == [[HELD]] * 60

    @pytest.mark.parametrize("lines", ["a", "ab"])
    def test_only_whose_turn_it_is_wakes_up(self, store: HostBackend, lines: str) -> None:
        """Of those who stand in several lines, too."""

        async def main() -> tuple[bool, bool]:
            holder, first, second = (Client(store, *lines) for _ in range(3))
            holder.ask()
            waits = []
            for one in (first, second):
                one.bell.close()
                one.bell = store.abell()
                one.ask()
                waits.append(asyncio.ensure_future(one.bell.await_(60)))
            await asyncio.sleep(0)
            await store.agive(holder.slots)
            await asyncio.wait_for(waits[0], 20)
            await asyncio.sleep(0)
            woken = (waits[0].done(), waits[1].done())
            waits[1].cancel()
            for one in (first, second):
                one.give()
                one.bell.close()
            return woken

        assert asyncio.run(main()) == (True, False)

    def test_who_has_left_one_of_its_lines_wakes_up(self, store: HostBackend) -> None:
        """It was its turn there, and it could not use that: it has to ask for its place."""

        async def main() -> list[int]:
            of_a, of_b, both = Client(store, "a"), Client(store, "b"), Client(store, "a", "b")
            both.bell.close()
            both.bell = store.abell()
            of_a.ask()
            of_b.ask()
            both.ask()
            waits = asyncio.ensure_future(both.bell.await_(60))
            await asyncio.sleep(0)
            await store.agive(of_b.slots)
            await asyncio.wait_for(waits, 20)
            found = states(both)
            both.bell.close()
            for one in (both, of_a):
                one.give()
            return found

        assert asyncio.run(main()) == [QUEUED, ASKED]

    def test_a_loop_hears_of_it_after_a_fork(self, store: HostBackend) -> None:
        """The child closes what it was left, and the parent's loop goes on to hear."""

        async def main() -> list[int]:
            holder, waiter = Client(store, "a"), Client(store, "a")
            waiter.bell = store.abell()
            holder.ask()
            waiter.ask()
            pid = os.fork()
            if pid == 0:
                waiter.bell.close()
                os._exit(bells.number_of(waiter.bell) != 0)
            assert os.waitpid(pid, 0)[1] == 0
            asyncio.get_running_loop().call_soon(store.give, holder.slots)
            await asyncio.wait_for(waiter.bell.await_(60), 20)
            found = states(waiter)
            waiter.give()
            waiter.bell.close()
            return found

        assert asyncio.run(main()) == [HELD]

    def test_a_bell_of_a_coroutine_is_rung_from_any_thread(self, store: HostBackend) -> None:
        async def main() -> None:
            bell = store.abell()
            threading.Timer(0.01, bell.ring).start()
            await asyncio.wait_for(bell.await_(60), 20)
            bell.ring()
            await asyncio.wait_for(bell.await_(60), 20)
            bell.close()

        asyncio.run(main())

    def test_a_bell_of_a_thread_is_rung_from_any_thread_and_once(self, store: HostBackend) -> None:
        bell = store.bell()
        timer = threading.Timer(0.01, bell.ring)
        timer.start()
        start = monotonic()
        bell.wait(60)
        timer.join()
        for _ in range(30):
            bell.ring()
        bell.wait(60)
        assert monotonic() - start < 30
        start = monotonic()
        bell.wait(0.02)
        assert monotonic() - start >= 0.02, "it is still rung"
        bell.close()
        bell.close()

    def test_without_a_descriptor_it_asks_often(self, store: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        def none_left(*arguments: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        async def made_on_a_loop() -> int:
            bell = store.abell()
            bell.close()
            return bells.number_of(bell)

        holder = Client(store, "a")
        holder.ask()
        loop = asyncio.new_event_loop()
        with monkeypatch.context() as patch:
            patch.setattr(bells, "_sender", None)
            patch.setattr(socket, "socket", none_left)
            waiter = Client(store, "a")
            assert loop.run_until_complete(made_on_a_loop()) == 0
            reply = waiter.ask()
            assert isinstance(reply, Queued)
            assert reply.again <= 0.02
            holder.give()
            waiter.bell.wait(reply.again)
            assert isinstance(waiter.ask(), Taken)
            waiter.give()
        loop.close()

    def test_a_bell_that_nobody_closes_goes_with_whoever_had_it(self, store: HostBackend) -> None:
        gc.collect()
        before = {post.number for post in bells._posts}
        bell = store.bell()
        assert len({post.number for post in bells._posts} - before) == 1
        del bell
        gc.collect()
        assert {post.number for post in bells._posts} <= before

        async def main() -> None:
            store.abell()
            await asyncio.sleep(0.01)

        asyncio.run(main())

        async def cut_short() -> None:
            kept.append(store.abell())

        kept: list[Any] = []
        asyncio.run(cut_short())
        kept.clear()
        gc.collect()
        assert {post.number for post in bells._posts if post.number} <= before

    def test_a_loop_has_one_socket_for_all(self, store: HostBackend) -> None:
        async def main() -> tuple[int, int]:
            made = [store.abell() for _ in range(20)]
            numbers = {bells.number_of(bell) for bell in made}
            for bell in made:
                bell.close()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            again = store.abell()
            numbers_again = {bells.number_of(again)}
            again.close()
            await asyncio.sleep(0)
            return len(numbers), len(numbers & numbers_again)

        assert asyncio.run(main()) == (1, 0)
