"""Hot reload: a changed policy file is in force in every process, a bad one changes nothing and is logged once."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import sleep
from typing import Any
from weakref import WeakSet

import pytest
from django.core.checks import run_checks
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory, override_settings
from django.utils.autoreload import autoreload_started, get_reloader

from django_concurrency_mw import concurrency_limit, conf, decorators, reload
from django_concurrency_mw.backends import get_backend
from django_concurrency_mw.exceptions import Problem
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.middleware import ConcurrencyLimitMiddleware
from django_concurrency_mw.policies import PolicyTable

from .support import Limits, exit_code, nothing_held, wait_until
from .views import held, switch

OURS = "django_concurrency_mw"
_numbers = count()


def text(limit: object = 5, name: str = "all", **fields: object) -> str:
    """A policy file with one policy over every view."""
    more = "".join(f"    {field}: {value}\n" for field, value in fields.items())
    return f"policies:\n  {name}:\n    url_names: ['*']\n    key: global\n    max_concurrent: {limit}\n{more}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "policies.yaml"
    file.write_text(text())
    return file


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, OURS)


@pytest.fixture(autouse=True)
def _nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the decorators and blocks of other tests use does not matter here."""
    monkeypatch.setattr(reload, "_used", {})
    monkeypatch.setattr(decorators, "limits", WeakSet())


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """With a test's settings its looks end, and those of earlier tests have."""
    yield
    conf.current()
    assert looks() == 0


def looks() -> int:
    """How many looks are to come; none while one is being made."""
    return sum(isinstance(getattr(call, "__self__", None), reload.Watch) for _, _, call in list(keeper._calls))


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == OURS and record.levelno == level]


def limit(name: str = "all") -> int | None:
    policy = conf.current().table.get(name)
    return None if policy is None else policy.max_concurrent


def moved(file: Path, content: str, *, long_ago: bool = False) -> None:
    new = file.with_suffix(".new")
    new.write_text(content)
    if long_ago:
        os.utime(new, (1e9, 1e9))
    new.replace(file)


class Owner:
    """Has a table, and what it has against others."""

    def __init__(self, table: PolicyTable) -> None:
        self.now: PolicyTable | None = table
        self.switched = 0
        self.against: list[Problem] = []

    def table(self) -> PolicyTable | None:
        return self.now

    def problems(self, table: PolicyTable) -> list[Problem]:
        return self.against

    def switch(self, table: PolicyTable, loaded: reload.Loaded) -> None:
        self.now = table
        self.switched += 1


@dataclass
class Hand:
    """A watch whose looks are made by hand; `waits` are the seconds that it wanted to wait."""

    file: Path
    owner: Owner
    watch: reload.Watch
    waits: list[float] = field(default_factory=list)

    def look(self) -> float:
        self.watch.look()
        return self.waits[-1]

    @property
    def limit(self) -> int:
        assert self.owner.now is not None
        (policy,) = self.owner.now
        return policy.max_concurrent

    def write(self, content: str, age: float = 1.0) -> None:
        """In place; so many seconds ago, as the clock that looks has it."""
        self.file.write_text(content)
        self.at = self.file.stat().st_mtime + age


INTERVAL = 30.0


@pytest.fixture
def hand(file: Path, monkeypatch: pytest.MonkeyPatch) -> Hand:
    table, loaded = reload.load(file)
    owner = Owner(table)
    hand = Hand(file, owner, reload.Watch(loaded, INTERVAL, owner, threading.RLock()))
    hand.at = file.stat().st_mtime + 1
    monkeypatch.setattr(reload, "time", lambda: hand.at)
    at = keeper.at

    def waits(seconds: float, call: Callable[[], None]) -> None:
        if call == hand.watch.look:
            hand.waits.append(seconds)
        else:
            at(seconds, call)

    monkeypatch.setattr(keeper, "at", waits)
    return hand


