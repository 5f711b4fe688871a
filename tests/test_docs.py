"""The pages of the docs keep their word: their snippets are run, and what they print is what there is."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import RequestFactory, override_settings
from django.urls import path
from django.utils.decorators import async_only_middleware

from django_concurrency_mw import concurrency_limit, conf, hold, keys, pace
from django_concurrency_mw.backends import get_backend
from django_concurrency_mw.backends.base import ASK_AGAIN, PLACE_FOR
from django_concurrency_mw.backends.redis.connecting import DEFAULT_LOCATION, DEFAULT_TIMEOUT
from django_concurrency_mw.backends.redis.rights import LISTENING, OF_A_CLUSTER, PERMISSIONS
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.drivers import run
from django_concurrency_mw.fields import FIELDS
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.limiter import decide
from django_concurrency_mw.loader import load_policies
from django_concurrency_mw.signals import slot_acquired
from django_concurrency_mw.steps import RETRY_AFTER
from django_concurrency_mw.testing import hold_slots

from .asgi_driver import Exchange
from .conftest import Run
from .queued import WAITING
from .redis_server import RedisServer
from .support import OURS, Limits, await_until, backend_entry, wait_until
from .views import held

DOCS = Path(__file__).resolve().parent.parent / "docs"


def block(page: str, language: str, containing: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    (one,) = [text for text in found if containing in text]
    return str(one)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the page on stores sets, after both of its snippets."""
    (tmp_path / "policies.yaml").write_text("policies: {}")
    names: dict[str, Any] = {"BASE_DIR": tmp_path}
    exec(block("stores.md", "python", '"LOCATION": "redis://127'), names)
    exec(block("stores.md", "python", '"here"'), names)
    return names


def test_the_settings_of_the_page_on_stores_are_good_and_tell_the_defaults(names: dict[str, Any]) -> None:
    config = conf.compile_settings(names["CONCURRENCY_LIMIT"])
    assert {alias: backend.backend for alias, backend in config.backends.items()} == {
        "default": "redis",
        "here": "memory",
    }
    default = config.backends["default"]
    assert (default.location, default.options) == (DEFAULT_LOCATION, {"socket_timeout": DEFAULT_TIMEOUT})
    assert (
        default.key_prefix
        == conf.compile_settings({"BACKENDS": {"default": {"BACKEND": "redis"}}}).backends["default"].key_prefix
    )


def test_a_semaphore_is_called_what_the_page_says(names: dict[str, Any], redis_server: RedisServer) -> None:
    """Policy report-exports, user 42: the printed key is there while the view runs, and gone afterwards."""
    settings = names["CONCURRENCY_LIMIT"]
    settings["BACKENDS"]["default"]["LOCATION"] = redis_server.url
    settings["POLICIES"] = {"policies": {"report-exports": {"key": "user", "max_concurrent": 1}}}
    seen: list[str] = []

    with redis_server.client() as client:

        @concurrency_limit(policy="report-exports")
        def view(request: HttpRequest) -> HttpResponse:
            seen.extend(key.decode() for key in client.scan_iter("{concurrency}:*"))
            return HttpResponse()

        request = RequestFactory().get("/")
        request.user = User(pk=42)
        with override_settings(CONCURRENCY_LIMIT=settings):
            assert view(request).status_code == 200
            assert seen == [block("stores.md", "text", "report-exports").strip()]
            assert wait_until(lambda: not list(client.scan_iter("{concurrency}:*")))
        for key in re.findall(r"\{concurrency\}:1:exports:(\w+)", block("stores.md", "text", "take.lua")):
            assert seen[0].split(":")[-1].startswith(key)


def _asking() -> HttpRequest:
    request = RequestFactory().get("/")
    request.user = AnonymousUser()
    return request


@pytest.fixture
def page() -> dict[str, Any]:
    """The views of the page on streaming."""
    names: dict[str, Any] = {"StreamingHttpResponse": StreamingHttpResponse, "asyncio": asyncio}
    names["expensive"] = lambda: [*held(), "row"]
    exec(block("asgi-and-streaming.md", "python", "def report"), names)
    exec(block("asgi-and-streaming.md", "python", "def feed"), names)
    return names


def test_a_view_may_be_done_with_its_slots_early(page: dict[str, Any], limits: Any) -> None:
    limits()
    report = concurrency_limit(name="report", key="global", max_concurrent=1)(page["report"])
    response = report(_asking())
    assert held() == []
    assert b"".join(response) == b"report\nrow\n", "it was held while the expensive part ran"


