"""The checks of stores: what each says of itself, who shares its place, and what is only for the servers."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from django.core.cache import caches
from django.core.cache.backends.redis import RedisCache
from django.test import override_settings

from django_concurrency_mw import backends, conf
from django_concurrency_mw.backends.base import has_host
from django_concurrency_mw.backends.redis.connecting import server_of_url
from django_concurrency_mw.backends.redis.store import RedisBackend

from .checking import ON_HOST, Decorate, decorate, found, ids
from .proxy import Proxy
from .redis_server import RedisServer
from .servers import free_port
from .support import Limits, everything, named

__all__ = ["decorate"]

TRUSTED = ["10.0.0.0/8"]


def on_redis(server: RedisServer | str, prefix: str, **options: Any) -> dict[str, Any]:
    url = server if isinstance(server, str) else server.url
    options = {"socket_timeout": 5, **options}
    return {"default": {"BACKEND": "redis", "LOCATION": url, "KEY_PREFIX": prefix, "OPTIONS": options}}


# -- what a Redis says of itself --------------------------------------------------------------------------------------


@pytest.fixture
def user(redis_server: RedisServer) -> Iterator[Any]:
    """Make an ACL user who may do everything but this; its URL."""
    client = redis_server.client()

    def make(*rules: str) -> str:
        client.execute_command("ACL", "SETUSER", "checked", "on", ">pw", "~*", "+@all", *rules)
        return f"redis://checked:pw@127.0.0.1:{redis_server.port}/0"

    yield make
    client.execute_command("ACL", "DELUSER", "checked")
    client.close()


@pytest.fixture
def memory(redis_server: RedisServer) -> Iterator[Any]:
    """Set the server's maxmemory and policy; both are as before afterwards."""
    client = redis_server.client()
    before = {**client.config_get("maxmemory"), **client.config_get("maxmemory-policy")}

    def change(size: str, policy: str) -> None:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", size)

    try:
        yield change
    finally:
        for name, value in before.items():
            client.config_set(name, value)
        client.close()


def test_a_redis_that_works_is_not_talked_about(limits: Limits, redis_server: RedisServer, prefix: str) -> None:
    limits(everything(), BACKENDS=on_redis(redis_server, prefix), TRUSTED_PROXIES=TRUSTED)
    assert ids(deploy=True) == []


def test_e005_a_redis_that_refuses(limits: Limits, user: Any, prefix: str) -> None:
    limits(everything(), BACKENDS=on_redis(user("-zadd"), prefix))
    (error,) = found()
    assert error.id == "django_concurrency_mw.E005"
    assert error.level == logging.ERROR
    assert "+zadd" in error.hint
    assert "pw" not in str(error).replace("ACL SETUSER", "")


def test_w006_a_redis_that_is_away(limits: Limits, prefix: str) -> None:
    limits(everything(), BACKENDS=on_redis(f"redis://127.0.0.1:{free_port()}/0", prefix))
    assert ids() == ["W006"]


def test_w007_a_redis_that_does_not_say_who_a_connection_is(limits: Limits, user: Any, prefix: str) -> None:
    limits(everything(), BACKENDS=on_redis(user("-client"), prefix))
    assert ids() == ["W007"]


def test_w026_a_redis_whose_user_lacks_what_requests_can_do_without(limits: Limits, user: Any, prefix: str) -> None:
    limits(everything(), BACKENDS=on_redis(user("-script|load"), prefix))
    assert ids() == ["W026"]
    assert "+script|load" in found()[0].msg


@pytest.mark.parametrize(
    ("size", "policy", "warns"),
    [
        ("100mb", "allkeys-lru", True),
        ("100mb", "volatile-ttl", True),
        ("100mb", "noeviction", False),
        ("0", "allkeys-lru", False),
    ],
)
def test_w018_a_redis_that_evicts(
    limits: Limits, redis_server: RedisServer, memory: Any, prefix: str, size: str, policy: str, warns: bool
) -> None:
    memory(size, policy)
    limits(everything(), BACKENDS=on_redis(redis_server, prefix))
    assert ids() == (["W018"] if warns else [])
    if warns:
        assert f"the policy {policy}" in found()[0].msg


def test_w018_is_silent_where_the_server_does_not_say(limits: Limits, memory: Any, user: Any, prefix: str) -> None:
    """A user who may not ask for INFO has a store that works all the same."""
    memory("100mb", "allkeys-lru")
    limits(everything(), BACKENDS=on_redis(user("-info", "-config"), prefix))
    assert ids() == []


