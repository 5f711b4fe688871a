"""The quick start, followed to the letter: a project made by startproject, its server, and the first 429."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test import override_settings

from django_concurrency_mw.backends import DEFAULT_BACKEND
from django_concurrency_mw.checks import check_settings

from .conftest import ROOT
from .support import wait_until
from .test_docs import DOCS, block

PAGE = "quickstart.md"
#: Fields of an answer that are others each time, or that the server has a say in.
_VARYING = re.compile(r"^(Date|Server|Retry-After):.*$", re.MULTILINE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As far as "A limit on it"."""
    folder = tmp_path_factory.mktemp("quickstart")
    assert "$ django-admin startproject mysite ." in (DOCS / PAGE).read_text()
    call_command("startproject", "mysite", str(folder))  # what django-admin does, without a process
    urls = block(PAGE, "python", "urlpatterns")
    assert "time.sleep(2)" in urls
    (folder / "mysite/urls.py").write_text(urls.replace("sleep(2)", "sleep(1.2)"))
    (folder / "policies.yaml").write_text(block(PAGE, "yaml", "policies:"))
    with (folder / "mysite/settings.py").open("a") as settings:
        settings.write(block(PAGE, "python", "MIDDLEWARE +="))
        # All that the page does not have: other runs of this test on this machine have a "mysite" too.
        name = f"quickstart-{os.getpid()}"
        settings.write(
            f"CONCURRENCY_LIMIT['BACKENDS'] = {{'default': {{'BACKEND': {DEFAULT_BACKEND!r}, 'KEY_PREFIX': {name!r}}}}}\n"
        )
    return folder


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    return {**inherited, "PYTHONPATH": str(ROOT), "DJANGO_COLORS": "nocolor"}


@pytest.fixture(scope="module")
def port(project: Path) -> Iterator[int]:
    """Of a runserver."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "manage.py", "runserver", "--noreload", str(port)],
        cwd=project,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        assert server.poll() is None
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert wait_until(answers, 60)
        yield port
    finally:
        server.kill()
        server.wait()


def test_of_five_at_once_two_are_let_in(project: Path, port: int) -> None:
    """By the client that is printed, which prints what is printed."""
    (project / "burst.py").write_text(block(PAGE, "python", "ThreadPoolExecutor").replace("8000", str(port)))
    done = subprocess.run([sys.executable, "burst.py"], cwd=project, capture_output=True, text=True, timeout=120)
    assert done.stdout == block(PAGE, "text", "429, 429, 429"), done.stderr
    codes = re.search(r"%\{http_code\}.*\n((?:\d+\n)+)", (DOCS / PAGE).read_text())
    assert codes is not None
    assert sorted(map(int, codes[1].split())) == [200, 200, 429, 429, 429]


def test_a_third_is_told_what_is_printed(port: int) -> None:
    """Two are held while it asks; but for the date, the server and the seconds."""
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(_get, port) for _ in range(3)]
        answers = [future.result() for future in held]
    (rejected,) = [answer for answer in answers if answer.startswith("HTTP/1.1 429")]
    printed = block(PAGE, "console", "HTTP/1.1 429").partition("\n")[2].rstrip("\n")
    assert _VARYING.sub("", rejected) == _VARYING.sub("", printed)


def _get(port: int) -> str:
    """The whole answer, as `curl -i` prints it."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/export/", headers={"Accept": "*/*"})
    response = connection.getresponse()
    fields = "".join(f"{name}: {value}\n" for name, value in response.getheaders())
    text = f"HTTP/1.1 {response.status} {response.reason}\n{fields}\n{response.read().decode()}"
    connection.close()
    return text


def test_the_mistake_is_named_as_it_is_printed(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = (project / "policies.yaml").read_text()
    Path("policies.yaml").write_text(good.replace("max_concurrent: 2", "max_concurrent: two"))
    with override_settings(CONCURRENCY_LIMIT={"POLICIES": tmp_path / "policies.yaml"}):
        (message,) = check_settings()
    assert f"\n{message}\n" in block(PAGE, "console", "'two'")
