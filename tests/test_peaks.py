"""Peaks: the most that take replies saw in flight, on every store, without a request that pays for it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from django_concurrency_mw import backends, conf, hold, peaks
from django_concurrency_mw.backends import BackendConfig, get_backend
from django_concurrency_mw.backends.base import PROBE, BaseBackend, has_host
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token, process_id

from .conftest import ROOT
from .redis_server import RedisServer
from .support import SOON, Limits, everything, exit_code, wait_until
from .views import held, switch

KINDS = ["memory", "redis", *(["host"] if has_host() else [])]
#: Seconds that stand for never, in a test.
NEVER = 3600.0

Make = Callable[[], BaseBackend]


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> BackendConfig:
    """Of one store of each kind, with nothing in it."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        return BackendConfig("default", "redis", server.url, prefix, {"socket_timeout": 5})
    options = {"path": tmp_path / "table", "slots": 256} if request.param == "host" else {}
    return BackendConfig("default", request.param, None, prefix, options)


@pytest.fixture
def make(config: BackendConfig) -> Iterator[Make]:
    """Call it once more for what another process has; the memory store has no other one."""
    made: list[BaseBackend] = []

    def make() -> BaseBackend:
        if not made or config.backend != "memory":
            made.append(get_backend("default", {"default": config}))
            backends._instances.clear()
        return made[-1]

    yield make
    for store in made:
        getattr(store, "close", lambda: None)()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No note comes by itself."""
    monkeypatch.setattr(peaks, "NOTE_EVERY", NEVER)


def slot(
    policy: str = "p", key: str = "k", limit: int = 100, ttl: float = 60.0, cost: int = 1, token: str = ""
) -> Slot:
    return Slot(policy, make_key(key), limit, ttl, token or new_token(), True, "/path/", cost)


def calls_about(store: BaseBackend, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """In how many seconds the keeper was asked to call back about this store, which it does not do. It goes on with all that
    is not about it: stores and leases of other tests may be alive."""
    asked: list[float] = []
    at = keeper.at

    def listen(seconds: float, call: Any) -> None:
        if getattr(call, "args", None) == (id(store),):
            asked.append(seconds)
        else:
            at(seconds, call)

    monkeypatch.setattr(keeper, "at", listen)
    return asked


def note(store: BaseBackend) -> None:
    """As the keeper does it, now."""
    with keeper.at_work():
        peaks._note(id(store))


def window(store: BaseBackend) -> Mapping[str, int]:
    return peaks.most_seen.get(id(store), {})


class TestWhatAStoreKeeps:
    """Through `note`, `peaks` and `reset_peaks` alone."""

    def test_the_highest_note_of_any_process_stands(self, make: Make) -> None:
        one, other = make(), make()
        assert dict(one.peaks()) == {}
        one.note({"a.b-C_1": 3, "q": 5})
        other.note({"a.b-C_1": 7, "q": 4})
        one.note({"a.b-C_1": 6})
        one.note({})
        assert dict(one.peaks()) == dict(other.peaks()) == {"a.b-C_1": 7, "q": 5}

    def test_a_reset_forgets_all_and_lets_new_ones_in(self, make: Make) -> None:
        one, other = make(), make()
        one.note({"p": 3, "q": 5})
        other.reset_peaks()
        assert dict(one.peaks()) == {}
        one.note({"p": 1})
        assert dict(other.peaks()) == {"p": 1}

    def test_peaks_are_no_holders_and_holders_no_peaks(self, make: Make) -> None:
        store, one = make(), slot()
        store.note({"p": 3})
        assert list(store.snapshot()) == []
        assert isinstance(store.take([one]), Taken)
        store.reset_peaks()
        assert [holder.token for holder in store.snapshot()] == [one.token]
        assert store.evict(one.token)
        store.note({"p": 2})
        assert store.evict(one.token) is False
        assert dict(store.peaks()) == {"p": 2}

    def test_who_holds_is_told_with_host_pid_and_ttl(self, make: Make, config: BackendConfig) -> None:
        store, one = make(), slot(ttl=45.0)
        store.take([one])
        store.note({})
        (holder,) = make().snapshot()
        assert (holder.host, holder.pid) == (os.uname().nodename, os.getpid())
        assert holder.ttl == (None if config.backend == "redis" else 45.0)

    def test_long_names_are_told_apart(self, make: Make, config: BackendConfig) -> None:
        names = ["x" * 300 + end for end in ("a", "b")] + ["y" * 104, "é" * 60]
        make().note(dict(zip(names, (1, 2, 3, 4), strict=True)))
        found = make().peaks()
        assert sorted(found.values()) == [1, 2, 3, 4]
        assert found["y" * 104] == 3
        if config.backend != "host":
            assert sorted(found) == sorted(names)

    @pytest.mark.skipif("host" not in KINDS, reason="not on this platform")
    @pytest.mark.parametrize("config", ["host"], indirect=True)
    def test_one_policy_too_many_is_left_out(self, make: Make) -> None:
        store = make()
        names = {f"policy-{number}": number + 1 for number in range(1025)}
        store.note(names)
        found = dict(store.peaks())
        assert len(found) == 1024
        assert found.items() <= names.items()
        store.note({"policy-0": 5000})
        assert store.peaks()["policy-0"] == 5000


class TestCounts:
    def test_it_is_what_a_take_would_find_and_changes_nothing(self, make: Make) -> None:
        store, other = make(), make()
        held = [slot(cost=3), slot("q"), slot(key="other"), slot()]
        for one in held:
            store.take([one])
        before = sorted(store.snapshot(), key=lambda holder: holder.token)
        asked = [slot(limit=0), slot("q"), slot(key="other"), slot("nobody")]
        assert list(other.counts(asked)) == [4, 1, 1, 0]
        assert list(store.counts(asked[:1])) == list(other.counts([slot(limit=0)])) == [4]
        assert list(store.counts([])) == []
        after = sorted(store.snapshot(), key=lambda holder: holder.token)
        assert [one.token for one in before] == [one.token for one in after]
        reply = store.take([slot(limit=0)])
        assert isinstance(reply, Full)
        assert reply.in_flight == (4,)

    def test_who_has_lapsed_does_not_count(self, make: Make) -> None:
        store, short, long = make(), slot(ttl=0.03, cost=2), slot()
        store.take([short])
        store.take([long])
        assert wait_until(lambda: list(store.counts([slot()])) == [1])
        assert list(make().counts([slot()])) == [1]
        assert isinstance(store.take([slot(limit=2)]), Taken)


class TestSeen:
    """What requests have to do with it."""

    def test_sixteen_threads_reach_a_peak_that_is_told_exactly(self, make: Make, quiet: None) -> None:
        """Against the highest of all the replies that they were given."""
        store = make()
        names = ["p", "q", "r"]
        most: list[dict[str, int]] = [dict.fromkeys(names, 0) for _ in range(16)]
        go = threading.Barrier(16)

        def work(number: int) -> None:
            go.wait()
            for turn in range(25):
                slots = tuple(
                    slot(name, limit=12 + turn % 3, token=f"t{number}-{turn}") for name in names[: 1 + turn % 3]
                )
                reply = store.take(slots)
                peaks.seen(store, slots, reply.in_flight)
                for one, count in zip(slots, reply.in_flight, strict=True):
                    most[number][one.policy] = max(most[number][one.policy], count)
                if number == 0 and turn % 5 == 0:
                    note(store)
                if turn == 0:  # all of them have taken before anybody gives back
                    go.wait()
                if isinstance(reply, Taken):
                    store.give(slots)

        run_all(work, 16)
        note(store)
        gauge = {name: max(each[name] for each in most) for name in names}
        assert dict(make().peaks()) == gauge
        assert gauge["p"] >= 12, "nobody met anybody"

    def test_no_maximum_is_lost_to_a_note_at_the_same_time(self, quiet: None) -> None:
        store = MemoryBackend(BackendConfig("default", "memory"))
        stop = threading.Event()
        one = slot()

        def notes() -> None:
            while not stop.is_set():
                note(store)

        noting = threading.Thread(target=notes)
        noting.start()
        run_all(lambda number: [peaks.seen(store, (one,), (count * 8 + number,)) for count in range(1, 2000)], 8)
        stop.set()
        noting.join()
        note(store)
        assert dict(store.peaks()) == {"p": 1999 * 8 + 7}

    def test_what_is_seen_during_a_note_is_for_the_next_one(self, quiet: None) -> None:
        class Slow(MemoryBackend):
            def note(self, peaks_: Mapping[str, int]) -> None:
                super().note(peaks_)
                if peaks_["p"] == 3:
                    peaks.seen(self, (slot(),), (7,))

        store = Slow(BackendConfig("default", "memory"))
        peaks.seen(store, (slot(),), (3,))
        note(store)
        assert dict(store.peaks()) == {"p": 3}
        note(store)
        assert dict(store.peaks()) == {"p": 7}

    def test_a_request_is_counted_admitted_or_not(self, limits: Limits, client: Client, quiet: None) -> None:
        table = {
            "policies": {name: {"url_names": ["*"], "key": "global", "max_concurrent": most} for name, most in POLICIES}
        }
        limits(table)
        store = the_store()
        switch.stop_at = 0
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(Client().get("/plain/").status_code)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: len(held()) == 4)
        assert client.get("/plain/").status_code == 429
        switch.go.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert dict(window(store)) == {"wide": 2, "narrow": 2}

    def test_who_is_turned_away_sees_what_others_hold(self, limits: Limits, client: Client, quiet: None) -> None:
        limits(everything(2))
        store = the_store()
        store.take([Slot("all", make_key("global"), 2, 60.0, new_token(), cost=2)])
        assert client.get("/plain/").status_code == 429
        assert dict(window(store)) == {"all": 2}

    def test_it_comes_to_the_store_by_itself(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peaks, "NOTE_EVERY", 0.05)
        store, one = make(), slot()
        peaks.seen(store, (one,), (3,))
        assert wait_until(lambda: dict(store.peaks()) == {"p": 3})
        peaks.seen(store, (one,), (2,))
        assert wait_until(lambda: not window(store))
        peaks.seen(store, (one,), (4,))
        assert wait_until(lambda: dict(store.peaks()) == {"p": 4})

    def test_a_window_has_one_note(self, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
        store = MemoryBackend(BackendConfig("default", "memory"))
        asked = calls_about(store, monkeypatch)
        for count in (1, 2, 5, 3):
            peaks.seen(store, (slot("a"), slot("b")), (count, count + 1))
        assert asked == [NEVER]
        assert window(store) == {"a": 5, "b": 6}

    def test_probes_and_nobody_in_flight_are_no_peak(self, quiet: None) -> None:
        store = MemoryBackend(BackendConfig("default", "memory"))
        peaks.seen(store, (slot(PROBE), slot("p")), (7, 0))
        peaks.seen(store, (slot(PROBE),), (7,))
        assert id(store) not in peaks.most_seen

    def test_outside_a_request_too(self, limits: Limits, quiet: None) -> None:
        limits({"policies": {"tasks": {"key": "global", "max_concurrent": 3}}})
        with hold("tasks"), hold("tasks"):
            pass
        assert window(the_store()) == {"tasks": 2}

    def test_a_store_that_nobody_has_any_more_leaves_nothing(self, quiet: None) -> None:
        store = MemoryBackend(BackendConfig("default", "memory"))
        peaks.seen(store, (slot(),), (1,))
        number = id(store)
        assert number in peaks.most_seen
        del store
        gc.collect()
        assert number not in peaks.most_seen
        assert number not in peaks._stores
        peaks._note(number)


class Dead(MemoryBackend):
    """One whose notes fail, until it is told not to."""

    dead = True
    asked = 0

    def note(self, peaks: Mapping[str, int]) -> None:
        self.asked += 1
        if self.dead:
            raise BackendError("dead")
        super().note(peaks)


@pytest.fixture
def dead() -> Dead:
    return Dead(BackendConfig("default", "memory"))


class TestAStoreThatFails:
    def test_keeps_the_window_for_the_next_time(
        self, dead: Dead, quiet: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        peaks.seen(dead, (slot("a"), slot("b")), (4, 2))
        note(dead)
        peaks.seen(dead, (slot("a"), slot("b")), (3, 6))
        note(dead)
        assert dead.asked == 2
        assert dict(window(dead)) == {"a": 4, "b": 6}
        dead.dead = False
        note(dead)
        assert dict(dead.peaks()) == {"a": 4, "b": 6}
        assert not window(dead)
        assert caplog.records == [], "an error is never loud"

    def test_is_asked_again_by_itself(self, dead: Dead, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peaks, "NOTE_EVERY", 0.02)
        peaks.seen(dead, (slot(),), (4,))
        assert wait_until(lambda: dead.asked >= 2)
        dead.dead = False
        assert wait_until(lambda: dict(dead.peaks()) == {"p": 4})

    def test_is_left_alone_while_it_is_known_to(self, dead: Dead, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peaks, "NOTE_EVERY", 0.02)
        dead.dead, dead.failure = False, BackendError("away")
        asked = calls_about(dead, monkeypatch)
        peaks.seen(dead, (slot(),), (4,))
        note(dead)
        assert dead.asked == 0
        assert asked == [0.02, 0.02], "the next try is due"
        dead.failure = None
        note(dead)
        assert dict(dead.peaks()) == {"p": 4}

    def test_a_request_goes_on_where_no_thread_can_be_started(
        self, dead: Dead, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_room(seconds: float, call: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(keeper, "at", no_room)
        peaks.seen(dead, (slot(),), (4,))
        assert dict(window(dead)) == {"p": 4}


class TestWhoHoldsForLong:
    """A store forgets a process that says nothing for a while; who holds something says so again."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Callable[[], None]]]:
        calls: list[tuple[float, Callable[[], None]]] = []
        at = keeper.at

        def seen(seconds: float, call: Callable[[], None]) -> None:
            if getattr(call, "func", None) in (peaks._note, peaks._still_here):
                calls.append((seconds, call))
            else:
                at(seconds, call)

        monkeypatch.setattr(keeper, "at", seen)
        return calls

    def test_is_noted_again_until_nothing_is_held(
        self, limits: Limits, calls: list[tuple[float, Callable[[], None]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits({"policies": {"tasks": {"key": "global", "max_concurrent": 3, "ttl": 86_400}}})
        store = the_store()
        with hold("tasks"):
            note(store)
            assert [seconds for seconds, _ in calls] == [peaks.NOTE_EVERY, peaks.STILL_HERE_EVERY]
            peaks._noted[id(store)] -= peaks.STILL_HERE_EVERY
            calls[1][1]()
            assert id(store) in peaks.most_seen, "the next note is due"
            assert [seconds for seconds, _ in calls[2:]] == [peaks.NOTE_EVERY, peaks.STILL_HERE_EVERY]
            note(store)
            assert len(calls) == 4
            calls[3][1]()
            assert len(calls) == 5, "it was noted a moment ago"
            assert 0 < calls[4][0] <= peaks.STILL_HERE_EVERY
        calls[4][1]()
        assert len(calls) == 5
        assert id(store) not in peaks._noted

    def test_redis_forgets_nobody_before_he_says_so_again(self) -> None:
        assert 2 * peaks.STILL_HERE_EVERY + 10 < wire.PROCESS_FOR

    def test_who_claims_is_noted_too(self, limits: Limits, calls: list[tuple[float, Callable[[], None]]]) -> None:
        limits({"policies": {"tasks": {"key": "global", "max_concurrent": 3}}})
        with hold("tasks") as concurrency:
            token = concurrency.hand_over()
        peaks.most_seen.clear()
        with hold(token):
            assert id(the_store()) in peaks.most_seen


#: In another process: takes and keeps, and sees as many as it is told to.
PROGRAM = """
import json, sys
from pathlib import Path
import django
django.setup()
from django_concurrency_mw import peaks
from django_concurrency_mw.backends import BackendConfig, get_backend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.tokens import new_token
peaks.NOTE_EVERY = 3600.0
given = json.loads(sys.argv[1])
store = get_backend("default", {"default": BackendConfig("default", *given["config"])})
for number in range(given["takes"]):
    one = Slot("p", make_key("k"), 100, 60.0, new_token())
    peaks.seen(store, (one,), store.take([one]).in_flight)
    print(one.token, flush=True)
sys.stdin.readline()
"""


class TestProcesses:
    @pytest.mark.parametrize("config", [kind for kind in KINDS if kind != "memory"], indirect=True)
    def test_their_peaks_meet_and_each_holder_has_its_pid(self, config: BackendConfig, make: Make) -> None:
        """What a process saw is in the store when it has ended, however short it lived."""
        program = {
            "config": [
                config.backend,
                config.location,
                config.key_prefix,
                {k: str(v) if k == "path" else v for k, v in config.options.items()},
            ],
        }
        env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps({**program, "takes": takes})],
                env=env,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for takes in (2, 3)
        ]
        try:
            tokens = {each.stdout.readline().strip(): each.pid for each in running if each.stdout for _ in range(2)}
            assert wait_until(lambda: list(make().counts([slot()])) == [5])
            store = make()
            if config.backend == "host":  # its table knows at once
                assert {tokens[one.token]: one.pid for one in store.snapshot() if one.token in tokens} == {
                    each.pid: each.pid for each in running
                }
            for each in running:
                _, _ = each.communicate("end\n", timeout=120)
                assert each.returncode == 0
        finally:
            for each in running:
                each.kill()
                each.wait()
        assert dict(store.peaks()) == {"p": 5}
        if config.backend == "redis":  # it has no way to see that they have ended
            assert {tokens[one.token]: one.pid for one in store.snapshot() if one.token in tokens} == {
                each.pid: each.pid for each in running
            }
            assert {one.host for one in store.snapshot()} == {os.uname().nodename}
        else:
            assert list(store.snapshot()) == []

    def test_a_forked_child_notes_what_it_sees_itself(self, make: Make, quiet: None) -> None:
        store, parents = make(), process_id()
        peaks.seen(store, (slot(),), (9,))
        child = os.fork()
        if not child:
            code = 1
            try:
                if not window(store) and process_id() != parents:
                    peaks.seen(store, (slot("child"),), (2,))
                    note(store)
                    code = 0 if dict(store.peaks()) == {"child": 2} else 2
            finally:
                os._exit(code)
        assert exit_code(child) == 0
        assert dict(window(store)) == {"p": 9}
        note(store)
        expected = {"p": 9, "child": 2}
        if isinstance(store, MemoryBackend):
            del expected["child"]
        assert dict(store.peaks()) == expected

    def test_a_fork_while_somebody_notes_does_no_harm(self, quiet: None) -> None:
        store = MemoryBackend(BackendConfig("default", "memory"))
        with peaks._changing:
            child = os.fork()
            if not child:
                code = 1
                try:
                    reached = threading.Thread(target=lambda: peaks.seen(store, (slot(),), (2,)), daemon=True)
                    reached.start()
                    reached.join(SOON)
                    code = 0 if dict(window(store)) == {"p": 2} else 2
                finally:
                    os._exit(code)
            assert exit_code(child) == 0


POLICIES = [("wide", 5), ("narrow", 2)]


def the_store() -> BaseBackend:
    config = conf.current()
    return get_backend("default", config.backends)


def run_all(work: Callable[[int], Any], number: int) -> None:
    errors: list[BaseException] = []

    def one(which: int) -> None:
        try:
            work(which)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
