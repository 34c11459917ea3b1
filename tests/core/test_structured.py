"""What StructuredOutputs takes, and what it refuses by name."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.core.structured import MAX_BYTES, MAX_DEPTH, StructuredOutputs


@pytest.mark.parametrize(
    ("given", "form", "text"),
    [
        ({"json": {"type": "integer"}}, "json", '{"type":"integer"}'),
        ({"json": ' {"b": 1, "a": "é"} '}, "json", '{"b":1,"a":"é"}'),
        ({"json": True}, "json", "true"),
        ({"json": False}, "json", "false"),
        ({"regex": "a|b", "json_object": False}, "regex", "a|b"),
        ({"choice": ["a", "b", "a"]}, "choice", '["a", "b"]'),
        ({"grammar": 'start: "x"'}, "grammar", 'start: "x"'),
        ({"json_object": True}, "json_object", '{"type":"object"}'),
    ],
)
def test_a_form_and_its_text(given: dict[str, Any], form: str, text: str) -> None:
    for asked in (StructuredOutputs(**given), StructuredOutputs.parse(given)):
        assert (asked.form, asked.text) == (form, text)
        assert SamplingParams(structured_outputs=asked).structured_outputs is asked
    params = SamplingParams(structured_outputs=given)  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputs(**given)
    assert hash(params.structured_outputs) == hash(StructuredOutputs(**given))


def nested(depth: int, inner: Any = True) -> Any:
    for _ in range(depth):
        inner = {"not": inner}
    return inner


def longest(size: int) -> dict[str, Any]:
    schema = {"const": ""}
    return {"const": "x" * (size - len(json.dumps(schema, separators=(",", ":"))))}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object must be given, got none"),
        ({"json_object": False}, "got none"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json": "{"}, "json is not a JSON text"),
        ({"json": "[" * 100_000}, "json is not a JSON text"),
        ({"json": "[1]"}, "an object or a boolean, got list"),
        ({"json": 5}, "got int"),
        ({"json": {"const": float("nan")}}, "cannot be written as JSON"),
        ({"json": {"const": {1}}}, "cannot be written as JSON"),
        ({"json": {"a": MappingProxyType({})}}, "cannot be written as JSON"),
        ({"json": {"const": "\ud800"}}, "not valid Unicode"),
        ({"json": nested(100_000)}, f"deeper than {MAX_DEPTH}"),
        ({"json": nested(MAX_DEPTH + 1)}, f"deeper than {MAX_DEPTH}"),
        ({"json": longest(MAX_BYTES + 1)}, f"{MAX_BYTES + 1} bytes"),
        ({"json": "x" * (MAX_BYTES + 1)}, f"{MAX_BYTES + 1} bytes"),
        ({"regex": ""}, "regex must be text that is not empty"),
        ({"regex": 5}, "regex must be text"),
        ({"regex": "\udfff"}, "not valid Unicode"),
        ({"regex": "é" * (MAX_BYTES // 2 + 1)}, "bytes"),
        ({"choice": "yes"}, "choice must be a list of texts, got str"),
        ({"choice": []}, "choice has no texts"),
        ({"choice": ["a", ""]}, "choice must be text that is not empty"),
        ({"choice": ["a", 5]}, "choice must be text"),
        ({"grammar": ["start"]}, "grammar must be text"),
        ({"json_object": 1}, "json_object must be true or false"),
        ({"regex": "a", "disable_any_whitespace": True}, "about JSON, and this is a regex"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "about JSON"),
        ({"json": {}, "whitespace_pattern": 3}, "whitespace_pattern must be text"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude each other"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words.replace("(", r"\(")) as caught:
        StructuredOutputs(**given)
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 400


def test_limits_are_reached() -> None:
    assert StructuredOutputs(json=nested(MAX_DEPTH)).form == "json"
    assert len(StructuredOutputs(json=longest(MAX_BYTES)).text) == MAX_BYTES
    assert len(StructuredOutputs(regex="x" * MAX_BYTES).text) == MAX_BYTES


def test_fields_that_there_are_not_are_named() -> None:
    for name in ("structural_tag", "backend", "jsno"):
        with pytest.raises(RequestError, match=f"{name} is not supported; the fields are choice") as caught:
            StructuredOutputs.parse({"json": {}, name: "x"})
        assert caught.value.param == f"structured_outputs.{name}"
    assert StructuredOutputs.parse({"json": {}, "structural_tag": None}).form == "json"
    with pytest.raises(RequestError, match="must be StructuredOutputs or a mapping"):
        SamplingParams(structured_outputs="json")  # type: ignore[arg-type]


def test_equal_questions_have_equal_keys() -> None:
    keys = {
        StructuredOutputs(json={"a": 1}).key,
        StructuredOutputs(json='{"a": 1}').key,
        StructuredOutputs(json={"a": 1}, disable_any_whitespace=True).key,
        StructuredOutputs(regex="a").key,
        StructuredOutputs(grammar="a").key,
    }
    assert len(keys) == 4
