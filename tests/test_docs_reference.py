"""The docs name all there is: every policy field, setting, signal, check and subcommand, with what is true of it."""

from __future__ import annotations

import ast
import json
import re
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

import django_concurrency_mw
from django_concurrency_mw import concurrency_limit, conf, health, hold, signals
from django_concurrency_mw.backends import DEFAULT_BACKEND
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.checks import CHECKS
from django_concurrency_mw.console import SUBCOMMANDS
from django_concurrency_mw.exceptions import ConcurrencyLimitExceeded, ConfigurationError, DecoratorUsageError
from django_concurrency_mw.fields import FIELDS
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.loader import load_policies
from django_concurrency_mw.outcomes import Concurrency, PolicyResult, Reason, Rejection, State
from django_concurrency_mw.policies import PolicyTable

from .support import Limits
from .test_docs import DOCS, block

NO_POLICIES = PolicyTable()
HEADING = re.compile(r"^### `([^`]+)`\n+(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)


def named(page: str) -> dict[str, str]:
    """What a page defines by a heading that is nothing but code, which is what the others refer to, and its text."""
    return dict(HEADING.findall((DOCS / page).read_text()))


def compiled(settings: dict[str, Any]) -> conf.Config:
    """The configuration but for its table, to be compared."""
    return replace(conf.compile_settings(settings), table=NO_POLICIES)


def test_every_field_has_its_place_and_the_page_is_what_the_table_makes() -> None:
    """After a change of the table of fields: `make schema`."""
    page = (DOCS / "policies.md").read_text()
    assert runpy.run_path(str(DOCS / "generate.py"))["written"](page) == page
    assert set(FIELDS) <= set(named("policies.md"))


def test_every_setting_has_its_place_and_its_default() -> None:
    assert set(named("settings.md")) == set(conf._KNOWN)
    told = {
        name: ast.literal_eval(found[1])
        for name, text in named("settings.md").items()
        if (found := re.match(r"Default: `(.+?)`[\n,]", text))
    }
    assert set(told) == set(conf._KNOWN) - {"POLICIES"}
    if DEFAULT_BACKEND != "host":
        del told["BACKENDS"]
    for name, default in told.items():
        assert compiled({name: default}) == compiled({}), name


def test_the_settings_that_are_printed_whole_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text("policies: {}")
    names: dict[str, Any] = {"BASE_DIR": tmp_path}
    exec(block("settings.md", "python", '"ENABLED"'), names)
    settings = names["CONCURRENCY_LIMIT"]
    assert set(settings) == set(conf._KNOWN)
    conf.compile_settings(settings)
    for name, value in settings.items():
        if name != "POLICIES" and (name != "BACKENDS" or DEFAULT_BACKEND == "host"):
            assert compiled({name: value}) == compiled({}), name


def test_every_signal_has_its_place_and_its_arguments(limits: Limits) -> None:
    told: dict[str, set[str]] = {}
    connected: list[tuple[Any, Any]] = []
    for name, signal in vars(signals).items():
        if isinstance(signal, signals.RobustSignal):

            def receiver(name: str = name, **arguments: Any) -> None:
                told[name] = set(arguments) - {"signal", "sender"}

            signal.connect(receiver, weak=False)
            connected.append((signal, receiver))
    try:
        limits({"policies": {"one": {"key": "global", "max_concurrent": 1}}})
        with hold("one"), pytest.raises(ConcurrencyLimitExceeded), hold("one"):
            pass
        health._tell(MemoryBackend(conf.current().backends["default"]), OSError())
    finally:
        for signal, receiver in connected:
            signal.disconnect(receiver)
    page = named("signals.md")
    assert set(page) == set(told)
    for name, text in page.items():
        arguments = re.search(r"Arguments: (.+?)\. ?(?:[A-Z]|\n|$)", re.sub(r"\([^)]*\)", "", text), re.DOTALL)
        assert arguments is not None, name
        assert set(re.findall(r"`(\w+)`", arguments[1])) == told[name], name


def test_the_receiver_that_is_printed_counts(limits: Limits) -> None:
    names: dict[str, Any] = {}
    exec(block("signals.md", "python", "@receiver"), names)
    limits({"policies": {"none": {"key": "global", "max_concurrent": 0}}})
    with pytest.raises(ConcurrencyLimitExceeded), hold("none"):
        pass
    assert names["rejections"] == {("none", "full", False): 1}


def test_every_check_has_its_place_and_says_when_it_is_made() -> None:
    page = named("checks.md")
    assert list(page) == [row.id for row in CHECKS]
    for row in CHECKS:
        assert page[row.id].startswith("*deploy.*") == row.deploy, row.id
        assert "*Cure:*" in page[row.id], row.id


def test_every_subcommand_has_its_place_and_its_command() -> None:
    page = named("operations.md")
    assert set(SUBCOMMANDS) <= set(page)
    assert all(text.startswith(f"`manage.py concurrency {name}") for name, text in page.items())


def test_every_page_has_a_title_and_a_sentence_for_llms_txt() -> None:
    line_of = runpy.run_path(str(DOCS / "_ext" / "llms.py"))["line_of"]
    lines = {page.name: line_of(page.read_text()) for page in DOCS.glob("*.md")}
    assert lines["stores.md"] == ("Stores", "A store keeps the slots.")
    assert len({sentence for _, sentence in lines.values()}) == len(lines)
    assert all(len(sentence) > 20 and "](" not in sentence for _, sentence in lines.values())


def test_the_page_on_what_is_told_names_all_there_is() -> None:
    page = (DOCS / "answers.md").read_text()
    kinds = (Concurrency, PolicyResult, Rejection)
    names = {each.name for kind in kinds for each in fields(kind) if not each.name.startswith("_")}
    names |= {f"{name}()" for name, value in vars(Concurrency).items() if callable(value) and not name.startswith("_")}
    names |= {*get_args(Reason), *get_args(State)}
    names |= {name for name, value in vars(django_concurrency_mw).items() if _is_error(value)}
    assert len(names) >= 25
    assert {name for name in names if f"`{name}`" not in page} == set()


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def test_the_callback_and_the_view_of_the_page_on_what_is_told(limits: Limits) -> None:
    names: dict[str, Any] = {}
    exec(block("answers.md", "python", "def busy"), names)
    exec(block("answers.md", "python", "def status"), names)
    limits()
    request = RequestFactory().get("/")
    busy = concurrency_limit(name="none", key="global", max_concurrent=0, response_callback=names["busy"])(
        names["status"]
    )
    assert json.loads(busy(request).content) == {"busy": "none", "limit": 0}
    status = concurrency_limit(name="some", key="global", max_concurrent=1)(names["status"])
    assert status(RequestFactory().get("/")).content.decode() == "limited: True, [('some', 'global', 'held')]"


def test_the_file_of_the_page_on_policies_is_good_and_its_mistake_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = block("policies.md", "yaml", "defaults:")
    Path("policies.yaml").write_text(text)
    exports, everything = load_policies("policies.yaml")
    assert (exports.ttl, everything.ttl) == (120.0, 60.0)
    Path("policies.yaml").write_text(text.replace("key: user", "key: usr"))
    with pytest.raises(ConfigurationError) as caught:
        load_policies("policies.yaml")
    assert str(caught.value) == block("policies.md", "text", "usr").strip()


def test_the_decorators_of_the_page_on_policies_work(limits: Limits) -> None:
    limits({"policies": {"report-exports": {"key": "ip", "max_concurrent": 5}}})
    names: dict[str, Any] = {}
    exec(block("policies.md", "python", "big_export"), names)
    request = RequestFactory().get("/")
    assert [names[view](request).status_code for view in ("export", "health")] == [200, 200]


def test_the_settings_of_the_page_on_keys_are_good(tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text("policies: {}")
    names: dict[str, Any] = {"BASE_DIR": tmp_path}
    exec(block("keys.md", "python", "TRUSTED_PROXIES"), names)
    assert conf.compile_settings(names["CONCURRENCY_LIMIT"]).trusted.unix


@pytest.mark.parametrize(
    ("key", "means"),
    [
        ("user_or_ip", "user"),
        ("param:x", "get"),
        ("user:{user.id}", "template"),
        ("ip:{ip}", "template"),
        ("team:{user.team_id}", "template"),
    ],
)
def test_a_key_means_here_what_the_page_on_migrating_says(key: str, means: str) -> None:
    assert parse_key(key).kind == means


@pytest.mark.parametrize("key", ["exports", "ip:x"])
def test_a_key_that_was_one_bucket_for_everybody_is_an_error_that_names_global(key: str) -> None:
    with pytest.raises(DecoratorUsageError, match="a constant bucket is 'global'"):
        concurrency_limit(key=key, max_concurrent=5)


def test_the_keywords_of_the_page_on_migrating_are_taken_by_position_too(limits: Limits) -> None:
    limits()

    @concurrency_limit("ip", 5, 60, "memory", False, None)
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    assert view(RequestFactory().get("/")).status_code == 200
