"""Real servers without any BACKENDS setting: one cap over all worker processes of the machine, and over two servers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPException
from itertools import count
from pathlib import Path
from time import monotonic

import pytest

from .. import gauge
from ..server_settings import KINDS
from ..servers import ROOT, crowd, free_port, get, gunicorn, held, running, uvicorn
from ..support import wait_until
from . import LONG

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the host store is for Linux; elsewhere memory is the default"
)

CLIENTS = 64
CAP = 5
SECONDS = 5.0 if LONG else 0.7
#: How often the crowd comes at most, until enough of it was admitted and the cap was reached.
ROUNDS = 4 if LONG else 30
_numbers = count()

SERVERS = {
    "gunicorn -w 4 --threads 16": ("gunicorn",),
    "uvicorn --workers 2": ("uvicorn",),
    "both on one file": ("gunicorn", "uvicorn"),
}
if not LONG:
    SERVERS = dict(list(SERVERS.items())[-1:])  # who asks both has asked each of them


def own_settings(folder: Path, base: str) -> dict[str, str]:
    """The environment of a site whose settings module, and so whose file, is its own."""
    name = f"settings_of_{os.getpid()}_{next(_numbers)}"
    (folder / f"{name}.py").write_text(f"from {base} import *\n")
    return {"DJANGO_SETTINGS_MODULE": name, "PYTHONPATH": f"{ROOT}:{folder}"}


@pytest.mark.parametrize("kind", KINDS if LONG else ["sync"])
@pytest.mark.parametrize("names", list(SERVERS.values()), ids=list(SERVERS))
def test_one_cap_holds_over_all_workers(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    log = tmp_path / "gauge"
    env = {**own_settings(tmp_path, "tests.server_settings"), "TEST_GAUGE_FILE": str(log)}
    ports = {name: free_port() for name in names}
    commands = {
        "gunicorn": lambda port: gunicorn(port, "--workers", "4", "--threads", "16"),
        "uvicorn": lambda port: uvicorn(port, "--workers", "2"),
    }
    with ExitStack() as stack:
        for name, port in ports.items():
            stack.enter_context(running(commands[name](port), port, log, env))
        total: Counter[int] = Counter()
        for _ in range(ROUNDS):
            with ThreadPoolExecutor() as crowds:
                asked = [
                    crowds.submit(crowd, port, f"/busy/{kind}/", CLIENTS // len(names), SECONDS)
                    for port in ports.values()
                ]
                for future in asked:
                    total += future.result()
            reading = gauge.read(str(log))[kind]
            if reading.admitted >= 100 and reading.most >= CAP:
                break
        assert all(wait_until(lambda port=port: held(port) == []) for port in ports.values())
        print(f"{names} {kind}: {total}, {reading}")
        assert reading.most == CAP, "never above the cap, and reached"
        assert reading.inside == 0
        assert reading.admitted >= 100
        admitted = 500 if kind == "raising" else 200
        assert set(total) == {admitted, 429}
        assert total[admitted] == reading.admitted


def test_the_slots_of_a_killed_worker_are_free_at_the_next_look(tmp_path: Path) -> None:
    """Of two workers the one that holds most is killed; nobody waits for its leases of an hour to end."""
    port = free_port()
    env = {**own_settings(tmp_path, "tests.chaos.settings"), "CHAOS_POLICY": json.dumps({"ttl": 3600})}
    command = gunicorn(port, "--workers", "2", "--threads", "8")
    with running(command, port, tmp_path / "log", env):

        def ask(path: str) -> int:
            with suppress(OSError, HTTPException):
                return get(port, path)[0]
            return 0

        for _ in range(5):
            threading.Thread(target=ask, args=("/work/?for=60000",), daemon=True).start()
        inside: dict[int, int] = {}

        def all_known() -> bool:
            told = json.loads(get(port, "/gauge/")[1])
            inside[told["pid"]] = told["inside"]
            return sum(inside.values()) == 5 and len(inside) == 2  # both have begun to serve

        assert wait_until(all_known)
        assert ask("/work/?for=1") == 429
        victim = max(inside, key=lambda pid: inside[pid])
        os.kill(victim, signal.SIGKILL)
        killed = monotonic()
        assert wait_until(lambda: ask("/work/?for=1") == 200)
        took = monotonic() - killed
        print(
            f"a new request was admitted {took * 1000:.0f} ms after kill -9 of a worker that held {inside[victim]} of 5"
        )
        assert took < 10, "nobody waits for its lease"
