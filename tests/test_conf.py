"""CONCURRENCY_LIMIT: everything that is wrong with it at once, each with its place; in force at once, both ways."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings

from django_concurrency_mw import backends, conf
from django_concurrency_mw.backends import BackendConfig, BaseBackend, get_backend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.exceptions import ConfigurationError
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.middleware import ConcurrencyLimitMiddleware
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.policies import Policy

from .asgi_driver import fetch
from .support import OURS, SOON, Limits, everything, held, nothing_held, run_async
from .views import switch


def problems(raw: Any) -> dict[str, str]:
    """What is wrong: place -> message."""
    with pytest.raises(ConfigurationError) as caught:
        conf.compile_settings(raw)
    found = {problem.place: problem.message for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    return found


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = problems(
        {
            "ENABLED": "yes",
            "BACKENDS": {
                "default": {"BACKEND": "", "KEY_PREFIX": None},
                1: {},
                "two": {"BACKEND": "memory", "OPTION": {}},
            },
            "POLICIES": {"policies": {"x": {"key": "user", "max_concurrent": "ten"}, "y": {"key": "usr"}}},
            "ON_BACKEND_ERROR": "alow",
            "TRUSTED_PROXIES": ["10.0.0.0/8", "10.0.0.1/8", 5],
            "CLIENT_IP_HEADER": "HTTP_X_REAL_IP",
            "HEADERS": True,
            "MAX_SYNC_WAITERS": "4",
            "RELOAD_INTERVAL": "2",
            "POLCIES": {},
        }
    )
    assert set(found) == {
        "CONCURRENCY_LIMIT['ENABLED']",
        "CONCURRENCY_LIMIT['BACKENDS']['default']['BACKEND']",
        "CONCURRENCY_LIMIT['BACKENDS']['default']['KEY_PREFIX']",
        "CONCURRENCY_LIMIT['BACKENDS'][1]",
        "CONCURRENCY_LIMIT['BACKENDS']['two']['OPTION']",
        "CONCURRENCY_LIMIT['POLICIES'].policies.x.max_concurrent",
        "CONCURRENCY_LIMIT['POLICIES'].policies.y.key",
        "CONCURRENCY_LIMIT['POLICIES'].policies.y",
        "CONCURRENCY_LIMIT['ON_BACKEND_ERROR']",
        "CONCURRENCY_LIMIT['TRUSTED_PROXIES'][1]",
        "CONCURRENCY_LIMIT['TRUSTED_PROXIES'][2]",
        "CONCURRENCY_LIMIT['CLIENT_IP_HEADER']",
        "CONCURRENCY_LIMIT['HEADERS']",
        "CONCURRENCY_LIMIT['MAX_SYNC_WAITERS']",
        "CONCURRENCY_LIMIT['RELOAD_INTERVAL']",
        "CONCURRENCY_LIMIT['POLCIES']",
    }
    assert found["CONCURRENCY_LIMIT['POLCIES']"] == "unknown name 'POLCIES'; did you mean 'POLICIES'?"
    assert found["CONCURRENCY_LIMIT['BACKENDS']['two']['OPTION']"] == "unknown name 'OPTION'; did you mean 'OPTIONS'?"
    assert found["CONCURRENCY_LIMIT['ON_BACKEND_ERROR']"].endswith("got 'alow'; did you mean 'allow'?")
    assert "host bits set" in found["CONCURRENCY_LIMIT['TRUSTED_PROXIES'][1]"]


@pytest.mark.parametrize(
    ("name", "value", "place", "message"),
    [
        ("ENABLED", None, "", "expected True or False, got None"),
        ("ENABLED", 1, "", "expected True or False, got 1"),
        ("enabled", True, "", "unknown name 'enabled'; did you mean 'ENABLED'?"),
        ("Policies", {}, "", "unknown name 'Policies'; did you mean 'POLICIES'?"),
        ("WHATEVER", 1, "", "unknown name 'WHATEVER'; known are ENABLED, BACKENDS, POLICIES"),
        (5, 1, "", "unknown name 5; known are"),
        ("HEADERS", "rejecte", "", "got 'rejecte'; did you mean 'rejected'?"),
        ("HEADERS", [], "", "expected one of 'rejected', 'always', 'never', got []"),
        ("ON_BACKEND_ERROR", None, "", "expected one of 'local', 'allow', 'deny', got None"),
        ("TRUSTED_PROXIES", "10.0.0.0/8", "", "expected a list of networks such as ['10.0.0.0/8'], got '10.0.0.0/8'"),
        ("TRUSTED_PROXIES", None, "", "expected a list of networks such as ['10.0.0.0/8'], got None"),
        ("TRUSTED_PROXIES", ["UNIX"], "[0]", "'10.0.0.0/8', an address or 'unix', got 'UNIX'"),
        ("TRUSTED_PROXIES", [None], "[0]", "got None"),
        ("CLIENT_IP_HEADER", "", "", "expected the name of a header such as 'X-Forwarded-For', got ''"),
        ("CLIENT_IP_HEADER", None, "", "got None"),
        ("CLIENT_IP_HEADER", "X Real", "", "got 'X Real'"),
        ("CLIENT_IP_HEADER", "X-R\xe9al", "", "expected the name of a header"),
        ("CLIENT_IP_HEADER", "HTTP_X_REAL_IP", "", "expected the header's own name, such as 'X-Real-Ip'"),
        ("CLIENT_IP_HEADER", "REMOTE_ADDR", "", "REMOTE_ADDR is no header but the peer's address"),
        (
            "BACKENDS",
            {},
            "",
            "expected a dictionary of aliases such as {'default': {'BACKEND': 'redis'}}, got an empty one",
        ),
        ("BACKENDS", "memory", "", "got str"),
        ("BACKENDS", {"": {"BACKEND": "memory"}}, "['']", "expected an alias as text, got ''"),
        ("BACKENDS", {"default": {}}, "['default']['BACKEND']", "expected 'host', 'memory', 'redis' or a dotted path"),
        (
            "BACKENDS",
            {"default": {"BACKEND": MemoryBackend}},
            "['default']['BACKEND']",
            "expected 'host', 'memory', 'redis' or a dotted",
        ),
        ("BACKENDS", {"default": {"BACKEND": "memory", "OPTIONS": []}}, "['default']['OPTIONS']", "got list"),
        ("POLICIES", 5, "", "expected a path or a dictionary, got int"),
        ("MAX_SYNC_WAITERS", -1, "", "expected an integer >= 0, got -1"),
        ("MAX_SYNC_WAITERS", None, "", "expected an integer >= 0, got None"),
        ("MAX_SYNC_WAITERS", True, "", "expected an integer >= 0, got True"),
        ("MAX_SYNC_WAITERS", 4.0, "", "expected an integer >= 0, got 4.0"),
        ("RELOAD_INTERVAL", 0, "", "expected None or seconds from 0.05 to 86400, got 0"),
        ("RELOAD_INTERVAL", 0.049, "", "got 0.049"),
        ("RELOAD_INTERVAL", -1, "", "got -1"),
        ("RELOAD_INTERVAL", True, "", "got True"),
        ("RELOAD_INTERVAL", "2", "", "got '2'"),
        ("RELOAD_INTERVAL", float("nan"), "", "got nan"),
        ("RELOAD_INTERVAL", float("inf"), "", "got inf"),
        ("RELOAD_INTERVAL", 86_401, "", "got 86401"),
    ],
)
def test_what_is_wrong_has_its_place_and_its_cure(name: Any, value: Any, place: str, message: str) -> None:
    found = problems({name: value})
    assert list(found) == [f"CONCURRENCY_LIMIT[{name!r}]{place}"]
    assert message in found[f"CONCURRENCY_LIMIT[{name!r}]{place}"]


@pytest.mark.parametrize("raw", [None, [], "policies.yaml", 5])
def test_what_is_no_dictionary(raw: Any) -> None:
    assert problems(raw) == {"CONCURRENCY_LIMIT": f"expected a dictionary, got {type(raw).__name__}"}


@pytest.mark.parametrize(
    "backends",
    [
        "redis://:secret@localhost",
        {"default": "redis://:secret@localhost"},
        {"default": {"BACKEND": 5, "LOCATION": "redis://:secret@localhost", "OPTIONS": "secret"}},
    ],
)
def test_no_message_repeats_a_password(backends: Any) -> None:
    assert "secret" not in str(problems({"BACKENDS": backends}))


def test_a_long_value_makes_a_short_message() -> None:
    found = problems({"HEADERS": "x" * 10_000, "y" * 10_000: 1, "TRUSTED_PROXIES": ["1" * 10_000]})
    assert all(len(message) < 500 for message in found.values())


def test_the_defaults() -> None:
    config = conf.compile_settings({})
    assert config.enabled is True
    assert config.backends == {"default": BackendConfig("default", "host" if sys.platform == "linux" else "memory")}
    assert config.on_backend_error == "local"
    assert (config.trusted.networks, config.trusted.unix) == ((), False)
    assert config.client_header == "HTTP_X_FORWARDED_FOR"
    assert config.headers == "rejected"
    assert config.max_sync_waiters == 4
    assert config.reload_interval is None
    assert len(config.table) == 0
    assert (
        conf.compile_settings({"BACKENDS": None, "POLICIES": None, "RELOAD_INTERVAL": None}).backends == config.backends
    )


def test_what_the_settings_say() -> None:
    config = conf.compile_settings(
        {
            "ENABLED": False,
            "BACKENDS": {"a": {"BACKEND": "memory", "LOCATION": "x", "KEY_PREFIX": "y", "OPTIONS": {"z": 1}}},
            "ON_BACKEND_ERROR": "deny",
            "TRUSTED_PROXIES": ("10.0.0.0/8", "unix", "::1"),
            "CLIENT_IP_HEADER": "cf-connecting-ip",
            "HEADERS": "always",
            "MAX_SYNC_WAITERS": 0,
        }
    )
    assert config.enabled is False
    assert config.backends == {"a": BackendConfig("a", "memory", "x", "y", {"z": 1})}
    assert config.on_backend_error == "deny"
    assert [str(network) for network in config.trusted.networks] == ["10.0.0.0/8", "::1/128"]
    assert config.trusted.unix is True
    assert config.client_header == "HTTP_CF_CONNECTING_IP"
    assert config.headers == "always"
    assert config.max_sync_waiters == 0


@pytest.mark.parametrize("as_text", [True, False])
def test_the_policies_come_from_a_file(tmp_path: Path, as_text: bool) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text("policies:\n  exports: {url_names: [x], key: user, max_concurrent: 1}\n")
    config = conf.compile_settings({"POLICIES": str(file) if as_text else file})
    assert [policy.name for policy in config.table] == ["exports"]
    file.write_text("policies:\n  exports: {url_names: [x], key: user, max_concurent: 1}\n")
    found = problems({"POLICIES": file, "ENABLED": 5})
    assert any(place.endswith("policies.yaml:2:40") and "max_concurrent" in message for place, message in found.items())
    assert "CONCURRENCY_LIMIT['ENABLED']" in found


# -- in force at once ---------------------------------------------------------------------------------------------------


def statuses(path: str = "/plain/") -> tuple[int, int]:
    """The answers of both halves."""

    async def main() -> int:
        return (await fetch(path)).status

    return Client(raise_request_exception=False).get(path).status_code, run_async(main)


def test_override_settings_works_at_once_both_ways(limits: Limits) -> None:
    """On a handler that is already running."""
    limits(everything(5))
    client = Client()
    handler = client.handler
    handler.load_middleware()
    assert client.get("/plain/").status_code == 200
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": everything(0)}):
        assert client.get("/plain/").status_code == 429
        with override_settings(CONCURRENCY_LIMIT={"POLICIES": everything(0), "ENABLED": False}):
            assert client.get("/plain/").status_code == 200
        assert client.get("/plain/").status_code == 429
    assert client.get("/plain/").status_code == 200
    assert client.handler is handler


def test_without_the_setting_nothing_is_limited(limits: Limits) -> None:
    limits(everything(0))
    with override_settings():
        del django_settings.CONCURRENCY_LIMIT
        assert statuses() == (200, 200)
    assert statuses() == (429, 429)


def test_the_settings_are_compiled_once(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(everything(5))
    config = conf.current()
    monkeypatch.setattr(conf, "compile_settings", None)
    assert conf.current() is config


def test_when_it_is_off_nothing_is_limited_and_requests_are_told_all_the_same(limits: Limits) -> None:
    limits(everything(0), ENABLED=False)
    assert statuses() == (200, 200)
    assert statuses("/decorated/") == (200, 200)
    assert Client().get("/told/").json() == {"limited": False, "policies": []}
    assert switch.seen == [[], []]


def test_a_broken_table_stops_the_server_from_starting(limits: Limits) -> None:
    limits({"policies": {"x": {"key": "usr", "max_concurrent": 1}}}, HEADERS="sometimes")
    for start in (WSGIHandler, lambda: ConcurrencyLimitMiddleware(lambda request: HttpResponse())):
        with pytest.raises(ConfigurationError) as caught:
            start()
        assert "CONCURRENCY_LIMIT['POLICIES'].policies.x.key: " in str(caught.value)
        assert "CONCURRENCY_LIMIT['HEADERS']: " in str(caught.value)


# -- the stores ---------------------------------------------------------------------------------------------------------


class WithoutSemaphores(MemoryBackend):
    supports_semaphores = False


class Own(MemoryBackend):
    """A store of the project's."""

    takes = 0

    def take(self, slots: Sequence[Slot]) -> Any:
        Own.takes += 1
        return super().take(slots)


class NoStore:
    """Not a BaseBackend."""


UNUSABLE: list[tuple[Any, str, str]] = [
    ({"default": {"BACKEND": "hots"}}, "default", r"'hots' cannot be loaded.*did you mean 'host'"),
    ({"default": {"BACKEND": "host", "OPTIONS": {"slot": 64}}}, "default", r"\['OPTIONS'\].*did you mean 'slots'"),
    ({"default": {"BACKEND": "memory"}}, "other", r"unknown backend 'other'"),
    ({"first": {"BACKEND": "memory"}}, "default", r"unknown backend 'default'.*'first'"),
    ({"default": {"BACKEND": "memroy"}}, "default", r"\['default'\]\['BACKEND'\].*'memroy'"),
    ({"default": {"BACKEND": "nowhere.Store"}}, "default", r"'nowhere\.Store' cannot be loaded"),
    ({"default": {"BACKEND": f"{__name__}.NoStore"}}, "default", r"not a subclass of BaseBackend"),
    ({"default": {"BACKEND": f"{__name__}.WithoutSemaphores"}}, "default", r"does not support semaphores"),
    ({"default": {"BACKEND": "memory"}}, f"{__name__}.WithoutSemaphores", r"does not support semaphores"),
    (
        {"default": {"BACKEND": "memory", "OPTIONS": {"a": 1}}},
        "default",
        r"\['OPTIONS'\]: the memory store has no options",
    ),
]


