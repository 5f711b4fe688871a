"""A real Redis Cluster of the tests' own, on free loopback ports: masters, replicas, moving a slot, failing over."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from time import monotonic, sleep
from typing import Any

import redis
from redis.crc import key_slot

from .redis_server import RedisServer
from .servers import free_port
from .support import wait_until

SLOTS = 16_384
#: Milliseconds without an answer after which the other nodes take one for dead.
PATIENT, WATCHFUL = 30_000, 1000


def free_cluster_port() -> int:
    """One whose bus port, 10,000 above it, is free too."""
    while True:
        port = free_port()
        if port + 10_000 > 65_535:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        return port


class Node(RedisServer):
    """One server of a Cluster. `restart` comes back with its name and its slots, but empty."""

    def __init__(self, node_timeout: int) -> None:
        super().__init__(
            *("--cluster-enabled", "yes"),
            *("--cluster-node-timeout", str(node_timeout)),
            *("--cluster-replica-validity-factor", "0"),
            *("--cluster-require-full-coverage", "no"),
            *("--repl-diskless-sync-delay", "0"),
            port=free_cluster_port(),
        )

    @property
    def name(self) -> str:
        return str(self.ask("CLUSTER MYID"))

    def ask(self, command: str, *words: object) -> Any:
        with self.client(decode_responses=True) as client:
            return client.execute_command(*command.split(), *words)  # type: ignore[no-untyped-call]  # redis-py's

    def knows(self) -> dict[str, Any]:
        """CLUSTER INFO."""
        said = self.ask("CLUSTER INFO")
        return said if isinstance(said, dict) else dict(line.split(":", 1) for line in str(said).splitlines() if line)

    @property
    def is_master(self) -> bool:
        return str(self.ask("ROLE")[0]) == "master"

    def held(self, prefix: str) -> int:
        """Members of the semaphores of a prefix that are here, whether or not their slot is yet (or still)."""
        total = 0
        with self.client(single_connection_client=True) as client:
            for key in client.scan_iter(f"{{{prefix}}}:1:[^!]*"):
                client.execute_command("ASKING")  # type: ignore[no-untyped-call]  # redis-py's
                with suppress(redis.ResponseError):  # it has gone meanwhile
                    total += int(client.zcard(key))
        return total

    def in_step(self) -> bool:
        """Is it a replica that has everything of its master's?"""
        role = self.ask("ROLE")
        return str(role[0]) in ("slave", "replica") and role[3] == "connected"


