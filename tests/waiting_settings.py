"""The test site with lines, as real servers run it: TEST_CONCURRENCY_LIMIT is the setting, as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from .server_settings import *  # noqa: F403  # settings are a module of names

ROOT_URLCONF = "tests.waiting_urls"
CONCURRENCY_LIMIT: dict[str, Any] = json.loads(os.environ["TEST_CONCURRENCY_LIMIT"])
