"""Scenarios of several processes; each runs in a fork of the nursery (see `tests.chaos.nursery`) and returns what it saw."""

from .both import both
from .kills import behind_the_dead, cutting, killing
from .order import order
from .race import race

__all__ = ["behind_the_dead", "both", "cutting", "killing", "order", "race"]
