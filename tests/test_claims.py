"""Hand-overs: a slot is claimed by another thread or process, all of them or none, and outlives who took it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import pytest
import redis

from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.host import access, layout, opening, ours
from django_concurrency_mw.backends.host.layout import Header
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .host_file import consistent, held_by_state
from .proxy import Proxy
from .redis_server import RedisServer
from .support import exit_code, wait_until
from .test_steps import BACKENDS


def slot(
    token: str = "", policy: str = "p", limit: int = 5, cost: int = 1, ttl: float = 60, path: str = "/view/"
) -> Slot:
    return Slot(policy, make_key("k"), limit, ttl, token or new_token(), True, path, cost)


def carried(old: Slot) -> Slot:
    """As another process makes it from what it was told, in JSON."""
    told = json.loads(
        json.dumps([old.policy, old.key.text, old.limit, old.ttl, old.token, old.path, old.cost, old.since])
    )
    policy, key, limit, ttl, token, path, cost, since = told
    return Slot(policy, make_key(key), limit, ttl, token, True, path, cost, since=since)


def count(store: BaseBackend, policy: str = "p") -> int:
    """Asked on the way that a give goes, so that it has been carried out."""
    reply = store.take([slot("looks", policy, 0)])
    assert isinstance(reply, Full)
    return reply.in_flight[0]


def tokens(store: BaseBackend) -> list[str]:
    count(store)
    return sorted(holder.token for holder in store.snapshot())


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def store(request: pytest.FixtureRequest) -> Iterator[BaseBackend]:
    store = request.param(request)
    yield store
    if isinstance(store, HostBackend):
        assert store._access._table is None or consistent(opened(store)) == []
    if not isinstance(store, MemoryBackend):
        store.close()


class TestClaim:
    def test_of_nothing_it_is_done_at_once(self, store: BaseBackend) -> None:
        assert store.claim([])

    def test_the_new_one_takes_the_place_of_the_old_one(self, store: BaseBackend) -> None:
        old, new = slot("old", cost=3), slot("new", cost=3, path="task")
        store.take([old])
        store.detach([old])
        assert store.claim([(carried(old), new)])
        assert count(store) == 3
        (holder,) = store.snapshot()
        assert (holder.token, holder.policy, holder.key, holder.path, holder.cost) == ("new", "p", "k", "task", 3)
        assert list(store.renew([(old, 60), (new, 60)])) == [False, True]
        store.give([new])
        assert count(store) == 0

    def test_a_late_give_of_the_old_one_does_not_hit_the_new_one(self, store: BaseBackend) -> None:
        old, new = slot("old"), slot("new")
        store.take([old])
        store.detach([old])
        assert store.claim([(carried(old), new)])
        store.give([old])
        store.give([carried(old)])
        assert tokens(store) == ["new"]

    def test_the_lease_begins_now(self, store: BaseBackend) -> None:
        old, new = slot("old", ttl=10), slot("new", ttl=60)
        store.take([old])
        assert store.claim([(carried(old), new)])
        (holder,) = store.snapshot()
        assert holder.lease_left > 30, "it outlives the old one"
        assert count(store) == 1
        short = slot("short", ttl=0.02)
        assert store.claim([(carried(new), short)])
        assert wait_until(lambda: count(store) == 0)
        assert list(store.renew([(short, 60)])) == [False]

    def test_its_age_is_what_it_says(self, store: BaseBackend) -> None:
        old = slot("old")
        store.take([old])
        new = slot("new")
        new.since = time() - 10
        assert store.claim([(carried(old), new)])
        (holder,) = store.snapshot()
        assert 10 <= holder.age < 20

    def test_the_limit_is_not_asked(self, store: BaseBackend) -> None:
        olds = [slot(f"old-{number}", cost=2) for number in range(2)]
        for old in olds:
            store.take([old])
        assert store.claim([(carried(old), slot(f"new-{old.token}", limit=0, cost=2)) for old in olds])
        assert count(store) == 4
        assert tokens(store) == ["new-old-0", "new-old-1"]

    @pytest.mark.parametrize("lost", ["given", "lapsed", "evicted", "claimed", "never"])
    @pytest.mark.parametrize("place", [0, 2])
    def test_all_or_none(self, store: BaseBackend, lost: str, place: int) -> None:
        olds = [slot("old", policy, cost=2) for policy in "abc"]
        gone = slot("gone", "g", cost=2)
        if lost != "never":
            store.take([gone])
        if lost == "given":
            store.give([gone])
        elif lost == "lapsed":
            store.renew([(gone, 0.01)])
            assert wait_until(lambda: store.snapshot() == [])
        elif lost == "evicted":
            assert store.evict("gone")
        elif lost == "claimed":
            assert store.claim([(carried(gone), slot("other", "g", cost=2))])
        store.take(olds)
        before = tokens(store)
        pairs = [(carried(old), slot("new", old.policy, cost=2)) for old in olds]
        pairs.insert(place, (carried(gone), slot("new", "g", cost=2)))
        assert not store.claim(pairs)
        assert tokens(store) == before
        assert [count(store, policy) for policy in "abcg"] == [2, 2, 2, 2 if lost == "claimed" else 0]
        assert store.claim([pair for pair in pairs if pair[0].token == "old"])
        assert list(store.renew([(new, 60) for _, new in pairs])) == [new.policy != "g" for _, new in pairs]

    def test_of_many_who_claim_at_once_one_does(self, store: BaseBackend) -> None:
        for turn in range(20):
            olds = [slot(f"old-{turn}", policy) for policy in "ab"]
            store.take(olds)
            won: list[list[Slot]] = []
            together = threading.Barrier(6)

            def claim(number: int, olds: list[Slot], won: list[list[Slot]], together: threading.Barrier) -> None:
                pairs = [(carried(old), slot(f"new-{number}", old.policy)) for old in olds]
                together.wait()
                if store.claim(pairs):
                    won.append([new for _, new in pairs])

            threads = [threading.Thread(target=claim, args=(number, olds, won, together)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (news,) = won
            assert tokens(store) == [new.token for new in news]
            store.give(news)
            assert (count(store, "a"), count(store, "b")) == (0, 0)

    def test_what_is_not_claimed_is_given_back_by_who_took_it(self, store: BaseBackend) -> None:
        old = slot("old", cost=2)
        store.take([old])
        store.detach([old])
        assert list(store.renew([(old, 60)])) == [True]
        assert list(store.give([old])) == [True]
        assert count(store) == 0
        assert not store.claim([(carried(old), slot("new", cost=2))])

    def test_what_is_detached_late_harms_nobody(self, store: BaseBackend) -> None:
        """Given back before, evicted, or never there."""
        old = slot("old")
        store.take([old])
        store.give([old])
        store.take([slot("other")])
        store.detach([old, slot("never")])
        assert tokens(store) == ["other"]

    def test_which_stores_count_in_one_process_only(self, store: BaseBackend) -> None:
        assert store.one_process == isinstance(store, MemoryBackend)


# -- host -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


def made(path: Path) -> HostBackend:
    return HostBackend(BackendConfig("default", "host", options={"path": path, "slots": 64}))


@pytest.fixture
def host(path: Path) -> Iterator[HostBackend]:
    host = made(path)
    yield host
    host.close()


def opened(store: HostBackend) -> Any:
    assert store._access._table is not None
    return store._access._table


def died_with(path: Path, slots: Sequence[Slot], detached: Sequence[Slot]) -> int:
    """Another process took these, handed some of them over, and was killed."""
    pid = os.fork()
    if pid == 0:
        store = made(path)
        store.take(slots)
        store.detach(detached)
        os._exit(0)
    assert exit_code(pid) == 0
    return pid


def cells(store: HostBackend) -> int:
    return sum(held_by_state(opened(store)).values())


class TestAmongProcesses:
    def test_what_was_handed_over_outlives_its_process(self, host: HostBackend, path: Path) -> None:
        host.take([slot("own")])
        died_with(path, [slot("kept", cost=3), slot("dropped", limit=9)], [slot("kept", cost=3)])
        holders = {holder.token: holder for holder in host.snapshot()}
        assert set(holders) == {"own", "kept"}
        assert (holders["own"].pid, holders["kept"].pid) == (os.getpid(), None)
        assert host.take([slot("next", cost=2)]) == Full((True,), (4,))
        assert host.claim([(slot("kept", cost=3), slot("new", cost=3))])
        assert {holder.token: holder.pid for holder in host.snapshot()} == {"own": os.getpid(), "new": os.getpid()}
        assert list(host.renew([(slot("new", cost=3), 60)])) == [True]
        assert list(host.give([slot("new", cost=3)])) == [True]
        assert count(host) == 1
        assert consistent(opened(host)) == []

    def test_who_holds_it_on_without_a_claim_is_not_counted_twice(self, host: HostBackend, path: Path) -> None:
        """Where a claim fails, its process may go on with the old one, which is counted again when the store is back."""
        old = slot("old", cost=2)
        host.take([old])
        host.detach([old])
        other = made(path)
        assert list(other.restore([Restore(carried(old), 100, float("inf"))])) == [True]
        assert count(other) == 2
        (holder,) = other.snapshot()
        assert (holder.pid, holder.cost) == (os.getpid(), 2)
        assert holder.lease_left > 90
        assert list(other.give([carried(old)])) == [True]
        assert count(other) == 0
        assert consistent(opened(host)) == []
        other.close()

    def test_a_lapsed_one_that_nobody_has_swept_is_not_claimed(self, host: HostBackend) -> None:
        old = slot("old", ttl=0.001)
        host.take([old])
        host.detach([old])
        sleep(0.002)  # the clock alone tells that a lease is over
        assert not host.claim([(old, slot("new"))])
        assert cells(host) == 1

    def test_it_goes_with_its_lease(self, host: HostBackend, path: Path) -> None:
        host.take([slot("own")])
        died_with(path, [slot("kept", ttl=0.3)], [slot("kept", ttl=0.3)])
        assert wait_until(lambda: count(host) == 1)
        assert cells(host) == 1

    def test_one_that_was_handed_over_is_evicted(self, host: HostBackend, path: Path) -> None:
        host.take([slot("own")])
        died_with(path, [slot("kept")], [slot("kept")])
        assert host.evict("kept")
        assert not host.claim([(slot("kept"), slot("new"))])
        assert count(host) == 1

    def test_who_claims_may_die_too(self, host: HostBackend, path: Path) -> None:
        """Then the slot is his, and goes with him."""
        old = slot("old")
        host.take([old])
        host.detach([old])
        pid = os.fork()
        if pid == 0:
            os._exit(0 if made(path).claim([(carried(old), slot("new"))]) else 1)
        assert exit_code(pid) == 0
        assert host.snapshot() == []
        assert list(host.give([old])) == [False]

    def test_the_place_of_the_old_one_is_somebody_elses(self, host: HostBackend, path: Path) -> None:
        old = slot("old")
        host.take([old])
        host.detach([old])
        other = made(path)
        assert other.claim([(carried(old), slot("new"))])
        assert isinstance(other.take([slot("next")]), Taken)  # in the cell of the old one
        host.detach([old])
        assert list(host.renew([(old, 0.001)])) == [False]
        assert list(host.give([old])) == [False]
        assert tokens(other) == ["new", "next"]
        assert {holder.pid for holder in other.snapshot()} == {os.getpid()}
        other.close()

    def test_what_was_claimed_elsewhere_is_forgotten(
        self, host: HostBackend, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ours, "TIDY_FROM", 16)
        host._ours.tidy_from = 16
        other = made(path)
        for number in range(500):
            old, new = slot(f"old-{number}"), slot(f"new-{number}")
            host.take([old])
            host.detach([old])
            assert other.claim([(carried(old), new)])
            other.give([new])
        assert len(host._ours.places) <= 17
        other.close()

    def test_a_full_table_is_an_error_and_changes_nothing(self, host: HostBackend) -> None:
        host.take([slot(f"old-{number}", limit=99) for number in range(63)])
        short = slot("short", limit=99)
        host.take([short])
        with pytest.raises(BackendError, match="all 64 cells"):
            host.claim([(slot("old-0"), slot("new"))])
        assert consistent(opened(host)) == []
        assert "old-0" in tokens(host)
        host.renew([(short, 0.001)])
        sleep(0.002)  # the clock alone tells that a lease is over
        assert host.claim([(slot("old-0"), slot("new"))])
        assert len(host.snapshot()) == 63

    def test_to_hand_over_waits_for_nobody(self, host: HostBackend, path: Path) -> None:
        """Where the table is locked it is done when that is over, and needs no other call of this process."""
        old = slot("old")
        host.take([old])
        other = made(path)
        count(other)
        fd = locked(path)
        start = monotonic()
        host.detach([old])
        assert monotonic() - start < access.TIMEOUT
        sleep(2 * access.TIMEOUT)  # one try of the keeper is over
        os.close(fd)
        assert wait_until(lambda: [holder.pid for holder in other.snapshot()] == [None])
        assert wait_until(lambda: not host._access._late)
        assert consistent(opened(host)) == []
        other.close()

    @pytest.mark.parametrize("seconds", [0.1, 2 * access.TIMEOUT + 0.1])
    def test_who_hands_over_while_the_table_is_locked_may_end(
        self, host: HostBackend, path: Path, run_python: Callable[..., Any], seconds: float
    ) -> None:
        """Its exit waits for that, and longer than one call does."""
        host.take([slot("own")])
        ended = run_python("-c", HANDS_OVER_AND_ENDS, path, str(seconds))
        assert (ended.returncode, ended.stderr) == (0, "")
        assert [holder.pid for holder in host.snapshot() if holder.token == "kept"] == [None]
        assert host.claim([(slot("kept"), slot("new"))])
        assert tokens(host) == ["new", "own"]

    def test_an_exit_is_not_held_up_by_a_file_that_cannot_be_opened(
        self, host: HostBackend, path: Path, run_python: Callable[..., Any]
    ) -> None:
        ended = run_python("-c", HANDS_OVER_WHAT_IS_GONE, path)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert float(ended.stdout) < 1

    def test_a_child_does_not_hand_over_what_its_parent_holds(self, host: HostBackend, path: Path) -> None:
        old = slot("old")
        host.take([old])
        fd = locked(path)
        host.detach([old])
        pid = os.fork()
        if pid == 0:
            start = monotonic()
            keeper.flush()
            left = host._access._late or host._access._kept or keeper._calls
            os._exit(1 if left or monotonic() - start > access.TIMEOUT else 0)
        assert exit_code(pid) == 0
        os.close(fd)
        assert wait_until(lambda: not host._access._late)  # the parent does
        assert [holder.pid for holder in host.snapshot()] == [None]

    def test_a_process_without_room_for_the_keepers_thread_hands_over(
        self, host: HostBackend, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_room() -> None:
            raise RuntimeError("can't start new thread")

        old = slot("old")
        host.take([old])
        fd = locked(path)
        with monkeypatch.context() as patched:
            patched.setattr(keeper, "ready", no_room)
            host.detach([old])
        os.close(fd)
        keeper.ready()
        assert wait_until(lambda: not host._access._late)
        assert [holder.pid for holder in host.snapshot()] == [None]


def locked(path: Path) -> int:
    """The table is locked until this descriptor is closed."""
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


#: For a Python of its own, which ends as any program does: the path, and for how many seconds the table stays locked.
HANDS_OVER_AND_ENDS = """
import sys, threading
from pathlib import Path
from os import close
from tests.test_claims import locked, made, slot

