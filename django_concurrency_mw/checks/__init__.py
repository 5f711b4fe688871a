"""The system checks: what is wrong with the configuration, before a request finds out.

Each room is about one subject; `table` has a row for every id.
"""

from __future__ import annotations

from ..middleware import MIDDLEWARE
from .deployment import check_addresses, check_deployed_memory, check_deployed_prefix, check_deployed_store
from .drf import check_api_views
from .middleware import check_identity, check_middleware, check_order
from .policies import check_keys, check_leases, check_nobody
from .settings import check_decorators, check_policies, check_settings
from .stores import check_caches, check_default_store, check_same_count, check_stores
from .table import CHECKS, Check, registered
from .urls import check_health, check_patterns, check_second_names, check_waits

TAG = "concurrency"

__all__ = [
    "CHECKS",
    "MIDDLEWARE",
    "TAG",
    "Check",
    "check_addresses",
    "check_api_views",
    "check_caches",
    "check_decorators",
    "check_default_store",
    "check_deployed_memory",
    "check_deployed_prefix",
    "check_deployed_store",
    "check_health",
    "check_identity",
    "check_keys",
    "check_leases",
    "check_middleware",
    "check_nobody",
    "check_order",
    "check_patterns",
    "check_policies",
    "check_same_count",
    "check_second_names",
    "check_settings",
    "check_stores",
    "check_waits",
    "registered",
]