@pytest.mark.parametrize(("backends", "name", "message"), UNUSABLE)
def test_a_store_that_cannot_limit_is_an_error_where_a_limited_view_is_called(
    limits: Limits, backends: Any, name: str, message: str
) -> None:
    """Not at the server's start, and not in other views."""
    table = everything(backend=name)
    table["policies"]["all"]["url_names"] = ["plain", "aplain"]
    limits(table, BACKENDS=backends)
    client = Client()
    assert client.get("/told/").status_code == 200
    with pytest.raises(ImproperlyConfigured, match=message):
        client.get("/plain/")
    assert statuses("/aplain/") == (500, 500)
    assert switch.seen == []


def test_a_store_of_the_projects(limits: Limits) -> None:
    """By its dotted path, in BACKENDS or in the policy itself."""
    Own.takes = 0
    limits(everything(), BACKENDS={"default": {"BACKEND": f"{__name__}.Own"}})
    assert statuses() == (200, 200)
    assert Own.takes == 2
    limits(everything(backend=f"{__name__}.Own"))
    assert statuses() == (200, 200)
    assert Own.takes == 4
    assert switch.seen == [["all"]] * 4
    assert nothing_held()


@pytest.mark.parametrize(
    ("backends", "name", "prefix"),
    [
        ({"memory": "alias", "other": "kind"}, "memory", "alias"),
        ({"a": "only"}, "memory", "only"),
        ({"a": "one", "b": "two"}, "memory", "concurrency"),
        ({"a": "one", "b": "two"}, "b", "two"),
    ],
)
def test_a_name_means_the_alias_then_the_only_one_of_that_kind_then_the_kinds_defaults(
    backends: dict[str, str], name: str, prefix: str
) -> None:
    made = {alias: {"BACKEND": "memory", "KEY_PREFIX": prefix} for alias, prefix in backends.items()}
    configs = conf.compile_settings({"BACKENDS": made}).backends
    store = get_backend(name, configs)
    assert isinstance(store, BaseBackend)
    assert store.config.key_prefix == prefix
    assert get_backend(name, configs) is store