def test_a_stream_holds_its_slot_until_its_last_byte(page: dict[str, Any], limits: Any) -> None:
    limits()
    feed = concurrency_limit(name="feed", key="global", max_concurrent=1)(page["feed"])

    async def main() -> None:
        response = await feed(_asking())
        parts = []
        async for part in response:
            parts.append(part)
            assert held() == ["feed"]
        assert parts == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]
        await asyncio.to_thread(response.close)  # as the server does
        assert held() == []

    asyncio.run(main())


def test_the_policy_of_the_page_on_streaming_is_good(tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(block("asgi-and-streaming.md", "yaml", "live-feeds"))
    (policy,) = load_policies(file)
    assert policy.max_age is None


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the page on limits, where its policies look for it."""
    package, module = ModuleType("shop"), ModuleType("shop.limits")
    exec(block("limits.md", "python", "def of_plan"), vars(module))
    package.limits = module  # type: ignore[attr-defined]  # as an import would set it
    monkeypatch.setitem(sys.modules, "shop", package)
    monkeypatch.setitem(sys.modules, "shop.limits", module)
    keys._import.cache_clear()
    yield module
    keys._import.cache_clear()


def test_the_limits_of_the_page_on_limits(shop: Any, tmp_path: Path, limits: Limits) -> None:
    (tmp_path / "policies.yaml").write_text(block("limits.md", "yaml", "per_key"))
    limits(tmp_path / "policies.yaml")
    config = conf.current()

    def told(pk: int, plan: str, address: str = "203.0.113.9", pages: int = 0) -> dict[str, tuple[Any, Any]]:
        request = RequestFactory().get("/", {"pages": pages}, REMOTE_ADDR=address)
        request.user = SimpleNamespace(pk=pk, plan=plan, is_authenticated=True)  # type: ignore[assignment]  # all that is read
        lease = Lease(request)
        verdict = run(decide(request, lease, config.table.policies, {}, config))
        lease.release()
        assert verdict is not None
        return {result.policy: (result.limit, result.in_flight) for result in verdict.concurrency.policies}

    assert told(2, "free") == {"exports": (1, 1), "exports-shadow": (20, 1)}
    assert told(2, "team", pages=250) == {"exports": (5, 3), "exports-shadow": (20, 1)}
    assert told(2, "house")["exports"] == (None, 1)
    assert told(42, "free")["exports"] == (50, 1)
    assert told(7, "free")["exports"] == (None, 1)
    assert list(told(1, "free")) == ["exports-shadow"]
    assert list(told(2, "free", "10.1.2.3")) == ["exports-shadow"]


@pytest.fixture
def holding(tmp_path: Path, limits: Limits) -> dict[str, Any]:
    """The page on `hold`."""
    (tmp_path / "policies.yaml").write_text(block("hold.md", "yaml", "report-exports"))
    limits(tmp_path / "policies.yaml")
    names: dict[str, Any] = {}
    exec(block("hold.md", "python", "nightly_export"), names)
    exec(block("hold.md", "python", "hand_over"), names)
    return names


def test_the_task_and_the_consumer_of_the_page_on_hold(holding: dict[str, Any]) -> None:
    assert holding["nightly_export"](42) == "exported"
    assert asyncio.run(holding["consumer"](42)) == 2
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(holding["hold"]("report-exports", key="user:42"))
        assert holding["nightly_export"](42) == "later: full, 5 of 5"
    assert held() == []


def test_the_view_that_hands_over_of_the_page_on_hold(holding: dict[str, Any]) -> None:
    done: list[tuple[str, str]] = []
    holding["print"] = lambda *words: done.append(words)
    view = concurrency_limit(policy="report-exports", key="global")(holding["export"])
    assert view(_asking()).status_code == 202
    assert wait_until(lambda: done == [("working for", "global")])
    assert wait_until(lambda: held() == [])


def test_the_page_on_hot_reload_tells_what_the_log_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings as they are printed (but for the seconds), and both lines."""
    caplog.set_level("INFO", "django_concurrency_mw")
    monkeypatch.setattr("django_concurrency_mw.reload._used", {})
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "policies.yaml"
    exports = "policies:\n  report-exports:\n    key: user\n    max_concurrent: 5\n"
    file.write_text(exports)
    names: dict[str, Any] = {"BASE_DIR": tmp_path}
    exec(block("reload.md", "python", "RELOAD_INTERVAL"), names)
    settings = names["CONCURRENCY_LIMIT"]
    assert conf.compile_settings(settings).reload_interval == 2
    with override_settings(CONCURRENCY_LIMIT={**settings, "RELOAD_INTERVAL": 0.05}):
        conf.current()
        file.write_text(exports.replace("5", "five"))
        assert wait_until(lambda: len(caplog.messages) == 1)
        file.write_text(exports.replace("5", "4") + "  partners: {key: ip, max_concurrent: 3}\n")
        assert wait_until(lambda: len(caplog.messages) == 2)
    wrong, right = caplog.messages
    assert wrong == block("reload.md", "text", "not reloaded").strip()
    assert right == block("reload.md", "text", "reloaded: added").strip()


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (DOCS / page).read_text()):
        file, _, anchor = target.partition("#")
        text = (DOCS / (file or page)).resolve().read_text()
        headings = {
            re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert not anchor or anchor in headings, target


def test_every_proof_of_the_page_on_guarantees_is_there() -> None:
    root = DOCS.parent
    proofs = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (DOCS / "guarantees.md").read_text())
    assert len(proofs) >= 25
    for file, name in proofs:
        text = (root / file).read_text()
        assert not name or re.search(rf"^(async )?(def|class) {name}\b", text, re.MULTILINE), f"{file}::{name}"


