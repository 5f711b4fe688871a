"""Random histories, the same for every store and for a model of a few dicts: every answer and every state is compared.

The order of calls is what is random here, not time: leases are far longer than a history, and where some end, all stores
are waited for. After a red run, shrinking may take minutes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from time import monotonic, sleep
from typing import Any, Final, NamedTuple

import pytest
import redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from django_concurrency_mw.backends import BackendConfig, Holder
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import store
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import UNLIMITED, Full, Slot, Taken, TakeReply

from ..redis_server import RedisServer
from . import LONG

SETTINGS = hypothesis_settings(
    max_examples=1500 if LONG else 10,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class Place(NamedTuple):
    """A semaphore, by its policy and the text of its key."""

    policy: str
    key: str


class Pair(NamedTuple):
    """A holder of a semaphore, or somebody who never was."""

    token: str
    place: Place


class Wanted(NamedTuple):
    """One slot of a take, without its token."""

    place: Place
    limit: int
    ttl: float
    block: bool


#: One name begins like the other one, and all of them have what could be meant as a pattern or a separator.
PLACES: Final = [Place(policy, key) for policy in ("a.b", "a.b-C_1") for key in ("user:7", "ip:::1 [ü]*")]
#: Each holder's cost, and who claims what he hands over, at the same cost. No holder's cost ever changes.
COSTS: Final = {"t-1": 1, "u-1": 1, "t-11": 2, "t-2": 2, "t-3": 12, "u-3": 12}
HEIRS: Final = {"t-1": "u-1", "u-1": "t-1", "t-11": "t-2", "t-2": "t-11", "t-3": "u-3", "u-3": "t-3"}
TOKENS: Final = tuple(COSTS)
PREFIX: Final = "chaos[1]*"
#: Seconds. No lease of these ends within a history, and their keys outlive every lease that is made short.
LEASES: Final = (100.0, 1_000.0, 10_000.0)
#: Seconds that two reckonings of one lease's end may differ; far less than what lies between the leases.
SLACK: Final = 20.0
#: Seconds of a lease that is to end, and of one that is to end when its holder has been evicted.
SHORT, TO_EVICT = 0.02, 0.05
#: Seconds after the end of a lease when it is over by every clock, in whole milliseconds too.
OVER: Final = 0.005
#: Seconds for one call: a busy machine may answer late, also between the two commands of a `restore`.
TIMEOUT: Final = 10.0
#: How often a history does what takes long: waits for that, or lets everybody take.
LAPSES, CROWDS = 3, 3
#: What `restore` is told of the moment after which it must not happen, in seconds from now.
UNTIL: Final = {"ahead": 60.0, "past": -0.001, "never": float("inf")}


@dataclass(frozen=True)
class Ways:
    """Where the stores differ from each other."""

    #: A give tells who was held; otherwise it says so of everybody.
    tells: bool


MEMORY: Final = Ways(tells=True)
REDIS: Final = Ways(tells=False)


class Model:
    """The rules. Every lease's end is in monotonic seconds, and who has lapsed stands there until somebody needs the room."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self.lose()

    def lose(self) -> None:
        self.standing: dict[Place, dict[str, float]] = {place: {} for place in PLACES}
        self.evicted: dict[str, float] = {}

    def take(self, token: str, wanted: Sequence[Wanted], now: float) -> TakeReply:
        held = [self._has_room(token, one, now) for one in wanted]
        full = [one.block and not has_room for one, has_room in zip(wanted, held, strict=True)]
        if any(full):
            return Full(tuple(full), tuple(self._count(one.place) for one in wanted))
        for one, has_room in zip(wanted, held, strict=True):
            if has_room:
                self.standing[one.place][token] = now + one.ttl
        return Taken(tuple(held), tuple(self._count(one.place) for one in wanted))

    def _count(self, place: Place) -> int:
        return sum(COSTS[token] for token in self.standing[place])

    def _has_room(self, token: str, one: Wanted, now: float) -> bool:
        there = self.standing[one.place]
        if token in there or self._count(one.place) + COSTS[token] <= one.limit:
            return True
        for lapsed in [other for other, ends in there.items() if ends <= now]:
            del there[lapsed]
        return self._count(one.place) + COSTS[token] <= one.limit

    def give(self, pairs: Sequence[Pair], now: float) -> list[bool]:
        held = [self.standing[place].pop(token, now) > now for token, place in pairs]
        return held if self.ways.tells else [True] * len(pairs)

    def renew(self, pairs: Sequence[tuple[Pair, float]], now: float) -> list[bool]:
        return [self._renew(pair, seconds, now) for pair, seconds in pairs]

    def _renew(self, pair: Pair, seconds: float, now: float) -> bool:
        there = self.standing[pair.place]
        held = there.get(pair.token, now) > now
        if held:
            there[pair.token] = now + seconds
        return held

    def restore(self, holders: Sequence[tuple[Pair, float, str]], now: float) -> list[bool]:
        return [self._restore(pair, seconds, until, now) for pair, seconds, until in holders]

    def _restore(self, pair: Pair, seconds: float, until: str, now: float) -> bool:
        there = self.standing[pair.place]
        if pair.token in there:
            return self._renew(pair, seconds, now)
        back = until != "past" and self.evicted.get(pair.token, now) <= now
        if back:
            there[pair.token] = now + seconds
        return back

    def claim(self, pairs: Sequence[tuple[Pair, float]], now: float) -> bool:
        if any(self.standing[place].get(token, now) <= now for (token, place), _ in pairs):
            return False
        for (token, place), seconds in pairs:
            del self.standing[place][token]
            self.standing[place][HEIRS[token]] = now + seconds
        return True

    def evict(self, token: str, now: float) -> bool:
        ends = [there.pop(token) for there in self.standing.values() if token in there]
        if ends:
            self.evicted = self.tombstones(now)
            self.evicted[token] = max([*ends, self.evicted.get(token, now)])
        return bool(ends)

    def held(self, now: float) -> dict[Pair, float]:
        """Who is held, and how many seconds of the lease are left."""
        return {
            Pair(token, place): ends - now
            for place, there in self.standing.items()
            for token, ends in there.items()
            if ends > now
        }

    def counts(self, now: float) -> list[int]:
        """What is in flight at each place."""
        held = self.held(now)
        return [sum(COSTS[pair.token] for pair in held if pair.place == place) for place in PLACES]

    def tombstones(self, now: float) -> dict[str, float]:
        """Who may not come back before when."""
        return {token: ends for token, ends in self.evicted.items() if ends > now}


