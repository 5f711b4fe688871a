"""`manage.py concurrency`: what people and programs read, options, exit codes, and what is wrong said clearly."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.auth.models import User
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.core.management.base import CommandError
from django.http import HttpRequest
from django.test import override_settings

from django_concurrency_mw import conf, decorated, hold
from django_concurrency_mw.backends import get_backend
from django_concurrency_mw.backends.base import Holder
from django_concurrency_mw.chain import AUTHENTICATION, SESSION
from django_concurrency_mw.console import SUBCOMMANDS, output
from django_concurrency_mw.decorated import leases, policies_in_use
from django_concurrency_mw.exceptions import PermanentBackendError
from django_concurrency_mw.keys import make_key, masked
from django_concurrency_mw.outcomes import Queued, Slot, Taken
from django_concurrency_mw.testing import hold_slots
from django_concurrency_mw.tokens import new_token

from .conftest import Run
from .queued import PATH, WAITING, standing
from .redis_server import RedisServer
from .servers import ROOT
from .support import OURS, SOON, Limits, backend_entry, named, wait_until
from .test_matching import Switchable, table

pytestmark = pytest.mark.urls("tests.matching_urls")


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and text. Raises: CommandError."""
    stream = io.StringIO()
    try:
        call_command("concurrency", *arguments, stdout=stream)
    except SystemExit as end:
        return int(end.code or 0), stream.getvalue()
    return 0, stream.getvalue()


def document(*arguments: str) -> tuple[int, Any]:
    """Exit code and JSON document."""
    code, text = command(*arguments, "--json")
    return code, json.loads(text)


