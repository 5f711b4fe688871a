"""Requests per second that a server answers: asked by wrk, or by a few connections of our own where that is not installed."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter, sleep

CONNECTIONS = 32
#: Seconds after which they are there.
CONNECTED = 0.25


def tool() -> str:
    """What asks."""
    return "wrk" if shutil.which("wrk") else "a client in Python, which takes a core itself (install wrk)"


def requests_per_second(
    port: int, path: str, seconds: float, is_fair: Callable[[], bool] = lambda: True
) -> float | None:
    """None where it is not fair, which is asked when all connections are there.

    Raises: AssertionError where not every answer is a 200.
    """
    command = [sys.executable, "-m", "benchmarks.load", str(port), path, str(seconds)]
    if shutil.which("wrk"):
        url = f"http://127.0.0.1:{port}{path}"
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        sleep(CONNECTED)
        if not is_fair():
            asking.kill()
            return None
        said = asking.communicate()[0]
    assert asking.returncode == 0, said
    assert "Non-2xx" not in said, said
    found = re.search(r"Requests/sec:\s*([\d.]+)", said)
    assert found, said
    return float(found[1])


async def _ask(port: int, path: str, until: float) -> int:
    """How many answers one connection has had."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    answers = 0
    while perf_counter() < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length, head
        await reader.readexactly(int(length[1]))
        answers += 1
    writer.close()
    return answers


async def _crowd(port: int, path: str, seconds: float) -> float:
    start = perf_counter()
    answers = await asyncio.gather(*(_ask(port, path, start + seconds) for _ in range(CONNECTIONS)))
    return sum(answers) / (perf_counter() - start)


if __name__ == "__main__":
    print("Requests/sec:", asyncio.run(_crowd(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