class Rig:
    """A store, asked in the words of the model."""

    #: Its snapshot is compared after every step.
    lists = True

    def __init__(self, name: str, ways: Ways, backend: MemoryBackend | RedisBackend) -> None:
        self.name, self.ways, self.backend = name, ways, backend
        self._slots: dict[Pair, Slot] = {}

    def begin(self) -> None:
        self._slots.clear()
        self.lose()

    def slot(self, pair: Pair) -> Slot:
        """The one that was taken, as its lease would keep it; or one for somebody who never took."""
        return self._slots.get(pair) or self._new(pair, Wanted(pair.place, 1, LEASES[0], True))

    def _new(self, pair: Pair, one: Wanted) -> Slot:
        # `since` is part of a holder's name in Redis.
        policy, key = pair.place
        cost = COSTS[pair.token]
        return Slot(
            policy, make_key(key), one.limit, one.ttl, pair.token, one.block, path_of(pair), cost, since=1_000.0
        )

    def take(self, token: str, wanted: Sequence[Wanted]) -> TakeReply:
        slots = []
        for one in wanted:
            pair = Pair(token, one.place)
            slots.append(self._new(pair, one))
            self._slots[pair] = slots[-1]
        return self._take(slots)

    def _take(self, slots: Sequence[Slot]) -> TakeReply:
        return self.backend.take(slots)

    def give(self, pairs: Sequence[Pair]) -> list[bool]:
        return list(self._give([self.slot(pair) for pair in pairs]))

    def _give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return self.backend.give(slots)

    def renew(self, pairs: Sequence[tuple[Pair, float]]) -> list[bool]:
        return list(self.backend.renew([(self.slot(pair), seconds) for pair, seconds in pairs]))

    def restore(self, holders: Sequence[tuple[Pair, float, str]]) -> list[bool]:
        now = monotonic()
        return list(
            self.backend.restore(
                [Restore(self.slot(pair), seconds, now + UNTIL[until]) for pair, seconds, until in holders]
            )
        )

    def claim(self, pairs: Sequence[tuple[Pair, float]]) -> bool:
        slots = []
        for pair, seconds in pairs:
            heir = Pair(HEIRS[pair.token], pair.place)
            old = self._new(pair, Wanted(pair.place, 1, LEASES[0], True))  # made anew, as by another process
            self._slots[heir] = self._new(heir, Wanted(pair.place, 0, seconds, True))
            slots.append((old, self._slots[heir]))
        self.backend.detach([old for old, _ in slots])
        return self.backend.claim(slots)

    def lose(self) -> None:
        """The store loses all it knows."""
        raise NotImplementedError

    def look(self, model: Model) -> None:
        """Compare what the store keeps with the model: who stands there, lapsed ones included, and what else there is."""
        raise NotImplementedError

    def counts(self) -> list[int]:
        return list(self.backend.counts([self.slot(Pair(TOKENS[0], place)) for place in PLACES]))

    def close(self) -> None:
        pass