def test_a_garbage_collection_in_the_making_of_a_store_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is collected there, whose own code takes a slot: all are one store."""
    configs = {"default": BackendConfig("default", "memory", key_prefix="made-while-made")}
    load, inner, outer = backends._load, list[BaseBackend](), list[BaseBackend]()

    def collecting(config: BackendConfig) -> BaseBackend:
        monkeypatch.undo()
        inner.append(get_backend("default", configs))
        return load(config)

    monkeypatch.setattr(backends, "_load", collecting)
    making = threading.Thread(target=lambda: outer.append(get_backend("default", configs)), daemon=True)
    making.start()
    making.join(SOON)
    assert not making.is_alive(), "it waits for its own lock"
    assert outer == inner


def test_the_same_store_is_counted_in_through_override_settings(limits: Limits) -> None:
    """A setting that has nothing to do with stores changes while a slot is held: the count goes on."""
    seen: list[Any] = []

    def again(request: HttpRequest) -> None:
        with override_settings(CONCURRENCY_LIMIT=django_settings.CONCURRENCY_LIMIT | {"HEADERS": "never"}):
            seen.extend([held(), Client().get("/told/").status_code])

    limits(everything(1, url_names=["told", "plain"]), middleware=[OURS])
    gate: Callable[[int], None] = switch.gate
    switch.gate = lambda number: again(HttpRequest())  # type: ignore[method-assign]  # for this test
    try:
        assert Client().get("/plain/").status_code == 200
    finally:
        switch.gate = gate  # type: ignore[method-assign]  # as it was
    assert seen == [["all"], 429]


def test_plans_are_not_kept_for_ever(limits: Limits) -> None:
    """Nor any of a table that is not in force any more."""
    limits()
    config = conf.current()
    for number in range(conf.MOST_PLANS + 2):
        config.plan((Policy(f"p{number}", parse_key("global"), 1),))
        assert len(config.plans) <= conf.MOST_PLANS
    assert config.plans
    conf._Owner(django_settings.CONCURRENCY_LIMIT).switch(config.table, config.loaded)  # type: ignore[arg-type]
    assert conf.current() is not config
    assert not conf.current().plans
