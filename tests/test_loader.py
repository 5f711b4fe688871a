"""The policy file: good ones, and what is said about every kind of broken one, with its place and the cure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_concurrency_mw.document import DEPTH_LIMIT, load_yaml
from django_concurrency_mw.exceptions import ConfigurationError
from django_concurrency_mw.loader import SETTING, load_policies

#: Four good lines; a case adds its own from line 5 on.
GOOD = "policies:\n  exports:\n    key: user\n    max_concurrent: 5\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str | bytes, name: str = "policies.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def problems(source: Any, **options: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_policies(source, **options)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems), "one problem is one line"
    return lines


FIELD = "policies.exports."
BROKEN: dict[str, tuple[str | bytes, str, str]] = {
    # What the file cannot be read for: reported alone.
    "empty": ("", "1:1: ", "policies: {}"),
    "only comments": ("# nothing\n\n", "1:1: ", "the file is empty"),
    "a list at the top": ("- a\n", "1:1: ", "expected a mapping at the top"),
    "two documents": (GOOD + "---\na: b\n", "5:1: ", "remove the ---"),
    "a star unquoted": (GOOD + "    url_names: [*]\n", "5:17: ", 'quoted: "*"'),
    "a star and a name": (GOOD + "    url_names: [a, *:export]\n", "5:20: ", 'quoted: "*:export"'),
    "an unknown alias": (GOOD + "    url_names: [*export]\n", "5:17: ", 'quoted: "*export"'),
    "an exclamation mark": (GOOD + "    url_names: [!x]\n", "5:17: ", 'quoted: "!x"'),
    "an at sign": (GOOD + "    url_names: [@x]\n", "5:17: ", 'quoted: "@x"'),
    "a percent sign": (GOOD + "    backend: %x\n", "5:14: ", 'quoted: "%x"'),
    "a template unquoted": (GOOD + "    x: {ip}:{kwargs.pk}\n", "5:12: ", 'quoted: "{ip}:{kwargs.pk}"'),
    "a tab": (GOOD + "\tttl: 60\n", "5:1: ", "use spaces"),
    "a colon in text": (GOOD + "    backend: a: b\n", "5:15: ", 'with ": " in it is quoted'),
    "wrong indentation": (GOOD + "   ttl: 60\n", "5:4: ", "indented"),
    "an open quotation mark": (GOOD + '    backend: "a\n', "5:14: ", "never closed"),
    "an open bracket": (GOOD + "    methods: [GET\n", "5:14: ", "never closed"),
    "a NUL": (GOOD + "    backend: a\x00b\n", "5:15: ", "U+0000 is not allowed"),
    "not UTF-8": (GOOD.encode() + b"    backend: caf\xe9\n", "5:17: ", "save the file as UTF-8"),
    "a character beyond Unicode": (GOOD + '    backend: "\\U00110000"\n', "5:17: ", "cannot be read as YAML"),
    "an alias inside itself": ("policies: &a {b: *a}\n", "1:18: ", "would never end"),
    "too deep": ("x-y: " + "[" * 60, f"1:{5 + DEPTH_LIMIT}: ", "nested more than"),
    # What leaves the rest readable.
    "a policy twice": (GOOD + "  exports: {}\n", "5:3: policies.exports: ", "the first is at policies.yaml:2:3"),
    "a field twice": (GOOD + "    key: ip\n", f"5:5: {FIELD}key: ", "the first is at policies.yaml:3:5"),
    "two merges": (
        "x-a: &a {ttl: 5}\n" + GOOD + "    <<: *a\n    <<: *a\n",
        "7:5: policies.exports: ",
        "<<: [*a, *b]",
    ),
    "a merge of no mapping": (GOOD + "    <<: 3\n", "5:9: policies.exports: ", "<<: *common"),
    "a number as a key": (GOOD + "    1: 2\n", "5:5: policies.exports: ", 'quote it: "1"'),
    "null as a key": (GOOD + "    null: 2\n", "5:5: policies.exports: ", 'quote it: "null"'),
    "true as a policy": (GOOD + "  true: {}\n", "5:3: policies: ", 'quote it: "true"'),
    "a list as a key": (GOOD + "    ? [a]\n    : b\n", "5:7: policies.exports: ", "a key must be text"),
    "a Python tag": (GOOD + "    when: !!python/name:os.system x\n", f"5:11: {FIELD}when: ", "not allowed"),
    "a tag of one's own": (GOOD + "    when: !foo staff\n", f"5:11: {FIELD}when: ", 'quoted: "!foo"'),
    "a set": (GOOD + "    methods: !!set {GET}\n", f"5:14: {FIELD}methods: ", "!!set is not allowed"),
    "a wrong core tag": (GOOD + "    ttl: !!int x\n", f"5:10: {FIELD}ttl: ", "remove the tag"),
    "octal": (GOOD + "    ttl: 010\n", f"5:10: {FIELD}ttl: ", "010 is ambiguous (octal in YAML 1.1): write 10 or 8"),
    "a leading zero": (GOOD + "    ttl: 09\n", f"5:10: {FIELD}ttl: ", "write 9"),
    "hexadecimal": (GOOD + "    ttl: 0x1F\n", f"5:10: {FIELD}ttl: ", "write 31"),
    "new octal": (GOOD + "    ttl: 0o17\n", f"5:10: {FIELD}ttl: ", "write 15"),
    "an underscore": (GOOD + "    ttl: 1_000\n", f"5:10: {FIELD}ttl: ", "write 1000"),
    "sixties": (GOOD + "    ttl: 1:30\n", f"5:10: {FIELD}ttl: ", "write 90"),
    "not a number": (GOOD + "    ttl: .nan\n", f"5:10: {FIELD}ttl: ", "finite"),
    "infinity": (GOOD + "    max_age: .inf\n", f"5:14: {FIELD}max_age: ", "finite"),
    "a date": (GOOD + "    ttl: 2024-01-01\n", f"5:10: {FIELD}ttl: ", "got '2024-01-01'"),
    "no as text": (GOOD + "    block: no\n", f"5:12: {FIELD}block: ", "expected true or false, got 'no'"),
    "on as a key": (GOOD + "    on: 1\n", f"5:5: {FIELD}on: ", "unknown field"),
    "a template as a mapping": (
        GOOD.replace("user", "{user.pk}"),
        f"3:10: {FIELD}key: ",
        'such as "{user.pk}"',
    ),
    "a wrong value": (
        GOOD.replace("5", "ten"),
        f"4:21: {FIELD}max_concurrent: ",
        "expected an integer >= 0, null, or a dotted path such as 'shop.limits.of_plan', got 'ten'",
    ),
    "an empty value": (GOOD + "    ttl:\n", f"5:5: {FIELD}ttl: ", "got null"),
    "an unknown field": (GOOD + "    max_ages: 1\n", f"5:5: {FIELD}max_ages: ", "did you mean 'max_age'?"),
    "a wait that is no duration": (GOOD + "    wait: long\n", f"5:11: {FIELD}wait: ", "'90s'"),
    "a cost that is no number": (GOOD + "    cost: x\n", f"5:11: {FIELD}cost: ", "from 1 to 1000"),
    "a key that no request has": (
        GOOD + "    per_key: {user:1: 2, '42': 9}\n",
        f"5:26: {FIELD}per_key.42: ",
        "'42' is no key of key: user; those look like 'user:42'",
    ),
    "a text for a list": (GOOD + "    url_names: a\n", f"5:16: {FIELD}url_names: ", 'write ["a"]'),
    "a wrong entry": (GOOD + "    url_names:\n      - a\n      - 3\n", f"7:9: {FIELD}url_names[1]: ", "got 3"),
    "no key": ("policies:\n  a:\n    max_concurrent: 1\n", "2:3: policies.a: ", "key is required, such as key: user"),
    "no limit": ("policies: {a: {key: ip}}\n", "1:12: policies.a: ", "max_concurrent: 5"),
    "a shadow that rejects": (
        GOOD + "    block: false\n    missing: reject\n",
        f"6:14: {FIELD}missing: ",
        "remove missing, or write block: true",
    ),
    "a shadow that waits": (GOOD + "    block: false\n    wait: 2\n", f"6:11: {FIELD}wait: ", "remove wait, or write"),
    "a shadow that waits by default": (
        "defaults: {wait: 500ms}\n" + GOOD + "    block: false\n",
        f"6:12: {FIELD}block: ",
        "remove wait, or write block: true",
    ),
    "a shadow that denies by default": (
        "defaults: {on_backend_error: deny}\n" + GOOD + "    block: false\n",
        f"6:12: {FIELD}block: ",
        "remove on_backend_error",
    ),
    "a policy that is no mapping": ("policies:\n  a: 5\n", "2:6: policies.a: ", "the fields of a policy"),
    "an empty policy": ("policies:\n  a:\n", "2:3: policies.a: ", "the fields of a policy"),
    "policies that are no mapping": ("policies: [a]\n", "1:11: policies: ", "expected a mapping"),
    "a name with a space": (GOOD.replace("exports", "all exports"), "2:3: policies.'all exports': ", "'all-exports'"),
    "no policies": ("version: 1\n", "1:1: ", "policies: {}"),
    "an unknown name at the top": (GOOD + "default: {}\n", "5:1: default: ", "did you mean 'defaults'?"),
    "another version": ("version: 2\n" + GOOD, "1:10: version: ", "expected 1"),
    "a version in quotes": ('version: "1"\n' + GOOD, "1:10: version: ", "expected 1"),
    "an unknown default": ("defaults: {tl: 5}\n" + GOOD, "1:12: defaults.tl: ", "did you mean 'ttl'?"),
    "a wrong default": ("defaults: {ttl: x}\n" + GOOD, "1:17: defaults.ttl: ", "'90s'"),
    "a contradicting default": (
        "defaults: {block: false, missing: reject}\n" + GOOD,
        "1:35: defaults.missing: ",
        "remove missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line_with_its_place_and_the_cure(case: str) -> None:
    text, place, cure = BROKEN[case]
    [line] = problems(write(text))
    assert line.startswith(f"policies.yaml:{place}")
    assert cure in line
    assert len(line) < 400


def test_everything_wrong_is_reported_at_once() -> None:
    text = """\
