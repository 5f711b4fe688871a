"""The JSON Schema for editors: it is the table of fields, says yes to every good file, and no to the common mistakes."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from django_concurrency_mw import schema
from django_concurrency_mw.document import load_yaml
from django_concurrency_mw.exceptions import ConfigurationError, shown
from django_concurrency_mw.fields import FIELDS
from django_concurrency_mw.loader import load_policies

from . import test_fields, test_loader
from .conftest import ROOT

#: Mistakes of the tests of the loader that JSON Schema cannot tell.
BEYOND = {
    "a key that no request has",  # what `per_key` may name depends on `key`
    "not a number",  # JSON has no NaN
}


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    made = schema.policy_file()
    Draft7Validator.check_schema(made)
    return Draft7Validator(made)


def data_of(text: str | bytes) -> Any:
    return load_yaml(text, "policies.yaml").data


def policy(**fields: Any) -> dict[str, Any]:
    return {"policies": {"exports": {"key": "user", "max_concurrent": 5, **fields}}}


def test_the_file_in_the_package_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change of the table of fields: `make schema`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported here already
        runpy.run_module("django_concurrency_mw.schema", run_name="__main__")
    assert capsys.readouterr().out == (Path(schema.__file__).parent / "policies.schema.json").read_text()


def test_it_describes_every_field_and_no_other() -> None:
    fields = schema.policy_file()["definitions"]["fields"]["properties"]
    assert set(fields) == set(FIELDS)
    assert all(row["markdownDescription"] == FIELDS[name].doc for name, row in fields.items())
    assert (fields["status"]["default"], fields["ttl"]["default"]) == (429, 60.0)
    assert "default" not in fields["key"]


def _printed() -> list[str]:
    """Every policy file that the README and the pages print, and the example."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [text for page in pages for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.S | re.M)]
    return [(ROOT / "policies.example.yaml").read_text(), *(text for text in found if "policies:" in text)]


def test_it_accepts_every_good_file(validator: Draft7Validator, tmp_path: Path) -> None:
    files = [test_loader.GOOD, test_loader.RICH, "policies: {}\n", *_printed()]
    assert len(files) >= 8
    for text in files:
        (tmp_path / "policies.yaml").write_text(text)
        load_policies(tmp_path / "policies.yaml")
        assert [error.message for error in validator.iter_errors(data_of(text))] == [], text


def _cases(test: Any) -> list[tuple[Any, ...]]:
    """What a parametrized test of the fields is given."""
    (cases,) = [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"]
    return [getattr(case, "values", case) for case in cases]


def _plain(value: Any) -> bool:
    """Could it come from a file?"""
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value)
    if isinstance(value, int):
        return value.bit_length() < 10_000  # jsonschema prints it
    return value is None or isinstance(value, (str, float, list))


def test_it_accepts_every_good_value_of_a_field(validator: Draft7Validator) -> None:
    for name, value, _ in _cases(test_fields.test_a_good_value_is_normalised):
        if _plain(value):
            assert validator.is_valid(policy(**{name: value})), (name, value)


def test_of_the_bad_values_of_a_field_it_accepts_only_those_that_a_pattern_cannot_tell(
    validator: Draft7Validator,
) -> None:
    missed = {
        (name, shown(value))
        for name, value, _ in _cases(test_fields.test_a_wrong_value_is_refused_with_the_cure)
        if _plain(value) and validator.is_valid(policy(**{name: value}))
    }
    assert missed == {
        ("ttl", "nan"),
        ("ttl", "'999999999999999h'"),
        ("except_ips", "['10.0.0.1/8']"),
        ("status", "429.0"),  # to JSON an integer
        ("max_waiting", "1.0"),
        ("max_concurrent", "5.0"),
    }


@pytest.mark.parametrize("case", test_loader.BROKEN)
def test_it_rejects_the_mistakes_that_the_loader_rejects(case: str, validator: Draft7Validator) -> None:
    text, _, cure = test_loader.BROKEN[case]
    try:
        document = load_yaml(text, "policies.yaml")
    except ConfigurationError:
        return  # no editor gets as far as a schema
    if case in BEYOND or document.problems:
        return
    assert not validator.is_valid(document.data), cure


def test_what_it_leaves_to_the_loader_is_known(validator: Draft7Validator) -> None:
    assert {case for case in BEYOND if validator.is_valid(data_of(test_loader.BROKEN[case][0]))} == BEYOND


@pytest.mark.parametrize(
    ("data", "good"),
    [
        ({"defaults": {"key": "ip", "max_concurrent": 1}, "policies": {"a": {}}}, True),
        ({"defaults": {"key": "ip"}, "policies": {"a": {}}}, False),
        ({"defaults": {"block": False}, **policy(missing="reject")}, False),
        ({"defaults": {"block": False}, **policy(missing="reject", block=True)}, True),
        ({"defaults": {"missing": "reject"}, **policy(block=False)}, False),
        ({"defaults": {"missing": "reject"}, **policy(block=False, missing="ip")}, True),
        ({"defaults": {"block": False}, **policy(on_backend_error="deny")}, False),
        ({"x-mine": {"anything": 1}, **policy()}, True),
        ({"y-mine": 1, **policy()}, False),
        (policy(wait=1, max_waiting=0), True),
        (policy(wait="0.5s"), True),
        (policy(block=False, wait=1), False),
        (policy(block=False, wait="10ms"), False),
        (policy(block=False, wait=0), True),
        (policy(block=False, wait=0.0), True),
        (policy(block=False, wait="0s"), True),
        ({"defaults": {"wait": 1}, **policy(block=False)}, False),
        ({"defaults": {"wait": 1}, **policy(block=False, wait=0)}, True),
        ({"defaults": {"block": False}, **policy(wait="1s")}, False),
        ({"defaults": {"block": False, "wait": 2}, **policy(block=True)}, False),
        ({"defaults": {"wait": 2}, **policy(max_waiting=5)}, True),
        (policy(ttl="90s", max_age="1h"), True),
        (policy(ttl="0s"), False),
    ],
)
def test_it_knows_the_defaults_and_the_fields_that_contradict_each_other(
    data: Any, good: bool, validator: Draft7Validator
) -> None:
    """As the loader does."""
    try:
        load_policies(data)
    except ConfigurationError:
        assert not good
    else:
        assert good
    assert validator.is_valid(data) is good
