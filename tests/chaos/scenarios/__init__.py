"""Scenarios of several processes; each runs in a fork of the nursery (see `tests.chaos.nursery`) and returns what it saw."""

from .both import both
from .kills import cutting, killing
from .order import order
from .race import race

__all__ = ["both", "cutting", "killing", "order", "race"]