version: 3
defaults: {ttl: soon, colour: red}
policys: {}
policies:
  exports: {key: usr, max_concurrent: ten, ttl: 010}
  "a b": {key: ip, max_concurrent: 1}
  empty: {}
"""
    assert [line.split(": ")[0] + ": " + line.split(": ")[1] for line in problems(write(text))] == [
        "policies.yaml:5:49: policies.exports.ttl",
        "policies.yaml:3:1: policys",
        "policies.yaml:1:10: version",
        "policies.yaml:2:17: defaults.ttl",
        "policies.yaml:2:23: defaults.colour",
        "policies.yaml:5:18: policies.exports.key",
        "policies.yaml:5:39: policies.exports.max_concurrent",
        "policies.yaml:6:3: policies.'a b'",
        "policies.yaml:7:3: policies.empty",
        "policies.yaml:7:3: policies.empty",
    ]


def test_a_wrong_value_that_policies_share_is_reported_once_where_it_stands() -> None:
    text = "x-a: &a {ttl: ten}\npolicies:\n" + "".join(
        f"  p{n}: {{<<: *a, key: ip, max_concurrent: 1}}\n" for n in range(3)
    )
    [line] = problems(write(text))
    assert line.startswith("policies.yaml:1:15: policies.p0.ttl: ")


#: Much of what a file can say.
RICH = """\
version: 1
x-slow: &slow {ttl: 2m, max_age: 10m}
x-more: &more {ttl: 7, missing: skip}
defaults: {ttl: 30, status: 503}
policies:
  report-exports:
    <<: [*slow, *more]
    url_names: ["reports:*", '!x']
    methods: [get]
    key: "team:{user.team_id}"
    max_concurrent: 0
    block: True
  on: {key: ip, max_concurrent: 2, <<: *more, backend: 'yes'}
  long: {key: shop.limits.team, max_concurrent: 1, ttl: 2h, response_callback: null}
