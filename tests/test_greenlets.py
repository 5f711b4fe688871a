"""gunicorn's gevent worker: threads are greenlets there, and nothing of ours stops them all, or lets too many in."""

from __future__ import annotations

import http.client
import os
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import sleep

import pytest

from .chaos import LONG
from .conftest import Run
from .redis_server import RedisServer
from .support import backend_entry, wait_until
from .test_queueing import WAITING
from .test_waiting_servers import Server, serving_by
from .ticking import read

CAP, CROWD, TTL = 5, 200, 2.0
#: Seconds in which no greenlet had a turn, at most; 0.07 were seen.
FROZEN = 0.5
#: The site is loaded after the worker has patched, as usual; or by the master: before the worker patches, or, where gunicorn's
#: own file patches, after that.
PRELOADED = {"no": [], "before the patch": ["--preload"], "after the patch": ["--preload"]}
#: How a worker is told to end: with time for its requests, of which there is none here, as at a reload; or at once.
ENDS = {"no": signal.SIGTERM, "before the patch": signal.SIGQUIT, "after the patch": signal.SIGTERM}
HOW = list(PRELOADED) if LONG else ["no", "before the patch"]


@pytest.fixture(autouse=True, scope="module")
def _gevent_is_there() -> None:
    assert find_spec("gevent"), "no gevent for the tests: python -m pip install 'gevent>=24.10.1'"


def _options(folder: Path, preloaded: str) -> list[str]:
    file = folder / "gunicorn.conf.py"
    patch = "from gevent import monkey\n\nmonkey.patch_all()\n" if preloaded == "after the patch" else ""
    file.write_text(f"{patch}from tests.ticking import post_worker_init\n")
    options = [*PRELOADED[preloaded], "--config", str(file)]
    return ["--worker-class", "gevent", "--workers", "1", "--graceful-timeout", "0", *options]


@pytest.mark.parametrize("preloaded", HOW)
def test_greenlets_are_admitted_wait_are_renewed_and_end(
    tmp_path: Path, request: pytest.FixtureRequest, prefix: str, preloaded: str, redis_server: RedisServer
) -> None:
    """On every store. And all others have their turns meanwhile, at the start and until the end."""
    whole = LONG or preloaded == "before the patch"  # where the most can go wrong
    fields = {"key": "global", "max_concurrent": CAP, "wait": 60, "max_waiting": CROWD, "on_backend_error": "deny"}
    names = {f"{store}{length}": (store, ttl) for store in WAITING for length, ttl in (("", TTL), ("-long", 600))}
    limit = {
        "BACKENDS": {store: backend_entry(store, request, prefix, tmp_path) for store in WAITING},
        "POLICIES": {
            "policies": {
                name: {"url_names": [name], "backend": store, "ttl": ttl, **fields}
                for name, (store, ttl) in names.items()
            }
        },
        "MAX_SYNC_WAITERS": CROWD,
    }
    with serving_by("gunicorn", tmp_path, *_options(tmp_path, preloaded), limit=limit) as server:
        (worker,) = server.workers()
        for store in WAITING if whole else WAITING[-1:]:
            _come_at_once(server, f"/{store}-long/?for=10")
        assert server.seen().most == CAP, "never above the cap, and reached"
        _stay_and_are_told_to_end(server, list(names), 1.25 * TTL if whole else 0, worker, ENDS[preloaded])
        assert redis_server.held(prefix) == 0, "those that were cut off gave back"
        noted = read(server.gauge_file, worker)
    print(noted)
    assert noted.ticks > 20
    assert noted.longest < FROZEN
    assert noted.at_exit < FROZEN


def _come_at_once(server: Server, path: str) -> None:
    with ThreadPoolExecutor(CROWD) as clients:
        statuses = Counter(status for status, _ in clients.map(server.get, [path] * CROWD))
    print(f"{path}: {statuses}, {server.seen()}")
    assert statuses == {200: CROWD}
    assert wait_until(server.is_empty), server.line()


def _stay_and_are_told_to_end(
    server: Server, names: list[str], seconds: float, worker: int, how: signal.Signals
) -> None:
    def ask(name: str) -> None:
        with suppress(OSError, http.client.HTTPException):
            server.get(f"/{name}/?for=60000")

    line = {"held": sorted(names * CAP), "waiting": CAP * len(names)}
    with ThreadPoolExecutor(2 * CAP * len(names)) as clients:
        for name in names * (2 * CAP):
            clients.submit(ask, name)
        try:
            assert wait_until(lambda: server.line() == line), server.line()
            sleep(seconds)  # a lease that nobody renews ends meanwhile, and one who waits comes in
            assert server.line() == line
        finally:
            os.kill(worker, how)
            if not wait_until(lambda: not Path(f"/proc/{worker}").exists()):
                server.process.kill()
                pytest.fail("it is still there")


