"""`hold`: slots outside a request, on every store, sync and async; and the claim of what a view has handed over."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings

from django_concurrency_mw import ConcurrencyLimitExceeded, SlotLost, concurrency_limit, conf, hold, renewals, signals
from django_concurrency_mw import held as held_module
from django_concurrency_mw.backends import BaseBackend, snapshot_all
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.handover import unpack
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import digest_text
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.limiter import store_of
from django_concurrency_mw.outcomes import HANDED_OVER, Concurrency

from .redis_server import RedisServer
from .support import SOON, Limits, exit_code, wait_until
from .test_limits import backend as backend

Block = Callable[..., Any]


@contextmanager
def in_a_thread(*args: Any, **keywords: Any) -> Iterator[Concurrency]:
    with hold(*args, **keywords) as held:
        yield held


@contextmanager
def on_a_loop(*args: Any, **keywords: Any) -> Iterator[Concurrency]:
    """`async with`, whose block is this one: the loop stands still meanwhile."""
    block = hold(*args, **keywords)
    with asyncio.Runner() as runner:
        held = runner.run(block.__aenter__())
        try:
            yield held
        finally:
            runner.run(block.__aexit__(None, None, None))


@pytest.fixture(params=[in_a_thread, on_a_loop], ids=["threads", "loop"])
def block(request: pytest.FixtureRequest) -> Block:
    found: Block = request.param
    return found


def limit_of(request: HttpRequest) -> int:
    return 1


#: Seconds of a lease that is to end.
SHORT = 0.3
#: Seconds of a lease that no stall of a busy machine ends; see `renewed_soon`.
LONGER = 60.0
TABLE = {
    "exports": {"url_names": ["reports:*"], "methods": ["POST"], "when": "staff", "key": "user", "max_concurrent": 2},
    "all": {"key": "global", "max_concurrent": 1},
    "own": {"key": "user", "max_concurrent": 1, "per_key": {"user:7": 3}, "cost": 1},
    "varies": {"key": "user", "max_concurrent": f"{__name__}.limit_of"},
    "costly": {"key": "user", "max_concurrent": 9, "cost": f"{__name__}.limit_of"},
    "shadow": {"key": "user", "max_concurrent": 1, "block": False},
    "short": {"key": "user", "max_concurrent": 1, "ttl": SHORT},
    "longer": {"key": "user", "max_concurrent": 1, "ttl": LONGER},
    "fixed": {"key": "user", "max_concurrent": 1, "ttl": LONGER, "renew": False},
    "aged": {"key": "user", "max_concurrent": 1, "ttl": LONGER, "max_age": LONGER + 1},
    "by-header": {"key": "header:X-Api-Key", "max_concurrent": 1, "per_key": {"header:X-Api-Key:gold": 2}},
    "shadow-denied": {"key": "user", "max_concurrent": 1, "block": False, "ttl": SHORT},
    "denied": {"key": "user", "max_concurrent": 1, "on_backend_error": "deny"},
}


class Held:
    """The store, and what it holds."""

    @property
    def store(self) -> BaseBackend:
        config = conf.current()
        return store_of(config.table.policies[0], config)

    def __call__(self) -> list[tuple[str, str]]:
        return sorted((holder.policy, holder.key) for holder in self.store.snapshot())

    def renewed(self) -> bool:
        """Does the lease of the only holder come to end later than it would have?"""
        (holder,) = self.store.snapshot()
        ends = monotonic() + holder.lease_left  # or before

        def later() -> bool:
            now = monotonic()
            (holder,) = self.store.snapshot()
            return now + holder.lease_left > ends + 0.01

        return wait_until(later)


@pytest.fixture
def renewed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of LONGER are due for their renewal in a moment."""
    monkeypatch.setattr(held_module, "RENEW_AFTER", 0.05 / LONGER)


@pytest.fixture
def held(limits: Limits, backend: dict[str, Any]) -> Iterator[Held]:
    limits({"policies": TABLE}, BACKENDS={"default": backend})
    held = Held()
    yield held
    assert wait_until(lambda: held() == []), "a test ended with slots held"


