"""Scenarios of several processes; each runs in a fork of the nursery (see `tests.chaos.nursery`) and returns what it saw."""

from .kills import cutting, killing
from .order import order

__all__ = ["cutting", "killing", "order"]
