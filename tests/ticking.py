"""A greenlet that ticks in gunicorn's gevent worker, and notes for how long nobody had a turn though nobody computed.

For a configuration file of gunicorn's: `from tests.ticking import post_worker_init`. The notes are written at the exit of
the worker, beside the gauge's file.
"""

from __future__ import annotations

import atexit
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, thread_time
from typing import Any

__all__ = ["post_worker_init"]

EVERY = 0.005


@dataclass
class Ticks:
    """Seconds, at most: between two turns of the ticker; and from its last one until all that is done at the exit was done."""

    ticks: int = 0
    longest: float = 0.0
    at_exit: float = 0.0


_found: dict[int, Ticks] = {}
_last = (0.0, 0.0)


def read(gauge_file: Path, pid: int) -> Ticks:
    """What this worker has noted. Raises: FileNotFoundError where it was killed."""
    return Ticks(**json.loads(gauge_file.with_suffix(f".{pid}.ticks").read_text()))


def post_worker_init(worker: Any) -> None:
    import gevent  # only where it is there

    def tick() -> None:
        global _last
        found = _found[os.getpid()] = Ticks()
        _last = _clocks()
        while True:
            gevent.sleep(EVERY)
            found.longest = max(found.longest, _idle())
            _last = _clocks()
            found.ticks += 1

    gevent.spawn(tick)


def _clocks() -> tuple[float, float]:
    return monotonic(), thread_time() + _kept_waiting()


def _idle() -> float:
    """Seconds since the last turn in which this thread neither computed nor would have, had others let it."""
    now, busy = _clocks()
    return now - _last[0] - (busy - _last[1])


def _kept_waiting() -> float:
    """Seconds in which the machine was busy with others instead."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


@atexit.register  # before the site is loaded: so it comes after all that the site does at its exit
def _note() -> None:
    found = _found.get(os.getpid())
    if found is not None:
        found.at_exit = _idle()
        file = Path(os.environ["TEST_GAUGE_FILE"]).with_suffix(f".{os.getpid()}.ticks")
        file.write_text(json.dumps(asdict(found)))
