"""The README keeps its word: each snippet is taken out of it and run as it is printed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from django_concurrency_mw import conf, signals
from django_concurrency_mw.backends import get_backend
from django_concurrency_mw.fields import FIELDS
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot, Taken
from django_concurrency_mw.tokens import new_token

from .redis_server import RedisServer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def block(language: str, containing: str) -> str:
    (found,) = [text for text in blocks(language) if containing in text]
    return found


SETTINGS = """
from pathlib import Path
BASE_DIR = Path(__file__).parent
SECRET_KEY = "readme"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "site_urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
"""

URLS = """
from django.urls import include, path
from django.http import HttpResponse
import site_views as views

reports = ([path("export/", lambda request: held(request), name="export")], "reports")

urlpatterns = [
    path("reports/", include(reports)),
    path("decorated/", views.export, name="decorated"),
    path("big/", views.big_export, name="big"),
    path("dashboard/", views.Dashboard.as_view(), name="dashboard"),
    path("health/", views.health, name="health"),
    path("status/", views.status, name="slots"),
    path("start/", views.start, name="start"),
]

asked, answers = [], []

def held(request):
    # While a request is in its view another one arrives; the sixth is one too many.
    from django.test import Client
    if len(asked) < 5:
        asked.append(request)
        answers.append(Client().get(request.path))
    return HttpResponse("exported")
"""

PROGRAM = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
import django
django.setup()
from django.core.management import call_command
call_command("check")
from django.test import Client
import site_urls
client = Client()
for path in ("/decorated/", "/big/", "/dashboard/", "/health/"):
    assert client.get(path).status_code == 200, path
print(client.get("/status/").content.decode())
assert client.get("/start/").status_code == 202
import site_views
from django_concurrency_mw.backends import snapshot_all
assert len(snapshot_all()) == 1
site_views.task(site_views.given[0])
site_views.nightly()
assert not snapshot_all()
assert client.get("/reports/export/").status_code == 200
statuses = [response.status_code for response in site_urls.answers]
assert statuses == [429, 200, 200, 200, 200], statuses
rejection = site_urls.answers[0]
print(f"HTTP/1.1 {rejection.status_code} {rejection.reason_phrase}")
for name, value in rejection.items():
    print(f"{name}: {value}")
print()
import json
print(json.dumps(json.loads(rejection.content), indent=2))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project made of what the README prints, and of what it takes for granted."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "site_settings.py").write_text(SETTINGS + block("python", "INSTALLED_APPS +="))
    (folder / "policies.yaml").write_text(block("yaml", "report-exports"))
    (folder / "site_views.py").write_text(
        block("python", "def export(request)")
        + block("python", "def status(request)")
        + block("python", "hand_over()")
        + "\ngiven = []\nlater = given.append\n"
    )
    (folder / "site_urls.py").write_text(URLS)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def without_chance(text: str) -> list[str]:
    return re.sub(r"Retry-After: \d", "Retry-After: N", text).split()


def test_the_snippets_make_a_site_that_limits_as_they_say(site: Path, run_python: Run) -> None:
    done = run_python("program.py", env={"PYTHONPATH": f"{ROOT}:{site}"}, cwd=site)
    assert done.returncode == 0, done.stderr
    status, _, rejection = done.stdout.partition("\n")[2].partition("\n")  # after the line of `check`
    assert status == "limited: True, 1 held"
    assert without_chance(rejection) == without_chance(block("text", "HTTP/1.1 429"))


def test_a_mistake_is_named_as_it_is_printed(site: Path, run_python: Run, tmp_path: Path) -> None:
    wrong = block("yaml", "report-exports").replace("max_concurrent: 5", "max_concurrent: 'five'")
    for file in site.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "policies.yaml").write_text(wrong)
    done = run_python(
        "-m",
        "django",
        "check",
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "DJANGO_SETTINGS_MODULE": "site_settings"},
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert block("text", "expected an integer").strip() in done.stderr
    assert "Traceback" not in done.stderr


def test_the_settings_for_a_proxy_are_good(tmp_path: Path) -> None:
    (tmp_path / "policies.yaml").write_text(block("yaml", "report-exports"))
    names: dict[str, object] = {"BASE_DIR": tmp_path}
    exec(block("python", "TRUSTED_PROXIES"), names)
    config = conf.compile_settings(names["CONCURRENCY_LIMIT"])
    assert config.trusted.unix


def test_the_settings_for_redis_are_good(tmp_path: Path, redis_server: RedisServer) -> None:
    (tmp_path / "policies.yaml").write_text(block("yaml", "report-exports"))
    names: dict[str, object] = {"BASE_DIR": tmp_path}
    exec(block("python", '"BACKEND": "redis"').replace("127.0.0.1:6379", f"127.0.0.1:{redis_server.port}"), names)
    config = conf.compile_settings(names["CONCURRENCY_LIMIT"])
    store = get_backend("default", config.backends)
    slot = Slot("readme", make_key("k"), 1, 60.0, new_token())
    assert isinstance(store.take([slot]), Taken)
    store.give([slot])


def test_every_snippet_has_been_run() -> None:
    """A new one is not printed without a test that runs it."""
    assert (len(blocks("python")), len(blocks("yaml")), len(blocks("console"))) == (6, 1, 2)


def test_both_commands_are_there_and_run() -> None:
    """`make demo` as far as the program that test_example.py runs; `make test` as far as pytest finding the tests."""
    commands = [line.removeprefix("$ ") for line in blocks("console")[0].splitlines()]
    assert commands == ["make demo", "make test"]
    done = _make("make --dry-run demo", {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("/python example_project/demo.py")
    # A test installs nothing, so the stamp stands as it is; the files of one letter are enough to see that they are found.
    options = "--collect-only -q --ignore-glob=*/chaos/* --ignore-glob=*/test_[!r]*"
    done = _make("make --old-file=.venv/.dev-stamp test", {"PYTEST_ADDOPTS": options})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_readme.py" in done.stdout


def _make(command: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    import os

    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST"))
    }
    return subprocess.run(
        command.split(), cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )


def test_the_tables_name_every_field_and_every_setting() -> None:
    for name in FIELDS:
        assert f"| `{name}` | " in README, name
    for name in conf._KNOWN:
        assert f"| `{name}` | " in README, name
    for name in vars(signals):
        if name.startswith(("slot_", "request_", "backend_")):
            assert f"`{name}`" in README, name


def test_line_3_says_what_this_is_not() -> None:
    assert "not optimistic locking" in README.splitlines()[2]