class TestABlock:
    def test_holds_a_slot_for_its_length(self, held: Held, block: Block) -> None:
        with block("exports", key="user:42") as concurrency:
            assert held() == [("exports", "user:42")]
            (result,) = concurrency.policies
            assert (concurrency.limited, result.state, result.in_flight, result.limit) == (True, "held", 1, 2)
        assert wait_until(lambda: held() == [])

    def test_whatever_ends_it(self, held: Held, block: Block) -> None:
        for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
            with pytest.raises(error), block("exports", key="user:42"):
                raise error
            assert wait_until(lambda: held() == [])

    def test_over_the_limit_it_says_why(self, held: Held, block: Block) -> None:
        with block("exports", key="user:42"), block("exports", key="user:42"):
            with pytest.raises(ConcurrencyLimitExceeded) as caught, block("exports", key="user:42"):
                pass
            rejection = caught.value.rejection
            assert (rejection.policy, rejection.key, rejection.reason) == ("exports", "user:42", "full")
            assert (rejection.limit, rejection.in_flight) == (2, 2)
            assert rejection.retry_after is not None
            with block("exports", key="user:43"):
                assert len(held()) == 3

    def test_is_the_same_semaphore_as_a_requests(self, held: Held, block: Block) -> None:
        @concurrency_limit(policy="all")
        def view(request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        assert view(RequestFactory().get("/")).status_code == 200
        with block("all"):
            assert view(RequestFactory().get("/")).status_code == 429

    def test_may_come_again_but_not_inside_itself(self, held: Held) -> None:
        again = hold("all")
        for _ in range(2):
            with again:
                assert held() == [("all", "global")]
                with pytest.raises(RuntimeError, match="under way"):
                    again.__enter__()
                assert held() == [("all", "global")]
            assert wait_until(lambda: held() == [])
        with pytest.raises(RuntimeError, match="has not begun, or has ended"):
            again.__exit__(None, None, None)

    def test_limits_and_costs(self, held: Held, block: Block) -> None:
        with block("own", key="user:7", cost=2), block("own", key="user:7"):
            with pytest.raises(ConcurrencyLimitExceeded), block("own", key="user:7"):
                pass
            with block("own", key="user:7", max_concurrent=None) as concurrency:
                assert (concurrency.policies[0].in_flight, concurrency.policies[0].limit) == (4, None)
        with pytest.raises(ConcurrencyLimitExceeded, match="cost_above_limit"), block("own", key="user:1", cost=2):
            pass
        for policy, argument in (("varies", "max_concurrent"), ("costly", "cost")):
            with pytest.raises(TypeError, match=f"give {argument}="), block(policy, key="user:1"):
                pass
            with block(policy, key="user:1", **{argument: 1}):
                assert held() == [(policy, "user:1")]

    def test_a_headers_value_may_be_written_raw(self, held: Held, block: Block) -> None:
        shown = f"header:X-Api-Key:{digest_text('gold')}"
        with block("by-header", key="header:X-Api-Key:gold"), block("by-header", key=shown) as concurrency:
            assert held() == [("by-header", shown)] * 2, "one semaphore, and nothing of the value in the store"
            assert concurrency.policies[0].limit == 2

    def test_a_shadow_policy_lets_it_run_without_a_slot(self, held: Held, block: Block) -> None:
        with block("shadow", key="user:1"), block("shadow", key="user:1") as concurrency:
            assert concurrency.policies[0].state == "over"
            assert len(held()) == 1

    @pytest.mark.usefixtures("renewed_soon")
    def test_its_lease_is_renewed(self, held: Held) -> None:
        with hold("longer", key="user:1"):
            assert held.renewed()
            assert held() == [("longer", "user:1")]

    def test_signals_without_a_request(self, held: Held, block: Block) -> None:
        told: list[tuple[str, Any, str]] = []

        def hear(name: str) -> Callable[..., None]:
            def receiver(**arguments: Any) -> None:
                told.append((name, arguments["request"], arguments["key"]))

            getattr(signals, name).connect(receiver)
            return receiver

        receivers = [hear(name) for name in ("slot_acquired", "slot_released", "request_rejected")]
        with block("all"):
            with pytest.raises(ConcurrencyLimitExceeded), block("all"):
                pass
            assert [name for name, _, _ in told] == ["slot_acquired", "request_rejected"]
        assert told[-1] == ("slot_released", None, "global")
        assert all(request is None for _, request, _ in told)
        del receivers

    def test_given_back_early(self, held: Held, block: Block) -> None:
        with block("all") as concurrency:
            concurrency.release()
            assert wait_until(lambda: held() == [])

    def test_while_the_store_fails(self, held: Held, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        broken(held.store, monkeypatch)
        with block("all") as concurrency:
            assert concurrency.policies[0].state == "local"
            with pytest.raises(ConcurrencyLimitExceeded), block("all"):
                pass
        with pytest.raises(ConcurrencyLimitExceeded, match="backend_unavailable"), block("denied", key="user:1"):
            pass
        monkeypatch.undo()

    def test_with_nothing_enabled(self, limits: Limits, block: Block) -> None:
        limits({"policies": TABLE}, ENABLED=False)
        with block("all"), block("all") as concurrency:
            assert not concurrency.limited
            assert concurrency.hand_over() == HANDED_OVER


class Own(MemoryBackend):
    """A store of a project's own that knows nothing of handing over."""

    claim = BaseBackend.claim


def broken(store: BaseBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise BackendError("down", whole=False)

    async def afails(*args: Any) -> Any:
        raise BackendError("down", whole=False)

    for name in ("take", "claim"):
        monkeypatch.setattr(store, name, fails)
    monkeypatch.setattr(store, "atake", afails)


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "keywords", "error", "message"),
        [
            (["exprots"], {"key": "user:1"}, ImproperlyConfigured, "no policy 'exprots'.*did you mean 'exports'"),
            (["exports"], {}, TypeError, "counts by 'user'; give key="),
            (["exports"], {"key": 5}, TypeError, "key= to be text such as"),
            (["exports"], {"key": ""}, TypeError, "key= to be text such as"),
            (["exports"], {"key": "user:1", "cost": 0}, TypeError, "cost: expected an integer from 1 to 1000"),
            (
                ["exports"],
                {"key": "user:1", "max_concurrent": -1},
                TypeError,
                "max_concurrent: expected an integer >= 0",
            ),
            (
                ["exports"],
                {"key": "42"},
                ValueError,
                "'42' is no key of policy exports, whose keys look like 'user:42'",
            ),
            (["all"], {"key": "user:1"}, ValueError, "look like 'global'"),
            ([None], {}, TypeError, "the name of a policy"),
            ([HANDED_OVER + "e30="], {}, ValueError, "not made by hand_over"),
            ([HANDED_OVER + "%%%"], {}, ValueError, "not made by hand_over"),
            ([HANDED_OVER], {"key": "user:1"}, TypeError, "give nothing else"),
        ],
    )
    def test_a_clear_word(
        self, held: Held, args: list[Any], keywords: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message), hold(*args, **keywords):
            pass


class TestOnALoop:
    def test_a_hundred_blocks_that_are_cancelled_leave_nothing(self, held: Held) -> None:
        async def main() -> None:
            async def one(number: int) -> None:
                async with hold("exports", key=f"user:{number % 7}", max_concurrent=100):
                    await asyncio.sleep(10)

            tasks = [asyncio.create_task(one(number)) for number in range(100)]
            for number, task in enumerate(tasks):
                task.cancel()
                if number % 3 == 0:
                    await asyncio.sleep(0)
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(main())
        assert wait_until(lambda: held() == [])

    def test_a_generator_that_is_dropped_leaves_nothing(self, held: Held) -> None:
        def chunks() -> Iterator[int]:
            with hold("all"):
                yield 1

        running = chunks()
        next(running)
        assert held() == [("all", "global")]
        del running
        assert wait_until(lambda: held() == [])

    def test_many_blocks_of_one_leave_nothing_behind(self, limits: Limits) -> None:
        limits({"policies": {"all": {"key": "global", "max_concurrent": 1}}})
        again = hold("all")
        before = len(weakref.finalize._registry)  # type: ignore[attr-defined]  # private: what would pile up
        for _ in range(100):
            with again:
                pass
        assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]

    def test_a_block_that_nobody_ends(self, held: Held) -> None:
        block = hold("all")
        block.__enter__()
        assert held() == [("all", "global")]
        del block
        gc.collect()
        assert wait_until(lambda: held() == [])


