"""`dovetail bench offline` on a tiny model: what is counted, what is left out."""

from __future__ import annotations

import json

import pytest

from dovetail import LLM
from dovetail.bench.engine import prompt_file
from tests.helpers.program import SMALL, call


def write(path, lines):
    path.write_bytes(b"".join((v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in lines))
    return path


def bench(model, source, *arguments, status=0):
    given = ("--input", source, *SMALL, "--max-tokens", 4, "--ignore-eos", *arguments, "--json", "-")
    result = call("bench", "offline", model, *given)
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result


def test_text_is_a_prompt_a_line(tiny_model, tmp_path):
    found, result = bench(tiny_model, write(tmp_path / "p.txt", [b"one", b"", b"three words here"]))
    tokens = len("one") + len("three words here")
    assert (found["requests"], found["prompt_tokens"], found["output_tokens"]) == (2, tokens, 8)
    assert found["requests_per_s"] == pytest.approx(2 / found["seconds"])
    assert found["prompt_tokens_per_s"] == pytest.approx(tokens / found["seconds"])
    assert found["output_tokens_per_s"] == pytest.approx(8 / found["seconds"])
    assert (found["mean_batch"], found["preemptions"], found["cached_tokens"], found["failed"]) == (2, 0, 0, 0)
    assert found["broken"] == {"count": 0, "first": []} and found["unknown_fields"] == []
    assert {"machine", "versions", "commit", "config", "activity"} <= set(found)
    assert found["config"]["threads"] == 1 and found["sampling"] == {"max_tokens": 4, "ignore_eos": True}
    assert found["spread"] == {} and "requests in a step" in result.stdout and "one round" in result.stdout


def test_json_lines_have_prompts_or_messages(tiny_model, tmp_path):
    conversation = [{"role": "user", "content": "Hi"}]
    lines = [{"prompt": "abc", "max_tokens": 2}, {"prompt": [1, 2]}, {"messages": conversation, "note": "x"}]
    found, result = bench(tiny_model, write(tmp_path / "p.jsonl", lines))
    chat = LLM(tiny_model, threads=1, kv_memory=1 << 20).chat_tokens(conversation)
    assert (found["requests"], found["prompt_tokens"]) == (3, 3 + 2 + len(chat))
    assert found["output_tokens"] == 2 + 4 + 4
    assert found["unknown_fields"] == ["note"] and "ignored: note" in result.stderr


def test_broken_lines_are_counted_and_the_others_run(tiny_model, tmp_path):
    lines = [
        {"prompt": "good"},
        b"{no JSON",
        b"[1]",
        {"prompt": "x", "messages": []},
        {"text": "x"},
        {"prompt": 7},
        {"prompt": []},
        {"prompt": ["a"]},
        {"prompt": [260]},
        {"prompt": ""},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "max_tokens": 9999},
        {"messages": [{"role": "user"}]},
        {"prompt": "y" * 5000},
        b'{"prompt": "\xff"}',
        {"prompt": "good too", "max_tokens": None},
    ]
    source = write(tmp_path / "p.txt", lines)
    found, result = bench(tiny_model, source)
    assert (found["requests"], found["broken"]["count"]) == (2, len(lines) - 2)
    assert [entry["line"] for entry in found["broken"]["first"]] == [2, 3, 4, 5, 6]
    assert "14 broken lines" in result.stderr and "line 4: a line has either prompt or messages" in result.stderr


def test_text_that_is_no_text(tmp_path):
    first, second, third = prompt_file.read(write(tmp_path / "p.txt", [b"\xff\xfe", b"ok", b'{"prompt": 1}']))
    assert "not valid UTF-8" in str(first.error)
    assert (second.number, second.prompt, third.prompt) == (2, "ok", '{"prompt": 1}')


def test_lines_longer_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("dovetail.batch.rows.MAX_LINE", 100)
    monkeypatch.setattr(prompt_file, "MAX_LINE", 100)
    first, second = prompt_file.read(write(tmp_path / "p.txt", [b"x" * 500, b"y"]))
    assert "longer than 100 bytes" in str(first.error)
    assert (second.number, second.prompt) == (2, "y")


