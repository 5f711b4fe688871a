"""The example site and its demo: they run, and the demo fails when a cap does not hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conftest import Run


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


def test_the_demo_shows_every_cap_hold(run_python: Run, tmp_path: Path) -> None:
    """Both servers, every kind of view, one rejection in full; it leaves nothing behind."""
    done = run_python("example_project/demo.py", env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "store: ",
        "gunicorn",
        "uvicorn",
        *("user-reports", "exports", "partners", "downloads", "live-feeds", "heavy-jobs", "site-shadow"),
        "dashboard",
        "3, 3",
        "HTTP/1.1 429 Too Many Requests",
        "Retry-After: ",
        "quota-exceeded",
        "Every cap held.",
        "What to try next",
    ):
        assert word in done.stdout, f"{word!r} is not in\n{done.stdout}"
    assert list(tmp_path.iterdir()) == []


def test_the_demo_fails_when_nothing_is_limited(run_python: Run) -> None:
    """It believes the views, so with the limits off it says which caps were broken."""
    done = run_python("example_project/demo.py", env={"EXAMPLE_LIMITS_OFF": "1"})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of user-reports was broken" in done.stdout
    assert "Every cap held" not in done.stdout


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
