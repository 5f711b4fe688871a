"""Single policies that load and yet hardly do what is wanted: limits of 0, short leases, keys that do not hold."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage


def check_leases(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W020: leases too short to be renewed in time."""
    return []


def check_keys(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W021 and W022: keys that a client can change, or that never arrive."""
    return []


def check_nobody(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """I001: policies that admit nobody."""
    return []
