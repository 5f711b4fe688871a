"""Three sentinels, a master and its replica, on free loopback ports: what fails over, and how tests make it do so."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from .redis_server import RedisServer, binary
from .servers import free_port
from .support import wait_until

MASTER_NAME = "limits"


class SentinelServer(RedisServer):
    """One sentinel. What it knows is in its file, so that `restart` goes on."""

    def __init__(self, port: int, lines: list[str]) -> None:
        self.lines = lines
        super().__init__(port=port)

    def command(self) -> list[str]:
        file = Path(self.folder) / "sentinel.conf"
        if not file.exists():
            common = [f"port {self.port}", "bind 127.0.0.1", "dir ."]
            file.write_text("\n".join([*common, *self.lines]) + "\n")
        return [binary(), str(file), "--sentinel"]


class Trio:
    """`servers[0]` is the master at first. `down_after` seconds without an answer make a server one that is down; on a busy
    machine that may also happen to one that lives, so that a test must bear a failover that it did not ask for.

    `options` are for the two servers, `of_sentinels` more lines for the sentinels' files.
    """

    def __init__(self, *options: str, down_after: float = 1.0, of_sentinels: tuple[str, ...] = ()) -> None:
        self.servers: list[RedisServer] = []
        self.sentinels: list[SentinelServer] = []
        try:
            common = ["--repl-diskless-sync-delay", "0", *options]
            self.servers.append(RedisServer(*common))
            first = self.servers[0].port
            self.servers.append(RedisServer(*common, "--replicaof", "127.0.0.1", str(first)))
            # They are told of each other: to find out by themselves takes them seconds.
            ids = {free_port(): secrets.token_hex(20) for _ in range(3)}
            while len(ids) < 3:
                ids[free_port()] = secrets.token_hex(20)
            for port, mine in ids.items():
                lines = [
                    f"sentinel myid {mine}",
                    f"sentinel monitor {MASTER_NAME} 127.0.0.1 {first} 2",
                    f"sentinel down-after-milliseconds {MASTER_NAME} {round(1000 * down_after)}",
                    f"sentinel failover-timeout {MASTER_NAME} 2000",
                    f"sentinel known-replica {MASTER_NAME} 127.0.0.1 {self.servers[1].port}",
                    *(
                        f"sentinel known-sentinel {MASTER_NAME} 127.0.0.1 {other} {theirs}"
                        for other, theirs in ids.items()
                        if other != port
                    ),
                    *of_sentinels,
                ]
                self.sentinels.append(SentinelServer(port, lines))
            assert wait_until(self.is_whole), "the trio did not come together"
        except BaseException:
            self.stop()
            raise

    @property
    def urls(self) -> list[str]:
        """Of the sentinels, for OPTIONS."""
        return [f"redis://127.0.0.1:{sentinel.port}" for sentinel in self.sentinels]

    @property
    def options(self) -> dict[str, Any]:
        return {"sentinels": self.urls, "master_name": MASTER_NAME}

    def is_whole(self) -> bool:
        """Does every sentinel see the other two and both servers, and does the replica follow?"""
        try:
            for sentinel in self.sentinels:
                with sentinel.client(socket_timeout=1) as client:
                    if not str(client.execute_command("SENTINEL CKQUORUM", MASTER_NAME)):
                        return False
                    (replica,) = map(_fields, client.execute_command("SENTINEL", "REPLICAS", MASTER_NAME))
                    master = _fields(client.execute_command("SENTINEL", "MASTER", MASTER_NAME))
                    if "down" in master["flags"] + replica["flags"] or "disconnected" in replica["flags"]:
                        return False
                    if master["num-other-sentinels"] != "2" or master["port"] != str(self.master_port):
                        return False
            return all(self._is_in_place(server) for server in self.servers)
        except (redis.RedisError, OSError, ValueError, KeyError):
            return False

    def _is_in_place(self, server: RedisServer) -> bool:
        with server.client(socket_timeout=1) as client:
            said: Any = client.info("replication")
        is_master = server.port == self.master_port
        return bool(said["role"] == "master" if is_master else said.get("master_link_status") == "up")

    @property
    def master_port(self) -> int:
        """By the word of most of the sentinels that answer."""
        said: list[int] = []
        for sentinel in self.sentinels:
            with suppress(redis.RedisError, OSError), sentinel.client(socket_timeout=1) as client:
                address: Any = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
                if address is not None:
                    said.append(int(address[1]))
        return max(said, key=said.count) if said else 0

    @property
    def master(self) -> RedisServer:
        port = self.master_port
        return next(server for server in self.servers if server.port == port)

    @property
    def replica(self) -> RedisServer:
        master = self.master
        return next(server for server in self.servers if server is not master)

    def fail_over(self) -> None:
        """The sentinels make the replica the master, and the master its replica; returns when they have."""
        before = self.master_port

        def asked() -> bool:
            with suppress(redis.RedisError, OSError), self.sentinels[0].client(socket_timeout=1) as client:
                client.execute_command("SENTINEL FAILOVER", MASTER_NAME)
                return True
            return self.master_port != before  # by itself, meanwhile

        assert wait_until(asked)
        assert wait_until(lambda: self.master_port != before, 30)

    def kill_master(self) -> RedisServer:
        """Returns the one that is dead now."""
        dead = self.master
        dead.kill()
        return dead

    def mend(self) -> None:
        """Who is dead comes back as a replica of who is the master, and all see each other."""
        for sentinel in self.sentinels:
            if sentinel.process is None:
                sentinel.start()
        dead = [server for server in self.servers if server.process is None]
        for server in dead:
            assert wait_until(lambda server=server: self.master_port != server.port, 30)  # type: ignore[misc]
            server.start()
            with server.client() as client:
                client.execute_command("REPLICAOF", "127.0.0.1", str(self.master_port))
        assert wait_until(self.is_whole, 60), "the trio did not come together again"

    def stop(self) -> None:
        for one in [*self.sentinels, *self.servers]:
            one.stop()


def _fields(said: Any) -> dict[str, str]:
    """Of one server. Not by redis-py's own parsers, which fail in its version 6."""
    words = [word.decode() for word in said]
    return dict(zip(words[::2], words[1::2], strict=True))


@contextmanager
def trio(*options: str, **more: Any) -> Iterator[Trio]:
    made = Trio(*options, **more)
    try:
        yield made
    finally:
        made.stop()
