"""Hot reload on real servers: a crowd is there while the file changes, and every worker switches within the interval."""

from __future__ import annotations

import http.client
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import pytest

from .chaos import LONG
from .servers import free_port, get, gunicorn, held, running, uvicorn
from .support import wait_until

CLIENTS = 64
INTERVAL = 0.5
#: Seconds that a switch may take beyond the interval, on a machine that is as busy as this crowd makes it. Less than another
#: interval, as each change comes just after a look: one look that is left out is seen.
SLACK = 0.45
#: Seconds that a request may take.
ASKED = 0.2
#: Seconds that the crowd stays at each limit, once every worker has it.
STAY = 2.0 if LONG else 0.5
BROKEN = "policies: {cap: {key: global, max_concurrent: %d"

SERVERS: dict[str, tuple[Callable[[int], list[str]], str]] = {
    "gunicorn gthread 2x32": (lambda port: gunicorn(port, "--workers", "2", "--threads", "32"), "/busy/sync/"),
    "gunicorn gthread 2x32 preloaded": (
        lambda port: gunicorn(port, "--workers", "2", "--threads", "32", "--preload"),
        "/busy/sync/",
    ),
    "uvicorn x2": (lambda port: uvicorn(port, "--workers", "2"), "/busy/async/"),
}
if not LONG:
    del SERVERS["gunicorn gthread 2x32"]


@dataclass(frozen=True)
class Answer:
    """One of a worker; `began` is when it was asked for, in monotonic seconds. A status of 0: none came."""

    began: float
    status: int
    pid: str
    limit: int


@contextmanager
def crowd(port: int, path: str) -> Iterator[list[Answer]]:
    """So many clients ask again and again, on a new connection now and then. Yields the answers as they come."""
    answers: list[Answer] = []
    enough = threading.Event()

    def client() -> None:
        while not enough.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            for _ in range(20):
                began = monotonic()
                try:
                    connection.request("GET", path)
                    response = connection.getresponse()
                    response.read()
                    told = response.headers
                    answers.append(Answer(began, response.status, told.get("X-Pid", ""), int(told.get("X-Limit", -1))))
                except (OSError, http.client.HTTPException):
                    answers.append(Answer(began, 0, "", -1))
                    break
                if enough.wait(0.02):
                    break
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def policies(limit: int) -> str:
    return f"policies:\n  cap: {{url_names: ['busy-*'], key: global, max_concurrent: {limit}}}\n"


def moved(file: Path, content: str) -> float:
    """Returns when, in monotonic seconds."""
    new = file.with_suffix(".new")
    new.write_text(content)
    new.replace(file)
    return monotonic()


def most_inside(gauge_file: Path, begin: float, end: float) -> int:
    """How many were inside the views at once between these two moments, by the views' own word."""
    events = sorted(
        (int(stamp) / 1e9, int(change))
        for stamp, change, _ in (line.split() for line in gauge_file.read_text().splitlines())
    )
    inside = most = 0
    for stamp, change in events:
        inside += change
        if begin <= stamp <= end:
            most = max(most, inside)
    return most


def stale(answers: Sequence[Answer], pid: str, limit: int, begin: float, end: float) -> float:
    """How long after `begin` this worker was last asked by somebody whom it judged by another limit."""
    old = (one.began - begin for one in answers if one.pid == pid and one.limit != limit and begin < one.began < end)
    return max(old, default=0.0)


@pytest.mark.parametrize(("command", "path"), list(SERVERS.values()), ids=list(SERVERS))
def test_every_worker_switches_under_a_crowd_and_no_slot_is_lost(
    tmp_path: Path, prefix: str, command: Callable[[int], list[str]], path: str
) -> None:
    port, file, gauge_file = free_port(), tmp_path / "policies.yaml", tmp_path / "events"
    moved(file, policies(5))
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.reload_settings",
        "TEST_POLICIES": str(file),
        "TEST_PREFIX": prefix,
        "TEST_GAUGE_FILE": str(gauge_file),
        "TEST_INTERVAL": str(INTERVAL),
    }
    log = gauge_file.with_suffix(f".{port}.log")

    def refusals() -> list[str]:
        """Who refused a file, once for each line."""
        return re.findall(r"^(\d+) ERROR .*: not reloaded", log.read_text(), re.MULTILINE)

    changes: list[tuple[float, float, int]] = []
    with running(command(port), port, gauge_file, env) as server:
        with crowd(port, path) as answers:
            assert wait_until(lambda: len({one.pid for one in answers}) == 2)
            pids = {one.pid for one in answers}
            for number, limit in enumerate((2, 7), 1):
                moved(file, BROKEN % number)
                assert wait_until(lambda: len(refusals()) == 2 * number), log.read_text()  # noqa: B023
                begin = moved(file, policies(limit))
                assert wait_until(lambda: {one.pid for one in answers if one.limit == limit} == pids)  # noqa: B023
                # Those whom the old limit let in have left by then.
                changes.append((begin, monotonic() + ASKED, limit))
                sleep(STAY)
            over = monotonic()
            if "--preload" in command(port):
                assert len(os.listdir(f"/proc/{server.pid}/task")) == 1, "a thread before the fork"
        assert wait_until(lambda: held(port) == []), "a slot was lost"
        assert get(port, path)[0] == 200
    text = log.read_text()
    print(f"{len(answers)} answers")
    assert {one.status for one in answers} == {200, 429}, text
    assert {one.pid for one in answers} == pids
    assert sorted(refusals()) == sorted([*pids] * 2), "one line for each broken file and worker"
    assert len(re.findall(r"INFO .*: reloaded: changed cap", text)) == 4
    for (begin, settled, limit), end in zip(changes, [*(begin for begin, *_ in changes[1:]), over], strict=True):
        latest = {pid: stale(answers, pid, limit, begin, end) for pid in pids}
        print(f"-> {limit}: the last by the old limit {', '.join(f'{took:.3f} s' for took in latest.values())} later")
        new = [one for one in answers if settled <= one.began < end - ASKED]
        assert {(one.pid, one.limit) for one in new} == {(pid, limit) for pid in pids}
        assert max(latest.values()) <= INTERVAL + SLACK
        assert most_inside(gauge_file, settled, end) == limit, "kept, and reached"


def test_runserver_starts_anew_when_the_file_changes(tmp_path: Path, prefix: str) -> None:
    """With no interval, and after a file that was wrong."""
    port, file = free_port(), tmp_path / "policies.yaml"
    moved(file, policies(5))
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.reload_settings",
        "TEST_POLICIES": str(file),
        "TEST_PREFIX": prefix,
        "TEST_INTERVAL": "null",
    }

    def limit() -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/busy/sync/")
            return connection.getresponse().headers.get("X-Limit")
        except OSError:
            return None
        finally:
            connection.close()

    log = tmp_path / f"log.{port}.log"
    with running([sys.executable, "-m", "django", "runserver", f"127.0.0.1:{port}"], port, tmp_path / "log", env):
        assert limit() == "5"

        def broken() -> bool:
            moved(file, "policies: [")  # again where Django had not yet looked at the first one
            return wait_until(lambda: "django_concurrency_mw.E001" in log.read_text(), 3)

        assert wait_until(broken, 60), log.read_text()

        def mended() -> bool:
            moved(file, policies(2))  # again where Django had not yet looked at the wrong one
            return wait_until(lambda: limit() == "2", 3)

        assert wait_until(mended, 60), log.read_text()
