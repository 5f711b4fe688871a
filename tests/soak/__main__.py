"""Run the soak: `python -m tests.soak [--seconds 600] [--only sentinel|cluster] [--json FILE]`.

Exit status 1: a promise was broken. The seconds are of load, half of them for each store; starting and ending come on top.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .day import KINDS, soak


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of load, on all stores together")
    parser.add_argument("--only", choices=KINDS, help="one of the stores")
    parser.add_argument("--clients", type=int, default=10, help="for each of the two servers")
    parser.add_argument("--ttl", type=float, default=6.0, help="seconds of a lease")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--files", type=Path, help="an empty folder for the servers' files, which stay there")
    parser.add_argument("--limits-off", action="store_true", help="to see it find that")
    asked = parser.parse_args(arguments)
    kinds = [asked.only] if asked.only else list(KINDS)
    reports = []
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="concurrency-soak-") as temporary:
            folder = (asked.files or Path(temporary)) / kind
            folder.mkdir(parents=True)
            report = soak(
                kind,
                asked.seconds / len(kinds),
                folder,
                clients=asked.clients,
                ttl=asked.ttl,
                limits=not asked.limits_off,
            )
        print(report.as_text(), flush=True)
        reports.append(report)
    if asked.json:
        asked.json.write_text(json.dumps([report.as_json() for report in reports], indent=2) + "\n")
    return 1 if any(report.broken for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
