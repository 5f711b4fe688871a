"""One day: a store, servers and a crowd; what happens to them, in whatever order; and what is left when all have gone home."""

from __future__ import annotations

import random
import secrets
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import redis

from ..servers import get
from ..support import wait_until
from .clients import Crowd
from .events import Event, read
from .fleet import BOUNDS, Fleet
from .report import Happened, Report
from .sampling import Sampler
from .stages import Change, Stage, stage
from .verdict import SLACK, Known, judge, never_left

KINDS = ("sentinel", "cluster")
#: Seconds that a thing takes at most, as it is known: one for which there is no time left is not begun.
TAKES = {"SENTINEL FAILOVER": 14, "CLUSTER FAILOVER": 6, "slot moved": 1, "master killed": 8, "a worker killed": 3}
RESTARTS = ("gunicorn restarted", "uvicorn restarted")


class Day:
    def __init__(self, place: Stage, fleet: Fleet, seconds: float) -> None:
        self._place, self._fleet = place, fleet
        self._began = monotonic()
        self._seconds = seconds
        self.changes: list[Change] = []
        self.happened: list[Happened] = []

    def pass_by(self) -> None:
        """Restarts and kills are over at half time, so that the workers of then live long enough to be looked at."""
        todo = list(self._place.changes[:1])  # of a short one, at least this
        while todo:
            for what in todo:
                if self._is_time_for(what) or not self.happened:
                    self._do(what)
                    # The store counts again, and what it lost is made good; in a short soak there is no time for that.
                    sleep(min(self._fleet.ttl / 3 + SLACK + random.uniform(0, 3), self._seconds / 20))
            todo = [what for what in self._shuffled() if self._is_time_for(what)]
        sleep(max(0.0, self._began + self._seconds - monotonic()))

    def _shuffled(self) -> list[str]:
        things = [*self._place.changes, *RESTARTS, "a worker killed", "a worker stopped"]
        return random.sample(things, len(things))

    def _is_time_for(self, what: str) -> bool:
        takes = {**TAKES, "a worker stopped": self._still + 2}.get(what, 12)
        left = self._began + self._seconds - monotonic()
        if what in (*RESTARTS, "a worker killed"):
            left -= self._seconds / 2
        return takes < left

    @property
    def _still(self) -> float:
        """Seconds for which a worker stands still: past its leases."""
        return self._fleet.ttl * 1.4

    def _do(self, what: str) -> None:
        began, change = monotonic(), None
        if what in self._place.changes:
            change = self._place.change(what)
            self.changes.append(change)
        elif what in RESTARTS:
            self._fleet.restart(what.split()[0])
        elif what == "a worker killed":
            what += f" ({self._fleet.kill_a_worker()})"
        else:
            what += f" for {self._still:.1f} s ({self._fleet.stop_a_worker(self._still)})"
        served = change.served - began if change is not None and change.served is not None else None
        self.happened.append(Happened(began, what, monotonic() - began, served))

    def lost(self) -> list[tuple[float, float]]:
        """When it may show that the store has lost something: until a heartbeat after it serves again."""
        return [
            (each.began, (each.served or each.over) + each.may_lose + self._fleet.ttl / 3 + SLACK)
            for each in self.changes
            if each.may_lose is not None
        ]


def soak(
    kind: str, seconds: float, folder: Path, *, clients: int = 10, ttl: float = 6.0, limits: bool = True
) -> Report:
    """`folder` is for the servers' files. What goes wrong is in the report."""
    report = Report(kind, seconds, ttl)
    with stage(kind, f"soak-{secrets.token_hex(4)}") as place:
        fleet = Fleet(folder, place.backend, ttl, limits)
        try:
            fleet.start()
            one_day(place, fleet, clients, report)
        finally:
            fleet.close()
    return report


def one_day(place: Stage, fleet: Fleet, clients: int, report: Report) -> None:
    """The servers run already, and run on at the end. What it finds is in the report."""
    sampler, crowd = Sampler(fleet), Crowd(fleet, clients, min(1.3 * fleet.ttl, report.seconds / 2))
    sampler.start()
    crowd.start()
    began = monotonic()
    day = Day(place, fleet, report.seconds)
    try:
        day.pass_by()
        # A day may be short, and the machine busy.
        wait_until(lambda: {event.policy for event in read(fleet.events)} >= set(BOUNDS))
    except Exception as error:
        report.wrong.append(f"something could not be done: {type(error).__name__}: {error}")
    finally:
        crowd.stop()
        sampler.stop()
    _look_at_what_is_left(place, fleet, report)
    report.answers, report.slowest = dict(crowd.statuses), crowd.slowest
    report.left, report.again = crowd.left, crowd.again
    report.failures = [f"at {at - began:.1f} s {said}" for at, said in crowd.failures]
    report.lives = sampler.lives()
    alive = {pid for server in fleet.servers.values() for pid in server.workers()}
    found = read(fleet.events)
    wrote = {event.pid: event.at for event in found}  # the last time, as they are in their order
    ended = {pid: at for pid, at in {**wrote, **sampler.seen}.items() if pid not in alive} | fleet.killed
    if left := never_left(found, ended):
        report.wrong.append(f"{left} slots were entered with and never left")
    report.counts = judge(found, Known(BOUNDS, fleet.ttl, day.lost(), fleet.stopped, ended))
    report.happened = day.happened
    _see_who_was_affected(report, found, began)
    texts = [log.read_text(errors="replace") for log in fleet.logs]
    report.tracebacks = sum(text.count("Traceback (most recent call last)") for text in texts)


def _look_at_what_is_left(place: Stage, fleet: Fleet, report: Report) -> None:
    """A lease later nothing is, and every server still admits."""
    ended, at_first = monotonic(), _held(place)
    if wait_until(lambda: _held(place) == 0, fleet.ttl + SLACK):
        report.free_after = monotonic() - ended
    report.held = (at_first, _held(place))
    for kind, server in fleet.servers.items():
        for _ in range(2):  # workers
            status = 0
            with suppress(OSError):
                status, _body = get(server.port, "/awork/?for=1" if kind == "uvicorn" else "/work/?for=1")
            if status != 200:
                report.wrong.append(f"{kind} answers {status} when everything is over")


def _held(place: Stage) -> int:
    try:
        return place.held()
    except (redis.RedisError, OSError):
        return -1


def _see_who_was_affected(report: Report, found: list[Event], began: float) -> None:
    """Each of those whom their process let in belongs to the last thing that happened before."""
    local = [event for event in found if event.state in ("local", "unprotected") and event.units > 0]
    ends = [each.at for each in report.happened[1:]] + [float("inf")]
    for each, until in zip(report.happened, ends, strict=False):
        requests = {event.request: event.at for event in local if each.at <= event.at < until}
        each.affected = len(requests)
        each.affected_for = max(requests.values(), default=each.at) - each.at
    for each in report.happened:
        each.at -= began