WHEN_PATCHED_LATE = """
import django
from django.conf import settings

settings.configure(CONCURRENCY_LIMIT={"POLICIES": {"policies": {}}})
django.setup()
from django_concurrency_mw import conf, health
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.host import bells
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import connecting, sentinel, sockets
from django_concurrency_mw.backends.redis.store import RedisBackend

OPTIONS = {"sentinels": ["redis://a"], "master_name": "limits"}
store = RedisBackend(BackendConfig("limits", "redis", None, "c", OPTIONS))
known = store._recipe.where


class Away(MemoryBackend):
    def probe(self):
        raise OSError("it is away")


from gevent import monkey

monkey.patch_all()
import gevent, socket, traceback
from time import monotonic

conf.current()


def probes():
    away, turns, end = Away(BackendConfig("away", "memory")), 0, monotonic() + 3 * health.PROBE_EVERY
    health.failed(away, OSError("away"), monotonic())
    while monotonic() < end:
        gevent.sleep(0.001)
        turns += 1
    assert away.failure is not None
    assert turns > 20, turns


def rings():
    post, turns = bells._Post(), []
    gevent.spawn(turns.append, 1)
    for _ in range(1000):
        bells._send(post.number)
    assert not turns


def asks():
    listening = socket.create_server(("127.0.0.1", 0))
    location = "redis://127.0.0.1:%d" % listening.getsockname()[1]
    recipe = connecting.Recipe(BackendConfig("asked", "redis", location, options={"socket_timeout": 0.05}))
    bounded = recipe.connection(monotonic() - 0.1)._connect()  # its time went by before its turn
    theirs, _ = listening.accept()
    bounded.deadline = monotonic() + 0.05

    def talk():
        heard = [bounded.recv(64), bounded.recv(64)]
        bounded.sendall(b"x")
        try:
            bounded.recv(64)
        except TimeoutError:
            heard.append(b"late")
        return heard

    talking = gevent.spawn(talk)
    gevent.sleep(0)
    theirs.sendall(b"+a\\r\\n")
    end = monotonic() + 0.2
    while monotonic() < end:  # nobody else has a turn
        pass
    gevent.sleep(0)
    theirs.sendall(b"+b\\r\\n")
    assert talking.get(timeout=60) == [b"+a\\r\\n", b"+b\\r\\n", b"late"]
    bounded.deadline = monotonic() - sockets.STEPS
    theirs.sendall(b"+c\\r\\n")
    try:
        bounded.recv(64)
    except TimeoutError:
        return
    raise AssertionError("it goes on for ever")


def finds():
    # A sentinel that is silent: whoever asks it has the lock, and the others wait for that.
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
    known._order[0] = sentinel.Sentinel("silent", connecting.Recipe(BackendConfig("a", "redis", url)).connection)
    asking = [gevent.spawn(known._find, monotonic() + 6) for _ in range(2)]
    longest, last = 0, monotonic()
    while not all(one.ready() for one in asking):
        gevent.sleep(0.01)
        longest, last = max(longest, monotonic() - last), monotonic()
    assert longest < 3, longest


for check in (probes, rings, asks, finds):
    print(check.__name__)
    try:
        with gevent.Timeout(20):
            check()
    except BaseException:
        print(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def found(run_python: Run) -> dict[str, str]:
    """What each check has to complain of, in a process that has loaded the site before it was patched."""
    done = run_python("-c", WHEN_PATCHED_LATE)
    assert done.returncode == 0, done.stderr
    names = ("probes", "rings", "asks", "finds")
    parts = re.split(rf"^({'|'.join(names)})$", done.stdout, flags=re.MULTILINE)
    complaints = dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))
    assert set(complaints) == set(names)
    return complaints


def test_a_store_that_is_away_stops_no_greenlet(found: dict[str, str]) -> None:
    """Its probe naps, in what was a thread when the site was loaded."""
    assert not found["probes"]


def test_a_bell_is_rung_without_giving_up_the_turn(found: dict[str, str]) -> None:
    """It may be rung from anywhere, and its receiver's queue may be full."""
    assert not found["rings"]


def test_the_turns_of_others_are_not_held_against_a_redis(found: dict[str, str]) -> None:
    """A greenlet's next step is not refused, as its time had gone by before it had its turn; a silent server is."""
    assert not found["asks"]


def test_who_waits_for_the_word_of_a_sentinel_stops_no_greenlet(found: dict[str, str]) -> None:
    """It waits for whoever asks already, at a lock that was made when the site was loaded."""
    assert not found["finds"]