def test_the_cluster_of_the_page_on_stores_can_be_made(names: dict[str, Any]) -> None:
    exec(block("stores.md", "python", '"cluster"'), names)
    config = conf.compile_settings(names["CONCURRENCY_LIMIT"]).backends["default"]
    assert [node.host for node in RedisBackend(config)._recipe.nodes] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def test_the_rights_of_the_page_on_stores_are_those_that_a_check_names() -> None:
    named = PERMISSIONS.split("* ", 1)[1]
    assert named in block("stores.md", "text", "+eval ")
    assert LISTENING.split("* ", 1)[1] in block("stores.md", "text", "+subscribe")
    assert f"`{OF_A_CLUSTER.strip()}`" in (DOCS / "stores.md").read_text()


SITE = """
from django.http import HttpResponse
from django.urls import include, path

SECRET_KEY = "docs"
ROOT_URLCONF = __name__
ALLOWED_HOSTS = ["*"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_concurrency_mw.middleware.ConcurrencyLimitMiddleware",
]
CONCURRENCY_LIMIT = {
    "POLICIES": {
        "policies": {
            "report-exports": {"url_names": ["reports:*"], "key": "user", "max_concurrent": 5},
            "patient-exports": {"url_names": ["patient:*"], "key": "user", "max_concurrent": 5, "wait": 10},
        }
    },
    "BACKENDS": {"default": {"BACKEND": "memory"}},
}
reports = [path("export/", lambda request: HttpResponse(), name="export")]
urlpatterns = [path("reports/", include((reports, "reports"))), path("patient/", include((reports, "patient")))]
"""
LEAVES_ONE = """

left = hold_slots("report-exports", "user:42")


def test_leaves_one():
    left.__enter__()


@pytest.fixture
def user(db, django_user_model):
    return django_user_model.objects.create_user("ada")
"""