def path_of(pair: Pair) -> str:
    return f"/of/{pair.token}"


class MemoryRig(Rig):
    backend: MemoryBackend

    def __init__(self, name: str) -> None:
        super().__init__(name, MEMORY, MemoryBackend(BackendConfig("default", "memory")))

    def lose(self) -> None:
        self.backend._forget()

    def look(self, model: Model) -> None:
        there = {name: set(semaphore) for name, semaphore in self.backend._semaphores.items()}
        assert there == {
            (policy, make_key(key).digest): set(tokens)
            for (policy, key), tokens in model.standing.items()
            if tokens  # nobody's semaphore is no entry
        }
        for semaphore in self.backend._semaphores.values():
            assert semaphore.total() == sum(COSTS[token] for token in semaphore)
            assert semaphore.earliest <= min(held.ends for held in semaphore.values()), (
                "nobody would look for lapsed ones"
            )
        now = monotonic()
        compare(
            {token: ends - now for token, ends in self.backend._evicted.items() if ends > now},
            {token: ends - now for token, ends in model.tombstones(now).items()},
        )


class RedisRig(Rig):
    """On a database of its own, with nothing else in it."""

    backend: RedisBackend

    def __init__(self, name: str, port: int, database: int) -> None:
        config = BackendConfig(
            "default", "redis", f"redis://127.0.0.1:{port}/{database}", PREFIX, {"socket_timeout": TIMEOUT}
        )
        super().__init__(name, REDIS, RedisBackend(config))
        # Any: the types of redis-py change with its version.
        self.client: Any = redis.Redis(port=port, db=database, protocol=2)
        self.places = {
            f"{{{PREFIX}}}:1:{place.policy}:{make_key(place.key).digest.hex()}".encode(): place for place in PLACES
        }
        self.tombstones = f"{{{PREFIX}}}:1:!evicted".encode()

    def _give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        given = self.backend.give(slots)
        assert self._take(HEARD) == FULL  # on the same connection: now the give is done
        return given

    def lose(self) -> None:
        self.client.flushdb()

    def look(self, model: Model) -> None:
        keys = sorted(self.client.keys("*"))
        pipeline = self.client.pipeline(transaction=False)
        pipeline.time()
        for key in keys:
            pipeline.zrange(key, 0, -1, withscores=True).pttl(key)
        (seconds, micros), *replies = pipeline.execute()
        server, now = seconds * 1000 + micros / 1000, monotonic()
        found: dict[Place, dict[str, float]] = {place: {} for place in PLACES}
        tombstones: dict[str, float] = {}
        for key, members, left in zip(keys, replies[::2], replies[1::2], strict=True):
            holders = [member for member, _ in members if member.count(b"\n") != 1]
            ends = {member.split(b"\n")[0].decode(): (score - server) / 1000 for member, score in members}
            assert len(ends) == len(holders), f"a holder stands there twice: {members}"
            if key != self.tombstones:
                assert len(members) == sum(COSTS[token] for token in ends), f"not all of a cost: {members}"
                ends_of = {(member.split(b"\n")[0], score) for member, score in members}
                assert len(ends_of) == len(ends), f"a part of a holder ends before the others: {members}"
            if key == self.tombstones:
                tombstones = ends
            else:
                found[self.places[key]] = ends
            assert left > 0, f"{key!r} would stay for ever"
            assert left / 1000 > max(ends.values()) - SLACK, f"{key!r} would go before its last lease's end"
        compare(
            {Pair(token, place): left for place, there in found.items() for token, left in there.items()},
            {Pair(token, place): e - now for place, there in model.standing.items() for token, e in there.items()},
        )
        compare(
            {token: left for token, left in tombstones.items() if left > 0},
            {token: ends - now for token, ends in model.tombstones(now).items()},
        )
        old = {token for token, left in tombstones.items() if left <= 0}
        assert old <= model.evicted.keys(), "an eviction sweeps the tombstones that are over"

    def close(self) -> None:
        self.backend.close()
        self.client.close()


