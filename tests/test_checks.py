"""The system checks: each one speaks when it should, is silent when it should, and has an id of its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from django.core.checks import Info
from django.core.checks.registry import registry as django_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.http import HttpRequest, HttpResponse

import django_concurrency_mw
from django_concurrency_mw import backends, checks, conf
from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.middleware import ConcurrencyLimitMiddleware

from .checking import HERE, ON_HOST, decorate, found, ids
from .conftest import Run
from .support import OURS, Limits, everything, named
from .test_conf import UNUSABLE

__all__ = ["decorate"]


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def test_all_is_well(limits: Limits, decorate: Callable[..., Any]) -> None:
    limits(everything(), TRUSTED_PROXIES=["10.0.0.0/8"], BACKENDS=ON_HOST)
    view = decorate(key="user", max_concurrent=1)
    other = decorate(policy="all", block=False)
    assert ids(deploy=True) == []
    call_command("check", tags=["concurrency"], fail_level="WARNING")
    assert view is not other


def test_e001_all_that_is_wrong_with_the_settings(limits: Limits) -> None:
    """And no other check, nor a traceback, on top of that."""
    limits({"policies": {"x": {"key": "usr", "max_concurrent": 1}}}, HEADERS="sometimes")
    first, second = found(deploy=True)
    assert first.id == second.id == "django_concurrency_mw.E001"
    assert first.msg.startswith("CONCURRENCY_LIMIT['HEADERS']: expected one of")
    assert second.msg.startswith("CONCURRENCY_LIMIT['POLICIES'].policies.x.key: ")
    with pytest.raises(SystemCheckError, match=r"E001"):
        call_command("check")


@pytest.mark.parametrize(("backends", "name", "message"), UNUSABLE)
@pytest.mark.parametrize("by", ["table", "decorator"])
def test_e002_a_store_that_cannot_limit(
    limits: Limits, decorate: Callable[..., Any], backends: Any, name: str, message: str, by: str
) -> None:
    if by == "table":
        limits(everything(backend=name), BACKENDS=backends)
    else:
        limits(BACKENDS=backends)
        view = decorate(key="global", max_concurrent=1, backend=name)
        assert view
    (error,) = found()
    assert error.id == "django_concurrency_mw.E002"
    assert re.search(message, error.msg)
    assert ("policy all" if by == "table" else f"{HERE}:") in error.msg


class Abstract(BaseBackend):
    """It lacks what a store has to be able to do."""

    supports_semaphores = True


class Impatient(MemoryBackend):
    """It limits, and lets nobody wait."""

    supports_wait = False


@pytest.mark.parametrize("by", ["table", "decorator"])
def test_e002_a_wait_on_a_store_where_nobody_can(limits: Limits, decorate: Callable[..., Any], by: str) -> None:
    backends = {"default": {"BACKEND": named(Impatient)}}
    limits(everything(wait=2) if by == "table" else None, BACKENDS=backends)
    view = decorate(key="global", max_concurrent=1, wait=2) if by == "decorator" else None
    (error,) = found()
    assert error.id == "django_concurrency_mw.E002"
    assert "wait: the backend 'default' cannot let requests wait" in error.msg
    limits(everything() if by == "table" else None, BACKENDS=backends)
    view = decorate(key="global", max_concurrent=1, wait=0) if by == "decorator" else None
    assert by == "decorator" or ids() == [], "without a wait it is as good as any"
    del view


class Fails(MemoryBackend):
    def __init__(self, config: Any) -> None:
        raise OSError("no such device")


@pytest.mark.parametrize("store", [Abstract, Fails])
def test_e002_a_store_that_cannot_be_made(limits: Limits, store: type) -> None:
    limits(everything(), BACKENDS={"default": {"BACKEND": named(store)}})
    assert ids() == ["E002"]


@pytest.mark.parametrize(
    "field",
    [
        {"key": "nowhere.at_all"},
        {"when": "nowhere.at_all"},
        {"response_callback": "nowhere.at_all"},
        {"response_callback": f"{__name__}.nothing"},
        {"response_callback": f"{__name__}.__name__"},
    ],
)
@pytest.mark.parametrize("by", ["table", "decorator"])
def test_e003_a_dotted_path_that_leads_nowhere(
    limits: Limits, decorate: Callable[..., Any], field: dict[str, str], by: str
) -> None:
    limits(everything(**field) if by == "table" else None)
    view = decorate(**({"key": "global", "max_concurrent": 1} | (field if by == "decorator" else {})))
    (error,) = found()
    assert error.id == "django_concurrency_mw.E003"
    assert next(iter(field.values())) in error.msg
    assert ("policy all" if by == "table" else f"{HERE}:") in error.msg
    assert view


def test_e003_a_module_that_fails(limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_checks.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    limits(everything(key="broken_for_checks.key"))
    (error,) = found()
    assert error.id == "django_concurrency_mw.E003"
    assert "ZeroDivisionError" in error.msg


def test_e003_is_silent_about_what_is_there(limits: Limits, decorate: Callable[..., Any]) -> None:
    limits(everything(key=f"{__name__}.view", when=f"{__name__}.view", response_callback=f"{__name__}.view"))
    view = decorate(key=lambda request: "x", when=lambda request: True, max_concurrent=1)
    assert ids() == []
    assert view


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "al"}, "no policy 'al' in CONCURRENCY_LIMIT['POLICIES']; did you mean 'all'?"),
        (
            {"key": "user", "max_concurrent": 1, "name": "all"},
            "'all' is the name of a policy of the table; use policy='all'",
        ),
        ({"policy": "all", "missing": "reject"}, "contradicts missing: reject"),
    ],
)
def test_e004_a_decorator_and_the_table(
    limits: Limits, decorate: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    limits(everything(block=False))
    view = decorate(**fields)
    (error,) = found()
    assert error.id == "django_concurrency_mw.E004"
    assert message in error.msg
    assert f"{HERE}:" in error.msg
    assert view


def test_e004_is_silent_about_a_policy_of_any_name(limits: Limits, decorate: Callable[..., Any]) -> None:
    """The view's own name, which a check does not know, is not mistaken for a policy's."""
    table = everything()
    table["policies"] |= {"view": table["policies"]["all"], "view_": table["policies"]["all"]}
    limits(table)
    view = decorate(key="global", max_concurrent=1)
    assert ids() == []
    assert view


class Mine(ConcurrencyLimitMiddleware):
    """A project's own."""