"""


def test_a_good_file_makes_a_table_in_its_order() -> None:
    table = load_policies(write(RICH))
    first, second, third = table
    assert (first.name, first.ttl, first.max_age, first.missing) == ("report-exports", 120.0, 600.0, "skip")
    assert (first.status, first.url_names, first.methods) == (503, ("reports:*", "!x"), {"GET", "HEAD"})
    assert (first.max_concurrent, first.place) == (0, "policies.yaml:6:3")
    assert (second.name, second.ttl, second.backend) == ("on", 7.0, "yes")
    assert (third.ttl, third.max_age, third.status) == (7200.0, 7200.0, 503)
    assert table.get("on") is second


def test_a_mapping_s_own_fields_win_over_merged_ones_wherever_the_merge_stands() -> None:
    text = "x-a: &a {ttl: 5, missing: skip}\npolicies:\n"
    text += "  first: {<<: *a, ttl: 9, key: ip, max_concurrent: 1}\n"
    text += "  last: {ttl: 9, key: ip, max_concurrent: 1, <<: *a}\n"
    assert [(policy.ttl, policy.missing) for policy in load_policies(write(text))] == [(9.0, "skip")] * 2


def test_a_table_may_be_empty() -> None:
    assert len(load_policies(write("policies: {}\n"))) == 0
    assert len(load_policies({"policies": {}})) == 0


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does() -> None:
    assert len(load_policies(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()))) == 1
    text = b"\xef\xbb\xbf" + (GOOD + "    ttl: x\n").replace("\n", "\r\n").encode()
    assert problems(write(text))[0].startswith("policies.yaml:5:10: ")


def test_the_label_is_the_path_as_a_person_here_would_write_it(here: Path) -> None:
    """Relative below the working directory, else as given; a label of one's own wins."""
    os.mkdir("conf")
    write("", "conf/p.yaml")
    assert problems(here / "conf" / "p.yaml")[0].startswith("conf/p.yaml:1:1: ")
    os.chdir("conf")
    assert problems(str(here / "conf" / "p.yaml"))[0].startswith("p.yaml:1:1: ")
    write("", str(here / "q.yaml"))
    assert problems(here / "q.yaml")[0].startswith(f"{here / 'q.yaml'}:1:1: ")
    assert problems("../q.yaml", label="the file")[0].startswith("the file:1:1: ")