class FakeRig(RedisRig):
    """The scripts on another Lua and another sorted set. What is asked command by command is slow there."""

    lists = False


class LoopRig(RedisRig):
    """It takes and gives on an event loop; the rest is for threads alone."""

    def __init__(self, name: str, port: int, database: int) -> None:
        super().__init__(name, port, database)
        self.runner = asyncio.Runner()

    def _take(self, slots: Sequence[Slot]) -> TakeReply:
        return self.runner.get_loop().run_until_complete(self.backend.atake(slots))

    def _give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        given = self.runner.get_loop().run_until_complete(self.backend.agive(slots))
        assert self._take(HEARD) == FULL
        return given

    def close(self) -> None:
        self.runner.close()
        super().close()


#: A take that leaves nothing behind and does not care what there is.
HEARD: Final = (Slot("heard", make_key("of all"), 0, 1.0, "t"),)
FULL: Final = Full((True,), (0,))


def compare_lists(snapshot: Sequence[Holder], held: dict[Pair, float]) -> None:
    assert sorted((one.policy, one.key, one.token, one.path, one.cost) for one in snapshot) == sorted(
        (*pair.place, pair.token, path_of(pair), COSTS[pair.token]) for pair in held
    )
    compare({Pair(one.token, Place(one.policy, one.key)): one.lease_left for one in snapshot}, held)


def compare(found: Mapping[Any, float], expected: Mapping[Any, float]) -> None:
    """The same ones, and as much left of their time; none or less is left of what is over."""
    assert found.keys() == expected.keys()
    for one, left in expected.items():
        assert (found[one] <= 0) == (left <= 0), f"{one}: {found[one]} s are left, not {left}"
        assert abs(found[one] - left) < SLACK or left <= 0, f"{one}: {found[one]} s are left, not {left}"


tokens = st.sampled_from(TOKENS)
places = st.sampled_from(PLACES)
leases = st.sampled_from(LEASES)
pairs = st.builds(Pair, tokens, places)
late = st.sampled_from(("give", "evict", "crowd", "take", "claim"))
limits = st.sampled_from((0, 1, 2, 3, 4, 5, 13, 14, 27, UNLIMITED))
wanted = st.builds(Wanted, places, limits, leases, st.booleans())


def shortly(pair: Pair, everywhere: bool, seconds: float = SHORT) -> list[tuple[Pair, float]]:
    """To be renewed for a moment only: there, or wherever this holder is."""
    others = [Pair(pair.token, place) for place in PLACES if place != pair.place]
    return [(each, seconds) for each in ([pair, *others] if everywhere else [pair])]