class TestOneLook:
    """What a look does with what it finds."""

    def test_a_new_content_is_in_force_at_the_look_that_sees_it(
        self, hand: Hand, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert (hand.look(), hand.owner.switched) == (INTERVAL, 0)
        hand.write(text(2))
        assert (hand.look(), hand.limit) == (INTERVAL, 2)
        assert said(caplog, logging.INFO) == [f"{hand.file}: reloaded: changed all"]
        hand.write(text(2) + text(1, name="more").replace("policies:\n", ""))
        hand.look()
        hand.write(text(3, name="more"))
        hand.look()
        hand.write("# a note\n" + text(3, name="more"))
        hand.look()
        assert [line.partition("reloaded: ")[2] for line in said(caplog, logging.INFO)[1:]] == [
            "added more",
            "removed all; changed more",
            "no policy differs",
        ]

    def test_what_has_not_changed_is_neither_read_nor_parsed(self, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
        hand.at += 60
        hand.look()
        monkeypatch.setattr(reload, "read", None)
        monkeypatch.setattr(reload, "parse", None)
        assert hand.look() == INTERVAL

    def test_a_touch_is_no_change(self, hand: Hand, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
        monkeypatch.setattr(reload, "parse", None)
        hand.look()
        os.utime(hand.file)
        hand.look()
        moved(hand.file, text())
        hand.look()
        assert (hand.owner.switched, caplog.records) == (0, [])

    def test_a_change_within_one_step_of_the_clock_is_seen(self, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
        """Same size and same times: the stat of a file that was changed just now says nothing."""
        monkeypatch.setattr(reload, "_identity", lambda found: (found.st_ino, found.st_size))
        hand.look()
        hand.write(text(6))
        hand.at = hand.file.stat().st_mtime + 60  # the next look comes late
        hand.look()
        assert hand.limit == 6

    def test_whoever_sets_the_time_back_is_seen(self, hand: Hand) -> None:
        hand.at += 60
        hand.look()
        before = hand.file.stat()
        hand.write(text(6))
        os.utime(hand.file, ns=(before.st_atime_ns, before.st_mtime_ns))
        hand.look()
        assert hand.limit == 6

    def test_what_may_be_half_written_is_looked_at_again_soon(self, hand: Hand, caplog: Any) -> None:
        """A half may be broken, or good and not all of it."""
        whole = text(2) + text(1, name="more").replace("policies:\n", "")
        for half in (text(2), text(2)[:-10], ""):
            hand.write(half, age=0.01)
            assert hand.look() == reload.AGAIN
            hand.write(half, age=1)
            os.utime(hand.file, (0, 0))  # a writer that pauses
            if half != text(2):
                hand.write(half + "x", age=1)
                assert hand.look() == reload.AGAIN, "broken, and not the same as before"
            hand.write(whole, age=1)
            assert hand.look() == INTERVAL
            hand.write(text())
            hand.look()
        assert {line.partition("reloaded: ")[2] for line in said(caplog, logging.INFO)} == {
            "added more; changed all",
            "removed more; changed all",
        }
        assert said(caplog, logging.ERROR) == []

    def test_a_broken_content_is_logged_once_and_what_was_in_force_stays(self, hand: Hand, caplog: Any) -> None:
        hand.write(text("five", ttl="no"))
        assert hand.look() == reload.AGAIN
        for _ in range(3):
            assert hand.look() == INTERVAL
        os.utime(hand.file)
        hand.look()
        (line,) = said(caplog, logging.ERROR)
        start = (
            f"{hand.file}: not reloaded, the policies in force stay: {hand.file}:5:21: policies.all.max_concurrent: "
        )
        assert line.startswith(start)
        assert f"; {hand.file}:6:10: policies.all.ttl: " in line
        assert (hand.limit, hand.owner.switched) == (5, 0)

    def test_it_is_said_when_the_old_content_is_back_and_what_breaks_again_is_said_again(
        self, hand: Hand, caplog: Any
    ) -> None:
        for number in (1, 2):
            hand.write("policies: [")
            hand.look()
            hand.look()
            hand.write(text())
            hand.look()
            hand.look()
            assert said(caplog, logging.INFO) == [f"{hand.file}: says again what is in force"] * number
            assert len(said(caplog, logging.ERROR)) == number

    def test_gone_for_a_moment_is_not_worth_a_word(self, hand: Hand, caplog: Any) -> None:
        hand.file.unlink()
        assert hand.look() == INTERVAL
        hand.write(text(7))
        hand.look()
        assert (hand.limit, said(caplog, logging.ERROR)) == (7, [])
        hand.file.unlink()
        hand.look()
        assert said(caplog, logging.ERROR) == [], "another moment"
        for _ in range(4):
            assert hand.look() == INTERVAL
        (line,) = said(caplog, logging.ERROR)
        assert line.endswith(f"{hand.file}: cannot be read: No such file or directory")
        hand.write(text(7))
        hand.look()
        assert said(caplog, logging.INFO)[-1].endswith("says again what is in force")

    @pytest.mark.parametrize("what", ["a directory", "a pipe", "too long", "binary", "deep"])
    def test_nothing_that_is_there_ends_the_looks(self, hand: Hand, caplog: Any, what: str) -> None:
        hand.file.unlink()
        if what == "a directory":
            hand.file.mkdir()
        elif what == "a pipe":
            os.mkfifo(hand.file)
        else:
            contents = {"too long": b"#" * 1_000_001, "binary": b"\xff\x00", "deep": b"[" * 50_000}
            hand.file.write_bytes(contents[what])
            os.utime(hand.file, (0, 0))
        for _ in range(3):
            hand.look()
        assert len(said(caplog, logging.ERROR)) == 1
        assert hand.limit == 5

    @pytest.mark.parametrize("ahead", [0, 60], ids=["written just now", "written long ago"])
    def test_what_is_wrong_outside_the_file_is_asked_about_at_each_look(
        self, hand: Hand, caplog: Any, monkeypatch: pytest.MonkeyPatch, ahead: float
    ) -> None:
        """One line for each distinct text; and the content is not parsed again, which takes long."""
        hand.write(text(2), age=1 + ahead)
        hand.owner.against = [Problem("shop", "no module yet")]
        assert hand.look() == reload.AGAIN
        assert hand.look() == INTERVAL
        monkeypatch.setattr(reload, "parse", None)
        for _ in range(3):
            assert hand.look() == INTERVAL
        for message in ("it fails now", "no module yet", "it fails now"):
            hand.owner.against = [Problem("shop", message)]
            hand.look()
        assert [line.partition("stay: ")[2] for line in said(caplog, logging.ERROR)] == [
            "shop: no module yet",
            "shop: it fails now",
        ]
        assert hand.limit == 5
        hand.owner.against = []
        assert (hand.look(), hand.limit) == (INTERVAL, 2)
        assert said(caplog, logging.INFO) == [f"{hand.file}: reloaded: changed all"]

    def test_a_text_that_is_another_at_each_look_does_not_fill_the_log(self, hand: Hand, caplog: Any) -> None:
        hand.write(text(2))
        for number in range(50):
            hand.owner.against = [Problem("shop", f"failed at 0x{number}")]
            hand.look()
        assert len(said(caplog, logging.ERROR)) == reload.TEXTS
        hand.write(text(3))
        hand.look()
        hand.look()
        assert len(said(caplog, logging.ERROR)) == reload.TEXTS + 1, "another content"

    def test_what_was_wrong_outside_is_forgotten_with_its_content(self, hand: Hand, caplog: Any) -> None:
        hand.owner.against = [Problem("shop", "no module yet")]
        for content in ("policies: [", text()):
            hand.write(text(2), age=60)
            hand.look()
            hand.look()
            hand.write(content, age=60)
            hand.look()
            hand.look()
            hand.owner.against = []
            assert (hand.look(), hand.limit) == (INTERVAL, 5)
            hand.owner.against = [Problem("shop", "no module yet")]

    def test_what_cannot_be_parsed_is_parsed_no_more(
        self, hand: Hand, caplog: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hand.write("policies: [")
        hand.look()
        hand.look()
        monkeypatch.setattr(reload, "parse", None)
        hand.look()
        assert len(said(caplog, logging.ERROR)) == 1

    @pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
    def test_no_error_of_ours_ends_them(
        self, hand: Hand, caplog: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
    ) -> None:
        def fails(*_: object) -> Any:
            raise kind("of ours")

        with monkeypatch.context() as patch:
            patch.setattr(reload, "parse", fails)
            hand.write(text(2))
            for _ in range(3):
                hand.look()
            assert len(said(caplog, logging.ERROR)) == 1
        with monkeypatch.context() as patch:
            patch.setattr(hand.owner, "switch", fails)
            hand.write(text(3))
            with pytest.raises(kind):
                hand.watch.look()
        assert hand.waits == [reload.AGAIN, INTERVAL, INTERVAL, INTERVAL]

    def test_it_ends_with_its_owner(self, hand: Hand) -> None:
        hand.look()
        hand.owner.now = None
        hand.watch.look()
        assert len(hand.waits) == 1


def _mv(file: Path) -> Callable[[str], None]:
    return lambda content: moved(file, content)


def _in_place(file: Path) -> Callable[[str], None]:
    return lambda content: file.write_text(content) and None


def _config_map(file: Path) -> Callable[[str], None]:
    """As Kubernetes does it: the file is a link into `..data`, a link to a folder, and that is replaced."""
    data = file.parent / "..data"
    file.unlink(missing_ok=True)
    file.symlink_to(Path("..data") / file.name)

    def put(content: str) -> None:
        folder = file.parent / f"..{next(_numbers)}"
        folder.mkdir()
        (folder / file.name).write_text(content)
        new = file.parent / "..data_tmp"
        new.symlink_to(folder.name)
        new.replace(data)

    put(text())
    return put


WAYS = pytest.mark.parametrize("way", [_mv, _in_place, _config_map])


class TestTheSetting:
    """The configuration in force follows the file."""

    @WAYS
    def test_it_follows_whichever_way_the_file_is_changed(
        self, file: Path, limits: Limits, caplog: pytest.LogCaptureFixture, way: Callable[[Path], Any]
    ) -> None:
        put = way(file)
        limits(file, RELOAD_INTERVAL=0.05)
        stores = conf.current().stores
        for number in (2, 7, 3):
            put(text(number))
            assert wait_until(lambda number=number: limit() == number)  # type: ignore[misc]
        assert conf.current().stores is stores
        # The last line is written after the switch.
        assert wait_until(lambda: len(said(caplog, logging.INFO)) >= 3)
        assert len(said(caplog, logging.INFO)) == 3
        assert said(caplog, logging.ERROR) == []

    def test_twenty_broken_files_are_twenty_lines(self, file: Path, limits: Limits, caplog: Any) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        table = conf.current().table
        for number in range(20):
            broken = text(f"five-{number}") if number % 2 else text() + f"  b{number}: {{key: user, ttl: [\n"
            (moved if number % 3 else Path.write_text)(file, broken)
            assert wait_until(lambda number=number: len(said(caplog, logging.ERROR)) > number)  # type: ignore[misc]
        assert len(said(caplog, logging.ERROR)) == 20
        assert conf.current().table is table
        assert Client().get("/plain/").status_code == 200
        file.write_text(text(2))
        assert wait_until(lambda: limit() == 2)
        assert len(said(caplog, logging.ERROR)) == 20

    def test_a_lowered_limit_throws_nobody_out(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        switch.stop_at = 0
        inside: list[int] = []
        threads = [
            threading.Thread(target=lambda: inside.append(Client().get("/plain/").status_code)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: held() == ["all"] * 3)
        file.write_text(text(2))
        assert wait_until(lambda: limit() == 2)
        assert Client().get("/plain/").status_code == 429
        assert held() == ["all"] * 3
        switch.go.set()
        for thread in threads:
            thread.join()
        assert inside == [200] * 3
        assert nothing_held()
        assert Client().get("/plain/").status_code == 200

    @pytest.mark.parametrize("interval", [None, "a mapping"])
    def test_without_an_interval_or_a_file_nobody_looks(self, file: Path, limits: Limits, interval: Any) -> None:
        if interval is None:
            limits(file, RELOAD_INTERVAL=None)
        else:
            limits({"policies": {}}, RELOAD_INTERVAL=0.05)
        conf.current()
        assert looks() == 0
        assert conf._watch is None

    def test_a_relative_path_stays_the_same_file(
        self, file: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch, caplog: Any, tmp_path_factory: Any
    ) -> None:
        monkeypatch.chdir(file.parent)
        limits("policies.yaml", RELOAD_INTERVAL=0.05)
        assert limit() == 5
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        moved(file, text(2))
        assert wait_until(lambda: limit() == 2)
        assert wait_until(lambda: said(caplog, logging.INFO) == ["policies.yaml: reloaded: changed all"])


class TestWhoUsesAPolicy:
    """A reload that code cannot live with is refused."""

    @pytest.fixture
    def modules(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder of modules that are forgotten after the test."""
        folder = tmp_path / "modules"
        folder.mkdir()
        monkeypatch.syspath_prepend(folder)
        return folder

    def refused(self, file: Path, content: str, caplog: pytest.LogCaptureFixture) -> str:
        table = conf.current().table
        moved(file, content)
        assert wait_until(lambda: bool(said(caplog, logging.ERROR)))
        (line,) = said(caplog, logging.ERROR)
        assert conf.current().table is table
        return line.partition("the policies in force stay: ")[2]

    def test_a_used_name_cannot_be_dropped(self, file: Path, limits: Limits, caplog: Any) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        file.write_text(text(name="kept"))
        assert wait_until(lambda: limit("kept") == 5)
        concurrency_limit(policy="kept", max_concurrent=1)
        line = self.refused(file, text(name="renamed"), caplog)
        assert line.startswith(f"{file}: policy kept is gone, but used by {__file__}:")
        moved(file, text(2, name="kept"))
        assert wait_until(lambda: limit("kept") == 2)

    def test_a_name_that_was_never_there_is_no_reason(self, file: Path, limits: Limits) -> None:
        reload.used("nowhere", "a place")
        limits(file, RELOAD_INTERVAL=0.05)
        assert limit() == 5
        moved(file, text(2))
        assert wait_until(lambda: limit() == 2)

    @pytest.mark.parametrize("own", ["mine-1", None])
    def test_a_decorators_own_name_cannot_be_taken(
        self, file: Path, limits: Limits, caplog: Any, own: str | None
    ) -> None:
        limits(file, RELOAD_INTERVAL=0.05)

        @concurrency_limit(key="global", max_concurrent=1, name=own)
        def view(request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        assert view(RequestFactory().get("/")).status_code == 200
        name = own or f"{__name__}.{view.__qualname__}".replace("<", "_").replace(">", "_")
        line = self.refused(file, text(name=name), caplog)
        assert f"@concurrency_limit: '{name}' is the name of a policy of the table" in line
        assert view(RequestFactory().get("/")).status_code == 200

    def test_a_decorator_that_starts_from_a_policy_has_to_fit(self, file: Path, limits: Limits, caplog: Any) -> None:
        file.write_text(text(name="base"))
        limits(file, RELOAD_INTERVAL=0.05)
        kept = concurrency_limit(policy="base", block=False)
        line = self.refused(file, text(name="base", missing="reject"), caplog)
        assert line.startswith(f"{__file__}:")
        assert "contradicts missing: reject" in line
        del kept

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"backend": "elsewhere"}, "unknown backend 'elsewhere'"),
            ({"response_callback": "no_such.module"}, "response_callback: 'no_such.module' cannot be imported: "),
            ({"when": "no_such.module"}, "when: 'no_such.module' cannot be imported: "),
            ({"cost": "no_such.module"}, "cost: 'no_such.module' cannot be imported: "),
            ({"limit": "no_such.module"}, "max_concurrent: 'no_such.module' cannot be imported: "),
            ({"response_callback": "ends.now"}, "response_callback: SystemExit: at import"),
        ],
    )
    def test_what_requests_would_trip_over_is_found_before(
        self, file: Path, limits: Limits, caplog: Any, modules: Path, fields: dict[str, Any], message: str
    ) -> None:
        (modules / "ends.py").write_text("raise SystemExit('at import')")
        limits(file, RELOAD_INTERVAL=0.05)
        line = self.refused(file, text(**fields), caplog)
        assert line.startswith(f"{file}:2:3: policy all: {message}")

    def test_a_module_that_arrives_later_is_found(self, file: Path, limits: Limits, caplog: Any, modules: Path) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        self.refused(file, text(2, response_callback="arrives.answer"), caplog)
        moved(modules / "arrives.py", "def answer(request, rejection): ...")
        assert wait_until(lambda: limit() == 2)
        assert len(said(caplog, logging.ERROR)) == 1

    def test_a_module_that_ends_the_process_does_not_end_the_first_request(
        self, file: Path, limits: Limits, caplog: Any, modules: Path
    ) -> None:
        (modules / "ends.py").write_text("raise SystemExit('at import')")
        limits(file, RELOAD_INTERVAL=0.05)
        ConcurrencyLimitMiddleware(lambda request: HttpResponse())
        moved(file, text(2, response_callback="ends.now"), long_ago=True)
        assert Client().get("/plain/").status_code == 200
        assert wait_until(lambda: bool(said(caplog, logging.ERROR)))
        sleep(0.2)
        (line,) = said(caplog, logging.ERROR)
        assert line.endswith("policy all: response_callback: SystemExit: at import")
        assert limit() == 5


class TestOverrideSettings:
    """A setting that is not in force is not looked after."""

    def test_both_ways(self, file: Path, limits: Limits, caplog: Any) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        assert limit() == 5
        with override_settings(CONCURRENCY_LIMIT={"POLICIES": {"policies": {}}}):
            assert limit() is None
            assert looks() == 0
            moved(file, text(2))
        assert limit() == 2, "what comes back is read anew"
        assert wait_until(lambda: looks() == 1)
        moved(file, text(3))
        assert wait_until(lambda: limit() == 3)

    def test_looks_do_not_pile_up(self, file: Path, limits: Limits) -> None:
        def keepers() -> int:
            """Tests of the keeper itself have left some of theirs."""
            return sum(thread.name == "concurrency-keeper" for thread in threading.enumerate())

        keeper.ready()
        before = keepers()
        limits(file, RELOAD_INTERVAL=3600)
        for number in range(20):
            conf.current()
            with override_settings(CONCURRENCY_LIMIT={"POLICIES": str(file), "RELOAD_INTERVAL": 60 + number}):
                conf.current()
                assert looks() == 1
        assert keepers() == before

    def test_a_look_that_finds_its_setting_gone_is_the_last(self, file: Path, limits: Limits, caplog: Any) -> None:
        """Nobody has asked for the configuration meanwhile."""
        limits(file, RELOAD_INTERVAL=0.05)
        assert limit() == 5
        with override_settings(CONCURRENCY_LIMIT={"POLICIES": {"policies": {}}}):
            moved(file, text(2))
            assert wait_until(lambda: looks() == 0)
            assert conf._watch is None
        assert limit() == 2
        moved(file, text(3))
        assert wait_until(lambda: limit() == 3), "and it is looked after again"

    def test_settings_that_are_wrong_leave_the_others_watched(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.2)
        conf.current()
        with (
            override_settings(CONCURRENCY_LIMIT={"POLICIES": 5}),
            pytest.raises(conf.ConfigurationError),
        ):
            conf.current()
        moved(file, text(2))
        assert wait_until(lambda: limit() == 2)


class TestProcesses:
    """One thread in each, and none before a fork."""

    def test_threads_do_not_grow(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        conf.current()
        before = threading.active_count()
        for number in range(1, 11):
            moved(file, text(number))
            assert wait_until(lambda number=number: limit() == number)  # type: ignore[misc]
        assert wait_until(lambda: looks() == 1), "none is to come while one is being made"
        assert threading.active_count() == before

    def test_a_server_that_loads_the_site_starts_no_thread(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        ConcurrencyLimitMiddleware(lambda request: HttpResponse())
        assert looks() == 0
        moved(file, text(2), long_ago=True)
        assert limit() == 2, "the first request knows what is there now"
        assert wait_until(lambda: looks() == 1)

    def test_a_forked_child_looks_for_itself(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        conf.current()
        stores = conf.current().stores
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                moved(file, text(2), long_ago=True)
                first = limit() == 2 and conf.current().stores is stores and wait_until(lambda: looks() == 1)
                moved(file, text(3))
                code = 0 if first and wait_until(lambda: limit() == 3) else 2
            finally:
                os._exit(code)
        assert exit_code(pid) == 0
        assert wait_until(lambda: limit() == 3)

    def test_what_is_broken_at_a_fork_breaks_no_child(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        conf.current()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                moved(file, "policies: [")
                code = 0 if limit() == 5 else 2
            finally:
                os._exit(code)
        assert exit_code(pid) == 0

    def test_an_exit_looks_no_more(self, file: Path, run_python: Any) -> None:
        """All calls that the keeper has before it are made then."""
        program = f"""
from django.conf import settings
settings.configure(CONCURRENCY_LIMIT={{"POLICIES": {str(file)!r}, "RELOAD_INTERVAL": 60}})
from django_concurrency_mw import conf, reload
conf.current()
reload._stat = lambda loaded: print("looked")
"""
        done = run_python("-c", program)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestWhoReads:
    """Whoever asks for the configuration has the new one."""

    def test_a_decorator_that_starts_from_the_table(self, file: Path, limits: Limits) -> None:
        file.write_text(text(1, name="started-from", ttl=60))
        limits(file, RELOAD_INTERVAL=0.05)

        @concurrency_limit(policy="started-from", status=503)
        def view(request: HttpRequest) -> HttpResponse:
            (result,) = request.concurrency.policies  # type: ignore[attr-defined]
            return HttpResponse(str(result.limit))

        def answer() -> tuple[int, bytes]:
            response = view(RequestFactory().get("/"))
            return response.status_code, getattr(response, "content", b"")

        assert answer() == (200, b"1")
        moved(file, text(4, name="started-from", ttl=60))
        assert wait_until(lambda: answer() == (200, b"4"))
        moved(file, text(0, name="started-from", ttl=60))
        assert wait_until(lambda: answer()[0] == 503)

    def test_the_middleware(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        client = Client()
        assert client.get("/plain/").status_code == 200
        moved(file, text(0))
        assert wait_until(lambda: client.get("/plain/").status_code == 429)
        moved(file, text(0, exclude="[plain]"))
        assert wait_until(lambda: client.get("/plain/").status_code == 200)

    @pytest.mark.urls("tests.drf_urls")
    @pytest.mark.django_db(transaction=True)
    @pytest.mark.parametrize("path", ["/throttled/"])
    def test_the_throttle(self, file: Path, limits: Limits, path: str) -> None:
        from django.contrib.auth.models import User
        from rest_framework.authtoken.models import Token

        limits(file, RELOAD_INTERVAL=0.05)
        token = Token.objects.create(user=User.objects.create_user("someone"))
        client = Client(headers={"Authorization": f"Token {token.key}"})
        before = client.get(path).status_code
        moved(file, text(0))
        assert wait_until(lambda: client.get(path).status_code == 429)
        moved(file, text(1))
        assert wait_until(lambda: client.get(path).status_code == before)

    def test_the_system_checks(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05, middleware=[])
        assert "django_concurrency_mw.W001" in {message.id for message in run_checks()}
        moved(file, "policies: {}\n")
        assert wait_until(
            lambda: "django_concurrency_mw.W001" not in {message.id for message in run_checks(tags=["concurrency"])}
        )

    def test_the_counts_stay(self, file: Path, limits: Limits) -> None:
        limits(file, RELOAD_INTERVAL=0.05)
        Client().get("/plain/")
        config = conf.current()
        moved(file, text(2))
        assert wait_until(lambda: limit() == 2)
        assert conf.current().stores["default"] is get_backend("default", config.backends)


class TestRunserver:
    """Django's autoreloader watches the file, whatever RELOAD_INTERVAL says."""

    def watched(self) -> set[Path]:
        reloader = get_reloader()
        autoreload_started.send(sender=reloader)
        return set(reloader.extra_files)

    def test_the_file_is_watched(self, file: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
        limits(str(file))
        assert file in self.watched()
        monkeypatch.chdir(file.parent)
        limits("policies.yaml")
        assert file in self.watched()

    @pytest.mark.parametrize("setting", [{"POLICIES": {"policies": {}}}, {}, None, {"POLICIES": 5}])
    def test_where_there_is_none_nothing_is(self, setting: Any) -> None:
        with override_settings(CONCURRENCY_LIMIT=setting):
            assert not [file for file in self.watched() if "policies" in file.name]