@pytest.mark.parametrize("missing", ["-subscribe", "-publish", "-pubsub", "resetchannels"])
def test_w025_a_redis_that_lets_nobody_be_told_that_it_is_his_turn(
    limits: Limits, user: Any, prefix: str, missing: str
) -> None:
    entry = on_redis(user("allchannels", missing), prefix)
    limits(everything(), BACKENDS=entry)
    assert ids() == [], "it is nothing to a site where nobody waits"
    limits(everything(wait=2), BACKENDS=entry)
    (warning,) = found()
    assert warning.id == "django_concurrency_mw.W025"
    assert f"&{{{prefix}}}:1:* +publish +subscribe +pubsub|numsub" in warning.hint
    user("allchannels", "+@all")
    assert ids() == []


def test_w025_is_silent_about_a_redis_that_is_away(limits: Limits, prefix: str) -> None:
    limits(everything(wait=2), BACKENDS=on_redis(f"redis://127.0.0.1:{free_port()}/0", prefix))
    assert ids() == ["W006"]


def test_a_redis_that_never_answers_takes_the_time_of_one_call(limits: Limits, prefix: str) -> None:
    timeout = 0.6
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        limits(everything(), BACKENDS=on_redis(url, prefix, socket_timeout=timeout))
        start = monotonic()
        assert ids() == ["W006"]
        assert monotonic() - start < 5 * timeout