class Histories(RuleBasedStateMachine):
    def __init__(self, rigs: Sequence[Rig]) -> None:
        super().__init__()
        self.each = [(rig, Model(rig.ways)) for rig in rigs]
        self.takes: list[tuple[str, list[Wanted]]] = []
        self.lapses = self.crowds = self.losses = 0
        self.agreed = True
        for rig in rigs:
            rig.begin()

    def ask(self, ask: Callable[[Rig], Any], tell: Callable[[Model, float], Any]) -> None:
        """Of every store, and of its model."""
        self.agreed = False
        for rig, model in self.each:
            answer = ask(rig)
            expected = tell(model, monotonic())
            assert answer == expected, f"{rig.name} says {answer}, and {expected} was expected"

    @rule(token=tokens, wanted=st.lists(wanted, min_size=1, max_size=3, unique_by=lambda one: one.place))
    def take(self, token: str, wanted: list[Wanted]) -> None:
        self.takes.append((token, wanted))
        self._take(token, wanted)

    def _take(self, token: str, wanted: list[Wanted]) -> None:
        self.ask(lambda rig: rig.take(token, wanted), lambda model, now: model.take(token, wanted, now))

    @precondition(lambda self: self.crowds < CROWDS)
    @rule(place=places, limit=limits)
    def crowd(self, place: Place, limit: int) -> None:
        """Everybody wants the same."""
        self.crowds += 1
        for token in TOKENS:
            self._take(token, [Wanted(place, limit, LEASES[0], True)])

    @precondition(lambda self: self.takes)
    @rule(data=st.data())
    def take_again(self, data: st.DataObject) -> None:
        self._take(*data.draw(st.sampled_from(self.takes)))

    @rule(pairs=st.lists(pairs, min_size=1, max_size=5))
    def give(self, pairs: list[Pair]) -> None:
        self.ask(lambda rig: rig.give(pairs), lambda model, now: model.give(pairs, now))

    @rule(pairs=st.lists(pairs, min_size=1, max_size=3))
    def give_twice(self, pairs: list[Pair]) -> None:
        self.give(pairs)
        self.give(pairs)

    @rule(pairs=st.lists(st.tuples(pairs, leases), min_size=1, max_size=5))
    def renew(self, pairs: list[tuple[Pair, float]]) -> None:
        self.ask(lambda rig: rig.renew(pairs), lambda model, now: model.renew(pairs, now))

    @precondition(lambda self: self.lapses < LAPSES and self.held())
    @rule(data=st.data(), everywhere=st.booleans(), then=late)
    def lapse(self, data: st.DataObject, everywhere: bool, then: str) -> None:
        """A holder's leases end, at one place or at all."""
        pair = data.draw(st.sampled_from(self.held()))
        short = shortly(pair, everywhere)
        self.ask(lambda rig: rig.renew(short), lambda model, now: model.renew(short, now))
        self.be_late(short, then)

    @precondition(lambda self: self.lapses < LAPSES and self.held())
    @rule(data=st.data())
    def evict_and_lapse(self, data: st.DataObject) -> None:
        """The same, but the holder is evicted just before, and another one before that, whose leases are long."""
        pair = data.draw(st.sampled_from(self.held()))
        short = shortly(pair, True, TO_EVICT)
        others = self.others(pair.token)
        if others:
            self.evict(data.draw(st.sampled_from(others)))
        # Store by store: the eviction has to come before the leases' end.
        self.ask(
            lambda rig: (rig.renew(short), rig.backend.evict(pair.token)),
            lambda model, now: (model.renew(short, now), model.evict(pair.token, now)),
        )
        self.be_late(short, "evict")

    @precondition(lambda self: self.lapses < LAPSES)
    @rule(token=tokens, other=tokens, place=places, then=late)
    def come_for_a_moment(self, token: str, other: str, place: Place, then: str) -> None:
        """Somebody takes with a short lease, beside another one, whose long lease keeps the key in Redis."""
        self._take(other, [Wanted(place, UNLIMITED, LEASES[0], True)])
        self._take(token, [Wanted(place, UNLIMITED, SHORT, True)])
        self.be_late(shortly(Pair(token, place), False), then)

    def held(self) -> list[Pair]:
        """Who is held in the memory store; in the others too, but for what differs. No clock decides what is drawn so."""
        _, model = self.each[0]
        return sorted(model.held(monotonic()))

    def others(self, token: str) -> list[str]:
        return sorted({each.token for each in self.held()} - {token})

    def be_late(self, short: Sequence[tuple[Pair, float]], then: str) -> None:
        """Wait until the short leases are over; then their holder wants to go on, and something else may follow."""
        self.lapses += 1
        sleep(short[0][1] + OVER)
        self.agree()
        self.renew([(pair, LEASES[0]) for pair, _ in short])
        self.restore([(pair, LEASES[0], "never") for pair, _ in short])
        token, place = short[0][0]
        if then == "take":
            self.take(token, [Wanted(pair.place, 1, LEASES[1], True) for pair, _ in short[:3]])
        elif then == "crowd":
            self.crowd(place, 2)
        elif then == "evict":
            self.evict(token)
            self.agree()
            self.evict(next(iter(self.others(token)), token))  # sweeps the tombstones
        elif then == "claim":
            self.claim([(pair, LEASES[1]) for pair, _ in short[:1]])
        elif then == "give":
            self.give_twice([pair for pair, _ in short])

    @rule(holders=st.lists(st.tuples(pairs, leases, st.sampled_from(list(UNTIL))), min_size=1, max_size=4))
    def restore(self, holders: list[tuple[Pair, float, str]]) -> None:
        self.ask(lambda rig: rig.restore(holders), lambda model, now: model.restore(holders, now))

    @rule(pairs=st.lists(st.tuples(pairs, leases), min_size=1, max_size=3, unique_by=lambda one: one[0]))
    def claim_any(self, pairs: list[tuple[Pair, float]]) -> None:
        self.claim(pairs)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def claim_held(self, data: st.DataObject) -> None:
        self.claim([(data.draw(st.sampled_from(self.held())), LEASES[1])])

    def claim(self, pairs: list[tuple[Pair, float]]) -> None:
        """But for those whose heir is there before them: in truth his token is a new one."""
        standing = [model.standing for _, model in self.each]
        pairs = [one for one in pairs if not any(HEIRS[one[0].token] in there[one[0].place] for there in standing)]
        self.ask(lambda rig: rig.claim(pairs), lambda model, now: model.claim(pairs, now))

    @rule(token=tokens)
    def evict(self, token: str) -> None:
        self.ask(lambda rig: rig.backend.evict(token), lambda model, now: model.evict(token, now))

    @precondition(lambda self: self.losses < 2)
    @rule()
    def lose(self) -> None:
        self.losses += 1
        for rig, model in self.each:
            rig.lose()
            model.lose()

    @invariant()
    def agree(self) -> None:
        self.agreed = False
        for rig, model in self.each:
            try:
                rig.look(model)
                assert rig.counts() == model.counts(monotonic())
                if rig.lists:
                    compare_lists(rig.backend.snapshot(), model.held(monotonic()))
            except Exception as error:
                error.add_note(f"of {rig.name}")
                raise
        self.agreed = True

    def teardown(self) -> None:
        if not self.agreed:  # something has failed already
            return
        self.give([Pair(token, place) for token in TOKENS for place in PLACES])
        for rig, model in self.each:
            assert not any(model.standing.values())
            rig.look(model)
            assert list(rig.backend.snapshot()) == [], rig.name


@pytest.fixture
def fake_server() -> Iterator[int | None]:
    """The port of a Redis in Python, which runs the scripts in a Lua of its own; None where it is not installed."""
    if find_spec("fakeredis") is None or find_spec("lupa") is None:
        yield None
        return
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0))
    handler: Any = server.RequestHandlerClass
    handler.disable_nagle_algorithm = True  # else every other reply takes 40 ms
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def rigs(redis_server: RedisServer, fake_server: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rig]]:
    monkeypatch.setattr(store, "RESTORE_WITHIN", TIMEOUT)
    rigs = [
        MemoryRig("memory"),
        RedisRig("Redis from threads", redis_server.port, 1),
        LoopRig("Redis from a loop", redis_server.port, 2),
    ]
    if fake_server is not None:
        rigs.append(FakeRig("fakeredis", fake_server, 0))
    yield rigs
    for rig in rigs:
        rig.close()


def test_every_store_does_what_the_model_does(rigs: list[Rig]) -> None:
    class OfThese(Histories):
        def __init__(self) -> None:
            super().__init__(rigs)

    run_state_machine_as_test(OfThese, settings=SETTINGS)
