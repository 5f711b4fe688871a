"""First come, first served: whoever waits for a slot gets it in the order in which they joined, over all processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support import backend_entry
from . import LONG
from .nursery import Nursery
from .scenarios.order import lines_of

#: How many wait at once.
WAITERS = {"loop": 1000 if LONG else 200, "threads": 1000 if LONG else 60}


@pytest.mark.parametrize("half", list(WAITERS))
@pytest.mark.parametrize("kind", ["memory", "host", "redis"])
def test_they_are_admitted_in_the_order_in_which_they_were_queued(
    kind: str, half: str, nursery: Nursery, request: pytest.FixtureRequest, prefix: str, tmp_path: Path
) -> None:
    waiters, file = WAITERS[half], str(tmp_path / "log")
    backend = backend_entry(kind, request, prefix, tmp_path)
    if kind == "host":
        backend["OPTIONS"]["slots"] = 2 * waiters + 100
    seen = nursery.run(
        "order",
        600 if LONG else 120,
        backend=backend,
        file=file,
        waiters=waiters,
        processes=1 if kind == "memory" else 4,
        half=half,
    )
    print(f"{kind}, {half}: {waiters} joined in {seen['joining']:.2f} s, were served in {seen['serving']:.2f} s")
    served = lines_of(file)
    expected = [(number, what) for number in range(waiters) for what in ("in", "out")]
    assert [(number, what) for number, what, _ in served] == expected
    stamps = [stamp for _, _, stamp in served]
    assert stamps == sorted(stamps)
