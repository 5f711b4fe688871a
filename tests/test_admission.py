"""What is read off a request at once, and taken at once, is what the steps come to; it is only quicker."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.utils.functional import SimpleLazyObject
from hypothesis import given
from hypothesis import strategies as st

from django_concurrency_mw import admission, concurrency_limit, conf, limiter, peaks, rejection, signals
from django_concurrency_mw import lease as lease_module
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.client import TrustedProxies
from django_concurrency_mw.drivers import run
from django_concurrency_mw.keys import Resolver, make_key
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.limiter import begin
from django_concurrency_mw.outcomes import UNLIMITED, Asked, Concurrency, Full, PolicyResult, Slot, StoreFailed, Taken
from django_concurrency_mw.plans import LONGEST_KNOWN, MOST_KNOWN, Plan
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.steps import Begun, full_at_once, lease_seconds
from django_concurrency_mw.tokens import new_token

from .striking import done_at
from .support import Limits, backend_entry, nothing_held, wait_until

FORWARDED = "HTTP_X_FORWARDED_FOR"


# -- what is asked for --------------------------------------------------------------------------------------------------


def _policies() -> list[Policy]:
    return [
        Policy("ip", parse_key("ip"), 5, per_key={"ip:203.0.113.9": 7}),
        Policy("user", parse_key("user"), 5, per_key={"user:1": 7, "ip:203.0.113.9": None}),
        Policy("all", parse_key("global"), None),
        Policy("header", parse_key("header:X-Key"), 5, per_key={"header:X-Key:one": 0}),
        Policy("dear", parse_key("header:X-Key"), 5, cost=3, per_key={"header:X-Key:one": 2}),
        Policy("shadow", parse_key("user"), 5, block=False),
    ]


USERS = st.one_of(
    st.none(),
    st.builds(
        SimpleNamespace,
        is_authenticated=st.booleans(),
        pk=st.sampled_from([1, 2, "1", "x", True, None, 1.0, UUID(int=7)]),
    ),
    st.builds(SimpleNamespace, is_authenticated=st.booleans()),
)
ADDRESSES = st.sampled_from(
    ["203.0.113.9", "10.0.0.1", "", "unix:", "2001:db8::1", "2001:db8::2", "::ffff:203.0.113.9", "203.0.113.9:80", None]
)
TEXTS = st.one_of(
    st.none(), st.sampled_from(["", "one", "two", "x" * LONGEST_KNOWN, "y" * (LONGEST_KNOWN + 1)]), st.text()
)


def _request(address: str | None, forwarded: str | None, key: str | None, user: Any, lazy: str) -> HttpRequest:
    request = RequestFactory().get("/")
    for name, value in (("REMOTE_ADDR", address), (FORWARDED, forwarded), ("HTTP_X_KEY", key)):
        request.META.pop(name, None)
        if value is not None:
            request.META[name] = value
    if user is not None:
        request.user = user if lazy == "no" else SimpleLazyObject(lambda: user)
        if lazy == "loaded":
            bool(request.user.is_authenticated)
    return request


REQUESTS = st.builds(_request, ADDRESSES, ADDRESSES, TEXTS, USERS, st.sampled_from(["no", "loaded", "not yet"]))


@given(st.lists(REQUESTS, max_size=8), st.sampled_from([(), ("10.0.0.0/8",), ("unix",), ("unix", "2001:db8::/32")]))
def test_what_is_read_off_a_request_is_what_the_steps_find(
    requests: list[HttpRequest], trusted: tuple[str, ...]
) -> None:
    """Or nothing is; and a second look says the same as the first."""
    proxies = TrustedProxies.parse(trusted)
    policies = _policies()
    for chosen in ([one] for one in policies), [policies[:2]], [policies]:
        for some in chosen:
            plan = Plan(some, proxies, FORWARDED)
            for request in [*requests, *requests]:
                asked = plan.asked(request)
                if asked is not None:
                    resolved = run(Resolver(request, {}, proxies, FORWARDED).resolve(some))
                    assert list(asked) == resolved


def test_what_can_be_read_off_is() -> None:
    """Or all of this would be in vain."""
    user = SimpleNamespace(is_authenticated=True, pk=1)
    request = _request("203.0.113.9", None, "two", user, "loaded")
    policies = _policies()
    asked = Plan(policies, TrustedProxies(), FORWARDED).asked(request)
    assert asked is not None
    assert [(entry.key.text.partition(":")[0], entry.limit) for entry in asked] == [
        ("ip", 7),
        ("user", 7),
        ("global", None),
        ("header", 5),
        ("header", 5),
        ("user", 5),
    ]


def test_values_that_are_equal_and_read_differently_are_told_apart() -> None:
    plan = Plan([Policy("user", parse_key("user"), 5)], TrustedProxies(), FORWARDED)
    for pk in (1, True, 1.0, "1"):
        user = SimpleNamespace(is_authenticated=True, pk=pk)
        asked = plan.asked(_request("203.0.113.9", None, None, user, "no"))
        assert asked is None or asked[0].key.text == f"user:{pk}"
    by_socket = Plan([Policy("ip", parse_key("ip"), 5)], TrustedProxies.parse(["unix"]), FORWARDED)
    for client in ("203.0.113.1", "203.0.113.2"):
        asked = by_socket.asked(_request("", client, None, None, "no"))
        assert asked is not None
        assert asked[0].key.text == f"ip:{client}"


@pytest.mark.parametrize("longest", [None, 5.0, 90.0])
def test_a_slot_made_by_hand_is_like_any_other(longest: float | None) -> None:
    policy = Policy("p", parse_key("ip"), 5, ttl=30.0, max_age=longest, block=False, wait=2.0, cost=3)
    for limit in (7, None):
        made = Asked(policy, make_key("ip:x"), limit, 3).slot("t", "/path")
        told = UNLIMITED if limit is None else limit
        usual = Slot("p", make_key("ip:x"), told, lease_seconds(policy), "t", False, "/path", 3, True)
        assert made == usual
        assert {each.name: type(getattr(made, each.name)) for each in fields(Slot)} == {
            each.name: type(getattr(usual, each.name)) for each in fields(Slot)
        }
        assert usual.since - made.since < 60
        assert (made.waited, made.memo) == (0.0, [])


def test_several_stores_are_asked_by_the_steps() -> None:
    policies = [Policy(name, parse_key("global"), 5, backend=name) for name in ("one", "two")]
    assert Plan(policies, TrustedProxies(), FORWARDED).asked(RequestFactory().get("/")) is None


def test_a_user_is_not_loaded_for_a_look() -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    request = RequestFactory().get("/")
    request.user = SimpleLazyObject(load)  # type: ignore[assignment]
    assert Plan([Policy("user", parse_key("user"), 5)], TrustedProxies(), FORWARDED).asked(request) is None


@pytest.mark.parametrize(
    "more",
    [
        {"when": "staff"},
        {"except_users": (1,)},
        {"except_ips": (ip_network("10.0.0.0/8"),)},
        {"cost": lambda request: 1},
        {"max_concurrent": lambda request: 1},
        {"key": parse_key("get:page")},
        {"key": parse_key("session")},
        {"cost": 6},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_takes_more_than_a_look_is_left_to_the_steps(more: dict[str, Any]) -> None:
    policy = Policy(**{"name": "p", "key": parse_key("global"), "max_concurrent": 5, **more})
    assert Plan([policy], TrustedProxies(), FORWARDED).asked(RequestFactory().get("/")) is None


@pytest.mark.parametrize("key", ["header:X-Key", "ip", "user"])
def test_what_clients_write_takes_no_more_memory_than_that(key: str) -> None:
    plan = Plan([Policy("p", parse_key(key), 5)], TrustedProxies.parse(["10.0.0.0/8"]), FORWARDED)
    (read,) = plan._readers
    (known,) = [cell.cell_contents for cell in read.__closure__ or () if isinstance(cell.cell_contents, dict)]
    most = 0
    for number in range(2 * MOST_KNOWN + 2):
        user = SimpleNamespace(is_authenticated=True, pk=number)
        address = f"203.0.{number // 256}.{number % 256}"
        assert plan.asked(_request("10.0.0.1", address, f"key {number}", user, "no")) is not None
        most = max(most, len(known))
    assert most == MOST_KNOWN
    before = len(known)
    long = "x" * (LONGEST_KNOWN + 1)
    user = SimpleNamespace(is_authenticated=True, pk=long)
    assert plan.asked(_request("10.0.0.1", f"{long}, 203.0.113.9", long, user, "no")) is not None
    assert len(known) == before


# -- what is taken ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "host", "redis"])
def backend(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    return backend_entry(request.param, request, prefix, tmp_path)


@pytest.fixture(params=["threads", "loop"])
def admit(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    if request.param == "threads":
        yield admission.admit
        return
    with asyncio.Runner() as runner:
        yield lambda *arguments: runner.run(admission.aadmit(*arguments))


TABLES: dict[str, dict[str, Any]] = {
    "one": {"p": {"key": "ip", "max_concurrent": 2}},
    "three": {
        "p": {"key": "ip", "max_concurrent": 3},
        "q": {"key": "global", "max_concurrent": 2},
        "r": {"key": "header:X-Key", "max_concurrent": None},
    },
    "shadow": {"p": {"key": "ip", "max_concurrent": 1, "block": False}, "q": {"key": "global", "max_concurrent": 3}},
    "cost": {"p": {"key": "global", "max_concurrent": 5, "cost": 2}},
}


@pytest.mark.parametrize("table", TABLES)
def test_one_take_and_the_steps_come_to_the_same(
    limits: Limits, backend: dict[str, Any], admit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """What the request is told, what its lease knows, what the store holds; until it is full, and after."""

    def outcome() -> list[Any]:
        limits({"policies": TABLES[table]}, BACKENDS={"default": backend})
        config, found, leases = conf.current(), [], []
        for _ in range(4):
            request = RequestFactory().get("/", headers={"X-Key": "k"})
            begin(request)
            lease = Lease(request)
            leases.append(lease)
            response = admit(request, lease, config.table.policies, {}, config)
            concurrency: Concurrency = request.concurrency  # type: ignore[attr-defined]
            refused = concurrency.rejection and (concurrency.rejection.reason, concurrency.rejection.violated)
            told = (concurrency.limited, concurrency.policies, refused, concurrency.waited)
            status = response and response.status_code
            found.append((status, told, lease.results, lease.fields, [one.confirmed for one in lease.holdings()]))
            assert not lease.is_asking
        (store,) = config.stores.values()
        found.append(sorted((one.policy, one.key, one.cost) for one in store.snapshot()))
        for lease in leases:
            lease.release()
            assert not lease.results
        assert wait_until(nothing_held)
        return found

    quick = outcome()
    monkeypatch.setattr(conf.Config, "plan", lambda *arguments: SimpleNamespace(asked=lambda request: None))
    by_steps = outcome()
    assert quick == by_steps
    assert [each[0] for each in quick[:4]].count(None) < 4 or table == "shadow"


FULL: dict[str, dict[str, Any]] = {
    "one": {"p": {"max_concurrent": 1}},
    "of cost 2": {"p": {"max_concurrent": 3, "cost": 2}},
    "closed": {"p": {"max_concurrent": 0}},
    "closed, though one may wait": {"p": {"max_concurrent": 0, "wait": 5}},
    "one where one may wait": {"p": {"max_concurrent": 1, "wait": 0.01}},
    "with a status of its own": {"p": {"max_concurrent": 1, "status": 503}},
    "with an answer of its own": {"p": {"max_concurrent": 1, "response_callback": "tests.rejecting_urls.busy"}},
    "two": {"p": {"max_concurrent": 1}, "q": {"max_concurrent": 5}},
    "a shadow": {"p": {"max_concurrent": 1, "block": False}},
}


@pytest.mark.parametrize("headers", ["rejected", "never"])
@pytest.mark.parametrize("table", FULL)
def test_one_that_is_full_at_once_gets_the_answer_of_the_steps(
    limits: Limits,
    admit: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    table: str,
    headers: str,
) -> None:
    """Status, body, every field, what the request is told and the log."""

    def outcome() -> list[Any]:
        monkeypatch.setattr(rejection, "_sampled", rejection._Sampled())
        policies = {name: {"key": "ip", "backend": "default", **more} for name, more in FULL[table].items()}
        limits({"policies": policies}, BACKENDS={"default": {"BACKEND": "memory"}}, HEADERS=headers)
        config, found = conf.current(), []
        caplog.clear()
        random.seed(7)
        first = RequestFactory().get("/")
        begin(first)
        holder = Lease(first)
        admit(first, holder, config.table.policies, {}, config)
        for accept in ("*/*", "application/json", "text/plain", "text/html"):
            request = RequestFactory().get("/", HTTP_ACCEPT=accept)
            begin(request)
            lease = Lease(request)
            response = admit(request, lease, config.table.policies, {}, config)
            told = request.concurrency  # type: ignore[attr-defined]
            found.append((told, told._lease is None, lease.results, lease.fields, lease.holdings(), lease.is_asking))
            if response is not None:
                found.append((response.status_code, response.content, list(response.headers.items()), response.charset))
                found.append((response.reason_phrase, response.cookies, response._has_been_logged))
            lease.release()
        holder.release()
        found.append([record.getMessage() for record in caplog.records])
        assert wait_until(nothing_held)
        return [repr(each) for each in found]

    caplog.set_level(logging.WARNING, "django_concurrency_mw")
    quick = outcome()
    monkeypatch.setattr(limiter, "full_at_once", lambda begun: None)
    assert quick == outcome()
    assert ("concurrent-requests" in "".join(quick)) is (headers == "rejected" and table != "a shadow")


def _begun(reply: Any, *more: dict[str, Any]) -> Begun:
    asked = [
        Asked(Policy(f"p{n}", parse_key("global"), 1, **each), make_key("global"), 1) for n, each in enumerate(more)
    ]
    return Begun(None, (), asked, reply, 0.0)


@pytest.mark.parametrize(
    "begun",
    [
        _begun(Taken((True,), (1,)), {}),
        _begun(StoreFailed(OSError()), {}),
        _begun(Full((True, True), (1, 1)), {}, {}),
        _begun(Full((True,), (1,)), {"wait": 1.0}),
        _begun(Full((True,), (1,)), {"block": False}),
        _begun(Full((False,), (1,)), {}),
    ],
)
def test_what_takes_more_than_a_look_at_the_reply_is_left_to_the_steps(begun: Begun) -> None:
    assert full_at_once(begun) is None
    assert full_at_once(_begun(Full((True,), (1,)), {})) is not None


def test_who_listens_for_rejections_is_told_of_one_that_is_full_at_once(
    limits: Limits, admit: Callable[..., Any]
) -> None:
    limits({"policies": {"p": {"key": "ip", "max_concurrent": 0}}}, BACKENDS={"default": {"BACKEND": "memory"}})
    config, seen = conf.current(), []

    def listens(**told: Any) -> None:
        seen.append((told["key"], told["in_flight"], told["limit"], told["reason"], told["shadow"]))

    request = RequestFactory().get("/")
    begin(request)
    signals.request_rejected.connect(listens)
    try:
        assert admit(request, Lease(request), config.table.policies, {}, config).status_code == 429
    finally:
        signals.request_rejected.disconnect(listens)
    assert seen == [("ip:127.0.0.1", 0, 0, "full", False)]


def test_one_that_is_full_and_was_given_back_while_it_was_asked_for_is_given_back_once_more(
    limits: Limits, admit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may have been asked twice: what the first question took, its release may have overtaken."""
    limits({"policies": {"p": {"key": "ip", "max_concurrent": 0}}}, BACKENDS={"default": {"BACKEND": "memory"}})
    config, given = conf.current(), []
    request = RequestFactory().get("/")
    begin(request)
    lease, store = Lease(request), limiter.store_of(config.table.policies[0], config)
    take, give = store.take, store.give

    def late(slots: Any) -> Any:
        lease.release()
        given.clear()
        return take(slots)

    def told(slots: Any) -> Any:
        given.append(tuple(slots))
        return give(slots)

    monkeypatch.setattr(store, "take", late)
    monkeypatch.setattr(store, "give", told)
    assert admit(request, lease, config.table.policies, {}, config).status_code == 429
    assert [[slot.policy for slot in slots] for slots in given] == [["p"]]
    assert not lease.holdings()


