"""Real servers under load: which share of the requests per second that a bare view answers is kept with a limit on Redis."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

from .load import requests_per_second
from .report import Result
from .room import Ratio

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


@contextmanager
def _running(command: tuple[str, ...], middleware: bool) -> Iterator[int]:
    """The port of a server with this command."""
    from tests.servers import free_port

    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BENCHMARK_MIDDLEWARE": "1" if middleware else ""}
    line = [sys.executable, "-m", *(part.format(port=port) for part in command)]
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            _wait(server, port)
            yield port
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


def kept(name: str, store: str, rounds: int, seconds: float) -> tuple[list[Result], dict[str, list[float]]]:
    """The rows of one server, and the requests per second of each round: bare, by decorator, by middleware, in turn."""
    command, beginning, target = SERVERS[name]
    with ExitStack() as stack:
        without, with_middleware = (stack.enter_context(_running(command, middleware)) for middleware in (False, True))
        asked = {
            "bare": (without, f"{beginning}bare/"),
            "decorator": (without, f"{beginning}{store}-view-1/"),
            "middleware": (with_middleware, f"{beginning}{store}-mw-1/"),
        }
        for port, path in asked.values():
            requests_per_second(port, path, 1)  # connections are made, scripts loaded
        found: dict[str, list[float]] = {row: [] for row in asked}
        for _ in range(rounds):
            for row, (port, path) in asked.items():
                found[row].append(requests_per_second(port, path, seconds))
    results = []
    for row in ("decorator", "middleware"):
        shares = sorted(ours / bare for ours, bare in zip(found[row], found["bare"], strict=True))
        spread = Ratio(statistics.median(shares), shares[len(shares) // 4], shares[-1 - len(shares) // 4])
        what = f"{name}, share of a bare view's requests kept, {store}, by {row}"
        results.append(Result(f"{name.split()[0]}-{store}-{row}", what, "free", spread, target, at_least=True))
    return results, found
