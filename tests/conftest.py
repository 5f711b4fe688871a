"""What all tests share: where the repository is, and how a program of it is run."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from django.conf import settings
from django.db.models.signals import post_migrate
from hypothesis import settings as hypothesis_settings
from xdist.remote import Producer

from django_concurrency_mw import backends, health, peaks
from django_concurrency_mw.keeper import keeper

from . import servers, sharing
from .proxy import Proxy
from .redis_cluster import RedisCluster
from .redis_server import RedisServer
from .support import EARLIER, limits

__all__ = ["limits"]

# The same examples on every run of CI; elsewhere new ones each time, so that something may still be found. Never a deadline:
# a busy machine stands still for longer than any example takes.
hypothesis_settings.register_profile("here", deadline=None)
hypothesis_settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis_settings.load_profile("ci" if os.environ.get("CI") else "here")

ROOT = Path(__file__).resolve().parent.parent
_numbers = count()
_files_before = pytest.StashKey[set[Path]]()
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    """What a worker of pytest-xdist runs is what runs without one: no test, and no program of a test, knows of it."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            del os.environ[name]
        servers.share_ports(int(worker["workerid"].removeprefix("gw")), worker["workercount"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among workers real servers first: one has them all, and while it waits for them the other one has the processors."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: sharing.unit(item.nodeid) != sharing.SERVERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> sharing.Sharing:
    return sharing.Sharing(config, log)


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the collections that many tests ask for need not look at all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_files_before] = _files()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A file of the host store stays until the machine goes down; of sites that only tests have, none is left.

    Only the process that was started first does so, when its workers are through: those use one another's files.
    """
    if sys.platform != "linux" or hasattr(session.config, "workerinput"):
        return
    from django_concurrency_mw.backends.host.layout import PROCESSES
    from django_concurrency_mw.backends.host.locking import any_alive

    for file in _files() - session.config.stash.get(_files_before, _files()):
        with contextlib.suppress(FileNotFoundError), file.open("r+b") as opened:
            if not any_alive(opened.fileno(), 0, PROCESSES):
                file.unlink()


def _files() -> set[Path]:
    return set(Path("/dev/shm").glob(f"concurrency-{os.geteuid()}-*"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def run_python() -> Run:
    """Run this Python from the repository's root (or `cwd`), with the repository importable; `env` adds variables."""

    def run(
        *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 120, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "140", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real server of the suite's own."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """A real Cluster of the suite's own: three masters, and a replica of the first. Who breaks it mends it."""
    cluster = RedisCluster(masters=3, replicas=1)
    yield cluster
    cluster.stop()


@pytest.fixture
def prefix() -> str:
    """A KEY_PREFIX that no other test has."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A bad network before that server."""
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def django_db_modify_db_settings_xdist_suffix() -> None:
    """None: the name of the database has the process in it already, and programs of the tests are told that name."""


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None) -> None:
    """After a test whose transactions are real Django empties the tables and makes the permissions of each model anew.

    No test asks for one, and that took most of such a test's time.
    """
    post_migrate.receivers.clear()
    post_migrate.sender_receivers_cache.clear()


@pytest.fixture(scope="session", autouse=True)
def _no_late_notes() -> Iterator[None]:
    """The peaks of one test are not noted while another one counts commands; who wants notes says when."""
    before, peaks.NOTE_EVERY = peaks.NOTE_EVERY, 3600.0
    yield
    peaks.NOTE_EVERY = before


@pytest.fixture(autouse=True)
def _forget_stores() -> Iterator[None]:
    """Each test has stores of its own, and what it asks all stores is not asked of those of the tests before it.

    One that fails still may come back in a later test: it says so under another name then.
    """
    yield
    # Else the keeper waits for a server that is gone, say, and later tests for the keeper. What it is trying goes next time.
    if keeper._owed and keeper._working.acquire(blocking=False):
        keeper._owed.clear()
        keeper._working.release()
    backends._instances.clear()
    for store in list(health._probes):
        store.config = replace(store.config, alias=EARLIER)


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """What a test overrides is undone in its order: else those after it run with other settings, or not, as their order is."""
    before = settings._wrapped
    yield
    after, settings._wrapped = settings._wrapped, before
    assert after is before, "the settings of this test are still in force"
