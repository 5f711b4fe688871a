"""The pages on stores, streaming and reloading keep their word: their snippets are run, and what they print is so."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import RequestFactory, override_settings

from django_concurrency_mw import concurrency_limit, conf
from django_concurrency_mw.backends.redis.connecting import DEFAULT_LOCATION, DEFAULT_TIMEOUT
from django_concurrency_mw.backends.redis.errors import PERMISSIONS
from django_concurrency_mw.loader import load_policies

from .redis_server import RedisServer
from .support import wait_until
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
    exec(block("stores.md", "python", '"LOCATION"'), names)
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
        for key in re.findall(r"\{concurrency\}:1:exports:(\w+)", block("stores.md", "text", "EVALSHA")):
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


def test_the_page_on_hot_reload_tells_what_the_log_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings as they are printed (but for the seconds), and both lines."""
    caplog.set_level("INFO", "django_concurrency_mw")
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


@pytest.mark.parametrize("page", ["stores.md", "asgi-and-streaming.md", "guarantees.md", "reload.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (DOCS / page).read_text()):
        file, _, anchor = target.partition("#")
        text = (DOCS / (file or page)).read_text()
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


def test_the_rights_of_the_page_on_stores_are_those_that_a_check_names() -> None:
    named = PERMISSIONS.split("* ", 1)[1]
    assert named in block("stores.md", "text", "ACL SETUSER")
