"""Memory and descriptors of the servers' workers, once a second, and whether they are flat."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic

from .fleet import Fleet

#: Seconds of a worker's life in which it may grow; and how long one has to live after that to be judged.
WARM_UP, JUDGED = 30.0, 60.0
#: So many samples at either end are one figure.
TOGETHER = 10
#: How much more at the end is flat still: megabytes, and descriptors of a server's workers together, whose clients come and go.
MEGABYTES, DESCRIPTORS = 4.0, 12


@dataclass(frozen=True)
class Sample:
    at: float
    #: Kilobytes.
    memory: int
    descriptors: int


@dataclass(frozen=True)
class Life:
    """Of one group of workers of a server: what they were after their warm-up and at the end, together."""

    server: str
    pids: tuple[int, ...]
    seconds: float
    megabytes: tuple[float, float]
    descriptors: tuple[float, float]

    @property
    def is_judged(self) -> bool:
        return self.seconds >= WARM_UP + JUDGED

    @property
    def is_flat(self) -> bool:
        memory, descriptors = self.megabytes, self.descriptors
        return memory[1] - memory[0] <= MEGABYTES * len(self.pids) and descriptors[1] - descriptors[0] <= DESCRIPTORS


class Sampler(threading.Thread):
    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self._fleet = fleet
        self._over = threading.Event()
        #: By the kind of server and its workers: those that live at the same time are looked at together.
        self._samples: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
        #: pid -> when it was last there.
        self.seen: dict[int, float] = {}

    def run(self) -> None:
        while not self._over.wait(1.0):
            for kind, server in list(self._fleet.servers.items()):
                pids = tuple(sorted(server.workers()))
                try:
                    sample = Sample(monotonic(), sum(map(_memory, pids)), sum(map(_descriptors, pids)))
                except OSError:  # one has just ended
                    continue
                self._samples.setdefault((kind, pids), []).append(sample)
                self.seen.update(dict.fromkeys(pids, sample.at))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def lives(self) -> list[Life]:
        return [_life(kind, pids, samples) for (kind, pids), samples in self._samples.items() if len(samples) > 1]


def _life(kind: str, pids: tuple[int, ...], samples: Sequence[Sample]) -> Life:
    warm = [sample for sample in samples if sample.at - samples[0].at >= WARM_UP] or list(samples)
    first, last = warm[:TOGETHER], warm[-TOGETHER:]
    return Life(
        kind,
        pids,
        samples[-1].at - samples[0].at,
        (median(each.memory for each in first) / 1024, median(each.memory for each in last) / 1024),
        (median(each.descriptors for each in first), median(each.descriptors for each in last)),
    )


def _memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
