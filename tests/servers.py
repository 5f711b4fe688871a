"""Real servers as subprocesses on loopback, and a crowd of clients that all want in at once."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

ROOT = Path(__file__).resolve().parent.parent
_dice = random.SystemRandom()  # hypothesis seeds the usual one


#: Below those that the kernel gives away by itself: a client may have taken one of these before a server binds it.
_ports = range(15_000, 32_000)


def share_ports(worker: int, workers: int) -> None:
    """From now on this process has the ports to itself that no other worker of this run looks at."""
    global _ports
    _ports = _ports[worker::workers]


def free_port() -> int:
    while True:
        port = _dice.choice(_ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


#: Seconds that a client waits for an answer: one that never comes is found, one that a busy machine holds up is waited for.
PATIENCE = 60
#: Seconds that a server keeps a connection on which nothing is asked. By default a client that stands still for 2 to 5 seconds,
#: as on a busy machine, would ask on one that is just being closed, and have no answer.
KEPT = "120"


def gunicorn(port: int, *options: str) -> list[str]:
    """gthread with the given options."""
    bound = ["--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--no-control-socket", "--keep-alive", KEPT]
    return [sys.executable, "-m", "gunicorn", *bound, *options, "tests.serving:wsgi"]


def uvicorn(port: int, *options: str) -> list[str]:
    bound = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--timeout-keep-alive", KEPT]
    return [sys.executable, "-m", "uvicorn", *bound, *options, "tests.serving:asgi"]


@contextmanager
def running(
    command: list[str], port: int, gauge_file: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ready; killed with all its workers, as what it does when it is told to end is what other tests are about.

    Its output is in the message of whatever goes wrong. It need not run any more at the end of the block.
    `env` has variables instead of the one that makes the views count in `gauge_file`.
    """
    log = gauge_file.with_suffix(f".{port}.log")
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.server_settings",
        "PYTHONPATH": str(ROOT),
        **({"TEST_GAUGE_FILE": str(gauge_file)} if env is None else env),
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(server, port, log)
        yield server
    finally:
        # It has a session of its own, so these are its own processes, and they are there even when it has ended itself.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = monotonic() + 120
    while monotonic() < end:
        if server.poll() is not None:
            break
        try:
            status, _ = get(port, "/-/held/")
            if status == 200:
                return
        except OSError:
            sleep(0.05)
    raise AssertionError(f"the server did not come up:\n{log.read_text()}")


def get(port: int, path: str, connection: http.client.HTTPConnection | None = None) -> tuple[int, bytes]:
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        own.request("GET", path)
        response = own.getresponse()
        return response.status, response.read()
    finally:
        if connection is None:
            own.close()


def held(port: int) -> list[str]:
    """The policies whose slots the server's store holds."""
    _, body = get(port, "/-/held/")
    found: list[str] = json.loads(body)["held"]
    return found


def crowd(port: int, path: str, clients: int, seconds: float) -> Counter[int]:
    """So many clients ask for the path again and again for so long. Returns how often each status came (0: no answer)."""
    statuses: Counter[int] = Counter()
    lock = threading.Lock()
    end = monotonic() + seconds

    def client() -> None:
        mine: Counter[int] = Counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        while monotonic() < end:
            try:
                status, _ = get(port, path, connection)
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            mine[status] += 1
        connection.close()
        with lock:
            statuses.update(mine)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses
