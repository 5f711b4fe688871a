"""The benchmarks run, and read off their figures what they say that they do. What comes out is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.room import Cell, Effort, Room, ratio

ROOT = Path(__file__).resolve().parent.parent


def test_a_whole_run_in_miniature(tmp_path: Path) -> None:
    """Every kind of comparison but the servers and the largest ones: each has a ratio for each of its rows."""
    file = tmp_path / "figures.json"
    chosen = ["host-sync", "redis-sync", "redis-async-10", "rejected-sync"]
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--quick", "--rounds", "1", "--slice", "0.00001"]
    done = subprocess.run(
        [*command, "--json", str(file), "--only", *chosen], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"redis-sync-middleware", "redis-async-10-decorator", "host-sync-decorator", "rejected-sync"} <= rows.keys()
    assert {row["target"] for row in rows.values()} >= {0.22, 0.25, 0.6, 1.35, 1.5}
    assert all(isinstance(row["ratio"], float) for row in rows.values())


def test_the_cells_are_timed_in_turn() -> None:
    """A B C A B C, and the fastest slice of a round counts, by the clock that was given."""
    now, order = 0.0, []
    # Twice to find out how many calls last a slice, then in each slice once to warm up, and timed.
    costs = {"a": iter([1.0, 1.0, 9.0, 4.0, 1.0, 5.0, 1.0, 6.0, 9.0, 5.0]), "b": iter([1.0] * 10)}

    def cell(name: str) -> Cell:
        def work(calls: int) -> None:
            nonlocal now
            order.append(name)
            now += next(costs[name]) * calls

        return Cell(work)

    room = Room(Effort(rounds=2, slices=2, seconds=0.1), lambda: now)
    found = room.compare({"a": cell("a"), "b": cell("b")})
    room.close()
    assert "".join(order) == "aabb" * 5
    assert found == {"a": [4.0, 5.0], "b": [1.0, 1.0]}


def test_a_ratio_is_of_what_is_added() -> None:
    """(ours - bare) / (theirs - bare), in each round; their median, and their quartiles."""
    seconds = {"ours": [3.0, 4.0, 9.0, 4.0], "bare": [1.0, 1.0, 1.0, 1.0], "theirs": [2.0, 3.0, 3.0, 3.0]}
    found = ratio(seconds, ("ours", "bare"), ("theirs", "bare"))
    assert found.value == pytest.approx(1.75)
    assert (found.low, found.high) == (1.5, 2.0)
    assert ratio(seconds, ("ours", None), ("bare", None)).value == pytest.approx(4.0)
