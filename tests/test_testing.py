"""The tools for a project's own tests: `hold_slots`, `assert_no_slots_held`, and semaphores of its own for each worker."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings

from django_concurrency_mw import BackendError, checks, concurrency_limit, conf, hold, signals
from django_concurrency_mw import held as held_module
from django_concurrency_mw.backends import BaseBackend, get_backend, snapshot_all
from django_concurrency_mw.keys import digest_text
from django_concurrency_mw.testing import aassert_no_slots_held, assert_no_slots_held, hold_slots

from .conftest import Run
from .queued import PATH, WAITING, standing
from .redis_server import RedisServer
from .support import OURS, SOON, Limits, await_until, backend_entry, run_async, wait_until
from .views import Deliberate, switch

Store = dict[str, Any]


@pytest.fixture(params=["memory", "host", "redis"])
def store(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> Store:
    """An entry of BACKENDS, for each kind."""
    if request.param == "memory":
        return {"BACKEND": "memory", "KEY_PREFIX": prefix}
    if request.param == "host":
        return {"BACKEND": "host", "KEY_PREFIX": prefix, "OPTIONS": {"path": str(tmp_path / "slots")}}
    return {
        "BACKEND": "redis",
        "KEY_PREFIX": prefix,
        "LOCATION": request.getfixturevalue("redis_server").url,
        "OPTIONS": {"socket_timeout": 5},
    }


def table(**policies: Any) -> dict[str, Any]:
    return {"policies": {name.replace("_", "-"): fields for name, fields in policies.items()}}


EXPORTS = table(
    report_exports={"url_names": ["plain", "aplain", "stream"], "key": "header:X-Client", "max_concurrent": 5},
    whole={"key": "global", "max_concurrent": 2},
    other={"key": "user", "max_concurrent": 3},
)


@pytest.fixture
def site(limits: Limits, store: Store) -> None:
    """The middleware with EXPORTS, on that store."""
    limits(EXPORTS, middleware=[OURS], BACKENDS={"default": store})


def current_store() -> BaseBackend:
    return get_backend("default", conf.current().backends)


def counts() -> dict[tuple[str, str], int]:
    """Holders by policy and key, by the store's own word."""
    found: dict[tuple[str, str], int] = {}
    for holder in current_store().snapshot():
        found[holder.policy, holder.key] = found.get((holder.policy, holder.key), 0) + 1
    return found


def status(client: str = "ada") -> int:
    return Client().get("/plain/", headers={"X-Client": client}).status_code


# -- hold_slots -----------------------------------------------------------------------------------------------------


def test_the_next_request_is_rejected_and_the_one_after_the_block_is_not(site: None) -> None:
    for _ in range(3):
        with hold_slots("report-exports", "header:X-Client:ada", 5):
            assert status() == 429
            assert status("bob") == 200, "another key"
        assert status() == 200


def test_async(site: None) -> None:
    async def main() -> None:
        async def code() -> int:
            return (await AsyncClient().get("/aplain/", headers={"X-Client": "ada"})).status_code

        for _ in range(3):
            async with hold_slots("report-exports", "header:X-Client:ada", 5):
                assert await code() == 429
            assert await code() == 200

    run_async(main)


def test_nested_blocks_add_up_and_each_gives_back_its_own(site: None) -> None:
    key = "header:X-Client:ada"
    with hold_slots("report-exports", key, 4):
        assert status() == 200
        with hold_slots("report-exports", key):
            assert status() == 429
        assert wait_until(lambda: sum(counts().values()) == 4)
        assert status() == 200


def test_more_than_the_limit_and_more_than_one_take_has(site: None) -> None:
    with hold_slots("whole", n=250):
        assert counts() == {("whole", "global"): 250}
    assert counts() == {}
    with hold_slots("whole", n=0):
        assert counts() == {}


def test_a_body_that_raises_gives_back_and_its_error_is_seen(site: None) -> None:
    with pytest.raises(Deliberate), hold_slots("whole", n=2):
        raise Deliberate
    assert counts() == {}

    async def main() -> None:
        async with hold_slots("whole", n=2):
            raise Deliberate

    with pytest.raises(Deliberate):
        run_async(main)
    assert counts() == {}


def test_only_what_it_took_is_given_back(site: None) -> None:
    with hold("whole"):
        with hold_slots("whole", n=2):
            assert sum(counts().values()) == 3
        assert counts() == {("whole", "global"): 1}


