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
from .servers import PATIENCE, free_port, get, gunicorn, held, running, uvicorn
from .support import wait_until

CLIENTS = 64
INTERVAL = 0.5
#: Seconds that the quickest switch may take beyond the interval. Less than another interval, as each change comes just after a
#: look: one look that is left out is seen.
SLACK = 0.45
#: Seconds that any switch may take: on a busy machine a worker may be held up for long.
LONGEST = 10 * INTERVAL
#: Seconds that a view holds its slot: long enough for a machine that lets in few a second to have as many inside at once.
DURATION = 0.1
#: Seconds that the crowd stays at each limit at least, once every worker has it and the limit was reached.
STAY = 2.0 if LONG else 0.3
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
    del SERVERS["gunicorn gthread 2x32"], SERVERS["uvicorn x2"]


@dataclass(frozen=True)
class Answer:
    """One of a worker, to a client; `began` is when it was asked for and `ended` when it came, in monotonic seconds.

    A status of 0: none came.
    """

    client: int
    began: float
    ended: float
    status: int
    pid: str
    limit: int


@contextmanager
def crowd(port: int, path: str) -> Iterator[list[Answer]]:
    """So many clients ask again and again, on a new connection now and then. Yields the answers as they come."""
    answers: list[Answer] = []
    enough = threading.Event()

    def client(number: int) -> None:
        while not enough.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            for _ in range(20):
                began = monotonic()
                try:
                    connection.request("GET", path)
                    response = connection.getresponse()
                    response.read()
                    told, status = response.headers, response.status
                except (OSError, http.client.HTTPException):
                    told, status = {}, 0
                pid, limit = told.get("X-Pid", ""), int(told.get("X-Limit", -1))
                answers.append(Answer(number, began, monotonic(), status, pid, limit))
                if not status:
                    break
                if enough.wait(0.02):
                    break
            connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
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


def most_inside(gauge_file: Path, begin: float, end: float = float("inf")) -> int:
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
        "TEST_DURATION": str(DURATION),
    }
    log = gauge_file.with_suffix(f".{port}.log")

    def refusals() -> list[str]:
        """Who refused a file, once for each line."""
        return re.findall(r"^(\d+) ERROR .*: not reloaded", log.read_text(), re.MULTILINE)

    def reloads() -> int:
        return len(re.findall(r"INFO .*: reloaded: changed cap", log.read_text()))

    def all_asked_again() -> bool:
        """Has every client an answer to what it has asked since now? Then whoever was let in before has left."""
        return len({one.client for one in answers if one.began >= switched}) == CLIENTS

    def reached() -> bool:
        """The limit, since then; and has every worker answered meanwhile?"""
        sleep(0.05)  # to read all that was counted keeps this process from asking
        asked = {one.pid for one in answers if one.began >= settled}
        return asked == pids and most_inside(gauge_file, settled) >= limit

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
                switched = monotonic()
                assert wait_until(all_asked_again)
                settled = monotonic()
                changes.append((begin, settled, limit))
                sleep(STAY)
                assert wait_until(reached), f"{limit} were not inside at once, but {most_inside(gauge_file, settled)}"
                assert wait_until(lambda: reloads() == 2 * number), log.read_text()  # noqa: B023
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
    assert reloads() == 4
    took = []
    for (begin, settled, limit), end in zip(changes, [*(begin for begin, *_ in changes[1:]), over], strict=True):
        latest = {pid: stale(answers, pid, limit, begin, end) for pid in pids}
        print(f"-> {limit}: the last by the old limit {', '.join(f'{late:.3f} s' for late in latest.values())} later")
        took += latest.values()
        new = [one for one in answers if settled <= one.began and one.ended < end]
        assert {(one.pid, one.limit) for one in new} == {(pid, limit) for pid in pids}
        assert most_inside(gauge_file, settled, end) == limit, "kept, and reached"
    assert max(took) <= LONGEST
    assert min(took) <= INTERVAL + SLACK


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
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
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

        def follows(content: str, fact: Callable[[], bool]) -> bool:
            """Moved again where Django had not yet looked at the one before; but not while it may still start anew for that."""
            for seconds in (1.5, 4, 10, 30, 60):
                moved(file, content)
                if wait_until(fact, seconds):
                    return True
            return False

        assert follows("policies: [", lambda: "django_concurrency_mw.E001" in log.read_text()), log.read_text()
        assert follows(policies(2), lambda: limit() == "2"), log.read_text()
