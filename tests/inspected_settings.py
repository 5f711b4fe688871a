"""A site whose views wait at a barrier, for the command to be asked about while real servers serve it.

INSPECTED_BACKEND is an entry of BACKENDS as JSON; the views wait until the file INSPECTED_BARRIER is there.
"""

from __future__ import annotations

import json
import os
from typing import Any

SECRET_KEY = "inspected"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.inspected_urls"
INSTALLED_APPS = ["django_concurrency_mw"]
MIDDLEWARE = ["django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"]
USE_TZ = True
BARRIER = os.environ.get("INSPECTED_BARRIER", "")
CONCURRENCY_LIMIT: dict[str, Any] = {
    "BACKENDS": {"default": json.loads(os.environ.get("INSPECTED_BACKEND", '{"BACKEND": "memory"}'))},
    "ON_BACKEND_ERROR": "deny",
    "POLICIES": {
        "policies": {
            "exports": {
                "url_names": ["export*"],
                "exclude": ["export-status"],
                "key": "header:X-Tenant",
                "max_concurrent": 3,
                "ttl": 30,
            },
            "everything": {"url_names": ["export*", "report"], "key": "global", "max_concurrent": 4},
            "jobs": {"url_names": ["job*"], "key": "header:X-Tenant", "max_concurrent": 3},
            "all-jobs": {"url_names": ["job*"], "key": "global", "max_concurrent": 4},
            "watch": {
                "url_names": ["export*", "report", "decorated"],
                "key": "ip",
                "max_concurrent": 2,
                "block": False,
            },
            "by-name": {"key": "global", "max_concurrent": 1},
        }
    },
}
