"""The wheel: what is in it, what is not, and that it works on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = "django_concurrency_mw"


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy, as a build writes into its source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in (PACKAGE, "tests", "example_project"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3"))
    target = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)])
    (built,) = target.glob("*.whl")
    return built


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    output: str = done.stdout
    return output


def test_the_wheel_has_the_whole_package_and_nothing_else(root: Path, wheel: Path) -> None:
    """Every file of the package is in it: modules, py.typed, templates and what else it needs at run time."""
    source = {
        path.relative_to(root).as_posix()
        for path in (root / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert f"{PACKAGE}/py.typed" in source
    assert f"{PACKAGE}/templates/{PACKAGE}/rejected.html" in source
    assert packed == source


def test_the_metadata_names_the_licence_and_what_is_needed(wheel: Path) -> None:
    """Installing brings Django, asgiref and PyYAML; rich and the servers only come with an extra."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    needed = {line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")}
    assert "License-Expression: MIT" in lines
    assert {need.partition(">")[0] for need in needed if "extra ==" not in need} == {"django", "asgiref", "pyyaml"}


SCRIPT = """
import sys
import django
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF="__main__", INSTALLED_APPS=["django_concurrency_mw"],
    MIDDLEWARE=["django_concurrency_mw.middleware.ConcurrencyLimitMiddleware"],
    CONCURRENCY_LIMIT={"POLICIES": {"policies": {"closed": {"url_names": ["closed"], "key": "global", "max_concurrent": 0}}}},
)
django.setup()
import django_concurrency_mw
from django.test import Client
from django.urls import path
urlpatterns = [path("", lambda request: None, name="closed")]
response = Client().get("/", headers={"accept": "text/html"})
print(response.status_code, response["Content-Type"], "<h1>" in response.content.decode())
print(django_concurrency_mw.__file__)
"""


def test_the_installed_wheel_turns_a_request_away_with_its_own_page(wheel: Path, tmp_path: Path) -> None:
    """Installed somewhere else, with nothing of the repository in reach, it limits and finds its template."""
    site = tmp_path / "site"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(wheel),
        ]
    )
    env = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    env["PYTHONPATH"] = str(site)
    told, place = run([sys.executable, "-c", SCRIPT], cwd=str(tmp_path), env=env).splitlines()
    assert told == "429 text/html; charset=utf-8 True"
    assert Path(place).is_relative_to(site)
