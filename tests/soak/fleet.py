"""The servers of the soak: gunicorn and uvicorn with two workers each, restarted under load with another table of policies."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from time import monotonic, sleep
from typing import Any

from ..servers import free_port, gunicorn, running, uvicorn
from ..support import wait_until

WORKERS = 2
#: The most that a policy ever admits, in whatever table.
BOUNDS = {"cap": 5, "streams": 3, "heavy": 6, "line": 3}


def table(version: int, ttl: float) -> dict[str, Any]:
    """Tables differ in the limit of a line, how long one waits there, and in policies that come and go."""
    odd = version % 2
    policies: dict[str, Any] = {
        "cap": {"url_names": ["work", "awork", "stream", "astream"], "max_concurrent": BOUNDS["cap"]},
        "streams": {"url_names": ["stream", "astream"], "max_concurrent": BOUNDS["streams"]},
        "heavy": {
            "url_names": ["heavy", "aheavy"],
            "max_concurrent": BOUNDS["heavy"],
            "cost": "tests.soak.site.cost",
        },
        "line": {
            "url_names": ["line", "aline"],
            "max_concurrent": BOUNDS["line"] - odd,
            "wait": 2 - odd,
            "max_waiting": 6,
        },
    }
    if odd:
        policies["watched"] = {"url_names": ["*work"], "max_concurrent": 2, "block": False}
    return {
        "defaults": {"ttl": ttl},
        "policies": {name: {"key": "global", **each} for name, each in policies.items()},
    }


@dataclass
class Server:
    """One that clients may ask."""

    kind: str
    port: int
    process: Popen[bytes]

    def workers(self) -> list[int]:
        """Pids."""
        with suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return [int(pid) for pid in children if "resource_tracker" not in _command(int(pid))]
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


class Fleet:
    """A server of each kind. `servers` has those that clients are to ask, by kind."""

    def __init__(
        self,
        folder: Path,
        backend: dict[str, Any],
        ttl: float,
        limits: bool = True,
        kinds: Sequence[str] = ("gunicorn", "uvicorn"),
    ) -> None:
        self.kinds = kinds
        self.folder, self.ttl = folder, ttl
        self.policies, self.events = folder / "policies.yaml", folder / "events"
        self.servers: dict[str, Server] = {}
        self.logs: list[Path] = []
        #: Workers that were killed -> when; those that stood still -> from when until when.
        self.killed: dict[int, float] = {}
        self.stopped: dict[int, list[tuple[float, float]]] = {}
        self._version = 0
        self._stacks: dict[str, ExitStack] = {}
        self._env = {
            "DJANGO_SETTINGS_MODULE": "tests.soak.settings",
            "SOAK_BACKEND": json.dumps(backend),
            "SOAK_POLICIES": str(self.policies),
            "SOAK_EVENTS": str(self.events),
            "SOAK_LIMITS": "on" if limits else "off",
        }
        self._write_table()

    def start(self) -> None:
        threads = [threading.Thread(target=self._start, args=(kind,)) for kind in self.kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(self.servers) == len(self.kinds), f"a server did not come up: {self.folder}"

    def _write_table(self) -> None:
        # JSON is YAML; in place at once, as a server may begin to read it at any time.
        new = self.policies.with_suffix(".new")
        new.write_text(json.dumps(table(self._version, self.ttl)))
        new.rename(self.policies)
        self._version += 1

    def _start(self, kind: str) -> None:
        port, stack = free_port(), ExitStack()
        if kind == "gunicorn":
            command = gunicorn(port, "--workers", str(WORKERS), "--threads", "8", "--timeout", "60")
        else:
            # One that stands still is to stay as it is, not to be replaced.
            command = uvicorn(port, "--workers", str(WORKERS), "--timeout-worker-healthcheck", "60")
        process = stack.enter_context(running(command, port, self.folder / kind, self._env))
        self.logs.append(self.folder / f"{kind}.{port}.log")
        self._stacks[kind] = stack
        self.servers[kind] = server = Server(kind, port, process)
        assert wait_until(lambda: len(server.workers()) == WORKERS)

    def restart(self, kind: str) -> None:
        """With another table; clients are served all the while. Returns when nothing of the former one is left."""
        self._write_table()
        if kind == "gunicorn":
            server = self.servers[kind]
            former = set(server.workers())
            server.process.send_signal(signal.SIGHUP)
            assert wait_until(lambda: not former & set(server.workers()), 90), "workers that do not end"
            assert wait_until(lambda: len(server.workers()) == WORKERS, 60), "too few new workers"
            return
        old, stack = self.servers[kind], self._stacks[kind]
        self._start(kind)
        sleep(0.2)  # who has just read the former port
        old.process.send_signal(signal.SIGTERM)
        old.process.wait(90)
        stack.close()

    def kill_a_worker(self) -> str:
        """Its master starts another one. Returns whose it was."""
        server = random.choice(list(self.servers.values()))
        pid = random.choice(server.workers())
        os.kill(pid, signal.SIGKILL)
        self.killed[pid] = monotonic()
        assert wait_until(lambda: pid not in server.workers() and len(server.workers()) == WORKERS, 60)
        return server.kind

    def stop_a_worker(self, seconds: float) -> str:
        """It stands still for so long. Returns whose it was."""
        server = random.choice(list(self.servers.values()))
        pid = random.choice(server.workers())
        began = monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            sleep(seconds)
        finally:
            self.stopped.setdefault(pid, []).append((began, monotonic()))
            os.kill(pid, signal.SIGCONT)
        return server.kind

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close()
