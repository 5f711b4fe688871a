"""django-smart-ratelimit, which also limits what is in flight: its decorator, where it is installed."""

from __future__ import annotations

import contextlib
import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: Its stores that can count what is in flight.
STORES = ("memory", "redis")
limit: Any = None
VERSION = ""

with contextlib.suppress(ImportError, PackageNotFoundError):
    limit = import_module("django_smart_ratelimit").concurrency_limit
    VERSION = version("django-smart-ratelimit")
    logging.getLogger("django_smart_ratelimit").setLevel(logging.ERROR)