def test_a_file_that_cannot_be_read_is_one_problem(here: Path) -> None:
    assert problems("policies.yaml") == ["policies.yaml: cannot be read: No such file or directory"]
    assert problems(here) == [".: cannot be read: Is a directory"]
    assert "cannot be read" in problems("a\x00b")[0]
    assert "larger than" in problems(write("#" * 1_000_001))[0]


MAPPINGS: dict[str, tuple[Any, str]] = {
    "a wrong value": (
        {"policies": {"x": {"key": "ip", "max_concurrent": 1, "ttl": "x"}}},
        f"{SETTING}.policies.x.ttl: expected seconds",
    ),
    "a wrong entry": (
        {"policies": {"x": {"key": "ip", "max_concurrent": 1, "url_names": ["a", 2]}}},
        f"{SETTING}.policies.x.url_names[1]: expected a view name",
    ),
    "a missing field": ({"policies": {"x": {"key": "ip"}}}, f"{SETTING}.policies.x: max_concurrent is required"),
    "an unknown field": (
        {"policies": {"x": {"key": "ip", "max_concurrent": 1, "tll": 1}}},
        f"{SETTING}.policies.x.tll: unknown field; did you mean 'ttl'?",
    ),
    "a name that is no text": (
        {"policies": {7: {"key": "ip", "max_concurrent": 1}}},
        f"{SETTING}.policies[7]: the name",
    ),
    "a field that is no text": (
        {"policies": {"x": {"key": "ip", "max_concurrent": 1, None: 1}}},
        f"{SETTING}.policies.x.null: unknown field",
    ),
    "no policies": ({}, f"{SETTING}: policies is required"),
    "a wrong default": ({"defaults": {"ttl": 0}, "policies": {}}, f"{SETTING}.defaults.ttl: expected seconds > 0"),
    "a list of policies": ({"policies": []}, f"{SETTING}.policies: expected a mapping"),
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_a_broken_mapping_is_reported_with_the_path_into_the_setting(case: str) -> None:
    source, line = MAPPINGS[case]
    [found] = problems(source)
    assert found.startswith(line)
    assert "policies.x.policies" not in found


def test_a_mapping_takes_callables_and_says_where_a_policy_stands() -> None:
    def team(request: object) -> str:
        return "a"

    [policy] = load_policies({"policies": {"x": {"key": team, "max_concurrent": 1, "when": team}}})
    assert policy.key.function is team
    assert policy.when is team
    assert policy.place == f"{SETTING}.policies.x"


def test_a_file_and_the_same_mapping_make_the_same_policies() -> None:
    text = GOOD + "    url_names: [a, 'b:*']\n    ttl: 5m\n    renew: false\n"
    fields = {"key": "user", "max_concurrent": 5, "url_names": ["a", "b:*"], "ttl": "5m", "renew": False}
    [of_file] = load_policies(write(text))
    [of_mapping] = load_policies({"policies": {"exports": fields}})
    for name in type(of_file).__match_args__:
        if name != "place":
            assert getattr(of_file, name) == getattr(of_mapping, name), name


def test_an_alias_bomb_is_refused_before_it_goes_off() -> None:
    rows = ["x-0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 6)]
    [line] = problems(write("\n".join(rows) + "\npolicies: {}\n"))
    assert line.startswith("policies.yaml:4:")
    assert "more than 10,000 values" in line


def test_a_chain_of_aliases_cannot_nest_without_end() -> None:
    rows = ["x-0: &a0 [1]"] + [f"x-{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000)]
    [line] = problems(write("\n".join(rows) + "\npolicies: {}\n"))
    assert "nested more than" in line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("+5", 5),
        ("0", 0),
        ("5.", 5.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("On", "On"),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!int 5", 5),
        ("!!float 5", 5.0),
        ("2024-01-01", "2024-01-01"),
        ("0b12", "0b12"),
        ("=", "="),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_are_read_by_the_core_schema(text: str, value: object) -> None:
    document = load_yaml(f"a: {text}\n", "p")
    assert document.problems == ()
    assert document.data == {"a": value}
    assert type(document.data["a"]) is type(value)


def test_the_place_of_every_key_and_value_is_known() -> None:
    places = load_yaml("a:\n  b: [x, yy]\nc: 1\n", "p").places
    assert {path: (place.key, place.value) for path, place in places.items() if path} == {
        ("a",): ((1, 1), (2, 3)),
        ("a", "b"): ((2, 3), (2, 6)),
        ("a", "b", 0): ((2, 7), (2, 7)),
        ("a", "b", 1): ((2, 10), (2, 10)),
        ("c",): ((3, 1), (3, 4)),
    }


INDICATORS = "*&!%@`{}[],:-?#|>'\"\t \n"
WORDS = [
    "\n  ",
    "\n    ",
    ": ",
    "- ",
    "<<: ",
    "&a ",
    "*a",
    "!!int ",
    "!x ",
    "---\n",
    "%YAML 1.1\n",
    "%TAG ! a\n",
    "...",
]
WORDS += ["policies:", "key: ip", "max_concurrent: 1", "defaults:", "ttl", "x-", "010", "1:30", ".nan", "null"]
WORDS += ["\x00", "é", "\u2028", "\\", '"\\ud800"', '"\\U00110000"', "9" * 50]
PIECES = st.sampled_from([*INDICATORS, *WORDS])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_raises_anything_but_a_configuration_error(text: str | bytes) -> None:
    for source in (text, GOOD.encode() + text if isinstance(text, bytes) else GOOD + "    " + text):
        if isinstance(source, str):
            source = source.encode("utf-8", "surrogatepass")
        found: ConfigurationError | None = None
        try:
            load_policies(write(source))
        except ConfigurationError as error:
            found = error
        if found is not None:
            lines = str(found).split("\n")
            assert len(lines) == len(found.problems)
            assert all(line.startswith("policies.yaml:") for line in lines)
            str(found).encode()