# -- handing over ----------------------------------------------------------------------------------------------------


def handed_over(policy: str = "exports", **keywords: Any) -> str:
    """What a view gives on whose request has ended since."""
    tokens: list[str] = []

    @concurrency_limit(
        policy=policy, key=lambda request: "user:42", when=lambda request: True, methods=["GET"], **keywords
    )
    def view(request: Any) -> HttpResponse:
        tokens.append(request.concurrency.hand_over())
        return HttpResponse(status=202)

    assert view(RequestFactory().get("/")).status_code == 202
    return tokens[0]


class TestHandOver:
    def test_the_slot_outlives_its_request_and_is_claimed(self, held: Held, block: Block) -> None:
        token = handed_over()
        assert held() == [("exports", "user:42")]
        with block(token) as concurrency:
            assert held() == [("exports", "user:42")]
            (result,) = concurrency.policies
            assert (result.policy, result.key, result.state, result.limit) == ("exports", "user:42", "held", 2)
        assert wait_until(lambda: held() == [])

    def test_it_is_small_text_that_any_queue_carries(self, held: Held) -> None:
        token = handed_over()
        assert len(token) < 1000
        assert token.isascii()
        assert json.loads(json.dumps(token)) == pickle.loads(pickle.dumps(token)) == token
        with hold(token):
            pass

    def test_the_limit_holds_all_the_while(self, held: Held, block: Block) -> None:
        first, second = handed_over(), handed_over()
        assert first != second
        with pytest.raises(ConcurrencyLimitExceeded), block("exports", key="user:42"):
            pass
        with block(first), block(second), pytest.raises(ConcurrencyLimitExceeded), block("exports", key="user:42"):
            pass

    def test_a_second_claim(self, held: Held, block: Block) -> None:
        token = handed_over()
        with block(token), pytest.raises(SlotLost, match="claimed"), block(token):
            pass
        with pytest.raises(SlotLost), block(token):
            pass
        assert wait_until(lambda: held() == [])

    def test_unclaimed_it_ends_with_its_lease(self, held: Held, block: Block) -> None:
        began, token = monotonic(), handed_over("short")
        assert held() == [("short", "user:42")] or monotonic() >= began + SHORT
        assert wait_until(lambda: held() == [])
        with pytest.raises(SlotLost), block(token):
            pass

    @pytest.mark.usefixtures("renewed_soon")
    def test_claimed_it_is_renewed(self, held: Held) -> None:
        with hold(handed_over("longer")):
            assert held.renewed()
            assert held() == [("longer", "user:42")]

    @pytest.mark.usefixtures("renewed_soon")
    @pytest.mark.parametrize(("policy", "ends"), [("fixed", LONGER), ("aged", LONGER + 1)])
    def test_its_time_goes_on_from_the_request(self, held: Held, policy: str, ends: float) -> None:
        """`renew: false` ends at its ttl as it stands, any other at its max_age: however often it changes hands."""
        began = monotonic()
        token = handed_over(policy)
        taken = monotonic()
        sleep(0.5)
        with hold(token) as concurrency, hold(concurrency.hand_over()):
            assert held() == [(policy, "user:42")]
            lasts = [one.last for lease in keeper.live() if isinstance(lease, Lease) for one in lease.holdings()]
            (last,) = lasts
            # A token tells the end by the wall clock, which is read at another moment; had it begun again, half a second more.
            assert began + ends - 0.25 < last < taken + ends + 0.25
            for _ in range(5):  # its renewals are due again and again
                now = monotonic()
                assert all(now + holder.lease_left < taken + ends + 0.25 for holder in held.store.snapshot())
                sleep(0.02)
        with pytest.raises(SlotLost), hold(token):
            pass

    @pytest.mark.parametrize("block", [in_a_thread, on_a_loop], ids=["threads", "loop"])
    def test_of_two_stores_all_or_nothing(
        self, limits: Limits, backend: dict[str, Any], prefix: str, block: Block
    ) -> None:
        other = {"BACKEND": "memory", "KEY_PREFIX": f"{prefix}-other"}
        limits(
            {
                "policies": {
                    name: {"key": "global", "max_concurrent": 1, "backend": name} for name in ("default", "other")
                }
            },
            BACKENDS={"default": backend, "other": other},
        )
        tokens: list[str] = []

        @concurrency_limit(policy="default")
        @concurrency_limit(policy="other")
        def view(request: Any) -> HttpResponse:
            tokens.append(request.concurrency.hand_over())
            return HttpResponse(status=202)

        for lost in (False, True):
            view(RequestFactory().get("/"))
            assert sorted(holder.policy for holder in snapshot_all()) == ["default", "other"]
            if lost:
                for policy, slot in unpack(tokens[-1]).slots:
                    if policy.name == "other":
                        assert store_of(policy, conf.current()).evict(slot.token)
                kept = hold(tokens[-1])  # its own end would give back too
                with pytest.raises(SlotLost, match="policy other"), kept if block is in_a_thread else block(tokens[-1]):
                    pass
            else:
                with block(tokens[-1]) as concurrency:
                    assert [result.policy for result in concurrency.policies] == ["default", "other"]
            assert wait_until(lambda: list(snapshot_all()) == [])

    def test_it_may_be_handed_on(self, held: Held, block: Block) -> None:
        with block(handed_over()) as concurrency:
            token = concurrency.hand_over()
            assert concurrency.hand_over() == HANDED_OVER, "nothing is left to hand over"
        assert held() == [("exports", "user:42")]
        with block(token):
            assert held() == [("exports", "user:42")]

    def test_costs_and_unlimited_ones(self, held: Held, block: Block) -> None:
        token = handed_over("own", cost=3, max_concurrent=None)
        with block(token) as concurrency:
            assert concurrency.policies[0].limit is None
            (holder,) = held.store.snapshot()
            assert holder.cost == 3

    def test_from_a_thread_that_the_view_has_started(self, held: Held) -> None:
        seen: list[Any] = []

        def work(token: str) -> None:
            with hold(token):
                seen.append(held())

        thread = threading.Thread(target=work, args=(handed_over(),))
        thread.start()
        thread.join(SOON)
        assert seen == [[("exports", "user:42")]]

    def test_the_release_is_told_once_and_by_the_last_one(self, held: Held, block: Block) -> None:
        told: list[tuple[Any, bool]] = []

        def receiver(**arguments: Any) -> None:
            told.append((arguments["request"], arguments["held"]))

        signals.slot_released.connect(receiver)
        token = handed_over()
        assert told == []
        with block(token):
            assert told == []
        assert told == [(None, True)]

    def test_nothing_held_nothing_handed_over(self, held: Held, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as failing:
            broken(held.store, failing)
            token = handed_over()
        assert token == HANDED_OVER
        with block(token) as concurrency:
            assert not concurrency.limited

    def test_while_the_store_fails_it_is_held_on_as_it_stands(
        self, held: Held, block: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        token, denied = handed_over(), handed_over("denied")
        with monkeypatch.context() as failing:
            broken(held.store, failing)
            with pytest.raises(ConcurrencyLimitExceeded, match="backend_unavailable"), block(denied):
                pass
            with block(token) as concurrency:
                assert concurrency.policies[0].state == "unprotected"
                assert ("exports", "user:42") in held()
        with block(denied):
            pass
        assert wait_until(lambda: held() == [])

    def test_a_shadow_policys_slot_keeps_nobody_from_running(
        self, held: Held, block: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began, token = monotonic(), handed_over("shadow-denied")
        assert held() == [("shadow-denied", "user:42")] or monotonic() >= began + SHORT
        assert wait_until(lambda: held() == [])
        with block(token) as concurrency:
            assert concurrency.policies[0].state == "over"
        with override_settings(CONCURRENCY_LIMIT={**settings.CONCURRENCY_LIMIT, "ON_BACKEND_ERROR": "deny"}):
            token = handed_over("shadow-denied")
            with monkeypatch.context() as failing:
                broken(held.store, failing)
                with block(token) as concurrency:
                    assert concurrency.policies[0].state == "unprotected"

    def test_a_claim_that_failed_is_renewed_at_once(
        self, held: Held, block: Block, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """How much of the lease is left nobody knows, and the store may work for everybody else."""
        token = handed_over("longer")
        renewed = threading.Event()
        renew = held.store.renew

        def renewing(slots: Any) -> Any:
            renewed.set()
            return renew(slots)

        monkeypatch.setattr(held.store, "renew", renewing)
        with monkeypatch.context() as failing:
            broken(held.store, failing)
            with block(token):
                assert renewed.wait(LONGER / 4), "not a third of its ttl later"
                assert ("longer", "user:42") in held()

    def test_a_store_that_cannot_says_so(self, limits: Limits) -> None:
        """At the hand-over, where the slots are still the request's own."""
        limits(
            {"policies": {"all": {"key": "global", "max_concurrent": 1}}},
            BACKENDS={"default": {"BACKEND": f"{__name__}.Own", "KEY_PREFIX": "own"}},
        )
        with hold("all") as concurrency:
            with pytest.raises(ImproperlyConfigured, match="Own cannot hand slots over"):
                concurrency.hand_over()
            assert len(snapshot_all()) == 1
        assert snapshot_all() == []

    def test_a_store_that_fails_to_let_go_is_no_reason_to_lose_the_token(
        self, held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fails(slots: Any) -> None:
            raise RuntimeError("of the store's own")

        monkeypatch.setattr(held.store, "detach", fails)
        with hold(handed_over()):
            assert held() == [("exports", "user:42")]
        assert "may end with this process" in caplog.text

    def test_it_waits_for_a_recount_under_way(self, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or the slot would be counted again after somebody has claimed it, by a token that nobody gives back."""
        entered, go = threading.Event(), threading.Event()
        restore = held.store.restore

        def restoring(holders: Any) -> Any:
            entered.set()
            assert go.wait(SOON)
            return restore(holders)

        monkeypatch.setattr(held.store, "restore", restoring)
        with hold("fixed", key="user:42", max_concurrent=5) as concurrency:
            recount = threading.Thread(target=renewals.recount, args=(held.store,))
            recount.start()
            assert entered.wait(SOON)
            threading.Timer(0.05, go.set).start()
            token = concurrency.hand_over()
            assert go.is_set()
            recount.join()
        with hold(token):
            assert len(held()) == 1

    def test_a_release_while_it_is_handed_over_gives_back_one_of_both(self, held: Held) -> None:
        """A hundred times at once: whoever is first has it, and nothing is lost or given back twice."""
        for _ in range(100):
            with hold("all") as concurrency:
                thread = threading.Thread(target=concurrency.release)
                thread.start()
                token = concurrency.hand_over()
                thread.join()
            if token != HANDED_OVER:
                with hold(token):
                    pass
            assert wait_until(lambda: held() == [])


class TestProcesses:
    def test_a_forked_child_claims_it_or_is_told_why_not(self, held: Held, backend: dict[str, Any]) -> None:
        token = handed_over()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with hold(token):
                    code = 0 if held() == [("exports", "user:42")] else 2
            except ImproperlyConfigured as error:
                code = 3 if "counts in one process only" in str(error) else 4
            finally:
                os._exit(code)
        assert exit_code(pid) == (3 if backend["BACKEND"] == "memory" else 0)
        if backend["BACKEND"] == "memory":
            with hold(token):
                pass
        assert wait_until(lambda: held() == [])

    def test_the_giver_may_die_before_it_is_claimed(self, held: Held, backend: dict[str, Any]) -> None:
        """A worker that is replaced after it has answered 202."""
        if backend["BACKEND"] == "memory":
            return  # its slots end with the process
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writing, handed_over().encode())
            finally:
                os._exit(0)
        assert exit_code(pid) == 0
        token = os.read(reading, 10_000).decode()
        os.close(reading)
        os.close(writing)
        with pytest.raises(ConcurrencyLimitExceeded), hold("exports", key="user:42", max_concurrent=1):
            pass
        with hold(token):
            assert held() == [("exports", "user:42")]
        assert wait_until(lambda: held() == [])


def test_a_claim_that_is_cancelled_leaves_nothing(redis_server: RedisServer, prefix: str, limits: Limits) -> None:
    """At random moments, while the store takes its time."""
    limits(
        {"policies": TABLE},
        BACKENDS={
            "default": {
                "BACKEND": "redis",
                "LOCATION": redis_server.url,
                "KEY_PREFIX": prefix,
                "OPTIONS": {"socket_timeout": 5},
            }
        },
    )
    held = Held()

    async def one(token: str, delay: float) -> None:
        async with asyncio.timeout(delay):
            async with hold(token):
                await asyncio.sleep(10)

    given = {}

    async def main() -> None:
        for _ in range(60):
            token = await asyncio.to_thread(handed_over, max_concurrent=None)
            ((_, slot),) = unpack(token).slots
            given[slot.token] = token
        asked = [one(token, number / 10_000) for number, token in enumerate(given.values())]
        assert {type(error) for error in await asyncio.gather(*asked, return_exceptions=True)} == {TimeoutError}

    def left() -> set[str]:
        return {holder.token for holder in held.store.snapshot()}

    asyncio.run(main())
    # A claim that was never made leaves its slot as it was, to the end of the lease; of one that was made nothing is left.
    assert wait_until(lambda: left() <= set(given))
    for token in left():
        with hold(given[token]):
            pass
    assert wait_until(lambda: left() == set())
