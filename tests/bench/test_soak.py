"""bench/soak.py: a short run of all its clients, and that it sees what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dovetail.checkpoint.random_model import write_random
from dovetail.models import MODELS


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    path = Path(__file__).parents[2] / "bench/soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_256_clients_who_leave_abuse_and_dawdle(soak: ModuleType, tmp_path: Path) -> None:
    """The form of two minutes is `bench/soak.py --seconds 120`."""
    model = tmp_path / "tiny.gguf"
    write_random(MODELS["llama"], soak.TINY, model, format="Q8_0")
    options = argparse.Namespace(seconds=12.0, clients=256, seed=1, server=[], model=None)
    report = asyncio.run(soak.soak(str(model), options))
    assert report["failures"] == []
    kinds = ("completion", "chat", "leaves", "tools", "structured", "canary", "malformed", "slow")
    assert all(report["kinds"].get(kind, 0) > 5 for kind in kinds), report["kinds"]
    assert "MiB for 10,000 requests" in soak.shown(report)


def stream(*events: Any, end: str = "data: [DONE]\n\n") -> bytes:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + end.encode()


def part(text: str, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": reason}]}


def test_streams_are_added_up_and_end_once(soak: ModuleType) -> None:
    read = soak.added_up
    both = read(stream(part("a"), part("x", "stop", 1), part("b", "length")), 2)
    assert [(c["text"], c["finish_reason"]) for c in both] == [("ab", "length"), ("x", "stop")]
    calls = (
        [{"index": 0, "function": {"name": "f", "arguments": '{"a'}}],
        [{"index": 0, "function": {"arguments": '":1}'}}],
    )
    deltas = [{"choices": [{"index": 0, "delta": {"tool_calls": c}, "finish_reason": None}]} for c in calls]
    (choice,) = read(stream(*deltas, part("", "tool_calls")), 1)
    assert choice["calls"] == [{"name": "f", "arguments": '{"a":1}'}]
    for broken, count, words in (
        (stream(part("a", "stop"), end=""), 1, "ended with"),
        (stream(part("a", "stop")) * 2, 1, "ended with"),
        (stream(part("a")), 1, "did not end"),
        (stream(part("a", "stop")), 2, "did not end"),
        (stream(part("a", "stop"), part("b")), 1, "behind its end"),
        (stream({"error": {"message": "oh"}}), 1, "a stream said"),
    ):
        with pytest.raises(soak.Broken, match=words):
            read(broken, count)


HEALTHY: dict[str, Any] = {
    "wrong": {}, "before": {"descriptors": 9, "threads": 4, "memory": 1}, "held": {"num_requests_running": 0.0},
    "after": {"descriptors": 9, "threads": 3, "memory": 2}, "slope_mib_per_10k": 0.5, "requests": 300_000,
    "log": ["shutting down"], "exit_code": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"wrong": {"chat": [3, "HTTP 500"]}}, ["chat: 3 times, as HTTP 500"]),
        ({"after": {"descriptors": 12, "threads": 4, "memory": 2}}, ["12 descriptors at the end, 9 before"]),
        ({"after": {"descriptors": 9, "threads": 5, "memory": 2}}, ["5 threads at the end, 4 before"]),
        ({"held": {"kv_cache_usage_perc": 0.25}}, ["kv_cache_usage_perc is 0.25 at the end"]),
        ({"slope_mib_per_10k": 1.5}, ["memory grows by 1.50 MiB for 10,000 requests"]),
        ({"slope_mib_per_10k": 1.5, "requests": 900}, []),
        ({"log": ["Traceback (most recent call last):"]}, ["the log has 'Traceback (most recent call last):'"]),
        ({"exit_code": 1}, ["the server ended with 1"]),
    ],
)
def test_each_rule_that_is_broken_is_named(soak: ModuleType, change: dict[str, Any], words: list[str]) -> None:
    assert soak.failures(HEALTHY | change) == words


def test_the_slope_of_memory_is_that_of_the_second_half(soak: ModuleType) -> None:
    watch = soak.Watch()
    for second in range(40):
        grown = (200 if second < 20 else 200 + (second - 20)) << 20
        watch.samples.append((float(second), 500 * second, soak.State(1, 1, grown)))
    assert watch.slope() == pytest.approx(20.0)
    assert soak.Watch().slope() is None


def test_answers_are_held_to_what_was_asked(soak: ModuleType) -> None:
    def choice(text: str = "", calls: list[dict[str, str]] | None = None, reason: str = "stop") -> dict[str, Any]:
        return {"text": text, "calls": calls or [], "finish_reason": reason}

    import random

    asks = [soak.structured(random.Random(i)) for i in range(40)]
    numbers = next(a for a in asks if a.path == "/v1/completions")
    assert not numbers.valid([choice("1,22"), choice("1,", reason="length")]) and numbers.valid([choice("1,")])
    schema = next(a for a in asks if a.path != "/v1/completions")
    assert schema.valid([choice("{}")]) and schema.valid([choice("no JSON")])
    called = soak.tools(random.Random(0)).valid
    assert not called([choice(calls=[{"name": "weather", "arguments": "{}"}], reason="tool_calls")])
    assert called([choice(calls=[{"name": "weather", "arguments": "{"}], reason="tool_calls")])
    assert called([choice(calls=[{"name": "other", "arguments": "{}"}], reason="tool_calls")])
