"""The example site and its demo: they run, and the demo fails when a cap does not hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Run
from .redis_server import RedisServer
from .redis_server import binary as redis_program

#: So that a burst is inside together where all three run at once beside other tests; seconds.
LONG = {"EXAMPLE_HOLD": "1.0"}
#: Run of the demo -> its arguments, and its variables.
DEMOS: dict[str, tuple[list[str], dict[str, str]]] = {
    "alone": ([], LONG),
    "redis": (["--redis"], LONG),
    "unlimited": ([], {"EXAMPLE_LIMITS_OFF": "1", "EXAMPLE_HOLD": "0.2"}),
}
#: How a run of the demo ended, and the folder that it had for its files.
Demo = tuple["subprocess.CompletedProcess[str]", Path]


@pytest.fixture(scope="module", autouse=True)
def demos(run_python: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Demo]]:
    """How each run of the demo ended. All run at once, and while the other tests here do, as what they do is mostly to wait.

    The first and the last have one file of the host store, but without limits nothing is taken.
    """
    with ThreadPoolExecutor() as pool:
        started = {}
        for name, (arguments, variables) in DEMOS.items():
            folder = tmp_path_factory.mktemp(name)
            env = {"TMPDIR": str(folder), "CONCURRENCY_TEST_REDIS_SERVER": redis_program(), **variables}
            started[name] = pool.submit(run_python, "example_project/demo.py", *arguments, env=env, timeout=300), folder
        yield lambda name: (started[name][0].result(), started[name][1])


def test_the_example_site_passes_its_checks(run_python: Run) -> None:
    """`manage.py check` finds nothing, warnings included."""
    done = run_python("example_project/manage.py", "check", "--fail-level", "WARNING")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_policy_of_the_example_table_is_exercised_by_the_demo(root: Path) -> None:
    """A policy that a newcomer reads about is one that the demo shows."""
    from django_concurrency_mw.loader import load_policies

    demo = (root / "example_project" / "demo.py").read_text()
    assert [
        policy.name for policy in load_policies(root / "policies.example.yaml") if f'"{policy.name}"' not in demo
    ] == []


def test_without_a_redis_server_the_demo_says_what_to_install(run_python: Run, tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path), "PATH": str(tmp_path), "CONCURRENCY_TEST_REDIS_SERVER": ""}
    done = run_python("example_project/demo.py", "--redis", env=env)
    assert done.returncode == 1
    assert "no Redis server was found: install redis-server" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_one_variable_puts_the_example_on_redis(run_python: Run, tmp_path: Path, redis_server: RedisServer) -> None:
    """EXAMPLE_REDIS_URL: a request to the site takes a slot there, and the look at what is held reads it from there."""
    program = (
        "import django; django.setup()\n"
        "from django.core.management import call_command; call_command('migrate', verbosity=0)\n"
        "call_command('demo_users')\n"
        "from django.test import Client\n"
        "from rest_framework.authtoken.models import Token\n"
        "token = Token.objects.get(user__username='alice').key\n"
        "for sent in (token, 'wrong'):\n"
        "    path, header = '/api/orders/?seconds=0', {'authorization': 'Token ' + sent}\n"
        "    print(Client().get(path, headers=header, SERVER_NAME='localhost').status_code)\n"
        "print(Client().get('/-/held/', SERVER_NAME='localhost').json()['held'])\n"
    )
    with redis_server.client() as client:
        before = _evalshas(client)
        done = run_python(
            *("-W", "error", "-c", program),
            env={
                "PYTHONPATH": f"{ROOT}:{ROOT / 'example_project'}",
                "DJANGO_SETTINGS_MODULE": "example.settings",
                "EXAMPLE_DATABASE": str(tmp_path / "db.sqlite3"),
                "EXAMPLE_REDIS_URL": redis_server.url,
            },
        )
        assert done.returncode == 0, done.stderr
        alice, bob, *rest = done.stdout.splitlines()
        assert alice.startswith("alice (password: demo; for the API: Authorization: Token ")
        assert bob.startswith("bob (")
        assert rest == ["200", "401", "[]"]
        assert _evalshas(client) == before + 2, "the take, and the note of its peak"


def _evalshas(client: Any) -> int:
    stats = client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "eval"))


@pytest.fixture
def gauge(root: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The example's gauge, imported the way that its site imports it."""
    monkeypatch.syspath_prepend(str(root / "example_project"))
    for name in ("example", "example.gauge"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from example import gauge

    return gauge


def test_the_gauge_replays_in_the_order_of_the_stamps(gauge: object, tmp_path: Path) -> None:
    """Lines arrive in any order; an exit at the stamp of an entry comes first."""
    file = tmp_path / "gauge"
    file.write_text("a +1 10\na +1 30\na -1 20\nb +1 5\na -1 40\na +1 40\n")
    found = gauge.read(file)  # type: ignore[attr-defined]
    assert (found["a"].admitted, found["a"].most, found["a"].inside) == (3, 1, 1)
    assert (found["b"].admitted, found["b"].most, found["b"].inside) == (1, 1, 1)


def test_the_gauge_counts_out_whoever_raises(gauge: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that fails has left; without the variable nothing is counted."""
    file = tmp_path / "gauge"
    with gauge.inside("nobody"):  # type: ignore[attr-defined]
        pass
    assert gauge.read(file) == {}  # type: ignore[attr-defined]
    monkeypatch.setenv("EXAMPLE_GAUGE_FILE", str(file))
    with pytest.raises(KeyError), gauge.inside("view"):  # type: ignore[attr-defined]
        raise KeyError
    found = gauge.read(file)["view"]  # type: ignore[attr-defined]
    assert (found.admitted, found.most, found.inside) == (1, 1, 0)


def test_the_demo_shows_every_cap_hold(demos: Callable[[str], Demo]) -> None:
    """Both servers, every kind of view, one rejection in full; it leaves nothing behind."""
    done, folder = demos("alone")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "store: ",
        "gunicorn",
        "uvicorn",
        *("user-reports", "exports", "partners", "downloads", "live-feeds", "api-users", "heavy-jobs", "site-shadow"),
        "dashboard",
        "3, 3",
        "labels: 4 at a time for each user, the others waited in line, ",
        "HTTP/1.1 429 Too Many Requests",
        "Retry-After: ",
        "quota-exceeded",
        "Every cap held.",
        "What to try next",
    ):
        assert word in done.stdout, f"{word!r} is not in\n{done.stdout}"
    assert list(folder.iterdir()) == []


def test_the_demo_shows_one_cap_hold_over_two_servers(demos: Callable[[str], Demo]) -> None:
    """Two worker processes of each, one Redis of the demo's own; it leaves nothing behind."""
    done, folder = demos("redis")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "store: redis, 2 processes of each server",
        "gunicorn 2x32 and uvicorn x2, one Redis",
        *("user-reports", "exports", "partners", "downloads", "live-feeds", "api-users", "heavy-jobs", "site-shadow"),
        "3, 3",
        "labels: 4 at a time for each user, the others waited in line, ",
        "Every cap held.",
        "make demo-redis",
    ):
        assert word in done.stdout, f"{word!r} is not in\n{done.stdout}"
    assert list(folder.iterdir()) == []


def test_the_demo_fails_when_nothing_is_limited(demos: Callable[[str], Demo]) -> None:
    """It believes the views, so with the limits off it says which caps were broken."""
    done, _ = demos("unlimited")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of user-reports was broken" in done.stdout
    assert "nobody waited for labels" in done.stdout
    assert "Every cap held" not in done.stdout
