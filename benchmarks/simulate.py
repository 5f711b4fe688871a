"""How long `manage.py concurrency simulate` takes for a million lines over 100,000 paths, and how much memory.

    python benchmarks/simulate.py [--lines 1000000] [--paths 100000] [--addresses 20000] [--profile]

Writes two logs into a temporary directory, the one with nginx's $msec and the other with its $time_local, and replays each in a
process of its own against three policies: by address, by a keyword of the URL, and a common one. Prints seconds and the most
that was resident.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from time import gmtime, perf_counter, strftime

ROOT = Path(__file__).resolve().parent.parent
POLICIES = """
policies:
  by-address: {url_names: ["told*"], key: ip, max_concurrent: 2}
  by-row: {url_names: ["told-pk"], key: "row:{kwargs.pk}", max_concurrent: 2}
  everybody: {url_names: ["*"], key: global, max_concurrent: 60, block: false}
"""
AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"


def write(directory: Path, lines: int, paths: int, addresses: int, rate: float) -> tuple[Path, Path]:
    """The two logs: the same requests, in the order in which they ended."""
    draw = random.Random(1)
    at, ends = 1_780_000_000.0, []
    for _ in range(lines):
        at += draw.expovariate(rate)
        took = round(draw.expovariate(20), 3)
        ends.append((round(at + took, 3), took, draw.randrange(paths), draw.randrange(addresses)))
    ends.sort()
    fine, whole = directory / "msec.log", directory / "seconds.log"
    with fine.open("w") as one, whole.open("w") as other:
        for end, took, path, address in ends:
            second = strftime("%d/%b/%Y:%H:%M:%S +0000", gmtime(end))
            text = (
                f'10.{address >> 16}.{address >> 8 & 255}.{address & 255} - - [{second}] "GET /told/row-{path}/ HTTP/1.1" '
                f'200 5120 "https://example.com/" "{AGENT}" {took:.3f} {took:.3f}'
            )
            one.write(f"{text} {end:.3f}\n")
            other.write(f"{text}\n")
    return fine, whole


def measure(log: str, policies: str, profile: bool) -> None:
    """In a process of its own."""
    import resource

    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    import django

    django.setup()
    from django.core.management import call_command

    began = perf_counter()
    arguments = ("concurrency", "simulate", log, "--policies", policies, "--suggest", "P99")
    if profile:
        import cProfile
        import pstats

        profiler = cProfile.Profile()
        profiler.runcall(call_command, *arguments)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    else:
        call_command(*arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = f"{perf_counter() - began:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of a processor"
    # ru_maxrss has the process that started this one in it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(f"{Path(log).name}: {took}, {int(status['VmHWM'].split()[0]) / 1024:.0f} MB resident at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--paths", type=int, default=100_000)
    parser.add_argument("--addresses", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options.profile)
        return
    with tempfile.TemporaryDirectory() as directory:
        policies = Path(directory) / "policies.yaml"
        policies.write_text(POLICIES)
        for log in write(Path(directory), options.lines, options.paths, options.addresses, options.rate):
            print(f"{log.name}: {log.stat().st_size / 1e6:.0f} MB, {options.lines:,} lines", flush=True)
            more = ["--profile"] if options.profile else []
            subprocess.run([sys.executable, __file__, "--measure", str(log), str(policies), *more], check=True)


if __name__ == "__main__":
    main()
