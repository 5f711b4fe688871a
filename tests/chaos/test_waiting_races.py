"""The last question of one who waits, and the slot that is given back at this very moment: it goes to one of them, always."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support import backend_entry
from . import LONG
from .nursery import Nursery

ROUNDS = 10_000 if LONG else 300


@pytest.mark.parametrize("kind", ["host", "redis"])
def test_a_time_out_that_races_a_release_loses_no_slot(
    kind: str, nursery: Nursery, request: pytest.FixtureRequest, prefix: str, tmp_path: Path
) -> None:
    backend = backend_entry(kind, request, prefix, tmp_path)
    seen = nursery.run("race", 900 if LONG else 120, backend=backend, rounds=ROUNDS)
    print(f"{kind}: {seen}")
    assert sum(seen["seen"].values()) == ROUNDS
    assert min(seen["seen"].get(reply, 0) for reply in ("Taken", "Full")) > ROUNDS / 20, "it was no race"
    assert seen["late"] < ROUNDS / 10, "the next one is not told that it is its turn"
    assert seen["codes"] == [0]
    assert seen["empty"]