def test_the_test_and_the_fixture_of_the_page_on_testing_work(tmp_path: Path, run_python: Run, root: Path) -> None:
    """Run as they are printed; a test that leaves a slot behind gets the message that is printed."""
    (tmp_path / "docs_settings.py").write_text(SITE)
    snippets = [block("testing.md", "python", text) for text in ("with hold_slots", "threading", "pytest.fixture")]
    (tmp_path / "test_page.py").write_text("\n".join([*snippets, LEAVES_ONE]))
    result = run_python(
        *("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path),
        cwd=tmp_path,
        env={"PYTHONPATH": f"{root}:{tmp_path}", "DJANGO_SETTINGS_MODULE": "docs_settings"},
    )
    assert "3 passed, 1 error" in result.stdout, result.stdout + result.stderr
    printed = block("testing.md", "text", "slot is held").splitlines()
    said = re.search(
        r"AssertionError: (1 slot is held:)\nE +(policy report-exports, key 'user:42', for) ", result.stdout
    )
    assert said is not None, result.stdout
    assert printed[0] == said[1]
    assert printed[1].strip().startswith(said[2])


# -- waiting -----------------------------------------------------------------------------------------------------------


class _User(AnonymousUser):
    pk = 42
    is_authenticated = True  # type: ignore[assignment]  # all that a key reads


def _logged_in(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> Any:
        request.user = _User()
        return await get_response(request)

    return middleware


logged_in = async_only_middleware(_logged_in)


@pytest.fixture(params=WAITING)
def feed(request: pytest.FixtureRequest, prefix: str, tmp_path: Path, limits: Limits) -> Any:
    """The recipe for an event stream, as it is printed, on each store that lets wait: its module, and the policy file."""
    (tmp_path / "policies.yaml").write_text(block("waiting.md", "yaml", "live-feed"))
    backend = backend_entry(request.param, request, prefix, tmp_path)
    limits(tmp_path / "policies.yaml", middleware=[f"{__name__}.logged_in", OURS], BACKENDS={"default": backend})
    module = ModuleType("feed_urls")
    exec(block("waiting.md", "python", "HEARTBEAT"), vars(module))
    module.urlpatterns = [path("feed/", module.feed, name="feed")]  # type: ignore[attr-defined]  # a URL configuration
    with override_settings(ROOT_URLCONF=module):
        yield module


def test_an_event_stream_that_reconnects_waits_for_its_ghost_to_go(feed: Any) -> None:
    """The second connection gets nothing until the first one's disconnect is noticed; then it streams."""
    store = get_backend("default", conf.current().backends)

    async def main() -> None:
        app = ASGIHandler()
        ghost = Exchange(app, "/feed/")
        await ghost.until_sent(2)
        assert (ghost.status, ghost.body) == (200, b": welcome\n\n")
        again = Exchange(app, "/feed/")
        assert await await_until(lambda: [waiter.place for waiter in store.waiters()] == [1])
        assert again.events == []
        assert len(feed.subscribers) == 1
        ghost.leave()
        await again.until_sent(2)
        assert (again.status, again.body) == (200, b": welcome\n\n")
        for orders in feed.subscribers:
            orders.put_nowait("order 7")
        await again.until_sent(3)
        assert again.body.endswith(b"data: order 7\n\n")
        again.leave()
        await ghost.end()
        await again.end()

    asyncio.run(main())
    assert wait_until(lambda: held() == [])
    assert store.waiters() == []
    assert feed.subscribers == set()


def test_its_heartbeat_comes_more_often_than_its_wait_is_long(feed: Any) -> None:
    (policy,) = conf.current().table
    assert policy.wait / 2 >= feed.HEARTBEAT
    feed.HEARTBEAT = 0.01

    async def main() -> None:
        exchange = Exchange(ASGIHandler(), "/feed/")
        await exchange.until_sent(4)
        assert exchange.body.startswith(b": welcome\n\n: still here\n\n: still here\n\n")
        exchange.leave()
        await exchange.end()

    asyncio.run(main())


def test_without_a_wait_it_is_turned_away_for_good(feed: Any, tmp_path: Path, limits: Limits) -> None:
    """What the recipe is against."""
    text = block("waiting.md", "yaml", "live-feed").replace("wait: 2", "wait: 0")
    (tmp_path / "impatient.yaml").write_text(text)
    limits(tmp_path / "impatient.yaml", middleware=[f"{__name__}.logged_in", OURS])

    async def main() -> None:
        app = ASGIHandler()
        ghost = Exchange(app, "/feed/")
        await ghost.until_sent(2)
        again = Exchange(app, "/feed/")
        await again.end()
        assert again.status == 429
        ghost.leave()
        await ghost.end()

    asyncio.run(main())


def test_the_policy_and_the_receiver_of_the_page_on_waiting(tmp_path: Path, limits: Limits) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(block("waiting.md", "yaml", "report-exports"))
    limits(file)
    (policy,) = conf.current().table
    assert (policy.wait, policy.max_waiting) == (2.0, 20)
    names: dict[str, Any] = {}
    exec(block("waiting.md", "python", "longest"), names)
    store = get_backend("default", conf.current().backends)
    both = hold_slots("report-exports", "user:2", 2)

    def give_back_when_somebody_waits() -> None:
        assert wait_until(lambda: len(store.waiters()) == 1)
        both.__exit__(None, None, None)

    giver = threading.Thread(target=give_back_when_somebody_waits)
    try:
        both.__enter__()
        giver.start()
        with hold("report-exports", key="user:2") as concurrency:
            assert names["longest"] == {"report-exports": concurrency.waited}
            assert concurrency.waited > 0
        giver.join()
    finally:
        slot_acquired.disconnect(names["measure"])


def test_the_page_on_waiting_tells_the_numbers_that_are_in_force() -> None:
    page = (DOCS / "waiting.md").read_text()
    assert f"up to {pace.LONGEST} seconds" in page
    assert pace.SPREAD == 0.5, "spread upwards by up to a half"
    assert f"Until a line has moved it is {RETRY_AFTER[0]} to {RETRY_AFTER[1]} seconds at random" in page
    assert ASK_AGAIN == 1, "about every second when it is not"
    assert PLACE_FOR == 5, "has not asked for five seconds"
    assert f"{{field}}`max_waiting`, {FIELDS['max_waiting'].default} |" in page
    assert f"{{setting}}`MAX_SYNC_WAITERS`, {conf.compile_settings({}).max_sync_waiters} |" in page
