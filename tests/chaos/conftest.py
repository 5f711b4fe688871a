"""What the chaos tests share: a process that forks others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Runs scenarios of several processes."""
    nursery = Nursery()
    yield nursery
    nursery.stop()