@pytest.mark.parametrize("times", [1, 3])
def test_the_second_take_of_a_request_is_told_of_the_first(
    limits: Limits, admit: Callable[..., Any], times: int
) -> None:
    """One slot per policy and key, however often it is asked for."""
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()
    request = RequestFactory().get("/")
    begin(request)
    lease = Lease(request)
    for _ in range(times):
        assert admit(request, lease, config.table.policies, {}, config) is None
        assert len(lease.holdings()) == 1
    lease.release()
    assert admit(request, lease, config.table.policies, {}, config) is None, "what was given back is asked for again"
    assert len(lease.holdings()) == 1
    assert lease.fields == (("p", 2, 1), ("p", 2, 1))
    lease.release()


def test_a_take_may_be_overtaken_by_another_of_its_request(limits: Limits) -> None:
    """Two views beside each other under one policy: both hold, whichever of them hears of it first."""
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()

    async def beside() -> None:
        request = RequestFactory().get("/")
        begin(request)
        lease, second = Lease(request), asyncio.Event()
        store = limiter.store_of(config.table.policies[0], config)
        atake = store.atake

        async def late(slots: Any) -> Any:
            reply = await atake(slots)
            if not second.is_set():
                second.set()
                assert await admission.aadmit(request, lease, config.table.policies, {}, config) is None
            return reply

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "never_waits", False)
            patch.setattr(store, "atake", late)
            assert await admission.aadmit(request, lease, config.table.policies, {}, config) is None
        assert [held.confirmed for held in lease.holdings()] == [True, True]
        await lease.arelease()
        assert store.snapshot() == []

    asyncio.run(beside())