class RedisCluster:
    """So many masters that share the slots, and replicas of the first ones.

    One that does not answer for a while is not replaced, as a busy machine may have left it no time; but see `watchful`.
    """

    def __init__(self, masters: int = 3, replicas: int = 0) -> None:
        self.nodes: list[Node] = []
        self._calm_at = 0.0
        try:
            for _ in range(masters + replicas):
                self.nodes.append(_started())
            self._meet(masters)
            self._node_timeout(PATIENT)
        except BaseException:
            self.stop()
            raise

    def _meet(self, masters: int) -> None:
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number < masters:
                first, end = SLOTS * number // masters, SLOTS * (number + 1) // masters
                node.ask("CLUSTER ADDSLOTS", *range(first, end))
        for number, node in enumerate(self.nodes):
            for other in self.nodes[:number]:
                node.ask("CLUSTER MEET", "127.0.0.1", other.port)
        assert wait_until(lambda: all(self._sees_all(node) for node in self.nodes)), "the nodes did not meet"
        for master, replica in zip(self.nodes, self.nodes[masters:], strict=False):
            replica.ask("CLUSTER REPLICATE", master.name)
        assert wait_until(self.is_whole), "the Cluster did not come up"

    def _sees_all(self, node: Node) -> bool:
        seen = [line for line in str(_lines(node.ask("CLUSTER NODES"))).split("\n") if "handshake" not in line]
        return len([line for line in seen if line]) == len(self.nodes)

    def is_whole(self) -> bool:
        """Does every node say so, and does every replica have what its master has?"""
        return all(
            node.knows()["cluster_state"] == "ok"
            and int(node.knows()["cluster_slots_ok"]) == SLOTS
            and (node.is_master or node.in_step())
            for node in self.nodes
        )

    @contextmanager
    def watchful(self) -> Iterator[None]:
        """A master that is dead is replaced by its replica, soon. At the end all are there again."""
        self._node_timeout(WATCHFUL)
        try:
            yield
            assert wait_until(self.is_whole, 30)
        finally:
            self._node_timeout(PATIENT)
            self._calm_at = monotonic() + 2.5 * WATCHFUL / 1000

    def _node_timeout(self, milliseconds: int) -> None:
        for node in self.nodes:
            if node.process is not None:
                node.ask("CONFIG SET", "cluster-node-timeout", milliseconds)

    def fail_over(self, replica: Node) -> None:
        """Its master makes room for it."""
        # Before that the others do not vote again, and an attempt that fails spoils the next one.
        sleep(max(0.0, self._calm_at - monotonic()))
        replica.ask("CLUSTER FAILOVER")
        assert wait_until(lambda: replica.is_master)

    @property
    def urls(self) -> list[str]:
        return [f"redis://127.0.0.1:{node.port}" for node in self.nodes]

    def owner(self, prefix: str) -> Node:
        """Who serves an alias of this prefix, by the word of a master: they are told of a move at once."""
        slot = key_slot(f"{{{prefix}}}".encode())
        asked = next(node for node in self.nodes if node.process is not None and node.is_master)
        port = next(int(entry[2][1]) for entry in _ranges(asked) if entry[0] <= slot <= entry[1])
        return next(node for node in self.nodes if node.port == port)

    def another(self, prefix: str) -> Node:
        """A master that does not."""
        owner = self.owner(prefix)
        return next(node for node in self.nodes if node is not owner and node.process and node.is_master)

    def replica_of(self, master: Node) -> Node:
        return next(node for node in self.nodes if not node.is_master and int(node.ask("ROLE")[2]) == master.port)

    def with_replica(self, prefix: str) -> str:
        """A prefix that begins so, and whose master has a replica."""
        ports = {int(node.ask("ROLE")[2]) for node in self.nodes if not node.is_master}
        return next(name for name in map(f"{prefix}-{{}}".format, count()) if self.owner(name).port in ports)

    def held(self, prefix: str) -> int:
        """Members of all the semaphores of a prefix, on all masters."""
        return sum(node.held(prefix) for node in self.nodes if node.process is not None and node.is_master)

    def begin_move(self, prefix: str) -> Move:
        return Move(key_slot(f"{{{prefix}}}".encode()), self.owner(prefix), self.another(prefix), self.nodes)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


def _started() -> Node:
    """Somebody else may have taken one of its two ports meanwhile."""
    for _ in range(3):
        with suppress(AssertionError):
            return Node(WATCHFUL)
    return Node(WATCHFUL)


class Move:
    """A slot on its way from one master to another, as redis-cli moves it."""

    def __init__(self, slot: int, source: Node, target: Node, nodes: Sequence[Node]) -> None:
        self.slot, self.source, self.target, self._nodes = slot, source, target, nodes
        target.ask("CLUSTER SETSLOT", slot, "IMPORTING", source.name)
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", target.name)

    def left(self) -> list[str]:
        """Those that are to be moved yet."""
        found: list[str] = self.source.ask("CLUSTER GETKEYSINSLOT", self.slot, 10_000)
        return found

    def key(self, key: str) -> None:
        self.source.ask("MIGRATE", "127.0.0.1", self.target.port, key, 0, 5000)

    def all_keys(self, between: Callable[[], object] = lambda: None) -> None:
        """One by one, until none is left: none can come any more."""
        while keys := self.left():
            for key in keys:
                self.key(key)
                between()

    def finish(self) -> None:
        for node in (self.target, self.source, *self._nodes):
            if node.process is not None and node.is_master:
                node.ask("CLUSTER SETSLOT", self.slot, "NODE", self.target.name)


def _ranges(node: Node) -> list[Any]:
    with redis.Redis(port=node.port, protocol=2) as client:
        client.response_callbacks.clear()  # those of redis-py differ from version to version
        found: list[Any] = client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]  # redis-py's
        return found


def _lines(said: object) -> str:
    """CLUSTER NODES: redis-py makes a dictionary of it."""
    return "\n".join(f"{key} {value}" for key, value in said.items()) if isinstance(said, dict) else str(said)