@pytest.mark.parametrize(
    ("middleware", "table", "expected"),
    [
        ([], everything(), ["W001"]),
        ([], None, []),
        ([], {"policies": {"x": {"key": "global", "max_concurrent": 1}}}, []),
        ([OURS], everything(), []),
        ([named(Mine)], everything(), []),
        ([OURS, OURS], everything(), ["W002"]),
        ([OURS, named(Mine)], None, ["W002"]),
        ([OURS, "nowhere.Middleware", "tests.views.plain", "tests.views.switch"], everything(), []),
    ],
)
def test_w001_and_w002_the_middleware_is_there_once(
    limits: Limits, middleware: list[str], table: Any, expected: list[str]
) -> None:
    limits(table, middleware=middleware)
    assert ids() == expected


@pytest.mark.parametrize(
    ("policy", "fires"),
    [
        ({"key": "ip"}, True),
        ({"key": "user"}, True),
        ({"key": "{ip}:{method}", "missing": "skip"}, True),
        ({"key": "session"}, True),
        ({"key": "session", "missing": "skip"}, False),
        ({"key": "header:X", "missing": "reject"}, False),
        ({"key": "global"}, False),
        ({"key": f"{__name__}.view"}, False),
    ],
)
@pytest.mark.parametrize("by", ["table", "decorator"])
def test_w003_an_address_that_may_be_the_proxys(
    limits: Limits, decorate: Callable[..., Any], policy: dict[str, Any], fires: bool, by: str
) -> None:
    """With --deploy only, and not where the proxies are named."""
    table = everything(**policy) if by == "table" else None
    view = decorate(**policy, max_concurrent=1) if by == "decorator" else None
    limits(table, BACKENDS=ON_HOST)
    assert ids(deploy=True) == (["W003"] if fires else [])
    assert ids() == []
    if fires:
        assert ("all" if by == "table" else f"{HERE}:") in found(deploy=True)[0].msg
    for trusted in (["10.0.0.0/8"], ["unix"]):
        limits(table, TRUSTED_PROXIES=trusted, BACKENDS=ON_HOST)
        assert ids(deploy=True) == []
    del view