def test_a_redis_that_always_answers_at_the_last_moment_takes_no_longer(
    limits: Limits, proxy: Proxy, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it complained of: a request asks it for less. Eight answers of 0.56 s each would be too much for a start."""
    timeout = 0.6
    take = RedisBackend.take

    def then_slow(store: RedisBackend, slots: Any) -> Any:
        reply = take(store, slots)
        proxy.delay = lambda: 0.28  # each way
        return reply

    monkeypatch.setattr(RedisBackend, "take", then_slow)
    limits(everything(), BACKENDS=on_redis(f"redis://127.0.0.1:{proxy.port}/0", prefix, socket_timeout=timeout))
    start = monotonic()
    assert ids() == []
    assert monotonic() - start < 5 * timeout


@pytest.mark.skipif(not has_host(), reason="the host store is for Linux")
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", ["nfs4", "tmpfs"])
def test_e005_the_host_store_on_a_network_file_system(
    limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, kind: str
) -> None:
    """Also before the first request has made the file."""
    path = tmp_path / "table"
    limits(everything(), BACKENDS={"default": {"BACKEND": "host", "OPTIONS": {"path": str(path)}}})
    if there:
        path.touch(0o600)
    monkeypatch.setattr("django_concurrency_mw.backends.host.opening._file_system", lambda device: kind)
    assert ids() == (["E005"] if kind == "nfs4" else [])
    if kind == "nfs4":
        assert "network file system (nfs4)" in found()[0].msg


# -- who shares its place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"BACKEND": "memory"}, {"BACKEND": "memory"}, True),
        ({"BACKEND": "memory"}, {"BACKEND": "memory", "KEY_PREFIX": "b"}, False),
        ({"BACKEND": "memory"}, {"BACKEND": "host"}, False),
        ({"BACKEND": "host"}, {"BACKEND": "host"}, True),
        ({"BACKEND": "host"}, {"BACKEND": "host", "KEY_PREFIX": "b"}, False),
        (
            {"BACKEND": "host", "OPTIONS": {"path": "/dev/shm/c"}, "KEY_PREFIX": "a"},
            {"BACKEND": "host", "OPTIONS": {"path": "/dev/shm/c"}},
            True,
        ),
        ({"BACKEND": "redis", "LOCATION": "redis://localhost"}, {"BACKEND": "redis"}, True),
        ({"BACKEND": "redis", "OPTIONS": {"socket_timeout": 2}}, {"BACKEND": "redis"}, True),
        ({"BACKEND": "redis", "LOCATION": "redis://127.0.0.1/1"}, {"BACKEND": "redis"}, False),
        ({"BACKEND": "redis", "KEY_PREFIX": "b"}, {"BACKEND": "redis"}, False),
    ],
)
def test_w017_two_aliases_of_one_count(
    limits: Limits, first: dict[str, Any], second: dict[str, Any], same: bool
) -> None:
    limits(BACKENDS={"one": first, "two": second, "default": {"BACKEND": "memory", "KEY_PREFIX": "other"}})
    assert ids() == (["W017"] if same else [])
    if same:
        assert "'one' and 'two'" in found()[0].msg


def test_w017_leaves_what_cannot_be_used_to_others(limits: Limits) -> None:
    limits(BACKENDS={"a": {"BACKEND": "nowhere.At"}, "b": {"BACKEND": "nowhere.At"}})
    assert ids() == []


DJANGOS = "django.core.cache.backends.redis.RedisCache"


class OwnCache(RedisCache):
    """A project's own."""


@pytest.mark.parametrize("backend", [DJANGOS, named(OwnCache), "django_redis.cache.RedisCache"])
def test_w019_a_cache_whose_clear_empties_the_store(
    limits: Limits, redis_server: RedisServer, prefix: str, backend: str
) -> None:
    limits(everything(), BACKENDS=on_redis(redis_server, prefix))
    port = redis_server.port
    with override_settings(CACHES={"pages": {"BACKEND": backend, "LOCATION": f"redis://localhost:{port}"}}):
        (warning,) = found()
        assert warning.id == "django_concurrency_mw.W019"
        assert warning.msg.startswith("CACHES['pages'] and CONCURRENCY_LIMIT['BACKENDS']['default'] are one database")
    for location, options in (
        (f"redis://localhost:{port}/1", {}),
        (f"redis://localhost:{port}", {"db": 2}),
        (f"redis://localhost:{free_port()}", {}),
        ("no URL", {}),
    ):
        cache = {"BACKEND": backend, "LOCATION": location, "OPTIONS": options}
        with override_settings(CACHES={"pages": cache}):
            assert ids() == []


def test_w019_is_silent_about_other_caches_and_other_stores(
    limits: Limits, redis_server: RedisServer, prefix: str
) -> None:
    limits(everything(), BACKENDS=on_redis(redis_server, prefix))
    for backend in ("django.core.cache.backends.locmem.LocMemCache", "nowhere.Cache"):
        with override_settings(CACHES={"default": {"BACKEND": backend, "LOCATION": redis_server.url}}):
            assert ids() == []
    limits(everything())
    with override_settings(CACHES={"default": {"BACKEND": DJANGOS, "LOCATION": redis_server.url}}):
        assert ids() == []


def test_what_w019_says_is_so(limits: Limits, redis_server: RedisServer, prefix: str) -> None:
    """On a database of its own, as it is emptied."""
    url = redis_server.url.removesuffix("/0") + "/7"
    limits(everything(), BACKENDS=on_redis(url, prefix))
    with override_settings(CACHES={"default": {"BACKEND": DJANGOS, "LOCATION": url}}):
        assert ids() == ["W019"]
        with redis_server.client(db=7) as client:
            client.set("somebody's", "own")
            caches["default"].clear()
            assert client.dbsize() == 0
        caches["default"]._cache._pools[0].disconnect()


@pytest.mark.parametrize(
    ("url", "options", "server"),
    [
        ("redis://", {}, ("localhost", 6379, 0)),
        ("redis://[::1]:7000/3", {}, ("localhost", 7000, 3)),
        ("rediss://user:pw@Cache.example/1", {"db": 2}, ("cache.example", 6379, 1)),
        ("redis://cache.example", {"db": "2"}, ("cache.example", 6379, 2)),
        ("redis://cache.example?db=4", {}, ("cache.example", 6379, 4)),
        ("unix:///run/redis.sock?db=1", {}, ("/run/redis.sock", 0, 1)),
        ("127.0.0.1:6379", {}, None),
        ("redis://host:port", {}, None),
    ],
)
def test_which_server_and_database_a_url_means(url: str, options: dict[str, Any], server: Any) -> None:
    assert server_of_url(url, options) == server


# -- --deploy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["table", "decorator", "nobody"])
def test_w015_the_memory_store_on_servers(limits: Limits, decorate: Decorate, by: str) -> None:
    stores = {**ON_HOST, "quick": {"BACKEND": "memory", "KEY_PREFIX": "quick"}}
    limits(everything(backend="quick") if by == "table" else None, BACKENDS=stores, TRUSTED_PROXIES=TRUSTED)
    view = decorate(key="global", max_concurrent=1, backend="quick") if by == "decorator" else None
    assert ids(deploy=True) == ([] if by == "nobody" else ["W015"])
    assert ids() == []
    assert by == "nobody" or "['quick'] is 'memory'" in found(deploy=True)[0].msg
    del view


def test_w015_is_silent_where_memory_is_the_default(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """W008 says it."""
    for place in (backends, conf):
        monkeypatch.setattr(place, "DEFAULT_BACKEND", "memory")
    limits(everything(), BACKENDS=None, TRUSTED_PROXIES=TRUSTED)
    assert ids(deploy=True) == ["W008"]


def test_w015_a_policy_that_names_the_memory_store_itself(limits: Limits) -> None:
    limits(everything(backend="memory"), BACKENDS=None, TRUSTED_PROXIES=TRUSTED)
    assert ids(deploy=True) == ["W015"]


def test_w016_the_default_prefix_on_a_redis(limits: Limits, redis_server: RedisServer, prefix: str) -> None:
    stores = on_redis(redis_server, prefix)
    del stores["default"]["KEY_PREFIX"]
    limits(everything(), BACKENDS=stores, TRUSTED_PROXIES=TRUSTED)
    assert ids(deploy=True) == ["W016"]
    assert ids() == []
