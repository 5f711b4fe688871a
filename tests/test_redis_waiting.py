"""The line of the Redis store: what is sent, who is told, and what a lost connection or a dead process costs those who wait.

What the lines of every store promise is in test_waiting.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import pytest
from redis.exceptions import ResponseError

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.backends.redis.listening import Ear
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, LineFull, Queued, QueueReply, Taken
from django_concurrency_mw.tokens import new_token, process_id, process_of

from .redis_server import RedisServer
from .support import await_until, exit_code, wait_until
from .test_waiting import GLOBAL, Client, places, settled

Make = Callable[..., Client]

#: Another process that stands in line and asks no more, with a forked child if its first argument says so.
ANOTHER = """
import os
import sys
import django
from django.conf import settings
settings.configure()
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.store import RedisBackend
from tests.test_waiting import Client
forks, url, prefix, *policies = sys.argv[1:]
store = RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 5}))
one = Client(store, *policies)
reply = one.ask()
if forks and os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print(type(reply).__name__, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """That nobody else uses."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture
def make_store(redis_server: RedisServer, prefix: str) -> Iterator[Callable[..., RedisBackend]]:
    made: list[RedisBackend] = []

    def make(url: str = redis_server.url) -> RedisBackend:
        made.append(RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 2})))
        return made[-1]

    yield make
    for store in made:
        settled(store)


@pytest.fixture
def store(make_store: Callable[..., RedisBackend]) -> RedisBackend:
    return make_store()


@pytest.fixture
def client(store: RedisBackend) -> Iterator[Make]:
    made: list[Client] = []

    def make(*policies: str, **options: Any) -> Client:
        made.append(Client(store, *policies, **options))
        return made[-1]

    yield make
    for one in made:
        one.give()
        one.bell.close()
        settled(one.store)
    assert store.snapshot() == []
    assert store.waiters() == []


def without_wait(one: Client) -> Client:
    """The same, of a policy that lets nobody wait."""
    one.slots = tuple(replace(slot, waits=False, memo=[]) for slot in one.slots)
    return one


def ask_from_the_grave(one: Client, process: str = "dead") -> None:
    """As a process did that listens no more."""
    assert isinstance(one.store, RedisBackend)
    keys = one.store._keys
    ask = partial(keys.queue, one.slots, one.most, keys.channel(process))
    one.store._call(ask(), (), partial(ask, whole=True))


def ears() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "concurrency-ear"}


def listeners(server: RedisServer, store: RedisBackend, process: str = "") -> int:
    with server.client() as client:
        ((_, number),) = client.pubsub_numsub(store._keys.channel(process or process_id()))
        return int(number)


def killed(process: subprocess.Popen[str], token: str, server: RedisServer, store: RedisBackend) -> None:
    """It is dead, and the server has seen it."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_until(lambda: listeners(server, store, process_of(token)) == 0)


@pytest.fixture
def another(redis_server: RedisServer, prefix: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another process that asks once, and then stands wherever that has brought it."""
    made: list[subprocess.Popen[str]] = []

    def start(*policies: str, forks: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ANOTHER, "forks" * forks, redis_server.url, prefix, *policies]
        made.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout is not None
        assert made[-1].stdout.readline().split()[:1] == ["Queued"]
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


class TestPackets:
    def test_where_nobody_may_wait_nothing_is_sent_but_what_always_was(self, store: RedisBackend, client: Make) -> None:
        one = without_wait(client("a"))
        (slot,) = one.slots
        packed, keys = wire.pack, store._keys
        name = keys.prefix + b"a:" + GLOBAL.digest.hex().encode()
        stored = wire.member(slot)
        one.take()
        assert keys.take(one.slots) == packed(b"EVALSHA", wire.TAKE.sha, b"1", name, b"1", b"60000", b"1", stored)
        assert [release.packed for release in keys.give(one.slots)] == [packed(b"ZREM", name, stored)]
        two = replace(slot, cost=2, memo=[])
        store.take([two])
        (release,) = keys.give([two])
        assert release.packed.startswith(b"*5\r\n$4\r\nEVAL\r\n")

    def test_who_may_wait_frees_first_and_wakes_then_with_one_command_for_all(
        self, store: RedisBackend, client: Make
    ) -> None:
        one = client("a", "b")
        packets = [release.packed for release in store._keys.give(one.slots)]
        assert [packed.split(b"\r\n")[2] for packed in packets] == [b"ZREM", b"ZREM", b"EVALSHA"]
        assert wire.WAKE.sha + b"\r\n$1\r\n2\r\n" in packets[2]
        for slot in one.slots:
            assert store._keys.semaphore(slot) in packets[2]

    def test_who_may_not_wait_wakes_where_somebody_who_may_was_within_a_lease(
        self, store: RedisBackend, client: Make
    ) -> None:
        once, holder, waiter = client("a", "b", limit=2), without_wait(client("a", "b")), client("a")
        once.take()
        once.give()
        settled(store)
        assert holder.take() == Taken((True, True), (1, 1))
        assert isinstance(waiter.ask(), Queued)
        holder.give()
        assert wait_until(waiter.holds), "the line may be younger than the slot"

    def test_so_does_who_has_claimed_its_slot(self, store: RedisBackend, client: Make) -> None:
        first, heir = without_wait(client("c")), without_wait(client("c"))
        first.take()
        assert store.claim([*zip(first.slots, heir.slots, strict=True)])
        assert len(store._keys.give(heir.slots)) == 1, "nobody has ever waited here"
        once, holder, waiter, next_one = client("a"), without_wait(client("a")), client("a"), without_wait(client("a"))
        once.take()
        once.give()
        settled(store)
        holder.take()
        assert isinstance(waiter.ask(), Queued)
        assert store.claim([*zip(holder.slots, next_one.slots, strict=True)])
        next_one.give()
        assert wait_until(waiter.holds)

    def test_that_is_forgotten_a_while_after_the_last(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        once, holder = client("a", ttl=7), without_wait(client("a"))
        once.take()
        once.give()
        settled(store)
        with redis_server.client() as server:
            (mark,) = server.scan_iter(store._keys.prefix + b"!waits:*")
            assert 7000 <= int(server.pttl(mark)) <= 14000
            server.delete(mark)
        holder.take()
        assert len(store._keys.give(holder.slots)) == 1

    def test_clients_that_have_gone_leave_nothing_behind(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        """There may be millions of them, each with a key of its own."""

        def kept() -> set[bytes]:
            settled(store)
            with redis_server.client() as server:
                names = set(server.scan_iter(store._keys.prefix + b"*"))
            return names - {store._keys.peaks, store._keys.process(process_id())}

        for number in range(3):
            one = client("a", ttl=3600)
            one.slots = (replace(one.slots[0], key=make_key(f"ip:{number}"), memo=[]),)
            one.take()
            one.give()
        assert kept() == {store._keys.prefix + b"!waits", store._keys.prefix + b"!waits:a"}

    def test_a_release_looks_only_at_its_own_line(self, own_server: RedisServer) -> None:
        """With a hundred who wait elsewhere the server carries out what it does with none."""
        store = RedisBackend(BackendConfig("default", "redis", own_server.url, "own", {"socket_timeout": 2}))

        def commands() -> dict[str, int]:
            one = Client(store, "alone")
            one.ask()
            one.bell.close()
            settled(store)
            with own_server.client() as server:
                before = {name: said["calls"] for name, said in server.info("commandstats").items()}
                one.give()
                settled(store)
                after = {name: said["calls"] for name, said in server.info("commandstats").items()}
            theirs = ("cmdstat_ping", "cmdstat_info")
            return {
                name: number - before.get(name, 0)
                for name, number in after.items()
                if name not in theirs and number != before.get(name, 0)
            }

        commands()
        without = commands()
        assert without["cmdstat_evalsha"] == 1
        crowd = [Client(store, "crowded") for _ in range(100)]
        assert {type(one.ask()) for one in crowd[1:]} <= {Taken, Queued}
        assert commands() == without
        for one in crowd:
            one.bell.close()
        settled(store)


class TestNobodyOvertakes:
    def test_a_take_lets_those_in_who_wait(self, store: RedisBackend, client: Make) -> None:
        """Something became free without a word: by a process of a release that knows no lines."""
        holder, waiter, newcomer = client("a"), client("a"), without_wait(client("a"))
        holder.take()
        waiter.ask()
        store._lines.tell(store._keys.give(holder.slots)[:1])  # all that such a process sends
        settled(store)
        assert newcomer.take() == Full((True,), (1,))
        assert waiter.holds()

    def test_such_a_release_is_seen_by_whoever_is_first(self, store: RedisBackend, client: Make) -> None:
        holder, waiter = client("a"), client("a")
        holder.take()
        assert isinstance(waiter.ask(), Queued)
        store._lines.tell(store._keys.give(holder.slots)[:1])
        settled(store)
        assert isinstance(waiter.ask(), Taken)

    def test_who_holds_already_is_not_kept_out_by_a_line(self, store: RedisBackend, client: Make) -> None:
        holder, waiter = client("a", limit=2), client("a", limit=2, cost=2)
        holder.take()
        waiter.ask()
        assert holder.take() == Taken((True,), (1,))

    def test_two_slots_that_are_given_back_together_go_to_one_who_waits_for_both(
        self, store: RedisBackend, client: Make
    ) -> None:
        holder, waiter, behind = client("a", "b"), client("a", "b"), client("a")
        holder.take()
        waiter.ask()
        behind.ask()
        holder.give()
        assert wait_until(waiter.holds), "between the two it would have to let the one behind it go first"
        assert places(store, behind) == [[("a", 1)]]

    def test_one_of_several_slots_given_back_is_the_end_of_the_wait_for_all(
        self, store: RedisBackend, client: Make
    ) -> None:
        holder, waiter = client("a", "b"), client("a", "b")
        holder.take()
        waiter.ask()
        assert places(store, waiter) == [[("a", 1), ("b", 1)]]
        store.give(waiter.slots[:1])
        settled(store)
        assert places(store, waiter) == [[]]

    @pytest.mark.parametrize(("most", "kind"), [(None, Full), (0, LineFull), (9, Queued)])
    def test_who_cannot_have_all_any_more_keeps_none_of_it(
        self, client: Make, most: int | None, kind: type[QueueReply]
    ) -> None:
        """It was let in to both, and the shorter lease ended before it asked."""
        holder, waiter, other, behind = client("a", "b"), client("a", "b"), client("a"), client("b")
        waiter.slots = (replace(waiter.slots[0], ttl=0.05, memo=[]), waiter.slots[1])
        holder.ask()
        waiter.ask()
        behind.ask()
        holder.give()
        assert wait_until(lambda: isinstance(other.take(), Taken))
        waiter.most = (most, most)
        assert isinstance(waiter.ask(), kind)
        assert behind.holds()
        assert not waiter.holds()

    def test_one_that_cannot_use_what_is_free_lets_the_next_one_in_with_the_same_release(
        self, store: RedisBackend, client: Make
    ) -> None:
        of_a, of_b, both, behind = client("a"), client("b"), client("a", "b"), client("b")
        of_b.take()
        both.ask()
        behind.ask()
        of_a.take()
        of_b.give()
        assert wait_until(behind.holds)
        both.bell.wait(60)
        assert isinstance(both.ask(), Queued)

    def test_who_asks_for_the_last_time_lets_those_have_what_it_could_not_use(
        self, store: RedisBackend, client: Make
    ) -> None:
        holder, large, small = client("a", limit=3), client("a", limit=3, cost=3), client("a", limit=3)
        for one in (holder, large, small):
            one.ask()
        assert isinstance(large.ask_for_the_last_time(), Full)
        assert wait_until(small.holds)

    def test_a_limit_that_is_exceeded_lets_nobody_in(self, store: RedisBackend, client: Make) -> None:
        """By holders that are counted again, say, or let in under a higher limit."""
        first, second, waiter = client("a", limit=5), client("a", limit=5), client("a")
        first.take()
        second.take()
        assert isinstance(waiter.ask(), Queued)
        first.give()
        settled(store)
        assert not waiter.holds()
        second.give()
        assert wait_until(waiter.holds)


class TestTheDead:
    def test_one_who_was_let_in_and_never_asks_keeps_nobody_waiting_for_its_whole_lease(
        self, store: RedisBackend, client: Make
    ) -> None:
        holder, waiter = client("a"), client("a")
        holder.take()
        waiter.ask()
        holder.give()
        assert wait_until(waiter.holds)
        (granted,) = store.snapshot()
        assert 0 < granted.lease_left <= 5
        assert isinstance(waiter.ask(), Taken)
        (granted,) = store.snapshot()
        assert 5 < granted.lease_left <= 60

    def test_a_process_killed_at_the_head_of_the_line_is_passed_over_by_the_next_release(
        self,
        store: RedisBackend,
        client: Make,
        another: Callable[..., subprocess.Popen[str]],
        redis_server: RedisServer,
    ) -> None:
        holder, waiter = client("a"), client("a")
        holder.take()
        dead = another("a")
        waiter.ask()
        (first, second) = store.waiters()
        assert second.token == waiter.slots[0].token
        killed(dead, first.token, redis_server, store)
        with redis_server.client() as server:
            server.persist(store._keys.waiter(first.token.encode()))  # its place has not ended by itself
            holder.give()
            assert wait_until(waiter.holds)
            server.pexpire(store._keys.waiter(first.token.encode()), 1)
        waiter.give()
        settled(store)
        assert isinstance(client("a").ask(), Taken), "and nothing is kept for it"

    def test_nor_does_it_stand_before_who_asks(
        self,
        store: RedisBackend,
        client: Make,
        another: Callable[..., subprocess.Popen[str]],
        redis_server: RedisServer,
    ) -> None:
        holder, other, waiter = [client("a", limit=2) for _ in range(3)]
        holder.take()
        other.take()
        dead = another("a")
        waiter.ask()
        (first, _) = store.waiters()
        killed(dead, first.token, redis_server, store)
        store._lines.tell(store._keys.give(other.slots)[:1])
        settled(store)
        assert isinstance(waiter.ask(), Taken)
        with redis_server.client() as server:
            assert server.pexpire(store._keys.waiter(first.token.encode()), 1), "its place has not ended by itself"

    def test_who_listens_again_stands_where_it_stood(self, client: Make) -> None:
        holder, first, second, third = [client("a") for _ in range(4)]
        holder.ask()
        ask_from_the_grave(first)
        assert [one.ask().ahead for one in (second, third)] == [0, 1], "nobody keeps the living waiting"
        assert [one.ask().ahead for one in (first, second, third)] == [0, 1, 2]
        holder.give()
        assert wait_until(first.holds)

    def test_nobody_walks_along_the_dead_twice(self, own_server: RedisServer) -> None:
        store = RedisBackend(BackendConfig("default", "redis", own_server.url, "own", {"socket_timeout": 2}))
        holder, waiter, *dead = [Client(store, "a") for _ in range(30)]

        def commands() -> int:
            with own_server.client() as server:
                before = sum(said["calls"] for said in server.info("commandstats").values())
                waiter.ask()
                return sum(said["calls"] for said in server.info("commandstats").values()) - before

        holder.ask()
        waiter.ask()
        without = commands()
        waiter.give()
        settled(store)
        for number, one in enumerate(dead):
            ask_from_the_grave(one, str(number))
        waiter.ask()
        assert commands() == without
        holder.give()
        assert wait_until(waiter.holds)
        for one in (holder, waiter, *dead):
            one.give()
            one.bell.close()
        settled(store)

    def test_who_has_not_asked_for_long_has_no_place(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        holder, gone, waiter, third = [client("a", most=2) for _ in range(4)]
        holder.take()
        gone.ask()
        waiter.ask()
        with redis_server.client() as server:
            record = store._keys.waiter(gone.slots[0].token.encode())
            assert 0 < int(server.pttl(record)) <= 5000
            server.delete(record)
        assert places(store, gone, waiter) == [[], [("a", 1)]]
        assert isinstance(third.ask(), Queued), "it does not count against the bound either"
        holder.give()
        assert wait_until(waiter.holds)
        assert isinstance(gone.ask(), LineFull | Queued)

    def test_those_in_the_middle_are_not_counted_either(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        holder, first, gone, third = [client("a", most=2) for _ in range(4)]
        holder.take()
        first.ask()
        gone.ask()
        assert third.ask() == LineFull((True,), (1,))
        with redis_server.client() as server:
            for key in (
                store._keys.waiter(first.slots[0].token.encode()),
                *server.scan_iter(store._keys.lines_pattern),
            ):
                server.persist(key)  # as if the first went on asking
            server.delete(store._keys.waiter(gone.slots[0].token.encode()))
        assert wait_until(lambda: isinstance(third.ask(), Queued)), "it is looked up once a second"


class TestTheEar:
    def test_it_is_there_while_somebody_waits_and_a_little_longer(
        self, store: RedisBackend, client: Make, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_concurrency_mw.backends.redis.listening.ASK_AFTER", 0.05)
        monkeypatch.setattr("django_concurrency_mw.backends.redis.listening.CLOSE_AFTER", 0.2)
        others = ears()
        assert listeners(redis_server, store) == 0
        for _ in range(2):
            holder, waiter = client("a"), client("a")
            holder.ask()
            waiter.ask()
            assert (len(ears() - others), listeners(redis_server, store)) == (1, 1)
            for one in (holder, waiter):
                one.give()
                one.bell.close()
            assert wait_until(lambda: not ears() - others and listeners(redis_server, store) == 0)

    def test_a_silent_connection_is_asked_whether_it_lives(
        self, store: RedisBackend, client: Make, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("django_concurrency_mw.backends.redis.listening.ASK_AFTER", 0.1)
        client("a").ask()
        with redis_server.client() as server:
            before = server.info("commandstats").get("cmdstat_ping", {}).get("calls", 0)

            def pinged() -> bool:
                return bool(server.info("commandstats").get("cmdstat_ping", {}).get("calls", 0) >= before + 3)

            assert wait_until(pinged)
        assert store._ear.connects == 1

    def test_threads_and_loops_share_it(self, store: RedisBackend, client: Make, redis_server: RedisServer) -> None:
        async def one_more() -> None:
            waiter = client("a")
            waiter.bell = store.abell()
            assert isinstance(await store.aqueue(waiter.slots, waiter.most, waiter.bell), Queued)
            assert (len(ears() - others), listeners(redis_server, store)) == (1, 1)
            holder.give()
            await asyncio.gather(waiter.bell.await_(30), asyncio.to_thread(lambda: None))
            assert isinstance(await store.aqueue(waiter.slots, waiter.most, waiter.bell), Taken)
            await store.agive(waiter.slots)

        holder, others = client("a"), ears()
        holder.ask()
        asyncio.run(one_more())

    def test_it_reads_the_older_protocol_whatever_the_others_speak(
        self, redis_server: RedisServer, prefix: str
    ) -> None:
        options = {"socket_timeout": 20, "protocol": 3}  # a busy machine may take long, and then it would connect again
        store = RedisBackend(BackendConfig("default", "redis", redis_server.url, prefix, options))
        holder, waiter = Client(store, "a"), Client(store, "a")
        holder.ask()
        waiter.ask()
        holder.give()
        began = monotonic()
        waiter.bell.wait(60)
        assert monotonic() - began < 30, "it was not told"
        assert store._ear.connects == 1, "it was told that nobody can tell it"
        assert waiter.ask() == Taken((True,), (1,))
        waiter.give()
        for one in (holder, waiter):
            one.bell.close()
        settled(store)

    def test_a_lost_one_is_there_again_and_everybody_asks(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        holder, waiter = client("a"), client("a")
        holder.ask()
        waiter.ask()
        for number in range(2, 6):
            with redis_server.client() as server:
                server.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            assert wait_until(lambda number=number: store._ear.connects >= number)
            began = monotonic()
            waiter.bell.wait(60)
            assert monotonic() - began < 30
            assert isinstance(waiter.ask(), Queued)
        holder.give()
        assert wait_until(waiter.holds)

    def test_while_it_cannot_be_had_those_who_wait_ask_often_and_keep_their_order(
        self, store: RedisBackend, client: Make, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        holder, first, second = client("a"), client("a"), client("a")
        holder.ask()
        first.ask()

        def refuse() -> Any:
            raise OSError("no route")

        monkeypatch.setattr(store._ear, "_connect", refuse)
        with redis_server.client() as server:
            server.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        first.bell.wait(60)
        for one in (first, second):
            reply = one.ask()
            assert isinstance(reply, Queued)
            assert reply.again <= wire.ASK_OFTEN
        holder.give()
        settled(store)
        assert not first.holds(), "nobody is let in who could not be told"
        assert isinstance(second.ask(), Queued)
        assert isinstance(first.ask(), Taken)
        monkeypatch.undo()
        second.bell.wait(60)
        assert wait_until(lambda: listeners(redis_server, store) == 1)
        first.give()
        assert wait_until(lambda: isinstance(second.ask(), Taken))

    def test_who_may_not_listen_waits_all_the_same_and_the_log_says_so_once(
        self,
        make_store: Callable[..., RedisBackend],
        redis_server: RedisServer,
        prefix: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        rules, others = wire_permissions(prefix), ears()
        with redis_server.client() as server:
            server.execute_command("ACL", "SETUSER", prefix, "reset", "resetchannels", "on", ">pass", *rules)
            with suppress(ResponseError):  # what redis-py asks for by itself, and does without; not every server has it
                server.execute_command("ACL", "SETUSER", prefix, "+client|setinfo")
            store = make_store(f"redis://{prefix}:pass@127.0.0.1:{redis_server.port}/0")
            with caplog.at_level(logging.WARNING, "django_concurrency_mw"):
                for _ in range(2):
                    holder, waiter = Client(store, "a"), Client(store, "a")
                    assert isinstance(holder.ask(), Taken)
                    reply = waiter.ask()
                    assert isinstance(reply, Queued)
                    assert reply.again <= wire.ASK_OFTEN
                    holder.give()
                    settled(store)
                    assert isinstance(waiter.ask(), Taken)
                    waiter.give()
                    for one in (holder, waiter):
                        one.bell.close()
                    settled(store)
            (said,) = [record.getMessage() for record in caplog.records if "every 50 ms" in record.getMessage()]
            rest = said.partition("ACL SETUSER <user> ")[2].split(" ")
            assert ears() <= others
            server.execute_command("ACL", "SETUSER", prefix, *rest)
            able = make_store(f"redis://{prefix}:pass@127.0.0.1:{redis_server.port}/0")
            server.execute_command("ACL", "LOG", "RESET")
            holder, waiter = Client(able, "a"), Client(able, "a")
            holder.ask()
            reply = waiter.ask()
            assert isinstance(reply, Queued)
            assert reply.again > wire.ASK_OFTEN
            holder.give()
            assert wait_until(waiter.holds)
            assert isinstance(waiter.ask(), Taken)
            assert len([*able.snapshot(), *able.waiters()]) == 1
            refused = [entry["object"] for entry in server.acl_log() if entry["username"] == prefix]
            assert refused == []
            for one in (holder, waiter):
                one.give()
                one.bell.close()
            settled(able)
            server.execute_command("ACL", "DELUSER", prefix)

    def test_a_forked_child_has_one_of_its_own(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        holder, waiter = client("a"), client("a")
        holder.ask()
        waiter.ask()
        parent = store._channel()
        go, ready = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                mine = Client(store, "b")
                assert isinstance(mine.ask(), Taken)
                assert store._channel() != parent
                mine.give()
                mine.bell.close()
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                store.close()
                os._exit(0)
            finally:
                os._exit(1)
        try:
            os.read(ready[0], 1)
            assert listeners(redis_server, store) == 1
            holder.give()
            assert wait_until(waiter.holds)
            assert isinstance(waiter.ask(), Taken)
            waiter.give()
            for one in (holder, waiter):
                one.bell.close()
            settled(store)
            assert wait_until(lambda: listeners(redis_server, store) == 0)
        finally:
            os.write(go[1], b"x")
            code = exit_code(pid)
            for end in (*go, *ready):
                os.close(end)
        assert code == 0

    def test_what_is_granted_to_one_who_does_not_wait_any_more_is_taken_back_at_once(
        self, store: RedisBackend, client: Make
    ) -> None:
        holder, gone, behind = client("a", "b"), client("a", "b"), client("b")
        for one in (holder, gone, behind):
            one.ask()
        gone.bell.close()  # and what it gave back was lost
        began = monotonic()
        holder.give()
        behind.bell.wait(60)
        assert monotonic() - began < 0.8 * wire.GRANT
        assert isinstance(behind.ask(), Taken)
        assert [held.policy for held in store.snapshot()] == ["b"]
        assert store.waiters() == []

    @pytest.mark.parametrize("ears", [1, 2])
    def test_a_late_word_takes_nothing_from_who_has_asked(
        self,
        store: RedisBackend,
        client: Make,
        make_store: Callable[..., RedisBackend],
        redis_server: RedisServer,
        monkeypatch: pytest.MonkeyPatch,
        ears: int,
    ) -> None:
        """Nor does another store of the process, that hears the same and knows nobody."""
        stores = [store, *[make_store() for _ in range(ears - 1)]]
        token = (waiter := client("a")).slots[0].token
        words: list[str] = []
        strays: list[str] = []

        def spy(ear: Ear, heard: Callable[[str], None], stray: Callable[[str], None]) -> None:
            monkeypatch.setattr(ear, "_stray", lambda word: (stray(word), strays.append(word)))
            monkeypatch.setattr(ear, "_heard", lambda word: (heard(word), words.append(word)))

        for each in stores:
            spy(each._ear, each._ear._heard, each._ear._stray)
        others = [Client(each, "b", limit=9) for each in stores]
        holder = client("a")
        for one in (*others, holder, waiter):
            one.ask()
        holder.give()
        assert wait_until(lambda: words.count(token) == ears)
        assert strays == []
        assert isinstance(waiter.ask(), Taken)
        waiter.bell.close()
        with redis_server.client() as server:
            server.publish(store._channel(), token)
        assert wait_until(lambda: words.count(token) == 2 * ears)
        assert strays == [token] * ears
        done = threading.Event()
        keeper.at(0, done.set)
        assert done.wait(30)
        for each in stores:
            settled(each)
        assert waiter.holds()
        for one in others:
            one.give()
            one.bell.close()
            settled(one.store)

    def test_nothing_is_taken_from_who_was_counted_again(self, store: RedisBackend, client: Make) -> None:
        """By a server that had heard of its wait, but not of its end: it lets it in once more, or comes to it in its line."""
        holder, first = client("a"), client("a")
        for one in (holder, first):
            one.ask()
        holder.give()
        first.hear()
        (slot,) = first.slots
        assert store.restore([Restore(slot, slot.ttl, float("inf"))]) == [True]
        first.bell.close()
        back = store._keys.back(slot.token.encode()).packed
        assert store._call(back, (), lambda: back) == 1
        assert first.holds()

    def test_who_holds_already_leaves_its_line_without_a_word(
        self, store: RedisBackend, client: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        strays: list[str] = []
        monkeypatch.setattr(store._ear, "_stray", strays.append)
        holder, first, second = [client("a") for _ in range(3)]
        for one in (holder, first, second):
            one.ask()
        (slot,) = first.slots
        assert store.restore([Restore(slot, slot.ttl, float("inf"))]) == [True]
        first.bell.close()
        holder.give()
        settled(store)
        assert places(store, first, second) == [[], [("a", 1)]]
        first.give()
        second.hear()
        assert strays == []

    def test_messages_for_nobody_change_nothing(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        holder, waiter = client("a"), client("a")
        holder.ask()
        waiter.ask()
        with redis_server.client() as server:
            for text in (b"", b"\xff\xfe", new_token().encode(), f"{process_id()}-0".encode()):
                server.publish(store._channel(), text)
        holder.give()
        waiter.bell.wait(60)
        assert isinstance(waiter.ask(), Taken)
        assert store._ear.connects == 1


def wire_permissions(prefix: str) -> list[str]:
    """What the store needs, without what those need who wait."""
    from django_concurrency_mw.backends.redis.rights import permitted

    line = permitted(wire.Keys(prefix))
    return line.removeprefix("ACL SETUSER <user> ").split(" ")


class TestLostState:
    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_flushed_scripts_lose_no_slot(
        self, store: RedisBackend, client: Make, redis_server: RedisServer, half: str
    ) -> None:
        async def on_a_loop() -> None:
            assert isinstance(await store.aqueue(holder.slots, holder.most, holder.bell), Taken)
            assert isinstance(await store.aqueue(waiter.slots, waiter.most, waiter.bell), Queued)
            flush()
            await store.agive(holder.slots)
            assert await await_until(waiter.holds), "it is left over, for a connection that has loaded it"

        def flush() -> None:
            with redis_server.client() as server:
                server.script_flush()

        holder, waiter = client("a"), client("a")
        if half == "loop":
            asyncio.run(on_a_loop())
        else:
            holder.ask()
            flush()
            assert isinstance(waiter.ask(), Queued)
            flush()
            holder.give()
            assert wait_until(waiter.holds)
        flush()
        assert isinstance(waiter.ask(), Taken)

    def test_who_waits_stands_in_line_again_after_the_store_has_forgotten_everything(
        self, store: RedisBackend, client: Make, redis_server: RedisServer
    ) -> None:
        holder, waiter = client("a"), client("a")
        holder.ask()
        waiter.ask()
        with redis_server.client() as server:
            server.delete(*server.scan_iter(store._keys.prefix + b"*"))
        assert isinstance(holder.ask(), Taken)
        assert isinstance(waiter.ask(), Queued)
        holder.give()
        assert wait_until(waiter.holds)

    def test_a_cancelled_question_leaves_neither_slot_nor_place(self, store: RedisBackend, client: Make) -> None:
        async def main() -> None:
            holder = client("a")
            await store.atake(holder.slots)
            for number in range(60):
                one = client("a")
                one.bell = store.abell()
                task = asyncio.ensure_future(store.aqueue(one.slots, one.most, one.bell))
                for _ in range(number % 6):
                    await asyncio.sleep(0)
                if number == 30:
                    await store.agive(holder.slots)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                one.bell.close()
                if not task.cancelled():  # it was through: whoever it was gives back
                    await store.agive(one.slots)
            assert await await_until(lambda: store.waiters() == [])
            assert await await_until(lambda: store.snapshot() == [])

        asyncio.run(main())
