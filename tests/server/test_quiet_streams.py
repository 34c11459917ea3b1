"""What a stream says while no token comes, and how long its parts took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from dovetail.server import generation
from dovetail.server.exchange import Reply
from tests.server.serving import NAME, SECONDS, Running, until
from tests.test_clock import VIRTUAL

LONG = "a long prompt " * 20
TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_n", "predicted_ms",
    "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip


@contextmanager
def events(running: Running, path: str, **body) -> Iterator[Iterator[str]]:
    """The events of a stream as they come."""
    body = {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "stream": True, **body}
    with httpx.stream("POST", running.url + path, json=body, timeout=SECONDS) as response:
        assert response.status_code == 200

        def parts() -> Iterator[str]:
            text = ""
            for piece in response.iter_text():
                text += piece
                *whole, text = text.split("\n\n")
                yield from whole
            assert not text

        yield parts()


def test_comments_keep_a_quiet_stream_alive(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "QUIET_SECONDS", 0.01)
    running: Running = start()
    with running.throttle.held() as _, events(running, "/v1/completions", prompt="x") as parts:
        assert [next(parts) for _ in range(3)] == [": keep-alive"] * 3
        running.throttle.open.set()
        *_, done = parts
    assert done == "data: [DONE]"
    written: list[bytes] = []
    write = Reply.write
    monkeypatch.setattr(Reply, "write", lambda reply, data: (written.append(data), write(reply, data))[1])
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
    with running.throttle.held(lambda plan: len(plan.spans[0].request.output) == 2):
        stream = client.completions.create(model=NAME, prompt="x", max_tokens=4, stream=True, temperature=0)
        assert running.throttle.inside.wait(SECONDS)
        written.clear()
        until(lambda: written.count(generation.KEEP_ALIVE) >= 2)
        running.throttle.open.set()
        assert "".join(chunk.choices[0].text for chunk in stream) == running.text("x", max_tokens=4)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_progress_of_a_long_prompt(start, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(generation, "PROGRESS_SECONDS", 0.01)
    running: Running = start(max_num_batched_tokens=16)
    asked = {"prompt": LONG} if path == "/v1/completions" else {"messages": [{"role": "user", "content": LONG}]}
    with (
        running.throttle.held(lambda plan: plan.spans[0].start == 64),
        events(running, path, return_progress=True, **asked) as parts,
    ):
        found = []
        while not found or found[-1]["processed"] < 64:
            found.append(json.loads(next(parts).removeprefix("data: "))["prompt_progress"])
        running.throttle.open.set()
        *rest, done = parts
    assert done == "data: [DONE]"
    rest = [json.loads(e.removeprefix("data: ")) for e in rest]
    found += [e["prompt_progress"] for e in rest if "prompt_progress" in e]
    total = rest[-1]["timings"]["prompt_n"]
    steps = [state["processed"] for state in found]
    assert steps == sorted(set(steps)) and steps[-1] == total
    assert all(state["total"] == total and state["cache"] == 0 for state in found)
    assert all(e["choices"] for e in rest)
    assert running.post("/v1/completions", prompt="x", return_progress=True).status_code == 400


@pytest.mark.parametrize("usage", [False, True])
def test_timings(start, usage: bool) -> None:
    """Steps take a second each: one for the prompts and the first tokens, three for the others."""
    running: Running = start(use=VIRTUAL)
    body = {"prompt": ["one two three", "four"], "max_tokens": 4, "n": 2}
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with events(running, "/v1/completions", **body, **options) as parts:
        *streamed, _ = [json.loads(p.removeprefix("data: ")) for p in parts if p != "data: [DONE]"] + [None]
    assert [("timings" in e) for e in streamed] == [False] * (len(streamed) - 1) + [True]
    whole = running.complete(**body, ignore_eos=True)["timings"]
    for found in (streamed[-1]["timings"], whole):
        assert set(found) == TIMINGS
        assert (found["predicted_n"], found["prompt_n"] + found["cache_n"]) == (16, 17)
        assert found["prompt_ms"] == 1000 and found["prompt_per_second"] == found["prompt_n"]
        assert found["predicted_per_token_ms"] == found["predicted_ms"] / 16 and found["predicted_ms"] >= 3000
    assert streamed[-1]["timings"]["cache_n"] == 0 and whole["cache_n"] > 0