store = made(Path(sys.argv[1]))
store.take([slot("kept")])
timer = threading.Timer(float(sys.argv[2]), close, (locked(Path(sys.argv[1])),))
timer.daemon = True
timer.start()
store.detach([slot("kept")])
"""
HANDS_OVER_WHAT_IS_GONE = """
import sys, time
from pathlib import Path
from tests.test_claims import access, made, slot

path = Path(sys.argv[1])
gone = path.with_name("gone")
gone.mkdir()
store = made(gone / "table")
store.take([slot("kept")])
(gone / "table").unlink()
gone.rmdir()
store._access._looked -= access.LOOK_EVERY + 1
store.detach([slot("kept")])
start = time.monotonic()
access.keeper.flush()
print(time.monotonic() - start)
"""


class TestTheFile:
    """What was handed over, and what happens to its file."""

    def test_it_outlives_the_last_process(self, path: Path) -> None:
        died_with(path, [slot("kept", cost=2), slot("dropped")], [slot("kept", cost=2)])
        died_with(path, [], [])
        host = made(path)
        assert count(host) == 2
        assert tokens(host) == ["kept"]
        assert consistent(opened(host)) == []
        assert host.claim([(slot("kept", cost=2), slot("new", cost=2))])
        assert tokens(host) == ["new"]
        host.close()

    def test_it_does_not_outlive_its_lease_there(self, path: Path) -> None:
        died_with(path, [slot("kept", ttl=0.001)], [slot("kept", ttl=0.001)])
        sleep(0.002)  # the clock alone tells that a lease is over
        host = made(path)
        host.take([slot("own", "q")])
        assert cells(host) == 1
        host.close()

    @pytest.mark.parametrize("boot", ["another", "unknown", "unreadable", "never known"])
    def test_it_does_not_outlive_the_machine(
        self, path: Path, tmp_path: Path, boot: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if boot in ("unknown", "never known"):  # by whoever made the file
            monkeypatch.setattr(opening, "BOOT", str(tmp_path / "not there"))
        died_with(path, [slot("kept")], [slot("kept")])
        monkeypatch.undo()
        if boot == "another":
            (tmp_path / "boot_id").write_text("another one")
            monkeypatch.setattr(opening, "BOOT", str(tmp_path / "boot_id"))
        elif boot in ("unreadable", "never known"):
            monkeypatch.setattr(opening, "BOOT", str(tmp_path / "not there"))
        host = made(path)
        assert count(host) == 0
        host.close()

    def test_another_number_of_slots_begins_anew(self, path: Path) -> None:
        died_with(path, [slot("kept")], [slot("kept")])
        host = HostBackend(BackendConfig("default", "host", options={"path": path, "slots": 128}))
        assert count(host) == 0
        host.close()

    def test_a_last_process_that_died_inside_leaves_a_right_table(self, path: Path) -> None:
        pid = os.fork()
        if pid == 0:
            store = made(path)
            store.take([slot("kept", cost=2), slot("dropped")])
            store.detach([slot("kept", cost=2)])
            table = opened(store)
            table.words[Header.DIRTY] = 1
            table.map[table.layout.index_at : table.layout.size] = b"\7" * (table.layout.size - table.layout.index_at)
            os._exit(0)
        assert exit_code(pid) == 0
        host = made(path)
        assert count(host) == 2
        assert consistent(opened(host)) == []
        host.close()

    def test_it_moves_to_a_file_that_replaces_the_removed_one(self, host: HostBackend, path: Path) -> None:
        old = slot("old", cost=2)
        host.take([old])
        host.detach([old])
        path.unlink()
        host._access._looked -= access.LOOK_EVERY + 1
        assert count(host) == 2
        assert [holder.pid for holder in host.snapshot()] == [None]
        other = made(path)
        assert other.claim([(carried(old), slot("new", cost=2))])
        assert tokens(other) == ["new"]
        other.close()

    @pytest.mark.parametrize("alone", [True, False])
    def test_it_is_there_once_where_the_same_file_is_opened_again(
        self, host: HostBackend, path: Path, alone: bool
    ) -> None:
        old, own = slot("old", cost=2), slot("own")
        other = None if alone else made(path)
        if other is not None:
            other.take([slot("other", "q")])
        host.take([old])
        host.take([own])
        host.detach([old])
        os.close(host._access._fd)  # behind its back
        host._access._looked -= access.LOOK_EVERY + 1
        assert count(host) == 3
        assert sorted(set(tokens(host)) - {"other"}) == ["old", "own"]
        assert list(host.give([old, own])) == [True, True]
        assert count(host) == 0
        assert consistent(opened(host)) == []
        if other is not None:
            other.close()

    def test_nobody_is_no_process(self) -> None:
        assert layout.NOBODY >= layout.PROCESSES


# -- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(redis_server: RedisServer, proxy: Proxy, prefix: str) -> Iterator[Callable[..., RedisBackend]]:
    """Stores that have delivered all before the proxy stops."""
    made: list[RedisBackend] = []

    def make(url: str = redis_server.url, timeout: float = 2) -> RedisBackend:
        made.append(RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": timeout})))
        return made[-1]

    yield make
    for store in made:
        store.close()
        assert wait_until(lambda store=store: not store._delivering and not store._leftovers)


class TestRedis:
    def test_another_process_names_the_old_one_by_the_same_bytes(self) -> None:
        """Its `since` came as a float of JSON, or in whole milliseconds."""
        for number in range(20_000):
            old = Slot(
                "p", make_key("ü\n"), 1, 60, "t", True, "/p\n", 1 + number % 3, 1_764_103_040 + number * 0.000_737
            )
            assert wire.member(carried(old)) == wire.member(old)
            in_ms = carried(old)
            in_ms.since = int(wire.member(old).split(b"\n")[1].split(b"x")[0]) / 1000
            assert wire.member(in_ms) == wire.member(old)

    def test_a_claim_that_is_sent_twice_is_one(self, make: Callable[[], RedisBackend]) -> None:
        """A command whose connection is lost is sent again."""
        store, olds = make(), [slot("old", policy, cost=2) for policy in "ab"]
        store.take(olds)
        pairs = [(carried(old), slot("new", old.policy, cost=2)) for old in olds]
        send = store._lines.call

        def twice(packed: bytes, *more: Any) -> Any:
            send(packed, *more)
            return send(packed, *more)

        store._lines.call = twice  # type: ignore[method-assign]  # as after a reply that was lost
        assert store.claim(pairs)
        store._lines.call = send  # type: ignore[method-assign]
        assert [count(store, policy) for policy in "ab"] == [2, 2]
        assert not store.claim([(old, slot("late", old.policy, cost=2)) for old, _ in pairs])

    def test_of_a_claim_whose_reply_is_lost_the_new_one_goes(
        self, make: Callable[..., RedisBackend], proxy: Proxy, redis_server: RedisServer, prefix: str
    ) -> None:
        """The old one may be gone, which its caller counts again if he goes on."""
        store, old = make(proxy.url), slot("old", cost=3)
        store.take([old])
        store._recipe.timeout = 0.25
        proxy.drop_replies = True
        with pytest.raises(BackendError):
            store.claim([(carried(old), slot("new", cost=3))])
        proxy.drop_replies = False
        assert wait_until(lambda: redis_server.held(prefix) == 0)

    def test_a_keys_expiry_only_grows(
        self, make: Callable[[], RedisBackend], redis_server: RedisServer, prefix: str
    ) -> None:
        store, old = make(), slot("old", ttl=10)
        store.take([old])
        client = redis_server.client()
        (key,) = client.scan_iter(f"{{{prefix}}}:1:*")
        store.claim([(carried(old), slot("new", ttl=100))])
        assert client.pttl(key) > 90_000
        store.claim([(slot("new", ttl=100), slot("short", ttl=1))])
        assert client.pttl(key) > 90_000

    def test_a_key_of_another_type_is_an_error_and_changes_nothing(
        self, make: Callable[[], RedisBackend], redis_server: RedisServer, prefix: str
    ) -> None:
        store, old, bad = make(), slot("old", "a"), slot("old", "b")
        store.take([old])
        client: redis.Redis = redis_server.client()
        client.set(f"{{{prefix}}}:1:b:{bad.key.digest.hex()}", "x")
        with pytest.raises(PermanentBackendError):
            store.claim([(carried(old), slot("new", "a")), (bad, slot("new", "b"))])
        assert [holder.token for holder in store.snapshot()] == ["old"]
