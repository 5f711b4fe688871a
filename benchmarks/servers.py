"""Real servers under load: which share of the requests per second that a bare view answers is kept with a limit on Redis.

Beside it stands the share that is kept of the requests per second of *work*: of the server's processes, of Redis and of who
asks. That is what the requests per second come to where nothing else runs and no core is idle, and it hardly changes where
something does run. Both are shown for the two raw round trips in a view, too, and for django-smart-ratelimit.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from .load import CONNECTIONS, requests_per_second
from .report import Result
from .room import Ratio, work_of
from .site import ROUTES

ROOT = Path(__file__).resolve().parent.parent
#: Server -> its command, the beginning of its views' paths, and the share to be kept.
SERVERS: Mapping[str, tuple[tuple[str, ...], str, float]] = {
    "gunicorn gthread 2x16": (
        (
            *("gunicorn", "--worker-class", "gthread", "--workers", "2", "--threads", "16", "--no-control-socket"),
            *("--keep-alive", "60", "--log-level", "warning", "benchmarks.serving:wsgi", "--bind", "127.0.0.1:{port}"),
        ),
        "/",
        0.70,
    ),
    "uvicorn 2 workers": (
        (
            *("uvicorn", "--workers", "2", "--no-access-log", "--log-level", "warning", "benchmarks.serving:asgi"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        "/a-",
        0.80,
    ),
}


@dataclass(frozen=True)
class Server:
    """One that listens, and its first process."""

    port: int
    process: int

    def processes(self) -> list[int]:
        """The first one and all that came of it."""
        parents = {}
        for process in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):  # it has just ended
                parents[int(process)] = int(Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1])
        found = [self.process]
        for one in found:
            found += [process for process, parent in parents.items() if parent == one]
        return found

    def shares(self) -> bool:
        """Has each of two workers a quarter of its connections or more?

        Whoever is awake takes all that come at once, which is often one worker alone: for as long as they stay, half of the
        server does nothing, whatever its views do.
        """
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ours = {
            f"socket:[{fields[9]}]" for fields in lines if fields[1].endswith(f":{self.port:04X}") and fields[3] == "01"
        }
        numbers = sorted(sum(link in ours for link in _open_files(process)) for process in self.processes())
        return numbers[-2] >= CONNECTIONS // 4


def _open_files(process: int) -> list[str]:
    found = []
    with suppress(OSError):  # the process has ended, or closed one meanwhile
        for one in Path("/proc", str(process), "fd").iterdir():
            with suppress(OSError):
                found.append(os.readlink(one))
    return found


@contextmanager
def _running(command: tuple[str, ...], middleware: bool) -> Iterator[Server]:
    """A server with this command."""
    from tests.servers import free_port

    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BENCHMARK_MIDDLEWARE": "1" if middleware else ""}
    line = [sys.executable, "-m", *(part.format(port=port) for part in command)]
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            _wait(server, port)
            yield Server(port, server.pid)
        except BaseException:
            output.seek(0)
            print(output.read().decode(errors="replace")[-3000:], file=sys.stderr)
            raise
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    from tests.servers import get

    end = monotonic() + 60
    while monotonic() < end and server.poll() is None:
        try:
            if get(port, "/bare/")[0] == 200:
                return
        except OSError:
            sleep(0.1)
    raise AssertionError("the server did not come up")


#: What the rows say of a view, by the beginning of its URL name behind the store's. Those with a target are ours.
VIEWS = {
    "decorator": ("view-1", "by decorator"),
    "middleware": ("mw-1", "by middleware"),
    "raw2": ("raw2", "two raw round trips"),
    "peer": ("peer", "django-smart-ratelimit"),
}
OURS = ("decorator", "middleware")
#: Seconds for which each is asked at a time: short, as what else the machine does changes from one to the next.
SLICE = 2.0
#: Until what there is has to do.
TRIES = 40
Figures = dict[str, list[float]]


def kept(name: str, store: str, rounds: int, redis: int) -> tuple[list[Result], dict[str, Figures]]:
    """The rows of one server, and the figures of each view, round by round, all asked in turn: requests per second, and per
    second of work. `redis` is its process."""
    command, beginning, target = SERVERS[name]
    with ExitStack() as stack:
        servers = [stack.enter_context(_running(command, middleware)) for middleware in (False, True)]
        asked = {"bare": (servers[0], f"{beginning}bare/")}
        for row, (view, _words) in VIEWS.items():
            if f"{store}-{view}" in ROUTES:
                asked[row] = (servers[row == "middleware"], f"{beginning}{store}-{view}/")
        found: dict[str, Figures] = {what: {row: [] for row in asked} for what in ("second", "second of work")}
        for server, path in asked.values():
            requests_per_second(server.port, path, SLICE)  # connections are made, scripts loaded
        for _ in range(rounds):
            for row, (server, path) in asked.items():
                per_second, per_work = _figures(server, path, redis)
                found["second"][row].append(per_second)
                found["second of work"][row].append(per_work)
    results = []
    for per, figures in found.items():
        for row in filter(asked.__contains__, VIEWS):
            what = f"{name}, share kept{' per second of work' if per != 'second' else ''}, {store}, {VIEWS[row][1]}"
            at_least = target if per == "second" and row in OURS else None
            id_ = f"{name.split()[0]}-{store}-{row}" + ("" if per == "second" else "-work")
            results.append(Result(id_, what, "free", _share(figures, row), at_least, at_least=True))
    return results, found


def _figures(server: Server, path: str, redis: int) -> tuple[float, float]:
    """Requests per second, and per second of work that they were to all who had any; of a try in which two workers shared."""
    clock = work_of([*server.processes(), redis], own=False)
    for left in reversed(range(TRIES)):
        before, asking = clock(), _of_children()
        per_second = requests_per_second(server.port, path, SLICE, server.shares if left else lambda: True)
        if per_second is not None:
            work = clock() - before + _of_children() - asking
            return per_second, per_second * SLICE / work
    raise AssertionError("the last try is always fair")


def _of_children() -> float:
    """Seconds of work of processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _share(figures: Figures, row: str) -> Ratio:
    pairs = zip(figures[row], figures["bare"], strict=True)
    shares = sorted(ours / bare for ours, bare in pairs if bare) or [float("nan")]
    return Ratio(statistics.median(shares), shares[len(shares) // 4], shares[-1 - len(shares) // 4])
