"""Chaos: everything goes wrong that can, on real servers and a real Redis, and the promises are counted.

A bounded part of each runs with the other tests; `CHAOS=long` (see `make chaos`) runs all of it.
"""

from __future__ import annotations

import os

#: All of it, however long it takes.
LONG = os.environ.get("CHAOS") == "long"
