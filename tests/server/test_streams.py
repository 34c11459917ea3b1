"""What is streamed is what comes whole, choice by choice: text, ends, log-probabilities, usage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.serving import SECONDS, Running

LETTERS = {str(token): 100.0 for token in b"abc"}
ODD = LETTERS | {"195": 100.0, "169": 100.0, "259": 98.0}  # the two bytes of an e with an accent, and an end
TOTALS = ("prompt_tokens", "completion_tokens", "total_tokens")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(shared: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.url, timeout=SECONDS) as found:
        yield found


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.status_code == 200, answer.text
    *parts, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [parse(part) for part in parts]


def parse(text: str) -> Any:
    """JSON, its numbers without the last bits, which depend on what else a product of matrices holds."""
    return json.loads(text, parse_float=lambda digits: round(float(digits), 6))


def joined(parts: list[dict[str, Any]], path: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The choices and the usage that a stream adds up to."""
    *parts, last = parts
    assert last["choices"] == []
    found: dict[int, dict[str, Any]] = {}
    for (choice,) in (part["choices"] for part in parts):
        text = choice["text"] if path == TEXT else choice["delta"]["content"]
        whole = found.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
        assert whole["finish_reason"] is None, "nothing may come after the end"
        whole["text"] += text
        for name, more in (choice["logprobs"] or {}).items():
            whole["logprobs"] = whole["logprobs"] or {}
            whole["logprobs"][name] = whole["logprobs"].get(name, []) + more
        whole["finish_reason"] = choice["finish_reason"]
        whole["stop_reason"] = choice.get("stop_reason")
    return [{"index": i, **found[i]} for i in sorted(found)], {name: last["usage"][name] for name in TOTALS}


def whole(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found = parse(answer.text)
    names = ("index", "logprobs", "finish_reason", "stop_reason")
    choices = [
        {name: choice[name] for name in names}
        | {"text": choice["text"] if path == TEXT else choice["message"]["content"]}
        for choice in found["choices"]
    ]
    return choices, {name: found["usage"][name] for name in TOTALS}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A request that samples from few letters, so that stop strings are met, within one step of each other too."""
    body: dict[str, Any] = {
        "temperature": 1.0,
        "seed": draw(st.integers(0, 1000)),
        "n": draw(st.integers(1, 3)),
        "max_tokens": draw(st.integers(1, 8)),
        "logit_bias": draw(st.sampled_from([LETTERS, ODD])),
        "stop": draw(st.lists(st.text("abcé", min_size=1, max_size=3), max_size=3)),
        "include_stop_str_in_output": draw(st.booleans()),
    }
    body["min_tokens"] = draw(st.integers(0, body["max_tokens"]))
    words = st.text("abc é", min_size=1, max_size=6)
    top = draw(st.none() | st.integers(0, 2))
    if draw(st.booleans()):
        body |= {"messages": [{"role": "user", "content": draw(words)}], "logprobs": top is not None}
        return CHAT, body if top is None else body | {"top_logprobs": top}
    return TEXT, body | {
        "prompt": draw(st.lists(words, min_size=1, max_size=4)), "echo": draw(st.booleans()), "logprobs": top
    }  # fmt: skip


@given(bodies())
@settings(max_examples=60, deadline=None)
def test_streamed_equals_whole(client: httpx.Client, asked: tuple[str, dict[str, Any]]) -> None:
    path, body = asked
    want, usage = whole(client, path, body)
    parts = events(client, path, body)
    assert joined(parts, path) == (want, usage)
    assert len(want) == body["n"] * len(body.get("prompt", "x"))
    assert all(choice["finish_reason"] for choice in want)


def test_prompts_that_end_in_one_step_all_get_their_end(client: httpx.Client) -> None:
    body = {
        "prompt": ["one", "two", "three"],
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
    }
    choices, usage = joined(events(client, TEXT, body), TEXT)
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 3
    assert all(len(choice["logprobs"]["tokens"]) == 1 for choice in choices)
    assert usage["completion_tokens"] == 3


def test_only_the_prompt_s_scores_are_streamed_where_no_token_is_asked_for(client: httpx.Client) -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    assert joined(events(client, TEXT, body), TEXT) == whole(client, TEXT, body)
