"""Scenarios of several processes; each runs in a fork of the nursery (see `tests.chaos.nursery`) and returns what it saw."""

from .order import order

__all__ = ["order"]
