"""The crowd of the soak: clients that ask all the time, wait for the whole answer or leave, and count what they were told."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from time import monotonic, sleep

from ..servers import PATIENCE
from .fleet import Fleet

#: What is asked for, with its weight: the view, and from when to when one stays in milliseconds. Beside these a request in
#: a hundred stays for about `longest`.
ASKED = {
    ("work", 20, 120): 45,
    ("heavy", 20, 150): 20,
    ("line", 30, 200): 20,
    ("stream", 200, 800): 14,
}
#: Of a hundred requests, so many are of clients that leave: before the answer begins, or while it comes.
LEAVING = 8


class Crowd:
    """Between `start` and `stop`. In `statuses` 0 is no answer on a new connection; `left` did not wait for one."""

    def __init__(self, fleet: Fleet, clients: int, longest: float) -> None:
        self._fleet, self._longest = fleet, longest
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(kind,)) for kind in fleet.servers for _ in range(clients)
        ]
        self.statuses: Counter[int] = Counter()
        self.left = self.again = 0
        self.slowest = 0.0
        #: Answers of 5xx: when, and how they begin.
        self.failures: list[tuple[float, str]] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads), "a request without an end"

    def _client(self, kind: str) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._over.is_set():
            server = self._fleet.servers[kind]
            if connection is not None and connection.port != server.port:
                connection.close()
                connection = None
            view, least, most = random.choices(list(ASKED), list(ASKED.values()))[0]
            leaves = random.randrange(100) < LEAVING
            if not leaves and random.randrange(100) == 0:
                least, most = round(400 * self._longest), round(1000 * self._longest)
            is_async = server.kind == "uvicorn" and (view == "stream" or random.random() < 0.8)
            path = f"/{'a' if is_async else ''}{view}/?for={random.randint(least, most)}"
            if view == "heavy":
                path += f"&cost={random.randint(1, 3)}"
            if leaves:
                self._leave(server.port, path)
            else:
                connection = self._ask(server.port, path, connection)
            sleep(random.uniform(0.0, 0.15))
        if connection is not None:
            connection.close()

    def _ask(
        self, port: int, path: str, connection: http.client.HTTPConnection | None
    ) -> http.client.HTTPConnection | None:
        """Once more on a new connection where a kept one was closed meanwhile, as every client does."""
        is_new = connection is None
        connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        began = monotonic()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            if not is_new and not self._over.is_set():
                with self._lock:
                    self.again += 1
                return self._ask(port, path, None)
            with self._lock:
                self.statuses[0] += 1
            return None
        with self._lock:
            self.statuses[answer.status] += 1
            self.slowest = max(self.slowest, monotonic() - began)
            if answer.status >= 500:
                self.failures.append((began, f"{path}: {answer.status} {body[:200].decode(errors='replace')}"))
        return connection

    def _leave(self, port: int, path: str) -> None:
        with self._lock:
            self.left += 1
        try:
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as gone:
                gone.sendall(f"GET {path} HTTP/1.1\r\nHost: soak\r\n\r\n".encode())
                if random.random() < 0.5:
                    gone.settimeout(random.uniform(0.01, 0.5))
                    gone.recv(500)
        except OSError:
            pass
