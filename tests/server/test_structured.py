"""Answers of a given form over HTTP, by each field that asks for one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from dovetail.server.protocol import CompletionRequest
from dovetail.server.structured import structured_outputs
from tests.server.serving import NAME, Running

CLOSE = {str(ord(c)): 8 for c in '"}]'}  # a random model hardly ever ends a text by itself
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
BODY = {"model": NAME, "prompt": "x", "max_tokens": 200, "logit_bias": CLOSE}


def complete(running: Running, **more: Any) -> dict[str, Any]:
    reply = httpx.post(f"{running.url}/v1/completions", json=BODY | more, timeout=20)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(running: Running, **more: Any) -> dict[str, Any]:
    reply = httpx.post(f"{running.url}/v1/completions", json=BODY | more, timeout=20)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def matches(expression: str) -> Callable[[str], object]:
    return re.compile(expression).fullmatch


def fits(text: str) -> bool:
    return set(json.loads(text)) == {"name", "ok"}


OPENAI = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("asked", "check"),
    [
        ({"structured_outputs": {"regex": "[abc]{3}-[0-9]{2}"}}, matches("[abc]{3}-[0-9]{2}")),
        ({"structured_outputs": {"choice": ["red", "green"]}}, matches("red|green")),
        ({"structured_outputs": {"json": SCHEMA}}, fits),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, fits),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-z]{2}/ ">"'}}, matches("<[a-z]{2}>")),
        ({"guided_regex": "[ab]{4}"}, matches("[ab]{4}")),
        ({"guided_choice": ["yes", "no"]}, matches("yes|no")),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " "}, fits),
        ({"response_format": OPENAI}, fits),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, fits),
    ],
)
def test_each_field_gives_an_answer_of_its_form(shared: Running, asked: dict[str, Any], check: Any) -> None:
    reply = complete(shared, n=3, seed=5, **asked)
    for choice in reply["choices"]:
        assert choice["finish_reason"] == "stop" and check(choice["text"]), choice


def test_any_json_object(shared: Running) -> None:
    reply = complete(shared, response_format={"type": "json_object"}, max_tokens=400, seed=1)
    assert isinstance(json.loads(reply["choices"][0]["text"]), dict)


def test_text_is_any_text(shared: Running) -> None:
    for asked in ({"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}):
        assert complete(shared, seed=3, **asked)["choices"] == complete(shared, seed=3)["choices"]


def test_a_stream_has_the_same_text_and_logprobs(shared: Running) -> None:
    asked = {"structured_outputs": {"json": SCHEMA}, "seed": 9, "logprobs": 2}
    whole = complete(shared, **asked)["choices"][0]
    with httpx.stream("POST", f"{shared.url}/v1/completions", json=BODY | asked | {"stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    parts = [json.loads(line)["choices"][0] for line in lines if line != "[DONE]"]
    assert "".join(p["text"] for p in parts) == whole["text"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"] == "stop"
    assert [x for p in parts for x in p["logprobs"]["token_logprobs"]] == whole["logprobs"]["token_logprobs"]


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"json": {"type": "banana"}}}, "structured_outputs", "banana"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "the fields are"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "structured_outputs", "leave one of them"),
        ({"guided_json": "{"}, "guided_json", "not a JSON text"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": {"a": 1}}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "banana"}}}},
         "response_format", "banana"),
        ({"response_format": {"type": "text", "mode": 1}}, "response_format.mode", "not supported"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_400_and_names_the_field(shared: Running, asked: Any, param: str, words: str) -> None:
    error = refused(shared, **asked)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_older_names_of_one_form_go_together() -> None:
    request = CompletionRequest(prompt="x", guided_json={"type": "null"}, guided_whitespace_pattern=" ")
    found = structured_outputs(request)
    assert found is not None and (found.form, found.whitespace_pattern) == ("json", " ")


def test_openai_parses_into_a_model(shared: Running) -> None:
    import openai

    class Person(BaseModel):
        ok: bool
        kind: None

    client = openai.OpenAI(base_url=f"{shared.url}/v1", api_key="x", max_retries=0)
    reply = client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": "hi"}], response_format=Person, max_tokens=100,
        logit_bias=dict(CLOSE),
    )  # fmt: skip
    assert isinstance(reply.choices[0].message.parsed, Person)


def test_forms_that_take_long_delay_nobody_and_are_refused(shared: Running) -> None:
    """Those that wait for the compiler wait by themselves: other forms, other requests and the health go on."""
    canary = complete(shared, seed=4, structured_outputs={"regex": "[ab]{5}"})["choices"]
    with ThreadPoolExecutor(3) as pool:
        slow = [
            pool.submit(refused, shared, structured_outputs={"json": long_to_compile(40 + i)}) for i in range(3)
        ]
        assert complete(shared, seed=4, structured_outputs={"regex": "[ab]{5}"})["choices"] == canary
        complete(shared, max_tokens=3)
        complete(shared, structured_outputs={"regex": "[ab]{3}"})
        assert httpx.get(f"{shared.url}/health", timeout=20).status_code == 200
        assert not any(s.done() for s in slow)
        for s in slow:
            assert "more than 1 seconds" in s.result()["message"]
    assert complete(shared, seed=4, structured_outputs={"regex": "[ab]{5}"})["choices"] == canary


def long_to_compile(parts: int) -> dict[str, Any]:
    return {"type": "string", "allOf": [{"pattern": f"^(.*a.{{{i}}}b.*|c)$"} for i in range(parts)]}


def test_what_no_token_continues_is_an_error_of_that_request(shared: Running) -> None:
    """The vocabulary of bytes writes anything; a grammar may still need a token that the model has not."""
    error = refused(shared, structured_outputs={"grammar": "start: <|no_such_token|>"})
    assert "no_such_token" in error["message"]
    reply = complete(shared, structured_outputs={"grammar": 'start: "a" <|im_end|>'}, skip_special_tokens=False)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 2
