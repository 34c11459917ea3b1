"""Fields of requests: numbers at their edges, limits under other names, fields that mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from dovetail.core.sampling import MAX_LOGPROBS, MAX_N
from dovetail.server.protocol import ChatRequest, CompletionRequest
from tests.server.serving import SECONDS, Running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
BASE = {"prompt": "x", "messages": HI, "max_tokens": 2}
MOST = {
    "n": MAX_N, "best_of": 1, "max_tokens": 500, "max_completion_tokens": 500, "min_tokens": 2, "temperature": 100,
    "top_p": 1, "top_k": 2**31 - 1, "min_p": 1, "presence_penalty": 2, "frequency_penalty": 2,
    "repetition_penalty": 100, "seed": 2**64 - 1, "prompt_logprobs": MAX_LOGPROBS, "logprobs": MAX_LOGPROBS,
    "top_logprobs": MAX_LOGPROBS,
}  # fmt: skip


def numeric(model: type) -> list[str]:
    """The names of a request's fields that are numbers."""
    properties = model.model_json_schema()["properties"]
    kinds = {name: {c.get("type") for c in field.get("anyOf", [field])} for name, field in properties.items()}
    return [name for name, found in kinds.items() if found & {"integer", "number"}]


def edges(name: str) -> Iterator[str]:
    """Values as they stand in a body."""
    most = MOST[name]
    for value in (-1, 0, 1, most, most + 1, 2**63, 2**64, -(2**63) - 1):
        yield from (str(value), f'"{value}"', f"{value}.0", f'"{value}.0"')
    yield from (
        "1e309",
        "-1e309",
        "NaN",
        "Infinity",
        '"NaN"',
        '"inf"',
        '"1e309"',
        '"x"',
        '""',
        "true",
        "[]",
        "0.5",
    )
    yield from ("9" * 5000, '"' + "9" * 5000 + '"', "1e-400", '"0x10"', '"1_0"', '" 1 "', "null")


@pytest.fixture(scope="module")
def client(shared: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.url, timeout=SECONDS) as found:
        yield found


@pytest.mark.parametrize(("path", "model"), [(COMPLETIONS, CompletionRequest), (CHAT, ChatRequest)])
def test_numbers_at_their_edges_work_or_are_refused(
    shared: Running, client: httpx.Client, path: str, model
) -> None:
    names = numeric(model)
    assert set(names) <= set(MOST) and len(names) > 12
    canary = shared.text("canary", max_tokens=8)
    for name in names:
        statuses = set()
        base = BASE | ({"logprobs": True} if name == "top_logprobs" else {})
        rest = json.dumps({k: v for k, v in base.items() if k != name})[:-1]
        for value in edges(name):
            answer = client.post(path, content=f'{rest}, "{name}": {value}}}')
            assert answer.status_code in (200, 400), (name, value[:40], answer.text)
            statuses.add(answer.status_code)
        assert statuses == {200, 400}, name
        assert shared.text("canary", max_tokens=8) == canary, name
    shared.check_empty()


def test_numbers_may_be_written_as_others_take_them(shared: Running) -> None:
    fields = {"n": 2, "max_tokens": 3, "temperature": 0.5, "seed": 7, "top_p": 0.9, "logit_bias": {"65": 5}}
    plain = shared.complete("x", **fields)["choices"]
    assert plain == shared.complete("x", **{k: str(v) for k, v in fields.items() if k != "logit_bias"},
                                    logit_bias={"65": "5.0"})["choices"]  # fmt: skip
    assert plain == shared.complete("x", **fields | {"n": 2.0, "max_tokens": "3.0", "seed": 7.0})["choices"]


def test_both_names_of_the_limit_hold_on_both_routes(shared: Running) -> None:
    for path in (COMPLETIONS, CHAT):
        asked = {"prompt": "x"} if path == COMPLETIONS else {"messages": HI}
        for limits in (
            {"max_tokens": 3},
            {"max_completion_tokens": 3},
            {"max_tokens": 9, "max_completion_tokens": 3},
        ):
            answer = shared.post(path, **asked, **limits, ignore_eos=True)
            assert answer.json()["usage"]["completion_tokens"] == 3, (path, limits)


@pytest.mark.parametrize(
    "name",
    ["max_token", "maxTokens", "max_new_tokens", "n_predict", "num_predict", "max_length", "max_output_tokens",
     "max_tokns", "max_completions_tokens", "maxCompletionTokens", "MAX_TOKENS"],
)  # fmt: skip
def test_a_limit_under_another_name_is_refused(shared: Running, name: str) -> None:
    answer = shared.post(COMPLETIONS, prompt="x", **{name: 5})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert "max_tokens" in answer.json()["error"]["message"]
    assert shared.post(COMPLETIONS, prompt="x", **{name: None}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_mean_nothing_are_named_in_a_header(shared: Running, stream: bool) -> None:
    fields = {"max_prompt_tokens": 5, "strange": 1, "odd\r\nx-evil: 1": 1, "user": "me"}
    answer = shared.post(COMPLETIONS, prompt="x", max_tokens=1, stream=stream, **fields)
    assert answer.status_code == 200 and "x-evil" not in answer.headers
    named = set(answer.headers["x-ignored-fields"].split(", "))
    assert named == {"max_prompt_tokens", "strange", "odd??x-evil??1"}
    assert "x-ignored-fields" not in shared.post(COMPLETIONS, prompt="x", max_tokens=1, stream=stream).headers


def test_sampling_without_a_seed_differs_after_a_restart(start) -> None:
    fields = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True}
    texts, seeded, chosen = [], [], []
    for _ in range(2):
        running: Running = start()
        texts += [running.text("x", **fields), running.text("x", **fields, seed=-1)]
        seeded.append(running.text("x", **fields, seed=3))
    for _ in range(2):
        chosen.append(start(seed=5).text("x", **fields))  # the engine's own seed was asked for
    assert len(set(texts)) == 4
    assert seeded[0] == seeded[1] and chosen[0] == chosen[1]


@pytest.mark.parametrize("parts", [False, True])
def test_a_chat_that_cannot_fit_is_refused_before_it_is_tokenized(
    shared: Running, monkeypatch, parts: bool
) -> None:
    monkeypatch.setattr(shared.llm.tokenizer, "apply_chat_template", None)  # calling it would be a 500
    text = "x" * 100_000
    content = [{"type": "text", "text": text}] if parts else text
    for path in (CHAT, "/tokenize"):
        answer = shared.post(path, messages=[{"role": "user", "content": content}])
        assert answer.status_code == 400 and "context" in answer.json()["error"]["message"], answer.text


def test_tools_and_calls_that_cannot_fit_are_refused_before_they_are_tokenized(
    shared: Running, monkeypatch
) -> None:
    monkeypatch.setattr(shared.llm.tokenizer, "apply_chat_template", None)  # calling it would be a 500
    said = {"role": "user", "content": "x"}
    long = {"name": "f", "description": "x" * 100_000}
    function = {"name": "f", "arguments": json.dumps({"a": "x" * 100_000})}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    for more in (
        {"messages": [said], "tools": [{"type": "function", "function": long}]},
        {"messages": [said, called, {"role": "tool", "content": "1"}]},
    ):
        answer = shared.post(CHAT, **more)
        assert answer.status_code == 400 and "context" in answer.json()["error"]["message"], answer.text
