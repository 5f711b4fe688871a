"""The table against the URL configuration: what its patterns reach, and what they should and should not."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage


def check_patterns(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W011: patterns that match no URL."""
    return []


def check_health(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W012: globs that reach a health check."""
    return []


def check_second_names(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W023: views that their policy does not cover under another name."""
    return []
