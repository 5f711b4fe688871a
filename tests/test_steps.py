"""The decisions of an acquisition: one suite of scenarios, run through both drivers and every store.

A store is a double (it answers what it is told) or a real one behind a wrapper that can be made to fail; whatever is added
to BACKENDS here runs all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, ClassVar

import pytest
from django.test import RequestFactory

from django_concurrency_mw import drivers
from django_concurrency_mw.backends import BackendConfig, BaseBackend, Holder
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.effects import Steps
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Asked, KeyMissing, Slot, TakeReply, Verdict
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.steps import OnError, acquire
from django_concurrency_mw.tokens import new_token

from .redis_cluster import RedisCluster
from .redis_server import RedisServer
from .support import wait_until

Drive = Callable[[Steps[Any]], Any]


class Unreliable(BaseBackend):
    """A store over another one, that can be switched off: before it has done what it was asked, or after."""

    supports_semaphores: ClassVar[bool] = True
    cancel_safe: ClassVar[bool] = True

    def __init__(self, inner: BaseBackend, local: bool) -> None:
        super().__init__(inner.config)
        self.inner = inner
        self.is_local = local  # type: ignore[misc]  # each of the two in a test has its own
        self.fails: str | None = None
        self.asked: list[list[str]] = []

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        self.asked.append([slot.policy for slot in slots])
        self._fail_if("before")
        reply = self.inner.take(slots)
        self._fail_if("after")
        return reply

    async def atake(self, slots: Sequence[Slot]) -> TakeReply:
        self.asked.append([slot.policy for slot in slots])
        self._fail_if("before")
        reply = await self.inner.atake(slots)
        self._fail_if("after")
        return reply

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        self._fail_if("before", "after")
        return self.inner.give(slots)

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        self._fail_if("before", "after")
        return await self.inner.agive(slots)

    def _fail_if(self, *when: str) -> None:
        if self.fails in when:
            raise BackendError("down")

    def snapshot(self) -> Sequence[Holder]:
        """What the inner store holds, once it has heard of all that it was sent."""
        inner = self.inner
        if isinstance(inner, RedisBackend):
            inner.close()
            assert wait_until(lambda: not inner._leftovers and not inner._delivering)
        return inner.snapshot()

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        return self.inner.renew(slots)


_numbers = count()


def memory(request: pytest.FixtureRequest) -> BaseBackend:
    return MemoryBackend(BackendConfig("default", "memory", key_prefix=f"steps-{next(_numbers)}"))


def host(request: pytest.FixtureRequest) -> BaseBackend:
    path = request.getfixturevalue("tmp_path") / f"steps-{next(_numbers)}"
    return HostBackend(BackendConfig("default", "host", options={"path": path, "slots": 256}))


def redis(request: pytest.FixtureRequest) -> BaseBackend:
    server: RedisServer = request.getfixturevalue("redis_server")
    return RedisBackend(BackendConfig("default", "redis", server.url, f"steps-{next(_numbers)}", {"socket_timeout": 5}))


def cluster(request: pytest.FixtureRequest) -> BaseBackend:
    nodes: RedisCluster = request.getfixturevalue("redis_cluster")
    options = {"cluster": True, "socket_timeout": 2}
    return RedisBackend(BackendConfig("default", "redis", nodes.urls, f"steps-{next(_numbers)}", options))


#: name -> a fresh store
BACKENDS: dict[str, Callable[[pytest.FixtureRequest], BaseBackend]] = {"memory": memory, "host": host, "redis": redis}


def _arun(steps: Steps[Any]) -> Any:
    return asyncio.run(drivers.arun(steps))


@pytest.fixture(params=[drivers.run, _arun], ids=["threads", "loop"])
def drive(request: pytest.FixtureRequest) -> Drive:
    found: Drive = request.param
    return found


class Shop:
    """Two stores, a local and a remote one, and requests that acquire from them."""

    def __init__(self, drive: Drive, near: BaseBackend, far: BaseBackend) -> None:
        self.drive = drive
        self.near, self.far = Unreliable(near, True), Unreliable(far, False)
        self.leases: list[Lease] = []

    def ask(self, *entries: Asked | KeyMissing, on_error: OnError = "local", lease: Lease | None = None) -> Verdict:
        lease = Lease(RequestFactory().get("/")) if lease is None else lease
        self.leases.append(lease)
        stores = {"near": self.near, "far": self.far}
        token = new_token()
        verdict: Verdict = self.drive(acquire(entries, stores, lease, token, "/", on_error))
        if verdict.rejected_by is not None:
            self.drive(lease.steps_to_give(token))
        return verdict

    def held(self) -> list[str]:
        return sorted(holder.policy for store in (self.near, self.far) for holder in store.snapshot())

    def end(self, lease: Lease | None = None) -> None:
        for each in self.leases if lease is None else [lease]:
            self.drive(each.steps_to_give())


@pytest.fixture(params=[*BACKENDS.values(), cluster], ids=[*BACKENDS, "cluster"])
def shop(request: pytest.FixtureRequest, drive: Drive) -> Iterator[Shop]:
    shop = Shop(drive, request.param(request), request.param(request))
    yield shop
    shop.near.fails = shop.far.fails = None
    shop.end()
    keeper._retry(0)
    assert shop.held() == [], "a scenario ended with slots held"


def policy(name: str, limit: int = 1, backend: str = "near", **fields: Any) -> Policy:
    return Policy(name, parse_key("global"), limit, backend=backend, **fields)


def asked(name: str, limit: int = 1, key: str = "k", backend: str = "near", **fields: Any) -> Asked:
    return Asked(policy(name, limit, backend, **fields), make_key(key), limit)


def states(verdict: Verdict) -> list[tuple[str, str, int | None]]:
    return [(result.policy, result.state, result.in_flight) for result in verdict.concurrency.policies]


def test_a_free_slot_is_held_and_given_back(shop: Shop) -> None:
    verdict = shop.ask(asked("a", 2))
    assert states(verdict) == [("a", "held", 1)]
    assert verdict.concurrency.limited
    assert verdict.concurrency.rejection is None
    assert verdict.fields == (("a", 2, 1),)
    assert shop.held() == ["a"]
    verdict.concurrency.release()
    assert shop.held() == []


def test_a_full_one_rejects(shop: Shop) -> None:
    shop.ask(asked("a"))
    verdict = shop.ask(asked("a"))
    rejection = verdict.concurrency.rejection
    assert rejection is not None
    assert (rejection.policy, rejection.reason, rejection.limit, rejection.in_flight) == ("a", "full", 1, 1)
    assert rejection.status == 429
    assert rejection.retry_after in range(1, 6)
    assert verdict.fields == (("a", 1, 0),)
    assert shop.held() == ["a"]


def test_another_key_is_another_bucket(shop: Shop) -> None:
    shop.ask(asked("a", key="one"))
    assert shop.ask(asked("a", key="two")).concurrency.rejection is None


def test_all_or_nothing_in_one_take(shop: Shop) -> None:
    shop.ask(asked("full"))
    verdict = shop.ask(asked("free", 3), asked("full"), asked("free too", 3))
    assert verdict.concurrency.rejection is not None
    assert states(verdict) == [("free", "skipped", None), ("full", "over", 1), ("free too", "skipped", None)]
    assert shop.near.asked[-1] == ["free", "full", "free too"], "one take for all of them"
    assert shop.held() == ["full"]


def test_of_several_full_ones_all_are_reported_and_the_first_answers(shop: Shop) -> None:
    shop.ask(asked("a"), asked("b", status=503))
    verdict = shop.ask(asked("c", 9), asked("b", status=503), asked("a"))
    rejection = verdict.concurrency.rejection
    assert rejection is not None
    assert rejection.violated == ("b", "a")
    assert (rejection.policy, rejection.status) == ("b", 503)
    assert verdict.fields == (("c", 9, 9), ("b", 1, 0), ("a", 1, 0))


def test_a_limit_of_0_gives_no_hope(shop: Shop) -> None:
    shop.ask(asked("full"))
    rejection = shop.ask(asked("closed", 0), asked("full")).concurrency.rejection
    assert rejection is not None
    assert rejection.violated == ("closed", "full")
    assert rejection.retry_after is None


def test_a_missing_key_is_skipped_or_rejects_before_any_store_is_asked(shop: Shop) -> None:
    verdict = shop.ask(KeyMissing(policy("lost"), "header:X", False), asked("a"))
    assert states(verdict) == [("lost", "skipped", None), ("a", "held", 1)]
    before = len(shop.near.asked)
    rejection = shop.ask(asked("a"), KeyMissing(policy("lost", 7), "header:X", True)).concurrency.rejection
    assert rejection is not None
    assert (rejection.policy, rejection.reason, rejection.retry_after) == ("lost", "key_missing", None)
    assert len(shop.near.asked) == before


def test_only_skipped_policies_limit_nothing(shop: Shop) -> None:
    assert not shop.ask(KeyMissing(policy("lost"), "header:X", False)).concurrency.limited


class TestShadow:
    def test_over_capacity_it_runs_without_a_slot(self, shop: Shop) -> None:
        shop.ask(asked("s", block=False))
        verdict = shop.ask(asked("s", block=False))
        assert verdict.concurrency.rejection is None
        assert states(verdict) == [("s", "over", 1)]
        assert verdict.fields == ()
        assert shop.held() == ["s"]

    def test_it_counts_nothing_of_a_rejected_request(self, shop: Shop) -> None:
        shop.ask(asked("a"))
        verdict = shop.ask(asked("s", block=False), asked("a"))
        assert states(verdict) == [("s", "skipped", None), ("a", "over", 1)]
        assert shop.held() == ["a"]

    def test_it_goes_with_the_blocking_ones_in_one_take(self, shop: Shop) -> None:
        shop.ask(asked("s", block=False), asked("a"))
        assert [set(names) for names in shop.near.asked] == [{"s", "a"}]

    def test_on_another_store_it_is_asked_last(self, shop: Shop) -> None:
        shop.ask(asked("s", block=False), asked("a", backend="far"))
        assert (shop.near.asked, shop.far.asked) == ([["s"]], [["a"]])
        shop.ask(asked("s", block=False), asked("a", backend="far"))
        assert len(shop.near.asked) == 1, "asked although the blocking one was rejected"


class TestSeveralStores:
    def test_the_local_one_is_asked_first(self, shop: Shop) -> None:
        shop.ask(asked("near"))
        verdict = shop.ask(asked("far", backend="far"), asked("near"))
        assert verdict.concurrency.rejection is not None
        assert shop.far.asked == []

    def test_a_rejection_by_the_later_gives_the_earlier_back(self, shop: Shop) -> None:
        shop.ask(asked("far", backend="far"))
        verdict = shop.ask(asked("near"), asked("far", backend="far"))
        rejection = verdict.concurrency.rejection
        assert rejection is not None
        assert rejection.violated == ("far",)
        assert states(verdict) == [("near", "skipped", None), ("far", "over", 1)]
        assert shop.held() == ["far"]

    def test_a_rejection_leaves_what_the_request_held_before(self, shop: Shop) -> None:
        shop.ask(asked("full"))
        lease = Lease(RequestFactory().get("/"))
        shop.ask(asked("first"), lease=lease)
        shop.ask(asked("second"), asked("full"), lease=lease)
        assert shop.held() == ["first", "full"]
        shop.end(lease)
        assert shop.held() == ["full"]


@pytest.mark.parametrize("fails", ["before", "after"])
class TestTheStoreFails:
    """`after`: the store took the slot, and only its answer was lost."""

    def settle(self, shop: Shop) -> None:
        shop.near.fails = None
        keeper._retry(0)

    def test_allow_lets_in_without_a_slot(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        for _ in range(3):
            verdict = shop.ask(asked("a"), on_error="allow")
            assert states(verdict) == [("a", "unprotected", None)]
        self.settle(shop)
        assert shop.held() == [], "what the store took without telling was not given back"

    def test_deny_rejects_with_503(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        rejection = shop.ask(asked("a"), on_error="deny").concurrency.rejection
        assert rejection is not None
        assert (rejection.status, rejection.reason, rejection.in_flight) == (503, "backend_unavailable", None)
        assert rejection.retry_after in range(1, 6)
        self.settle(shop)
        assert shop.held() == []

    def test_local_counts_in_this_process(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        lease = Lease(RequestFactory().get("/"))
        assert states(shop.ask(asked("a", 2), lease=lease)) == [("a", "local", 1)]
        assert states(shop.ask(asked("a", 2))) == [("a", "local", 2)]
        verdict = shop.ask(asked("a", 2))
        rejection = verdict.concurrency.rejection
        assert rejection is not None
        assert (rejection.reason, rejection.in_flight, rejection.status) == ("full", 2, 429)
        assert verdict.fields == (("a", 2, 0),)
        assert states(shop.ask(asked("a", 2, key="other"))) == [("a", "local", 1)]
        shop.end(lease)
        assert states(shop.ask(asked("a", 2))) == [("a", "local", 2)]

    def test_local_counts_what_the_process_holds_already(self, shop: Shop, fails: str) -> None:
        shop.ask(asked("a", 2))
        shop.near.fails = fails
        assert states(shop.ask(asked("a", 2))) == [("a", "local", 2)]
        assert shop.ask(asked("a", 2)).concurrency.rejection is not None

    def test_local_is_all_or_nothing(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        shop.ask(asked("full"))
        verdict = shop.ask(asked("free", 3), asked("full"))
        assert verdict.concurrency.rejection is not None
        assert verdict.concurrency.rejection.violated == ("full",)
        assert states(shop.ask(asked("free", 3))) == [("free", "local", 1)]

    def test_a_policys_own_word_goes_before_the_setting(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        assert shop.ask(asked("a", on_backend_error="deny"), on_error="allow").rejected_by is not None
        assert shop.ask(asked("b", on_backend_error="allow"), on_error="deny").rejected_by is None

    def test_deny_beats_local_beats_allow(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        entries = [asked(mode, on_backend_error=mode) for mode in ("allow", "local", "deny")]
        rejection = shop.ask(*entries).concurrency.rejection
        assert rejection is not None
        assert rejection.violated == ("deny",)
        assert states(shop.ask(*entries[:2])) == [("allow", "unprotected", None), ("local", "local", 1)]

    def test_a_shadow_policy_never_rejects(self, shop: Shop, fails: str) -> None:
        shop.near.fails = fails
        for on_error in ("local", "allow", "deny"):
            assert states(shop.ask(asked("s", block=False), on_error=on_error)) == [("s", "unprotected", None)]  # type: ignore[arg-type]  # a literal

    def test_a_release_that_fails_is_tried_again(self, shop: Shop, fails: str) -> None:
        lease = Lease(RequestFactory().get("/"))
        shop.ask(asked("a"), lease=lease)
        shop.near.fails = fails
        shop.end(lease)
        assert shop.held() == ["a"]
        self.settle(shop)
        assert shop.held() == []


class TestTwoStoresAndACancel:
    """A request that holds slots of two stores is cancelled while it gives the first ones back."""

    class Endless(MemoryBackend):
        """Its releases never answer."""

        async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
            await asyncio.Event().wait()
            return ()

    def test_gives_all_of_them_back_all_the_same(self) -> None:
        stores = {name: self.Endless(BackendConfig(name, "memory")) for name in ("near", "far")}
        entries = [asked("a", backend="near"), asked("b", backend="far")]

        async def main() -> None:
            lease = Lease()
            await drivers.arun(acquire(entries, stores, lease, new_token(), "/", "local"))
            releasing = asyncio.create_task(lease.arelease())
            await asyncio.sleep(0.01)
            releasing.cancel()
            await asyncio.wait([releasing])

        asyncio.run(main())
        keeper._retry(0)
        assert [list(store.snapshot()) for store in stores.values()] == [[], []]

    def test_two_acquisitions_of_one_request_at_once_do_not_meet(self) -> None:
        """One is rejected and given back while the other one waits for its answer."""

        class Slow(MemoryBackend):
            async def atake(self, slots: Sequence[Slot]) -> TakeReply:
                await asyncio.sleep(0.01 if slots[0].policy == "slow" else 0)
                return self.take(slots)

        store = Slow(BackendConfig("near", "memory"))
        lease = Lease()

        async def ask(entry: Asked) -> None:
            token = new_token()
            verdict = await drivers.arun(acquire([entry], {"near": store}, lease, token, "/", "local"))
            if verdict.rejected_by is not None:
                await drivers.arun(lease.steps_to_give(token))

        async def main() -> None:
            await asyncio.gather(ask(asked("slow")), ask(asked("full", 0)))

        asyncio.run(main())
        assert [holder.policy for holder in store.snapshot()] == ["slow"]
        lease.release()
        assert store.snapshot() == []


class TestCancel:
    """An event loop's task is cancelled while its take is under way."""

    class Slow(MemoryBackend):
        """A server that carries out a take 10 ms after it was sent, whoever has gone meanwhile, and a release at once."""

        cancel_safe: ClassVar[bool] = False

        async def atake(self, slots: Sequence[Slot]) -> TakeReply:
            loop = asyncio.get_running_loop()
            reply: asyncio.Future[TakeReply] = loop.create_future()

            def carry_out() -> None:
                answer = self.take(slots)
                if not reply.done():
                    reply.set_result(answer)

            loop.call_later(0.01, carry_out)
            answer = await reply
            await asyncio.sleep(0.01)
            return answer

        async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
            await asyncio.sleep(0.001)
            return self.give(slots)

    @pytest.mark.parametrize("after", [0.0, 0.005, 0.015, 0.025])
    def test_leaves_nothing_behind(self, after: float) -> None:
        """Also where the release is quicker than the acquire it belongs to, and where a second cancel meets the release."""
        store = self.Slow(BackendConfig("default", "memory"))

        async def request(number: int) -> None:
            lease = Lease()
            stores = {"near": store}
            entry = asked("a", 1000, key=str(number % 7))
            try:
                await drivers.arun(acquire([entry], stores, lease, new_token(), "/", "local"))
                await asyncio.sleep(1)
            finally:
                await lease.arelease()

        async def main() -> None:
            tasks = [asyncio.create_task(request(number)) for number in range(100)]
            await asyncio.sleep(after)
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await asyncio.sleep(0.1)

        asyncio.run(main())
        assert store.snapshot() == []
