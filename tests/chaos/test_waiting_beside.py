"""Whoever waits for one slot keeps no other one from those who could use it, however many do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support import backend_entry
from . import LONG
from .nursery import Nursery
from .scenarios.both import MANY, A, B

#: How often those who take a slot of A all have to be inside at once: while B is held, and while B goes round.
MEETINGS = (2000, 2000) if LONG else (30, 50)


@pytest.mark.parametrize("kind", ["host", "redis"])
def test_who_waits_for_b_takes_nothing_of_a(
    kind: str, nursery: Nursery, request: pytest.FixtureRequest, prefix: str, tmp_path: Path
) -> None:
    backend = backend_entry(kind, request, prefix, tmp_path)
    ordered, rounds = MEETINGS
    seen = nursery.run("both", 400, backend=backend, folder=str(tmp_path), ordered=ordered, rounds=rounds)
    print(f"{kind}: {seen}")
    assert seen["in line"]
    assert (seen["in order"], seen["rejected"]) == (ordered, 0), "all of A was free for those who wanted only that"
    assert seen["under load"] >= rounds
    assert seen["both"] >= MANY
    assert seen["rejected at all"] == 0
    assert seen["most"] == {"a": A, "b": B}
    assert seen["codes"] == [0, 0]
    assert seen["empty"]
