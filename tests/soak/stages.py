"""What the soak runs on, a Sentinel trio or a Cluster of three masters, and the ways in which each loses its master."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Protocol

from redis.crc import key_slot

from ..redis_cluster import Move, Node, RedisCluster
from ..redis_trio import Trio
from ..support import wait_until

#: Seconds after which connections to a former master of Sentinel's are looked for, at the latest.
LOOK = 5.0


@dataclass
class Change:
    """Something that was done to the store."""

    what: str
    began: float
    #: When the new master served; None where there was no new one.
    served: float | None = None
    #: Seconds after that in which what the store lost may be admitted once more, but for the heartbeat. None: it loses nothing.
    may_lose: float | None = None
    #: Everything was as before.
    over: float = 0.0


class Stage(Protocol):
    name: str
    #: What may be done to it, in words.
    changes: tuple[str, ...]
    backend: dict[str, Any]

    def change(self, what: str) -> Change:
        """Do it, and return when all is whole again."""

    def held(self) -> int:
        """Slots and places in lines that the master knows of."""


class SentinelStage:
    name = "sentinel"
    changes: tuple[str, ...] = ("SENTINEL FAILOVER", "master killed")

    def __init__(self, trio: Trio, prefix: str) -> None:
        self.trio, self._prefix = trio, prefix
        options = {**trio.options, "socket_timeout": 1.0}
        self.backend = {"BACKEND": "redis", "KEY_PREFIX": prefix, "OPTIONS": options}

    def change(self, what: str) -> Change:
        made = Change(what, monotonic())
        if what == "SENTINEL FAILOVER":
            self.trio.fail_over()
            # The sentinels let the former master go on until they tell it: who is connected counts there until it looks.
            made.served, made.may_lose = monotonic(), LOOK
        else:
            former = self.trio.kill_master()
            assert wait_until(lambda: self.trio.master_port != former.port, 60), "no new master"
            made.served, made.may_lose = monotonic(), 0.0
        self.trio.mend()
        made.over = monotonic()
        return made

    def held(self) -> int:
        return self.trio.master.held(self._prefix)


class ClusterStage:
    name = "cluster"
    changes: tuple[str, ...] = ("CLUSTER FAILOVER", "slot moved", "master killed")

    def __init__(self, cluster: RedisCluster, prefix: str) -> None:
        self.cluster, self._prefix = cluster, cluster.with_replica(prefix)
        options = {"cluster": True, "socket_timeout": 1.0}
        location = cluster.urls
        self.backend = {"BACKEND": "redis", "LOCATION": location, "KEY_PREFIX": self._prefix, "OPTIONS": options}

    def change(self, what: str) -> Change:
        made = Change(what, monotonic())
        if what == "slot moved":
            home, guest = self.cluster.owner(self._prefix), self.cluster.another(self._prefix)
            for source, target in ((home, guest), (guest, home)):  # and back, as only one master has a replica
                self._move(source, target)
        elif what == "CLUSTER FAILOVER":
            self._fail_over(self.cluster.replica_of(self.cluster.owner(self._prefix)))
            made.served = monotonic()
            assert wait_until(self.cluster.is_whole, 60), "the Cluster did not come together again"
        else:
            master = self.cluster.owner(self._prefix)
            replica = self.cluster.replica_of(master)
            with self.cluster.watchful():
                master.kill()
                try:
                    assert wait_until(lambda: replica.is_master, 60), "no new master"
                    made.served, made.may_lose = monotonic(), 0.0
                finally:
                    master.start()
        made.over = monotonic()
        return made

    def _fail_over(self, replica: Node) -> None:
        """Tried again, as people do: the others vote once in a while only, and not while they learn of an epoch."""
        with self.cluster.watchful():
            for _ in range(6):
                replica.ask("CLUSTER FAILOVER")
                if wait_until(lambda: replica.is_master, 6):
                    return
        raise AssertionError("no failover")

    def _move(self, source: Node, target: Node) -> None:
        """Key by key, with time between them, under the eyes of all who ask."""
        move = Move(key_slot(f"{{{self._prefix}}}".encode()), source, target, self.cluster.nodes)
        move.all_keys(lambda: sleep(0.05))
        move.finish()

    def held(self) -> int:
        return self.cluster.held(self._prefix)


@contextmanager
def stage(kind: str, prefix: str) -> Iterator[Stage]:
    """A new one, which ends with the block."""
    if kind == "sentinel":
        trio = Trio()
        try:
            yield SentinelStage(trio, prefix)
        finally:
            trio.stop()
    else:
        cluster = RedisCluster(masters=3, replicas=1)
        try:
            yield ClusterStage(cluster, prefix)
        finally:
            cluster.stop()