class Chatty(MemoryBackend):
    def check(self) -> Any:
        return [Info("mind the gap", hint="mind it", id="chatty.I001")]


@pytest.mark.parametrize("by", ["table", "decorator", "both", "nobody"])
def test_a_store_in_use_says_its_own_once(limits: Limits, decorate: Callable[..., Any], by: str) -> None:
    backends = {"default": {"BACKEND": "memory"}, "chatty": {"BACKEND": named(Chatty)}}
    limits(everything(backend="chatty") if by in ("table", "both") else None, BACKENDS=backends)
    view = decorate(key="global", max_concurrent=1, backend="chatty") if by in ("decorator", "both") else None
    assert ids() == ([] if by == "nobody" else ["chatty.I001"])
    del view


@pytest.mark.parametrize("by", ["table", "decorator", "nobody"])
@pytest.mark.parametrize("platform", ["linux", "other"])
def test_w008_and_w009_a_default_store_counts_in_a_process_or_on_a_machine(
    limits: Limits,
    decorate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    by: str,
) -> None:
    for place in (backends, conf):
        monkeypatch.setattr(place, "DEFAULT_BACKEND", "host" if platform == "linux" else "memory")
    limits(everything() if by == "table" else None, BACKENDS=None, TRUSTED_PROXIES=["10.0.0.0/8"])
    view = decorate(key="global", max_concurrent=1) if by == "decorator" else None
    expected = [] if by == "nobody" else ["W009"] if platform == "linux" else ["W008"]
    assert ids(deploy=True) == expected
    assert ids() == [id for id in expected if id == "W008"]
    limits(everything(), BACKENDS={"default": {"BACKEND": "host"}}, TRUSTED_PROXIES=["10.0.0.0/8"])
    assert ids(deploy=True) == []
    del view


@pytest.mark.parametrize(
    ("module", "backend", "warns"),
    [
        ("config.settings", {}, True),
        ("mysite.settings.production", {}, True),
        ("settings", {}, True),
        ("", {}, True),
        ("shop_of_alice.settings", {}, False),
        ("config.settings", {"KEY_PREFIX": "shop"}, False),
        ("config.settings", {"OPTIONS": {"path": "/dev/shm/shop"}}, False),
        ("config.settings", {"BACKEND": "memory"}, False),
    ],
)
def test_w010_a_name_that_another_site_may_have(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, module: str, backend: dict[str, Any], warns: bool
) -> None:
    limits(everything(), BACKENDS={"default": {"BACKEND": "host", **backend}}, TRUSTED_PROXIES=["10.0.0.0/8"])
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", module)
    assert [id for id in ids(deploy=True) if id != "W015"] == (["W010"] if warns else [])
    assert ids() == []