def test_the_limit_counts_prompts_that_run(tiny_model, tmp_path):
    lines = [{"prompt": ""}, *({"prompt": "abc"} for _ in range(5)), b"{"]
    found, _ = bench(tiny_model, write(tmp_path / "p.jsonl", lines), "--limit", 3)
    assert (found["requests"], found["broken"]["count"]) == (3, 1)


def test_the_prefix_cache_is_empty_at_the_start_of_every_round(tiny_model, tmp_path):
    shared = "the same beginning of every prompt, long enough for some pages. "
    source = write(tmp_path / "p.txt", [f"{shared}{i}".encode() for i in range(6)])
    found, _ = bench(tiny_model, source, "--rounds", 3, "--max-num-seqs", 2)
    low, high = found["spread"]["cached_tokens"]
    assert low == high == found["cached_tokens"] > 0
    assert found["cached_tokens"] <= 5 * len(shared)
    assert found["mean_batch"] <= 2
    none, _ = bench(tiny_model, source, "--no-enable-prefix-caching")
    assert none["cached_tokens"] == 0


def test_preemptions_are_counted(tiny_model, tmp_path):
    source = write(tmp_path / "p.txt", [bytes([65 + i]) * 16 for i in range(4)])
    few = ("--kv-memory", "64KiB", "--max-tokens", 90, "--max-model-len", 128)
    found, _ = bench(tiny_model, source, *few)
    assert found["preemptions"] > 0
    assert found["output_tokens"] == 4 * 90


def test_two_settings_in_turns(tiny_model, tmp_path):
    source = write(tmp_path / "p.txt", [b"abc abc abc abc", b"x"])
    found, result = bench(
        tiny_model, source, "--use", "ngram", "--against", "plain", "--rounds", 2, "--max-tokens", 64
    )
    assert found["activity"]["ngram"] > 0 and found["against"]["activity"] == {}
    assert found["output_tokens"] == found["against"]["output_tokens"] == 2 * 64
    low, high = found["spread"]["ratio"]["output_tokens_per_s"]
    assert low <= found["ratio"]["output_tokens_per_s"] <= high
    assert found["ratio"]["output_tokens"] == 1.0
    assert "plain" in result.stdout


def test_a_prompt_must_run_on_both_sides(tiny_model, tmp_path):
    source = write(tmp_path / "p.txt", [b"a" * 100, b"b"])
    found, _ = bench(tiny_model, source, "--against", "max-model-len=64", "--rounds", 1)
    assert (found["requests"], found["broken"]["count"]) == (1, 1)
    assert "context holds 64" in found["broken"]["first"][0]["error"]


def test_a_technique_that_never_acts_is_an_error(tiny_model, tmp_path):
    source = write(tmp_path / "p.txt", [b"abc"])
    found, result = bench(tiny_model, source, "--use", "sink-window", status=1)
    assert found["activity"] == {"sink-window": 0}
    assert "never acted" in result.stderr


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (b"", [], "there is no prompt in it"),
        (b"\n \n", [], "there is no prompt in it"),
        (b"{broken\n[1]\n", [], "no line can be used, 2 are broken; line 1: the line is not valid JSON"),
        (b"x\n", ["--limit", 0], "--limit"),
        (b"x\n", ["--rounds", 0], "--rounds"),
        (b"x\n", ["--max-tokens", 0], "max_tokens must be between"),
        (b"x\n", ["--against", "ngram:x=1"], "no option of ngram"),
        (b"x\n", ["--json", "no/where.json"], "there is no folder"),
    ],
)
def test_wrong_input(tiny_model, tmp_path, content, arguments, says):
    source = tmp_path / "p.jsonl"
    source.write_bytes(content)
    result = call("bench", "offline", tiny_model, "--input", source, *SMALL, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_a_file_that_is_not_there(tiny_model, tmp_path):
    assert call("bench", "offline", tiny_model, "--input", tmp_path / "none.txt").exit_code == 2
    assert call("bench", "offline", tiny_model, "--input", tmp_path).exit_code == 2
    assert call("bench", "offline", tiny_model).exit_code == 2
