"""The table of policies of the measured site, and the same one among thousands that no view asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: So high that nobody is ever turned away, and still a limit to count against.
AMPLE = 1_000_000
#: How many hold one key while others take and give.
HOLDERS = (0, 10, 1_000, 100_000)
#: How many policies are in the table while a view is asked for that has none.
TABLE_SIZES = (10, 1_000, 10_000)


def held_name(store: str, holders: int) -> str:
    """Of the view, and of its policy, whose key so many hold."""
    return f"{store}-held-{holders}"


def stores(redis: str, host_table: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"memory": {"BACKEND": "memory"}}
    if host_table:
        found["host"] = {"BACKEND": "host", "OPTIONS": {"path": host_table}}
    if redis:
        found["redis"] = {"BACKEND": "redis", "LOCATION": redis, "KEY_PREFIX": "bench"}
        # A busy machine is to make it slow, not to make it fail.
        found["redis"]["OPTIONS"] = {"socket_timeout": 10.0}
    return found


def setting(redis: str, host_table: str) -> dict[str, Any]:
    """CONCURRENCY_LIMIT. A view `STORE-mw-N` is matched by N policies; `rejected` by one that is always full."""
    backends = stores(redis, host_table)
    policies: dict[str, Any] = {}
    for store in backends:
        common = {"key": "ip", "max_concurrent": AMPLE, "backend": store}
        policies[f"{store}-one"] = {**common, "url_names": [f"{store}-mw-1", f"{store}-mw-3"]}
        for name in ("two", "three"):
            policies[f"{store}-{name}"] = {**common, "url_names": [f"{store}-mw-3"]}
    policies["rejected"] = {
        "url_names": ["rejected"],
        "key": "ip",
        "max_concurrent": 1,
        "backend": "memory",
        "ttl": 3600,
    }
    return {
        "BACKENDS": {"default": {"BACKEND": "memory"}, **backends},
        "ON_BACKEND_ERROR": "deny",
        "POLICIES": {"policies": policies},
    }


def among(raw: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The same setting with `size` policies in all, whose others are for views that are not there."""
    policies = dict(raw["POLICIES"]["policies"])
    for number in range(size - len(policies)):
        names = [f"app{number % 50}:page-{number}", f"app{number % 50}:list-{number}-*"]
        policies[f"unused-{number}"] = {"url_names": names, "key": "ip", "max_concurrent": 5, "backend": "memory"}
    while len(policies) > size:
        policies.popitem()
    return {**raw, "POLICIES": {"policies": policies}}