def test_ids_are_unique_and_explained() -> None:
    """Each is said in one place of the code, and has one row in the table that explains them all."""
    said: list[str] = []
    for file in Path(django_concurrency_mw.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = re.fullmatch(r"django_concurrency_mw\.([EWI]\d{3})", node.value)
                said += [match[1]] if match else []
    assert sorted(said) == sorted(row.id for row in checks.CHECKS)
    assert all(re.fullmatch(r"[A-Z].{10,98}\.", row.meaning) for row in checks.CHECKS)


def test_every_id_is_seen_firing() -> None:
    """A test is called after each, and its code names it. (`test_all_is_well` says that nothing is said where all is well.)"""
    tests: dict[str, str] = {}
    for file in [*Path(__file__).parent.glob("test_checks*.py"), Path(__file__).parent / "test_drf.py"]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and (ids := re.findall(r"_([ewi]\d{3})(?=_)", node.name)):
                code = [*node.decorator_list, *(node.body[1:] if ast.get_docstring(node) else node.body)]
                for id in ids:
                    tests[id] = "\n".join([tests.get(id, ""), *map(ast.unparse, code)])
    for row in checks.CHECKS:
        assert row.id in tests.get(row.id.lower(), ""), f"no test is called test_{row.id.lower()}_... and asserts it"


def test_each_function_is_registered_once_as_the_table_says() -> None:
    registry = [check for check in django_checks.get_checks(True) if check.__module__.startswith(checks.__name__)]
    assert sorted(map(id, registry)) == sorted({id(row.function) for row in checks.CHECKS})
    deployed = set(registry) - set(django_checks.get_checks())
    for row in checks.CHECKS:
        assert (row.function in deployed) is row.deploy, row.id
        assert row.function.tags == (checks.TAG,)
    assert (checks.CHECKS[0].full_id, checks.CHECKS[0].anchor) == ("django_concurrency_mw.E001", "check-e001")


# -- manage.py check ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, root: Path, run_python: Run) -> Callable[..., Any]:
    """Run `check` over a project of a few lines."""

    def run(yaml: str, views: str = "", *arguments: str) -> Any:
        (tmp_path / "policies.yaml").write_text(dedent(yaml))
        (tmp_path / "project_settings.py").write_text(
            dedent(f"""
            SECRET_KEY = "x"
            ROOT_URLCONF = "project_urls"
            INSTALLED_APPS = ["django_concurrency_mw"]
            MIDDLEWARE = ["{OURS}"]
            CONCURRENCY_LIMIT = {{"POLICIES": {str(tmp_path / "policies.yaml")!r}}}
            """)
        )
        (tmp_path / "project_urls.py").write_text(dedent(views) + "\nurlpatterns = []\n")
        path = f"{tmp_path}:{root}"
        return run_python(
            "-m",
            "django",
            "check",
            "--settings=project_settings",
            *arguments,
            env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        )

    return run


BROKEN = """
    policies:
      exports:
        key: user
        max_concurrent: ten
      imports:
        key: usr
        max_concurent: 1
"""


def test_a_broken_file_is_told_without_a_traceback(project: Callable[..., Any]) -> None:
    result = project(BROKEN)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(r"policies\.yaml:5:\d+: policies\.exports\.max_concurrent: expected an integer", result.stderr)
    assert re.search(r"policies\.yaml:7:\d+: .*did you mean 'user'", result.stderr)
    assert re.search(r"policies\.yaml:8:\d+: .*did you mean 'max_concurrent'", result.stderr)
    assert "(django_concurrency_mw.E001)" in result.stderr


def test_a_decorator_is_found_through_the_urls(project: Callable[..., Any]) -> None:
    result = project(
        "policies: {exports: {key: user, max_concurrent: 1}}",
        """
        from django_concurrency_mw import concurrency_limit

        @concurrency_limit(policy="export")
        def export(request):
            ...
        """,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(r"project_urls\.py:\d+: .*no policy 'export'.*did you mean 'exports'", result.stderr)
    assert "(django_concurrency_mw.E004)" in result.stderr


def test_a_decorator_that_is_refused_when_its_module_is_imported(project: Callable[..., Any]) -> None:
    views = """
    from django_concurrency_mw import concurrency_limit

    @concurrency_limit(key="usr", max_concurrent=1)
    def export(request):
        ...
    """
    result = project("policies: {}", views, "--tag=concurrency")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(r"project_urls\.py:\d+: .*did you mean 'user'", result.stderr)
    assert "(django_concurrency_mw.E004)" in result.stderr


def test_a_project_that_is_well(project: Callable[..., Any]) -> None:
    result = project("policies: {exports: {url_names: [x], key: global, max_concurrent: 1}}", "", "--fail-level=DEBUG")
    assert (result.returncode, result.stderr) == (0, "")