@pytest.fixture(params=["memory", "host", "redis"])
def backend(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    """An entry of BACKENDS."""
    return backend_entry(request.param, request, prefix, tmp_path)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decorators of other tests, which ask this one's store for what it has not, are not there."""
    ours = WeakSet(limit for limit in decorated.limits if "urls.py:" in limit.place)
    monkeypatch.setattr(decorated, "limits", ours)


def raises(request: HttpRequest) -> bool:
    return bool(1 / 0)


class TestTheCommand:
    def test_a_broken_table_is_told_with_its_places(self, limits: Limits, tmp_path: Path) -> None:
        file = tmp_path / "policies.yaml"
        file.write_text("policies:\n  a: {url_names: [x], key: user, max_concurrent: ten}\n")
        limits(file)
        for name in ("policies", "holders", "ping"):
            with pytest.raises(CommandError, match=r"policies\.yaml:2:50: .*expected an integer") as raised:
                command(name)
            assert raised.value.returncode == 2

    def test_without_rich_there_is_json(self, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
        limits(table(p={}))
        monkeypatch.setitem(sys.modules, "rich.console", None)
        monkeypatch.setattr(output, "find_spec", lambda name: None)
        with hold_slots("p"), pytest.raises(CommandError, match=r"django_concurrency_mw\[cli\]") as raised:
            command("holders")
        assert raised.value.returncode == 2
        assert document("ping")[0] == 0
        assert "default: works" in command("ping")[1], "which prints no table"
        assert "Nobody holds a slot." in command("holders")[1]

    def test_a_subcommand_that_is_not_there(self) -> None:
        with pytest.raises(CommandError, match="invalid choice: 'explian'"):
            command("explian")

    def test_each_subcommand_is_documented_in_its_help(self) -> None:
        for name, module in SUBCOMMANDS.items():
            assert module.HELP, name

    def test_what_would_move_the_terminal_is_written_out(self, limits: Limits) -> None:
        """Paths and keys are the clients' own text; C1 codes too, and in JSON."""
        wild = "/\x1b]0;owned\x07\x1b[2J\x9b2J\u202e/"
        stream = io.StringIO()
        out = output.Output(output.OutputWrapper(stream), as_json=False)
        out.table(["a"], [[wild]], wild)
        out.line(wild)
        out.note(wild)
        output.Output(output.OutputWrapper(stream), as_json=True).document({"path": wild})
        text = stream.getvalue()
        assert text.count("\\x1b]0;owned\\x07") == 4
        assert not {each for each in text if not (each.isprintable() or each == "\n")}

    def test_djangos_own_options_behind_the_subcommand(self, run_python: Run) -> None:
        for place in (
            ("--settings", "tests.inspected_settings", "ping"),
            ("ping", "--settings", "tests.inspected_settings"),
        ):
            done = run_python("-m", "django", "concurrency", *place, "-v", "0", "--no-color")
            assert (done.returncode, "default: works" in done.stdout) == (0, True), done.stderr

    def test_a_pipe_gets_each_row_in_one_line(self, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COLUMNS")
        limits(table(**{"a" * 60: {}}))
        with hold_slots("a" * 60):
            assert re.search("^ *" + "a" * 60 + " .* hold_slots", command("holders")[1], re.MULTILINE)

    def test_a_crash_is_not_a_no(self, limits: Limits) -> None:
        limits(table(a={"url_names": ["*"], "when": named(raises)}), middleware=[OURS])
        with pytest.raises(CommandError, match="ZeroDivisionError") as raised:
            command("explain", "/told/")
        assert raised.value.returncode == 2

    def test_what_others_wrote_is_no_markup(self) -> None:
        """A path such as /[red]/ comes out as it is."""
        stream = io.StringIO()
        out = output.Output(output.OutputWrapper(stream), as_json=False)
        out.table(["a"], [["[red]x[/red]"]])
        out.line("[bold]y")
        assert "[red]x[/red]" in stream.getvalue()
        assert "[bold]y" in stream.getvalue()


class TestPing:
    def test_a_store_that_works(self, limits: Limits, backend: dict[str, Any]) -> None:
        limits(table(p={}), BACKENDS={"default": backend})
        code, found = document("ping")
        assert (code, found["ready"]) == (0, True)
        assert [(one["backend"], one["ok"]) for one in found["backends"]] == [("default", True)]
        assert re.match(r"default: works, [0-9.]+ ms", command("ping")[1])

    def test_one_that_does_not(self, limits: Limits) -> None:
        limits(
            table(p={}, q={"backend": "away"}),
            BACKENDS={
                "default": {"BACKEND": "memory"},
                "away": {"BACKEND": "redis", "LOCATION": "redis://:secret@127.0.0.1:1/0"},
            },
        )
        code, found = document("ping")
        assert (code, found["ready"]) == (1, False)
        assert [one["ok"] for one in found["backends"]] == [True, False]
        code, text = command("ping")
        assert code == 1
        assert "default: works" in text
        assert "away: " in text
        assert "secret" not in text + json.dumps(found)

    def test_a_cure(self, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
        limits(table(p={}), BACKENDS={"default": {"BACKEND": named(Switchable)}})

        def refused(self: Any) -> None:
            raise PermanentBackendError("no permission", cure="allow EVALSHA")

        monkeypatch.setattr(Switchable, "probe", refused)
        assert document("ping")[1]["backends"][0]["cure"] == "allow EVALSHA"
        assert "Cure: allow EVALSHA" in command("ping")[1]

    def test_no_policy(self, limits: Limits) -> None:
        limits()
        assert command("ping")[0] == 0


class TestPolicies:
    def test_for_programs(self, limits: Limits, backend: dict[str, Any]) -> None:
        limits(
            table(
                a={"url_names": ["report-*"], "exclude": ["report-status"], "methods": ["POST"], "max_concurrent": 2},
                b={"url_names": ["told", "page"], "key": "user", "per_key": {"user:7": 1}},
                c={"url_names": ["shop:list", "nothing"], "max_concurrent": None, "block": False},
                d={"max_concurrent": "tests.test_limits.two"},
                e={"cost": 2, "max_concurrent": 5},
            ),
            middleware=[OURS],
            BACKENDS={"default": backend},
        )
        with (
            hold_slots("a", n=2),
            hold_slots("b", "user:7"),
            hold_slots("b", "user:8"),
            hold_slots("c", n=9),
            hold_slots("e", n=4),
        ):
            code, found = document("policies", "--show-keys")
        assert code == 0
        told = {one["policy"]: one for one in found["policies"]}
        names = ("limit", "in_flight", "keys", "busiest", "at_limit")
        assert {policy: [told[policy][name] for name in names] for policy in told} == {
            "a": [2, 2, 1, 2, ["global"]],
            "b": [5, 2, 2, 1, ["user:7"]],
            "c": [None, 9, 1, 9, []],
            "d": ["tests.test_limits.two", 0, 0, 0, []],
            "e": [5, 4, 1, 4, ["global"]],
        }
        assert found["url_names"]["report-a"] == [{"policy": "a", "methods": "POST"}]
        assert found["url_names"]["report-status"] == []
        assert "report-status" in found["uncovered"]
        assert "told" not in found["uncovered"]
        # shop: is also reachable as second:, and the views are the same.
        assert {"policy": "c", "covered": "shop:list", "outside": "second:list"} in found["also_reachable"]
        assert [(one["pattern"], one["field"]) for one in found["unmatched"]] == [("nothing", "url_names")]

    def test_for_people(self, limits: Limits) -> None:
        limits(table(a={"url_names": ["tols"], "max_concurrent": 1}, b={"url_names": ["report-*"], "block": False}))
        with hold_slots("a"):
            text = command("policies")[1]
        assert re.search(r"^ *a +1 +1 +1 +1 +\S+ +gl~[0-9a-f]{8} ", text, re.MULTILINE), text
        assert re.search(r"^ *b \(shadow\) +5 +0 ", text, re.MULTILINE), text
        assert re.search(r"^ *report-a +b\b", text, re.MULTILINE), text
        assert "url_names 'tols' matches no URL; the nearest name is told." in text
        assert re.search(r"No policy covers: told,", text), text
        assert "counts in each process" in text

    def test_the_peak_of_a_long_name(self, limits: Limits, backend: dict[str, Any]) -> None:
        """A store may cut it."""
        name = "a" * 150
        limits(table(**{name: {}}), BACKENDS={"default": backend})
        get_backend("default", conf.current().backends).note({name: 4})
        assert document("policies")[1]["policies"][0]["peak"] == 4

    def test_reset_peak(self, limits: Limits, backend: dict[str, Any]) -> None:
        limits(table(a={}), BACKENDS={"default": backend})
        store = get_backend("default", conf.current().backends)
        store.note({"a": 4})
        assert document("policies")[1]["policies"][0]["peak"] == 4
        assert document("policies", "--reset-peak")[1]["policies"][0]["peak"] == 4
        assert document("policies")[1]["policies"][0]["peak"] in (None, 0)


class TestHolders:
    def test_filters(self, limits: Limits, backend: dict[str, Any]) -> None:
        limits(
            table(a={"key": "user"}, b={"key": "header:X-Tenant"}),
            BACKENDS={"default": backend},
        )
        code, nobody = document("holders")
        assert (code, nobody["holders"], nobody["failed"]) == (1, [], {})
        with hold_slots("a", "user:7"), hold_slots("a", "user:8"), hold_slots("b", "header:X-Tenant:acme"):
            code, found = document("holders")
            assert code == 0
            assert sorted(one["policy"] for one in found["holders"]) == ["a", "a", "b"]
            assert all("user" not in one["key"] for one in found["holders"]), "masked"
            assert document("holders", "--show-keys", "--key", "user:8")[1]["holders"][0]["key"] == "user:8"
            assert len(document("holders", "--policy", "a")[1]["holders"]) == 2
            assert len(document("holders", "--policy", "b", "--key", "header:X-Tenant:acme")[1]["holders"]) == 1
            assert len(document("holders", "--key", masked("user:8"))[1]["holders"]) == 1
            assert document("holders", "--key", "user:9")[0] == 1
            assert document("holders", "--older-than", "1h")[0] == 1
            assert len(document("holders", "--older-than", "0")[1]["holders"]) == 3
            text = command("holders")[1]
        assert len(re.findall(r"hold_slots\(\)", text)) == 3
        assert "Nobody holds a slot." in command("holders")[1]

    def test_watch(self) -> None:
        """A document each time, until Ctrl-C, which is no failure."""
        environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.inspected_settings", "PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONUNBUFFERED", None)
        command = [sys.executable, "-m", "django", "concurrency", "holders", "--watch", "0.1", "--json"]
        started = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            # Whoever runs the tests in the background may have told them to ignore it, which a child inherits.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with started as process:
            assert process.stdout is not None
            assert [json.loads(process.stdout.readline())["holders"] for _ in range(3)] == [[]] * 3
            process.send_signal(signal.SIGINT)
            assert process.wait(SOON) == 0

    def test_what_is_wrong(self, limits: Limits) -> None:
        limits(table(exports={}))
        with pytest.raises(CommandError, match="no such policy; did you mean 'exports'"):
            command("holders", "--policy", "export")
        with pytest.raises(CommandError, match="expected seconds such as 90"):
            command("holders", "--older-than", "yesterday")

    def test_watch_too_often(self, limits: Limits) -> None:
        limits(table(p={}))
        with pytest.raises(CommandError, match=r"at least 0\.1 seconds"):
            command("holders", "--watch", "0")

    def test_a_store_that_is_away(self, limits: Limits) -> None:
        """The others are asked all the same; nobody anywhere, but not everywhere was looked, is no answer."""
        away = {"BACKEND": "redis", "LOCATION": "redis://127.0.0.1:1/0"}
        limits(table(p={}, q={"backend": "away"}), BACKENDS={"default": {"BACKEND": "memory"}, "away": away})
        with hold_slots("p"):
            code, found = document("holders")
            assert (code, [one["policy"] for one in found["holders"]]) == (0, ["p"])
            assert "refused" in found["failed"]["away"]
            assert "Note: backend away cannot be asked: " in command("holders")[1]
            told = {one["policy"]: one for one in document("policies")[1]["policies"]}
            assert (told["p"]["in_flight"], told["q"]["in_flight"]) == (1, None)
            text = command("policies")[1]
            assert re.search(r"^ *q +5 +\? +\? +\? ", text, re.MULTILINE), text
            assert "backend away cannot be asked" in text
        with pytest.raises(CommandError, match=r"backend away cannot be asked: .*refused") as raised:
            command("holders")
        assert raised.value.returncode == 2

    def test_a_policy_that_is_not_in_the_table_any_more(self, limits: Limits, prefix: str, tmp_path: Path) -> None:
        backend = {"BACKEND": "host", "KEY_PREFIX": prefix, "OPTIONS": {"path": str(tmp_path / "table"), "slots": 64}}
        limits(table(old={}), BACKENDS={"default": backend})
        with (
            hold_slots("old"),
            override_settings(CONCURRENCY_LIMIT={"POLICIES": table(new={}), "BACKENDS": {"default": backend}}),
        ):
            assert [one["policy"] for one in document("holders", "--policy", "old")[1]["holders"]] == ["old"]

    def test_a_table_that_nobody_has_made(self, limits: Limits, prefix: str, tmp_path: Path) -> None:
        """Another user's or another settings module's site has another one: that is said, not guessed."""
        path = tmp_path / "table"
        limits(table(p={}), BACKENDS={"default": {"BACKEND": "host", "OPTIONS": {"path": str(path), "slots": 64}}})
        code, found = document("holders")
        assert (code, str(path) in found["notes"][0]) == (1, True)
        assert "no process of this user and this settings module has used it" in command("holders")[1]
        with hold_slots("p"):
            assert document("holders")[1]["notes"] == []

    @pytest.mark.parametrize(
        ("age", "left", "marks"),
        [
            (1.0, 59.0, ""),
            (19.9, 40.2, ""),
            (50.0, 45.0, ""),
            (61.0, 55.0, "overran"),
            (30.0, 30.0, "not renewed"),
            (90.0, 12.0, "not renewed"),
        ],
    )
    def test_marks(self, limits: Limits, monkeypatch: pytest.MonkeyPatch, age: float, left: float, marks: str) -> None:
        """With a ttl of 60 a renewal is due every 20 seconds."""
        limits(table(p={"ttl": 60}), BACKENDS={"default": {"BACKEND": named(Switchable)}})
        holder = Holder("p", "global", "token-1", age, left)
        monkeypatch.setattr(Switchable, "snapshot", lambda self: [holder])
        found = document("holders")[1]["holders"][0]
        assert (found["overran"], found["not_renewed"]) == (marks == "overran", marks == "not renewed")
        assert marks in command("holders")[1]

    @pytest.mark.parametrize(
        ("fields", "left"), [({"ttl": 60, "max_age": 10}, 9.99), ({"ttl": 60}, 59.9), ({"ttl": 5, "renew": False}, 4.9)]
    )
    def test_a_new_holder_has_no_mark(
        self, limits: Limits, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], left: float
    ) -> None:
        """Where the store does not know how long its lease was."""
        limits(table(p=fields), BACKENDS={"default": {"BACKEND": named(Switchable)}})
        monkeypatch.setattr(Switchable, "snapshot", lambda self: [Holder("p", "global", "token-1", 0.01, left)])
        assert document("holders")[1]["holders"][0]["not_renewed"] is False

    @pytest.mark.urls("tests.decorated_urls")
    def test_a_name_with_several_leases_has_no_mark(self, limits: Limits) -> None:
        """Nobody knows which of them the holder has."""
        limits(table(**{"from-table": {"ttl": 50}}), BACKENDS={"default": {"BACKEND": named(Switchable)}})
        known = policies_in_use(conf.current())
        assert set(leases(known)) >= {"from-table", "shared"}
        assert leases({"p": [known["from-table"][0], known["shared"][0]]}) == {"p": None}

    def test_renewed_and_not(self, limits: Limits) -> None:
        """Of real holders: one that is renewed past its ttl, and one whose lease runs out as it stands."""
        limits(table(kept={"ttl": 2}, short={"ttl": 60, "renew": False}, ending={"ttl": 5, "renew": False}))
        with hold("kept", key="global"), hold("short", key="global"), hold("ending", key="global"):

            def marks() -> dict[str, tuple[bool, bool]]:
                rows = document("holders")[1]["holders"]
                return {row["policy"]: (row["overran"], row["not_renewed"]) for row in rows}

            assert set(marks().values()) == {(False, False)}
            assert wait_until(lambda: marks().get("kept") == (True, False))
            assert wait_until(lambda: marks().get("ending") == (False, True))
            assert marks()["short"] == (False, False)


@pytest.fixture(params=WAITING)
def lining(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
    """An entry of BACKENDS for a store that lets wait."""
    return backend_entry(request.param, request, prefix, tmp_path)


class TestLines:
    @pytest.fixture(autouse=True)
    def line(self, limits: Limits, lining: dict[str, Any]) -> Any:
        """User 7 holds the only slot of `a`, and two wait for it; one waits for `b`."""
        limits(
            table(
                a={"url_names": ["told"], "key": "user", "max_concurrent": 1, "wait": 2, "max_waiting": 3},
                b={"max_concurrent": 1, "wait": "500ms"},
                c={},
            ),
            middleware=[OURS],
            BACKENDS={"default": lining},
        )
        store = get_backend("default", conf.current().backends)
        store.note({})  # which its keeper would do a little later: who this process is
        with (
            hold_slots("a", "user:7"),
            standing(store, "a", "user:7", 2),
            hold_slots("b"),
            standing(store, "b", "global"),
        ):
            yield

    def test_who_waits_is_shown_with_place_and_time_and_a_masked_key(self) -> None:
        code, found = document("holders")
        assert code == 0
        told = [(one["policy"], one["key"], one["place"], one["path"]) for one in found["waiting"]]
        mine = masked("user:7")
        assert told == [("a", mine, 1, PATH), ("a", mine, 2, PATH), ("b", masked("global"), 1, PATH)]
        assert all(
            0 <= one["age"] < 30 and one["pid"] == os.getpid() and one["backend"] == "default"
            for one in found["waiting"]
        )
        assert len({one["token"] for one in found["waiting"]}) == 3
        assert {one["token"] for one in found["waiting"]}.isdisjoint(one["token"] for one in found["holders"])
        text = command("holders")[1]
        assert "3 wait in line" in text
        assert re.search(
            rf"^ *a +{re.escape(mine)} +2 +[0-9.]+ s +1 +\S+ +{os.getpid()} +{PATH} ", text, re.MULTILINE
        ), text
        assert "user:7" not in text
        assert re.search(r"^ *a +user:7 +1 +", command("holders", "--show-keys")[1], re.MULTILINE)

    def test_one_who_is_let_in_between_the_two_looks_is_seen_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And holds then: whatever is looked at first."""
        store = get_backend("default", conf.current().backends)
        asked = Slot("c", make_key("global"), 1, 60.0, new_token(), waits=True)
        bell = store.bell()
        full = ExitStack()
        full.enter_context(hold_slots("c"))
        assert isinstance(store.queue((asked,), (5,), bell), Queued)
        looks: list[str] = []
        inner = {name: getattr(store, name) for name in ("waiters", "snapshot")}

        def look(name: str) -> Any:
            seen = inner[name]()
            looks.append(name)
            if len(looks) == 1:
                full.close()
                assert wait_until(lambda: isinstance(store.queue((asked,), (5,), bell), Taken))
            return seen

        for name in inner:
            monkeypatch.setattr(store, name, partial(look, name))
        found = document("holders", "--policy", "c")[1]
        assert [[one["token"] for one in found[part]] for part in ("holders", "waiting")] == [[asked.token], []]
        assert set(looks) == set(inner)
        store.give((asked,))
        bell.close()

    def test_the_filters_are_for_them_too(self) -> None:
        assert [one["policy"] for one in document("holders", "--policy", "b")[1]["waiting"]] == ["b"]
        assert [one["place"] for one in document("holders", "--key", "user:7")[1]["waiting"]] == [1, 2]
        assert document("holders", "--key", "user:8")[0] == 1
        assert document("holders", "--older-than", "1h")[1]["waiting"] == []

    @pytest.mark.parametrize("terminal", [False, True], ids=["a pipe", "a terminal"])
    def test_the_watch_shows_them(self, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
        def interrupted(seconds: float) -> None:
            raise KeyboardInterrupt

        clock = SimpleNamespace(sleep=interrupted, strftime=time.strftime)
        monkeypatch.setattr("django_concurrency_mw.console.holders.time", clock)
        stream = io.StringIO()
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        call_command("concurrency", "holders", "--watch", stdout=stream)
        text = stream.getvalue()
        assert "2 holders at" in text
        assert text.index("2 holders at") < text.index("3 wait in line")
        assert text.count(PATH) == (6 if terminal else 3), "at the end it is drawn once more"
        assert ("\x1b[" in text) == terminal

    def test_one_who_waits_is_not_evicted(self, lining: dict[str, Any]) -> None:
        """Not by `--evict`: the line goes on as it stands."""
        token = document("holders")[1]["waiting"][0]["token"]
        if lining["BACKEND"] == "memory":  # where nobody is evicted at all
            with pytest.raises(CommandError, match="counts in each process"):
                command("holders", "--evict", token, "--yes")
        else:
            code, text = command("holders", "--evict", token, "--yes")
            assert (code, f"{token} waits and holds no slot yet" in text) == (1, True)
        assert len(document("holders")[1]["waiting"]) == 3

    def test_a_policy_says_how_long_it_lets_wait_and_how_many_do(self) -> None:
        told = {
            one["policy"]: (one["wait"], one["max_waiting"], one["waiting"])
            for one in document("policies")[1]["policies"]
        }
        assert told == {"a": (2.0, 3, 2), "b": (0.5, 100, 1), "c": (0.0, 100, 0)}
        text = command("policies")[1]
        assert re.search(r"^ *a .* 2 s +2 of 3/key ", text, re.MULTILINE), text
        assert re.search(r"^ *c .* - +- ", text, re.MULTILINE), text

    @pytest.mark.django_db
    def test_explain_says_at_which_place_and_for_how_long(self, limits: Limits) -> None:
        user = User.objects.create(pk=7, username="ada")
        code, text = command("explain", "/told/", "--user", str(user.pk))
        assert code == 0
        assert re.search(r"^ *a +middleware +user:7 +1 +1 +2 +1 +waits, place 3 ", text, re.MULTILINE), text
        assert "Now: it would wait in line (a, place 3) for at most 2 s, and be let in when it is its turn." in text
        assert "4 threads wait already (MAX_SYNC_WAITERS)" in text
        found = document("explain", "/told/", "--user", "7")[1]
        assert (found["admitted"], found["waits"], found["rejection"]) == (True, 2.0, None)
        told = [(one["waiting"], one["place_in_line"]) for one in found["policies"] if one["applies"]]
        assert told == [(2, 3)]
        with standing(get_backend("default", conf.current().backends), "a", "user:7"):
            code, text = command("explain", "/told/", "--user", "7")
            assert (code, "Now: 429 queue_full (a), Retry-After by the pace of the line." in text) == (1, True), text
            assert document("explain", "/told/", "--user", "7")[1]["rejection"]["retry_after"] == [1, 120]
        code, found = document("explain", "/told/")
        assert (code, found["waits"]) == (0, 0), "another key"

    def test_explain_says_that_no_thread_waits(self, limits: Limits, lining: dict[str, Any]) -> None:
        one = {"url_names": ["told"], "max_concurrent": 1, "wait": 2}
        limits(table(b=one), middleware=[OURS], BACKENDS={"default": lining}, MAX_SYNC_WAITERS=0)
        code, text = command("explain", "/told/")
        assert (code, "MAX_SYNC_WAITERS is 0: it waits on an event loop only" in text) == (0, True), text


class TestEvict:
    @pytest.fixture(params=["host", "redis"])
    def backend(self, request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> dict[str, Any]:
        """A command's own process holds nothing in the memory store: see test_memory."""
        return backend_entry(request.param, request, prefix, tmp_path)

    @pytest.fixture
    def token(self, limits: Limits, backend: dict[str, Any]) -> Any:
        """Of somebody who holds the only slot there is."""
        limits(table(p={"max_concurrent": 1}), BACKENDS={"default": backend})
        with hold_slots("p"):
            yield document("holders")[1]["holders"][0]["token"]

    def test_it_asks_and_says_what_it_means(self, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for answer in ("", "n", "no", "maybe"):
            monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
            code, text = command("holders", "--evict", token)
            assert code == 1
            assert "runs on without a slot" in text
            assert "Nobody was evicted." in text
        assert len(document("holders")[1]["holders"]) == 1
        monkeypatch.setattr("builtins.input", lambda _: "y")
        code, text = command("holders", "--evict", token)
        assert (code, f"Evicted: {token}" in text) == (0, True)
        assert document("holders")[0] == 1

    def test_no_terminal_is_no_answer(self, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def closed(_: str) -> str:
            raise EOFError

        monkeypatch.setattr("builtins.input", closed)
        assert command("holders", "--evict", token)[0] == 1
        with pytest.raises(CommandError, match="--yes"):
            document("holders", "--evict", token)
        assert len(document("holders")[1]["holders"]) == 1

    @pytest.mark.parametrize("pattern", ["*", "?*", "[0-9a-f]*", "", "0123456789abcdef-*", "0123456789abcdef"])
    def test_a_pattern_is_no_token(self, token: str, backend: dict[str, Any], pattern: str) -> None:
        with pytest.raises(CommandError, match="expected a token as `holders` shows it"):
            command("holders", f"--evict={pattern}", "--yes")
        assert get_backend("default", conf.current().backends).evict(pattern) is False
        assert len(document("holders")[1]["holders"]) == 1

    def test_a_token_that_nobody_has(self, token: str) -> None:
        assert command("holders", "--evict", "0123456789abcdef-1", "--yes")[0] == 1
        assert len(document("holders")[1]["holders"]) == 1

    def test_memory(self, limits: Limits) -> None:
        limits(table(p={}))
        with pytest.raises(CommandError, match="counts in each process"):
            command("holders", "--evict", "0123456789abcdef-1", "--yes")


@pytest.mark.django_db
class TestExplain:
    def test_for_people(self, limits: Limits) -> None:
        limits(
            table(
                a={"url_names": ["told"], "max_concurrent": 1, "response_callback": "tests.views.plain"},
                b={"url_names": ["report-*"]},
                c={"url_names": ["*"], "methods": ["POST"]},
                d={"url_names": ["*"], "exclude": ["told"]},
                e={},
                f={"url_names": ["*"], "when": "staff"},
                g={"url_names": ["*"], "except_ips": ["127.0.0.0/8"]},
                h={"url_names": ["*"], "key": "header:X-Tenant", "missing": "skip"},
            ),
            middleware=[OURS],
        )
        with hold_slots("a"):
            code, text = command("explain", "/told/")
        assert code == 1
        assert "GET /told/ is told" in text
        assert re.search(r"^ *a +middleware +global +1 +1 +1 +rejects: full ", text, re.MULTILINE), text
        for policy, reason in {
            "b": "url_names: none of report-* is told",
            "c": "methods: POST only",
            "d": "exclude: told has told",
            "e": "no url_names: only for policy= and hold()",
            "f": "when: the request is not staff",
            "g": "except_ips: the address is in 127.0.0.0/8",
            "h": "key: header:X-Tenant has no value here",
        }.items():
            assert re.search(rf"^ *{policy} +{re.escape(reason)}", text, re.MULTILINE), (policy, text)
        assert "Now: 429 full (a), Retry-After of 1 to 5 seconds, answered by tests.views.plain." in text
        assert "counts in each process" in text
        code, text = command("explain", "/told/")
        assert (code, "Now: it would be let in." in text) == (0, True)

    def test_who_asks(self, limits: Limits, django_user_model: type[User]) -> None:
        user = django_user_model.objects.create(username="ada", is_staff=True)
        limits(
            table(
                u={"url_names": ["*"], "key": "user"},
                t={"url_names": ["*"], "key": "{user.username}:{header.X-Tenant}", "missing": "skip"},
                s={"url_names": ["*"], "key": "session", "missing": "skip"},
                p={"url_names": ["page"], "key": "{kwargs.pk}:{get.page}:{method}"},
            ),
            middleware=[OURS],
        )
        session = SessionStore()
        session["a"] = 1
        session.save()

        def keys(*arguments: str) -> dict[str, str]:
            found = document("explain", *arguments)[1]
            return {one["policy"]: one["key"] for one in found["policies"] if one["applies"]}

        assert keys("/told/") == {"u": "ip:127.0.0.1"}
        assert keys("/told/", "--ip", "203.0.113.7") == {"u": "ip:203.0.113.7"}
        assert keys("/told/", "--user", str(user.pk), "--header", "X-Tenant: acme")["u"] == f"user:{user.pk}"
        assert keys("/told/", "--user", str(user.pk), "--header", "X-Tenant: acme")["t"].startswith("ada:")
        assert keys("/told/", "--session", session.session_key or "")["s"].startswith("session:")
        assert "s" not in keys("/told/", "--session", "made-up")
        assert keys("/page/7/?page=2", "--method", "post")["p"] == "7:2:POST"
        with pytest.raises(CommandError, match="there is no such user"):
            command("explain", "/told/", "--user", "4711")

    @pytest.mark.parametrize("why", ["another key", "an old hash"])
    def test_the_session_stays_as_it_is(self, limits: Limits, settings: Any, why: str) -> None:
        """To find out who is logged in, Django would give it a new key, or end it."""
        user = User.objects.create(username="ada")
        limits(table(u={"url_names": ["*"], "key": "user"}), middleware=[SESSION, AUTHENTICATION, OURS])
        session = SessionStore()
        session[SESSION_KEY], session[BACKEND_SESSION_KEY] = str(user.pk), settings.AUTHENTICATION_BACKENDS[0]
        session[HASH_SESSION_KEY] = user.get_session_auth_hash() if why == "another key" else "of another password"
        session.save()
        if why == "another key":
            settings.SECRET_KEY_FALLBACKS, settings.SECRET_KEY = [settings.SECRET_KEY], "new"
        before = list(Session.objects.values_list())
        found = document("explain", "/told/", "--session", session.session_key or "")[1]
        assert found["policies"][0]["key"] == (f"user:{user.pk}" if why == "another key" else "ip:127.0.0.1")
        assert list(Session.objects.values_list()) == before

    def test_a_user_whom_no_middleware_sets(self, limits: Limits) -> None:
        User.objects.create(pk=7, username="ada")
        limits(table(u={"url_names": ["*"], "key": "user"}), middleware=[OURS])
        assert "AuthenticationMiddleware is not in MIDDLEWARE" in command("explain", "/told/", "--user", "7")[1]
        limits(table(u={"url_names": ["*"], "key": "user"}), middleware=[SESSION, AUTHENTICATION, OURS])
        assert "AuthenticationMiddleware" not in command("explain", "/told/", "--user", "7")[1]

    @pytest.mark.urls("tests.drf_urls")
    def test_a_view_that_knows_its_users_by_token(self, limits: Limits) -> None:
        limits(table(u={"url_names": ["*"], "key": "user"}), middleware=[OURS])
        assert "knows a token's user inside the view only" in command("explain", "/bare/")[1]
        assert "knows a token's user" not in command("explain", "/throttled/")[1]
        assert "knows a token's user" not in command("explain", "/sessions/")[1]

    def test_what_cannot_be_explained(self, limits: Limits) -> None:
        limits(table(a={"url_names": ["*"]}), middleware=[OURS])
        with pytest.raises(CommandError, match="/nowhere/: no URL pattern matches"):
            command("explain", "/nowhere/")
        with pytest.raises(CommandError, match="expected a path that begins with /"):
            command("explain", "told/")
        with pytest.raises(CommandError, match="expected 'NAME: VALUE'"):
            command("explain", "/told/", "--header", "X-Tenant")

    def test_a_path_with_its_language(self, limits: Limits) -> None:
        limits(table(a={"url_names": ["greeting"]}), middleware=[OURS])
        for language in ("en", "de"):
            assert document("explain", f"/{language}/greeting/")[1]["view_name"] == "greeting"

    def test_where_nothing_limits(self, limits: Limits) -> None:
        limits(table(a={"url_names": ["*"], "max_concurrent": 0}), middleware=[])
        code, text = command("explain", "/told/")
        assert (code, "is not in MIDDLEWARE" in text) == (0, True)
        limits(table(a={"url_names": ["*"], "max_concurrent": 0}), middleware=[OURS], ENABLED=False)
        code, text = command("explain", "/told/")
        assert (code, "ENABLED is False" in text) == (0, True)

    def test_it_changes_nothing(self, limits: Limits, redis_server: RedisServer, prefix: str) -> None:
        backend = {
            "BACKEND": "redis",
            "KEY_PREFIX": prefix,
            "LOCATION": redis_server.url,
            "OPTIONS": {"socket_timeout": 5},
        }
        limits(table(a={"url_names": ["*"]}, b={"url_names": ["*"], "key": "ip"}), BACKENDS={"default": backend})
        with redis_server.client() as client:
            before = client.dbsize()
            client.config_resetstat()
            assert document("explain", "/told/")[0] == 0
            stats = {name for name in client.info("commandstats") if not name.startswith("cmdstat_config")}
            assert client.dbsize() == before
        assert not {name for name in stats if re.search("zadd|zrem|set$|del|expire|evalsha", name)}, stats

    @pytest.mark.parametrize(
        ("mode", "code", "note"),
        [("local", 0, "each process counts by itself"), ("allow", 0, "fails"), ("deny", 1, "fails")],
    )
    def test_a_store_that_fails(self, limits: Limits, mode: str, code: int, note: str) -> None:
        limits(
            table(a={"url_names": ["*"]}),
            middleware=[OURS],
            BACKENDS={"default": {"BACKEND": "redis", "LOCATION": "redis://127.0.0.1:1/0"}},
            ON_BACKEND_ERROR=mode,
        )
        found_code, found = document("explain", "/told/")
        assert found_code == code
        assert any(note in one for one in found["notes"])
        assert (found["rejection"] or {}).get("reason") == ("backend_unavailable" if mode == "deny" else None)
