"""Whatever is sent, the answer is an error with a status and a body, and the next request is served as before."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from tests.server.serving import SECONDS, Running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
HUGE = 10**400

RAW = [
    b"", b" ", b"null", b"1", b'"text"', b"[]", b"[{}]", b"{", b'{"prompt"', b'{"prompt": "x",}',
    b"{'prompt': 'x'}", b'{"prompt": "x"} trailing', b"\xff\xfe", b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\\ud800"}', b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "\\u12"}', b'{"prompt": "\n"}', b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
    b'{"prompt": "x", "seed": 01}', b"[" * 100_000, b'{"a":' * 100_000,
    b'{"prompt": ' + b"[" * 10_000 + b"1" + b"]" * 10_000 + b"}",
    b'{"prompt": "x", "model": "' + b"\\u0000" * 8 + b'"}',
]  # fmt: skip

WRONG_TYPES = {
    "n": ["two", 1.5, True, [], {}], "max_tokens": ["x", 1.5, True, [5]], "temperature": ["hot", [], True, {}],
    "top_p": ["x", {}], "top_k": [1.5, "x"], "min_p": ["x"], "seed": [1.5, "x", []], "stream": ["yes", 1, []],
    "stop": [5, [5], {}, [None], ["a", 1]], "stop_token_ids": [5, "5", ["5"], [1.5], [True], {}],
    "logit_bias": [5, [], "x", {"x": 1}, {"5": "x"}, {"5": None}, {"5": [1]}], "presence_penalty": ["x"],
    "stream_options": [5, [], "x", {"include_usage": "x"}], "model": [5, [], {}], "ignore_eos": ["x", 5],
    "skip_special_tokens": ["x"], "prompt_logprobs": ["x", True], "cache_salt": [5], "best_of": ["x"],
}  # fmt: skip

OUT_OF_RANGE = {
    "n": [0, -1, 129, 2**31, 2**63, HUGE], "max_tokens": [0, -1, 513, 2**31, 2**63, HUGE],
    "temperature": [-1, 101, HUGE], "top_p": [0, -1, 1.1, HUGE], "top_k": [-2, 2**31, HUGE], "min_p": [-1, 1.1],
    "seed": [2**64, -(2**63) - 1, HUGE], "presence_penalty": [-3, 3], "frequency_penalty": [-3, 3],
    "repetition_penalty": [0, -1, 101], "min_tokens": [-1, 17, HUGE],
    "logit_bias": [{"5": 101}, {"-1": 1}, {"260": 1}, {"99999999999": 1}],
    "stop_token_ids": [[-1], [260], [2**63]], "prompt_logprobs": [-1, 21], "stop": ["", ["a", ""]],
    "cache_salt": ["", "x" * 129], "best_of": [2],
}  # fmt: skip

COMPLETION_ONLY = [
    {"prompt": None}, {"prompt": 5}, {"prompt": {}}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [""]},
    {"prompt": ""}, {"prompt": ["x", 1]}, {"prompt": [1, "x"]}, {"prompt": [[1], "x"]}, {"prompt": [[1], ["x"]]},
    {"prompt": [[[1]]]}, {"prompt": [True]}, {"prompt": [1.5]}, {"prompt": [-1]}, {"prompt": [260]},
    {"prompt": [2**63]}, {"prompt": [HUGE]}, {"prompt": "x" * 512}, {"prompt": "x" * 100_000},
    {"prompt": [1] * 100_000}, {"prompt": ["x"] * 1025}, {"prompt": "x", "logprobs": -1},
    {"prompt": "x", "logprobs": 21}, {"prompt": "x", "logprobs": True}, {"prompt": "x", "suffix": "y"},
    {"prompt": "x", "echo": "yes"}, {"prompt": "x", "stream_options": {}},
    {"prompt": "x", "stream": True, "prompt_logprobs": 1},
    {"prompt": "x", "response_format": {"type": "yaml"}}, {"prompt": "x", "guided_regex": "a("},
    {"prompt": "x", "response_format": {"type": "json_schema"}}, {"prompt": "x", "guided_regex": 5},
    {"prompt": "x", "structured_outputs": {"regex": "a", "json": {}}}, {"prompt": "x", "guided_choice": []},
    {"prompt": "x", "structured_outputs": {}},
    {"prompt": "x", "structured_outputs": {"structural_tag": "x"}}, {"prompt": "x", "use_beam_search": True},
    {"prompt": "x", "use_beam_search": 1}, {},
]  # fmt: skip

CHAT_ONLY = [
    {"messages": None}, {"messages": []}, {"messages": {}}, {"messages": "hi"}, {"messages": [5]},
    {"messages": ["hi"]}, {"messages": [[]]}, {"messages": [{}]}, {"messages": [{"role": 5, "content": "x"}]},
    {"messages": [{"content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": {}}]}, {"messages": [{"role": "user", "content": [5]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost"}}]}]},
    {"messages": [{"role": "user", "content": "x" * 600}]}, {"messages": HI, "max_completion_tokens": 0},
    {"messages": HI, "top_logprobs": 2}, {"messages": HI, "logprobs": True, "top_logprobs": 21},
    {"messages": HI, "logprobs": True, "top_logprobs": -1}, {"messages": HI, "logprobs": 5},
    {"messages": HI, "tools": [{"type": "function", "function": {"name": ""}}]}, {"messages": HI, "tools": {}},
    {"messages": HI, "tool_choice": "required"}, {"messages": HI, "functions": [{}]},
    {"messages": HI, "parallel_tool_calls": "yes"}, {"messages": HI, "tool_choice": 5},
    {"messages": HI, "echo": True},
    {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {}}},
    {"messages": HI, "chat_template": "{{ 7 * 7 }}"}, {"messages": HI, "chat_template_kwargs": 5},
    {"messages": HI, "chat_template_kwargs": {"messages": []}},
    {"messages": HI, "chat_template_kwargs": {"self": 1}},
    {"messages": HI, "chat_template_kwargs": {"continue_final_message": True}},
    {"messages": HI, "chat_template_kwargs": {"bos_token": "x"}},
    {"messages": HI, "chat_template_kwargs": {"tools": 1}},
    {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
    {"messages": HI, "add_generation_prompt": "x"}, {"messages": HI, "add_special_tokens": True}, {},
]  # fmt: skip

CASES = [
    *((COMPLETIONS, raw) for raw in RAW),
    *((CHAT, raw) for raw in RAW[:8]),
    *((path, {"prompt": "x", "messages": HI, name: value})
      for table in (WRONG_TYPES, OUT_OF_RANGE) for name, values in table.items() for value in values
      for path in (COMPLETIONS, CHAT) if not (path == CHAT and name == "min_tokens" and value == 17)),
    *((COMPLETIONS, body) for body in COMPLETION_ONLY),
    *((CHAT, body) for body in CHAT_ONLY),
]  # fmt: skip


def encoded(body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def test_every_malformed_request_is_refused_and_harms_nothing(shared: Running) -> None:
    assert len(CASES) > 250
    canary = shared.text("canary", max_tokens=8)
    with httpx.Client(
        base_url=shared.url, timeout=SECONDS, headers={"content-type": "application/json"}
    ) as client:
        for number, (path, body) in enumerate(CASES):
            answer = client.post(path, content=encoded(body))
            known = {404} if b'"model"' in encoded(body)[:40] else {400}
            assert answer.status_code in known | {400}, (path, encoded(body)[:200], answer.text)
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["code"] == answer.status_code
            assert error["message"] and len(error["message"]) < 1100 and "0x" not in error["message"]
            if number % 25 == 0:
                assert shared.text("canary", max_tokens=8) == canary
    assert shared.text("canary", max_tokens=8) == canary
    shared.check_empty()


def test_the_field_is_named(shared: Running) -> None:
    for body, param in (
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "stream_options": {"include_usage": 5}, "stream": True}, "stream_options.include_usage"),
        ({"prompt": [300]}, "prompt"),
        ({}, "prompt"),
    ):
        found = shared.post(COMPLETIONS, **body).json()["error"]["param"]
        assert found.startswith(param), (body, found)


def test_bodies_and_headers_are_bounded(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.server.exchange.MAX_BODY", 1000)
    assert shared.post(COMPLETIONS, prompt="x" * 2000).status_code == 413

    def chunks():
        for _ in range(10):
            yield b"x" * 500

    headers = {"content-type": "application/json"}
    assert httpx.post(shared.url + COMPLETIONS, content=chunks(), headers=headers).status_code == 413
    many = {f"x-{i}": "1" for i in range(120)}
    assert httpx.get(f"{shared.url}/version", headers=many).status_code == 431
    assert httpx.get(f"{shared.url}/version", headers={"x-big": "1" * 40_000}).status_code == 431


def test_routes(shared: Running) -> None:
    for method, path, status in (
        ("GET", COMPLETIONS, 405), ("POST", "/v1/models", 405), ("PUT", CHAT, 405), ("POST", "/nothing", 404),
        ("GET", "/v1/models/other", 404), ("GET", "/v1/../etc/passwd", 404),
    ):  # fmt: skip
        answer = httpx.request(method, shared.url + path)
        assert answer.status_code == status and answer.json()["error"]["code"] == status
    lost = httpx.post(f"{shared.url}/chat/completions").json()["error"]["message"]  # a base URL without /v1
    assert "POST /chat/completions" in lost and "under /v1" in lost
    assert "takes POST" in httpx.get(shared.url + CHAT).json()["error"]["message"]


def test_bytes_that_are_not_http(shared: Running) -> None:
    for data in (b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
        with socket.create_connection(shared.listener.getsockname()[:2], timeout=SECONDS) as connection:
            connection.sendall(data)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert shared.text("x", max_tokens=1) is not None