@pytest.mark.parametrize("meanwhile", ["nothing", "another take"])
def test_what_is_given_back_while_it_is_asked_for_is_given_back_once_more(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """The take may overtake its release; what else the request came to hold stays."""
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()
    request = RequestFactory().get("/")
    begin(request)
    lease, store = Lease(request), limiter.store_of(config.table.policies[0], config)

    def late(slots: Any) -> Any:
        monkeypatch.undo()
        lease.release()
        if meanwhile == "another take":
            assert admission.admit(request, lease, config.table.policies, {}, config) is None
        return store.take(slots)

    monkeypatch.setattr(store, "take", late)
    assert admission.admit(request, lease, config.table.policies, {}, config) is None
    assert [holder.token for holder in store.snapshot()] == [held.slot.token for held in lease.holdings()]
    assert len(lease.holdings()) == (meanwhile == "another take")
    lease.release()
    assert store.snapshot() == []


def test_the_most_in_flight_is_noted(limits: Limits, admit: Callable[..., Any]) -> None:
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()
    for _ in range(2):
        request = RequestFactory().get("/")
        begin(request)
        lease = Lease(request)
        assert admit(request, lease, config.table.policies, {}, config) is None
        lease.release()
    (store,) = config.stores.values()
    assert peaks.most_seen[id(store)] == {"p": 1}


class Impatient(MemoryBackend):
    supports_wait = False


def test_a_store_where_nobody_can_wait_is_no_store_for_who_may(limits: Limits, admit: Callable[..., Any]) -> None:
    """Whichever of the policies says so."""
    table = TABLES["one"] | {"patient": {"key": "global", "max_concurrent": 2, "wait": 1}}
    limits({"policies": table}, BACKENDS={"default": {"BACKEND": f"{__name__}.Impatient"}})
    config = conf.current()
    request = RequestFactory().get("/")
    begin(request)
    for _ in range(2):  # the second time the store is there
        with pytest.raises(ImproperlyConfigured, match="policy patient: wait: "):
            admit(request, Lease(request), config.table.policies, {}, config)
    (store,) = config.stores.values()
    assert not store.never_waits, "nobody knows what a project's own store does"


@pytest.mark.parametrize("moment", ["confirm_at_once", "uncounted"])
def test_of_a_take_and_a_stand_in_at_the_same_time_one_sees_the_other(
    limits: Limits, admit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The store has answered one request and fails the next, which this process counts in its stead: before the first has
    taken note of its reply, or when it has just looked for such others."""
    limits({"policies": {"p": {"key": "global", "max_concurrent": 1}}}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()
    (policy,) = config.table.policies
    store = limiter.store_of(policy, config)
    real, other, let_in = getattr(Lease, moment), Lease(), []

    def beside(lease: Lease, *arguments: Any) -> Any:
        monkeypatch.setattr(Lease, moment, real)
        found = real(lease, *arguments) if moment == "uncounted" else None
        asked = Slot("p", make_key("global"), 1, 60, new_token(), True)
        let_in.append(other.stand_in(store, [policy], [asked])[0])
        return real(lease, *arguments) if found is None else found

    monkeypatch.setattr(Lease, moment, beside)
    request = RequestFactory().get("/")
    begin(request)
    lease = Lease(request)
    let_in.append(admit(request, lease, (policy,), {}, config) is None)
    for each in (lease, other):
        each.release()
    assert let_in.count(True) == 1


def test_a_garbage_collection_in_a_count_drops_no_stand_in(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end a stream whose own code takes, and so looks for stand-ins, when one is not in its lease yet."""
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    (policy,) = conf.current().table.policies
    store, lease, other = limiter.store_of(policy, conf.current()), Lease(), Lease()
    slots = [Slot("p", make_key("global"), 2, 60, new_token())]
    add = Lease.add

    def late(lease: Lease, held: Any) -> None:
        monkeypatch.undo()
        other.uncounted(store, slots)
        add(lease, held)

    monkeypatch.setattr(Lease, "add", late)
    assert lease.stand_in(store, [policy], slots) == (True, (1,))
    assert other.uncounted(store, slots) == (1,)
    lease.release()
    assert other.uncounted(store, slots) == ()


def test_what_was_had_at_once_may_be_asked_about_by_two_threads(limits: Limits) -> None:
    """Wherever the second comes in: what it adds stays."""
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()

    def interrupted(point: int) -> bool:
        request = RequestFactory().get("/")
        begin(request)
        lease = Lease(request)
        assert admission.admit(request, lease, config.table.policies, {}, config) is None

        def beside() -> None:
            lease.results[("q", b"")] = PolicyResult("q", "k", "held", 1, 1)
            lease.fields += (("q", 1, 0),)

        came = done_at(point, lease_module, lambda: lease.fields, beside)
        if came:
            assert [policy for policy, _ in lease.results] == ["p", "q"]
            assert lease.fields == (("p", 2, 1), ("q", 1, 0))
        lease.release()
        return came

    points = 1
    while interrupted(points):
        points += 1
    assert points > 2


def test_what_a_shadow_policy_was_told_without_a_store_is_known_after_a_take(limits: Limits) -> None:
    limits({"policies": {"dear": {"key": "ip", "max_concurrent": 1, "cost": 2, "block": False}, **TABLES["one"]}})
    seen: list[str] = []

    def listens(**told: Any) -> None:
        seen.append(told["policy"].name)

    @concurrency_limit(policy="dear")
    @concurrency_limit(policy="p")
    @concurrency_limit(policy="dear")
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    signals.request_rejected.connect(listens)
    try:
        assert view(RequestFactory().get("/")).status_code == 200
    finally:
        signals.request_rejected.disconnect(listens)
    assert seen == ["dear"]


def test_signals_are_sent_all_the_same(limits: Limits, admit: Callable[..., Any]) -> None:
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config, seen = conf.current(), []

    def listens(**told: Any) -> None:
        seen.append({name: told[name] for name in told if name in ("in_flight", "limit", "held", "key", "waited")})

    for signal in (signals.slot_acquired, signals.slot_released):
        signal.connect(listens)
    try:
        request = RequestFactory().get("/")
        begin(request)
        lease = Lease(request)
        assert admit(request, lease, config.table.policies, {}, config) is None
        lease.release()
    finally:
        for signal in (signals.slot_acquired, signals.slot_released):
            signal.disconnect(listens)
    assert seen == [
        {"key": "ip:127.0.0.1", "in_flight": 1, "limit": 2, "waited": 0.0},
        {"key": "ip:127.0.0.1", "limit": 2, "held": True},
    ]


@pytest.mark.parametrize("interrupted", ["before", "after"])
def test_what_cuts_a_take_short_leaves_nothing(
    limits: Limits, admit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """A worker's SystemExit, say, before the store has done anything or behind that."""
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()
    request = RequestFactory().get("/")
    begin(request)
    first = Lease(request)
    admit(request, first, config.table.policies, {}, config)
    (store,) = config.stores.values()
    take = store.take

    def cut(slots: Any) -> Any:
        if interrupted == "after":
            take(slots)
        raise SystemExit

    monkeypatch.setattr(store, "take", cut)
    second = Lease(request)
    with pytest.raises(SystemExit):
        admit(request, second, config.table.policies, {}, config)
    monkeypatch.undo()
    second.release()
    assert len(store.snapshot()) == 1
    first.release()
    assert store.snapshot() == []


def test_what_nobody_has_looked_at_yet_is_like_any_other(limits: Limits) -> None:
    limits({"policies": TABLES["one"]}, BACKENDS={"default": {"BACKEND": "memory"}})
    config = conf.current()

    def made() -> Concurrency:
        request = RequestFactory().get("/")
        begin(request)
        lease = Lease(request)
        admission.admit(request, lease, config.table.policies, {}, config)
        lease.release()
        return request.concurrency  # type: ignore[attr-defined, no-any-return]

    one, other = made(), made()
    assert one == other
    assert hash(one) == hash(made())
    assert repr(made()) == repr(one)
    assert copy(made()) == one
    assert made().policies[0].state == "held"
    with pytest.raises(AttributeError, match="limitd"):
        _ = made().limitd  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        made().limited = False  # type: ignore[misc]