def test_settings_that_change_inside_leave_the_slots_where_they_are(site: None, prefix: str) -> None:
    there = current_store()
    block = hold_slots("whole", n=2)
    block.__enter__()
    elsewhere = {"default": {"BACKEND": "memory", "KEY_PREFIX": f"{prefix}-inside"}}
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": table(), "BACKENDS": elsewhere}):
        assert len(there.snapshot()) == 2
        block.__exit__(None, None, None)
        assert len(there.snapshot()) == 0


def test_the_settings_are_those_at_entry(site: None, prefix: str) -> None:
    block = hold_slots("inside", "user:1")
    backends = {"default": {"BACKEND": "memory", "KEY_PREFIX": f"{prefix}-inside"}}
    policies = table(inside={"key": "user", "max_concurrent": 1})
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": policies, "BACKENDS": backends}):
        with block:
            assert counts() == {("inside", "user:1"): 1}
            with pytest.raises(AssertionError, match="1 slot is held"):
                assert_no_slots_held(timeout=0)
        assert_no_slots_held()


def test_they_are_held_for_longer_than_a_lease(limits: Limits, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All leases are renewed, whatever the policies say: they come to end later than a minute after they began."""
    monkeypatch.setattr(held_module, "RENEW_AFTER", 0.05 / 60)
    one = {"key": "global", "max_concurrent": 1, "ttl": 60}
    limits(
        table(renewed=one, unrenewed={**one, "renew": False}, aged={**one, "max_age": 60}),
        BACKENDS={"default": store},
    )
    with hold_slots("renewed"), hold_slots("unrenewed"), hold_slots("aged"):
        assert wait_until(lambda: all(holder.age + holder.lease_left > 60.1 for holder in snapshot_all()))
        assert sorted(policy for policy, _ in counts()) == ["aged", "renewed", "unrenewed"]
    assert counts() == {}


def test_a_header_may_be_written_raw_or_as_its_digest(limits: Limits, store: Store) -> None:
    limits(EXPORTS, middleware=[OURS], BACKENDS={"default": store})
    resolved = f"header:X-Client:{digest_text('ada')}"
    for key in ("header:X-Client:ada", resolved):
        with hold_slots("report-exports", key, 5):
            assert status() == 429
            assert counts()["report-exports", resolved] == 5
    raw = "0123456789abcdef0123456789abcdef"  # an API key that looks like a digest
    with hold_slots("report-exports", f"header:X-Client:{raw}", 5):
        assert status(raw) == 429
    assert_no_slots_held()


def test_the_semaphore_of_a_decorator_with_a_name(limits: Limits, store: Store) -> None:
    @concurrency_limit("user", 2, name="testing-decorated")
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    def code() -> int:
        request = RequestFactory().get("/")
        return view(request).status_code

    limits(BACKENDS={"default": store})
    with hold_slots("testing-decorated", "ip:127.0.0.1", 2):
        assert code() == 429
        with pytest.raises(AssertionError, match="2 slots are held"):
            assert_no_slots_held("testing-decorated", timeout=0)
    assert code() == 200


def test_the_store_of_a_decorator_that_nothing_else_uses(limits: Limits, store: Store, prefix: str) -> None:
    """No table, and no request yet under these settings: the decorator alone tells that the store is in use."""

    @concurrency_limit("global", 2, name="testing-elsewhere", backend="testing-there")
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    @concurrency_limit("global", 2, backend="testing-there")
    def unnamed(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    backends = {"default": {"BACKEND": "memory", "KEY_PREFIX": prefix}, "testing-there": store}
    limits(table(view={"key": "global", "max_concurrent": 1}), BACKENDS=backends)
    with hold_slots("testing-elsewhere", n=2):
        limits(table(view={"key": "global", "max_concurrent": 1}), BACKENDS=backends)
        del view
        assert conf.current().stores == {}
        with pytest.raises(AssertionError, match=r"(?s)2 slots.*backend testing-there"):
            assert_no_slots_held(timeout=0)


def test_no_signal_is_sent(limits: Limits) -> None:
    limits(EXPORTS)
    seen: list[str] = []

    def heard(sender: Any, policy: Any, **about: Any) -> None:
        seen.append(policy.name)

    for signal in (signals.slot_acquired, signals.slot_released, signals.request_rejected):
        signal.connect(heard)
    try:
        with hold_slots("whole", n=5):
            pass
    finally:
        for signal in (signals.slot_acquired, signals.slot_released, signals.request_rejected):
            signal.disconnect(heard)
    assert seen == []


def test_what_is_wrong_is_said(limits: Limits) -> None:
    limits(EXPORTS)
    with pytest.raises(ImproperlyConfigured, match=r"no policy 'hole'.*did you mean 'whole'"), hold_slots("hole"):
        pass
    with pytest.raises(TypeError, match="policy other counts by 'user'; give key"), hold_slots("other"):
        pass
    for wrong in ({"n": "2"}, {"n": True}, {"key": ""}, {"key": 42}, {"policy": None}):
        with pytest.raises(TypeError, match="hold_slots: expected"):
            hold_slots(**{"policy": "whole", **wrong})
    with pytest.raises(ValueError, match="0 or more"):
        hold_slots("whole", n=-1)
    block = hold_slots("whole")
    with block, pytest.raises(RuntimeError, match="under way"):
        block.__enter__()
    with block:  # again, one after another
        assert counts() == {("whole", "global"): 1}
    with pytest.raises(RuntimeError, match="not begun"):
        block.__exit__(None, None, None)
    assert counts() == {}


def test_a_block_that_nobody_ends_is_given_back_all_the_same(site: None) -> None:
    hold_slots("whole", n=2).__enter__()
    assert_no_slots_held()


def test_a_store_that_fails_is_an_error_and_no_stand_in(limits: Limits, prefix: str) -> None:
    closed = {"BACKEND": "redis", "KEY_PREFIX": prefix, "LOCATION": "redis://127.0.0.1:1/0"}
    limits(EXPORTS, BACKENDS={"default": closed})
    with pytest.raises(BackendError, match="hold_slots: backend default fails"), hold_slots("whole"):
        pass

    async def main() -> None:
        async with hold_slots("whole"):
            pass

    with pytest.raises(BackendError, match="hold_slots: backend default fails"):
        run_async(main)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["with", "async with"])
def test_a_store_that_fails_half_way_leaves_nothing(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    limits(EXPORTS)
    store = current_store()
    take, calls = store.take, []

    def second_fails(slots: Any) -> Any:
        reply = take(slots)
        calls.append(len(slots))
        if len(calls) == 2:
            raise BackendError("its reply was lost")
        return reply

    async def enter() -> None:
        await block.__aenter__()

    monkeypatch.setattr(store, "take", second_fails)
    block = hold_slots("whole", n=150)  # kept, so that nobody but its own code gives back
    with pytest.raises(BackendError, match="its reply was lost"):
        run_async(enter) if asynchronous else block.__enter__()
    assert calls == [100, 50]
    assert wait_until(lambda: counts() == {})


@pytest.mark.parametrize("asynchronous", [False, True], ids=["with", "async with"])
def test_the_end_waits_until_the_release_is_carried_out(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """As on a Redis that is slow to read what it was sent."""
    limits(EXPORTS)
    store = current_store()
    give = store.give
    timers: list[threading.Timer] = []

    def later(slots: Any) -> list[bool]:
        timers.append(threading.Timer(0.3, give, (slots,)))
        timers[-1].start()
        return [True] * len(slots)

    async def main() -> None:
        async with hold_slots("whole", n=2):
            pass

    monkeypatch.setattr(store, "give", later)
    if asynchronous:
        run_async(main)
    else:
        with hold_slots("whole", n=2):
            pass
    assert counts() == {}
    assert len(timers) == 1


# -- assert_no_slots_held -------------------------------------------------------------------------------------------


def test_each_holder_is_listed(site: None) -> None:
    def get() -> None:
        b"".join(Client().get("/plain/?page=1", headers={"X-Client": "ada"}))

    assert_no_slots_held()
    switch.stop_at = 0
    thread = threading.Thread(target=get)
    thread.start()
    assert switch.entered.wait(SOON)
    with hold_slots("whole", n=2), pytest.raises(AssertionError) as raised:
        assert_no_slots_held(timeout=0)
    first, *lines = str(raised.value).splitlines()
    assert first == "3 slots are held:"
    key = f"header:X-Client:{digest_text('ada')}"
    ages = [float(re.search(r"for (\d+\.\d) s", line)[1]) for line in lines]  # type: ignore[index]
    assert max(ages) < 60
    assert sorted(re.sub(r"\d+\.\d s", "N s", line) for line in lines) == [
        f"  policy report-exports, key {key!r}, for N s, path '/plain/' (backend default)",
        *["  policy whole, key 'global', for N s, path 'hold_slots()' (backend default)"] * 2,
    ]
    switch.go.set()
    thread.join(SOON)
    assert_no_slots_held()


def test_with_arguments_only_those_count(site: None) -> None:
    with hold_slots("other", "user:1"), hold_slots("report-exports", "header:X-Client:ada"):
        assert_no_slots_held("whole")
        assert_no_slots_held("other", "user:10")
        assert_no_slots_held(key="user:2")
        assert_no_slots_held("report-exports", "header:X-Client:bob")
        for policy, key in (
            ("other", None),
            ("other", "user:1"),
            (None, "user:1"),
            ("report-exports", "header:X-Client:ada"),
        ):
            with pytest.raises(AssertionError, match="1 slot is held"):
                assert_no_slots_held(policy, key, timeout=0)
    assert_no_slots_held("other", "user:1")


@pytest.mark.parametrize("text", ["k" * 400, "é" * 300, "€\n" * 200, "\x1f€" * 200])
def test_a_key_of_which_the_store_keeps_a_part(site: None, text: str) -> None:
    with hold_slots("other", text), pytest.raises(AssertionError, match="1 slot is held"):
        assert_no_slots_held("other", text, timeout=0)


# -- and the lines ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=WAITING)
def lines(request: pytest.FixtureRequest, limits: Limits, prefix: str, tmp_path: Path) -> BaseBackend:
    """A store that lets wait, under a policy that does."""
    whole = {"url_names": ["plain", "aplain"], "key": "global", "max_concurrent": 1, "wait": 8}
    backend = backend_entry(request.param, request, prefix, tmp_path)
    limits(
        table(whole=whole, other={"key": "user", "max_concurrent": 3}), middleware=[OURS], BACKENDS={"default": backend}
    )
    return current_store()


def test_who_is_left_in_a_line_is_named(lines: BaseBackend) -> None:
    with hold_slots("whole"), standing(lines, "whole", "global", 2):
        with pytest.raises(AssertionError) as raised:
            assert_no_slots_held("whole", timeout=0)
        assert re.sub(r"\d+\.\d s", "N s", str(raised.value)).splitlines() == [
            "1 slot is held and 2 places in lines are taken:",
            "  policy whole, key 'global', for N s, path 'hold_slots()' (backend default)",
            f"  policy whole, key 'global', waits at place 1 for N s, path '{PATH}' (backend default)",
            f"  policy whole, key 'global', waits at place 2 for N s, path '{PATH}' (backend default)",
        ]
        assert_no_slots_held("other")
        with (
            hold_slots("other", "user:1", 3),
            standing(lines, "other", "user:1", limit=3),
            pytest.raises(AssertionError, match="1 place in a line is taken:"),
        ):
            _only_waiters(lines)
    assert_no_slots_held()


def _only_waiters(store: BaseBackend) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "snapshot", lambda: [])
        assert_no_slots_held("other", "user:1", timeout=0)


def test_a_request_waits_until_the_block_ends(lines: BaseBackend) -> None:
    """Which is how a site tests its waiting; the test client has to say that its server has threads."""
    answers: list[int] = []

    def get() -> None:
        answers.append(Client().get("/plain/", **{"wsgi.multithread": True}).status_code)  # type: ignore[arg-type]  # environ

    thread = threading.Thread(target=get)
    with hold_slots("whole"):
        assert Client().get("/plain/").status_code == 429, "a server of one thread lets nobody wait"
        thread.start()
        assert wait_until(lambda: len(lines.waiters()) == 1)
    thread.join(10)
    assert answers == [200]
    assert_no_slots_held()


def test_a_request_of_the_async_client_waits(lines: BaseBackend) -> None:
    async def main() -> int:
        async with hold_slots("whole"):
            asking = asyncio.create_task(AsyncClient().get("/aplain/"))
            assert await await_until(lambda: len(lines.waiters()) == 1)
        return (await asyncio.wait_for(asking, 10)).status_code

    assert run_async(main) == 200
    assert_no_slots_held()


def test_more_slots_are_filled_though_somebody_waits(lines: BaseBackend) -> None:
    """A test fills what it wants: no limit and no line is asked."""

    async def main() -> int:
        async with hold_slots("whole", n=2):
            return len(await sync_to_async(lines.snapshot)())

    with hold_slots("whole"), standing(lines, "whole", "global"):
        with hold_slots("whole", n=3):
            assert counts() == {("whole", "global"): 4}
        assert run_async(main) == 3
        assert wait_until(lambda: counts() == {("whole", "global"): 1})
        assert len(lines.waiters()) == 1
    assert_no_slots_held()


def test_a_store_that_cannot_fill_past_a_line_says_so(lines: BaseBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "restore", lambda holders: [False] * len(holders))
    with hold_slots("whole"), standing(lines, "whole", "global"):
        with pytest.raises(BackendError, match="requests wait in line there"), hold_slots("whole"):
            pass
        assert counts() == {("whole", "global"): 1}


def test_a_name_that_nobody_has_is_an_error(limits: Limits) -> None:
    limits(EXPORTS)
    with pytest.raises(ImproperlyConfigured, match=r"assert_no_slots_held: no policy 'hole'.*did you mean 'whole'"):
        assert_no_slots_held("hole")
    assert_no_slots_held("shop.views.export")


def test_it_waits_for_what_is_just_given_back(site: None) -> None:
    block = hold_slots("whole")
    block.__enter__()
    timer = threading.Timer(0.3, block.__exit__, (None, None, None))
    timer.start()
    began = monotonic()
    assert_no_slots_held()
    assert monotonic() - began > 0.2
    timer.join()


def test_it_waits_so_long_and_no_longer(site: None) -> None:
    with hold_slots("whole"):
        for given, tries in ((0.3, 1), (0.1, 3)):
            took = []
            for _ in range(tries):
                began = monotonic()
                with pytest.raises(AssertionError):
                    assert_no_slots_held(timeout=given)
                took.append(monotonic() - began)
            assert given <= min(took) < 0.95, "not as long as it waits by itself"


def test_on_an_event_loop_the_others_go_on(site: None) -> None:
    async def main() -> None:
        async def later() -> None:
            async with hold_slots("whole"):
                await asyncio.sleep(0.3)

        task = asyncio.create_task(later())
        while not await asyncio.to_thread(counts):
            await asyncio.sleep(0.01)
        await aassert_no_slots_held()
        await task
        with hold_slots("other", "user:1"), pytest.raises(AssertionError, match="policy other, key 'user:1'"):
            await aassert_no_slots_held("other", timeout=0)

    run_async(main)


def test_the_slots_of_another_process_are_seen(
    limits: Limits, prefix: str, redis_server: RedisServer, run_python: Run
) -> None:
    backends = {
        "default": {
            "BACKEND": "redis",
            "KEY_PREFIX": prefix,
            "LOCATION": redis_server.url,
            "OPTIONS": {"socket_timeout": 5},
        }
    }
    limits(EXPORTS, BACKENDS=backends)
    program = f"""
import os, django
from django.conf import settings
settings.configure(CONCURRENCY_LIMIT={{"POLICIES": {EXPORTS!r}, "BACKENDS": {backends!r}}})
django.setup()
from django_concurrency_mw.testing import hold_slots
block = hold_slots("whole", n=2)
block.__enter__()
os._exit(0)
"""
    assert run_python("-c", program).returncode == 0
    with pytest.raises(AssertionError, match="2 slots are held"):
        assert_no_slots_held(timeout=0)


# -- parallel test runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this process a worker of pytest-xdist."""
    return lambda name: monkeypatch.setenv("PYTEST_XDIST_WORKER", name)


def test_every_worker_has_semaphores_of_its_own(limits: Limits, store: Store, worker: Callable[[str], None]) -> None:
    found = []
    for name in ("gw0", "gw1"):
        worker(name)
        limits(EXPORTS, BACKENDS={"default": store})
        assert conf.current().backends["default"].key_prefix == f"{store['KEY_PREFIX']}-{name}"
        found.append(hold_slots("whole", n=2))
        found[-1].__enter__()
        assert counts() == {("whole", "global"): 2}
    for block in found:
        block.__exit__(None, None, None)
    assert_no_slots_held()


def test_the_default_stores_are_set_apart_too(worker: Callable[[str], None]) -> None:
    worker("gw3")
    assert conf.compile_settings({}).backends["default"].key_prefix == "concurrency-gw3"
    assert get_backend("memory", {}).config.key_prefix == "concurrency-gw3"
    assert (
        conf.compile_settings({"BACKENDS": {"a": {"BACKEND": "redis"}}}).backends["a"].key_prefix == "concurrency-gw3"
    )


def test_a_worker_of_djangos_runner_has_a_number(
    worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("django.test.runner._worker_id", 2)
    assert conf.compile_settings({}).backends["default"].key_prefix == "concurrency-2"
    worker("gw1")
    assert conf.compile_settings({}).backends["default"].key_prefix == "concurrency-gw1-2"


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert conf.compile_settings({}).backends["default"].key_prefix == "concurrency"
    assert get_backend("memory", {}).config.key_prefix == "concurrency"


def test_the_check_of_common_names_says_the_same_in_a_worker(
    worker: Callable[[str], None], limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "mysite.settings")
    worker("gw0")
    limits(EXPORTS, BACKENDS={"default": {"BACKEND": "host"}})
    assert "django_concurrency_mw.W010" in [message.id for message in checks.check_deployed_store()]


PROJECT = """
SECRET_KEY = "tests"
CONCURRENCY_LIMIT = {
    "POLICIES": {"policies": {"exports": {"key": "global", "max_concurrent": 2}}},
    "BACKENDS": {"default": {"BACKEND": "host", "KEY_PREFIX": "%(prefix)s", "OPTIONS": %(options)s}},
}
"""
#: Two of these run at the same time, in two processes: each waits until the other one holds its slots, too.
MEETING = """
import os, sys
from pathlib import Path
from time import monotonic, sleep
from django_concurrency_mw import conf
from django_concurrency_mw.backends import get_backend
from django_concurrency_mw.testing import assert_no_slots_held, hold_slots

HERE = Path(__file__).parent

def meet(me, other, word):
    (HERE / f"{word}-{me}").write_text(str(os.getpid()))
    end = monotonic() + 60
    while not (HERE / f"{word}-{other}").exists() or not (HERE / f"{word}-{other}").read_text():
        assert monotonic() < end, "the other one did not come"
        sleep(0.01)
    assert (HERE / f"{word}-{other}").read_text() != str(os.getpid()), "two processes"

def fill(me, other):
    with hold_slots("exports", n=2):
        meet(me, other, "holding")
        assert len(get_backend("default", conf.current().backends).snapshot()) == 2
        meet(me, other, "counted")
    assert_no_slots_held()
"""


@pytest.fixture(params=["by prefix", "by path"])
def project(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Path:
    """A project on the host store; whose two tests, `a` and `b`, are up to the test."""
    options = {"path": str(tmp_path / "slots")} if request.param == "by path" else {}
    (tmp_path / "parallel_settings.py").write_text(PROJECT % {"prefix": prefix, "options": options})
    (tmp_path / "meeting.py").write_text(MEETING)
    return tmp_path


def succeeded(result: subprocess.CompletedProcess[str], word: str) -> None:
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert word in said


def test_two_workers_of_pytest_xdist_fill_the_same_policy(project: Path, run_python: Run, root: Path) -> None:
    (project / "test_both.py").write_text(
        "from meeting import fill\ndef test_a(): fill('a', 'b')\ndef test_b(): fill('b', 'a')\n"
    )
    # Whatever other plug-ins are installed, all three processes would have to import them.
    plugins = ("-p", "xdist.plugin", "-p", "pytest_django.plugin", "-p", "no:cacheprovider")
    result = run_python(
        *("-m", "pytest", "-q", "-n", "2", *plugins, "--rootdir", project, project),
        cwd=project,
        env={
            "PYTHONPATH": f"{root}{os.pathsep}{project}",
            "DJANGO_SETTINGS_MODULE": "parallel_settings",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
    )
    succeeded(result, "2 passed")


def test_two_workers_of_djangos_runner_fill_the_same_policy(project: Path, run_python: Run, root: Path) -> None:
    """The configuration was compiled before they were forked."""
    (project / "test_both.py").write_text(
        "from django.test import SimpleTestCase\n"
        "from django_concurrency_mw import conf\n"
        "from meeting import fill\n"
        "conf.current()\n"
        "class A(SimpleTestCase):\n    def test_it(self): fill('a', 'b')\n"
        "class B(SimpleTestCase):\n    def test_it(self): fill('b', 'a')\n"
    )
    result = run_python(
        *("-m", "django", "test", "--parallel", "2", "-v", "2"),
        cwd=project,
        env={"PYTHONPATH": f"{root}{os.pathsep}{project}", "DJANGO_SETTINGS_MODULE": "parallel_settings"},
    )
    succeeded(result, "Ran 2 tests")


def test_a_program_that_a_worker_starts_has_its_prefix(worker: Callable[[str], None], run_python: Run) -> None:
    worker("gw5")
    program = "from django_concurrency_mw.backends import worker_suffix; print(worker_suffix())"
    assert run_python("-c", program).stdout.strip() == "-gw5"
