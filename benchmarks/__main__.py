"""What the limits cost, beside what they are compared with, in one run.

    python -m benchmarks [--quick] [--only ID ...] [--json FILE] [--svg FILE] [--profile ID] [--list]

Starts a Redis of its own (left out where there is no server to start) and puts itself and Redis on one core, so that figures
are work and not luck with wake-ups; without --quick, the rows of Redis are measured free as well, and real servers under load.
"added" is what a request takes more than the same request to a bare view; `raw2` are two raw round trips of redis-py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from .room import idlest_core
from .starting import running_redis


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the ratios that a change could spoil, in less than a minute"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ID",
        default=[],
        help="comparisons of these names, in which * is any text (gunicorn, uvicorn: servers)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot there (needs matplotlib)")
    parser.add_argument(
        "--profile",
        metavar="ID",
        help="instead: where the time goes, of a comparison's cells or of one: redis-sync/decorator",
    )
    parser.add_argument("--list", action="store_true", help="instead: the names of comparisons and rows")
    parser.add_argument("--rounds", type=int, help="how often everything is timed")
    parser.add_argument("--slice", type=float, help="seconds that each is timed at once")
    parser.add_argument(
        "--wall", action="store_true", help="on one core, too, the wall clock instead of the time of work"
    )
    parser.add_argument("--no-servers", action="store_true", help="without gunicorn and uvicorn under wrk")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # Redis and the servers end, too
    core = {idlest_core()}
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as folder, running_redis() as server:
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        os.environ["BENCHMARK_REDIS"] = "" if server is None else server.url
        os.environ["BENCHMARK_HOST_TABLE"] = str(Path(folder) / "table")
        import django

        django.setup()
        from .session import Session

        status = Session(options, core, server).run()
    sys.exit(status)


if __name__ == "__main__":
    main()
