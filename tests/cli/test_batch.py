import json
import signal
import time

import pytest

from dovetail.batch import rows
from dovetail.batch.journal import Journal
from dovetail.core.errors import ConfigError
from tests.helpers.program import SMALL, call, start

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat_row(i, **body):
    body = {"messages": [{"role": "user", "content": f"number {i}"}], "max_tokens": 4, "ignore_eos": True} | body
    return {"custom_id": f"row-{i}", "method": "POST", "url": CHAT, "body": body}


def write(path, values):
    path.write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]  # not at U+0085 within a text


def batch(model, source, *arguments):
    result = call("batch", model, source, "-o", source.with_name("out.jsonl"), *SMALL, "--json", "-", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), read(source.with_name("out.jsonl")), result.stderr


def texts(results):
    return [r["response"]["body"]["choices"] for r in results]


def test_answers_are_openai_shaped_and_in_order(tiny_model, tmp_path):
    several = {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "logprobs": 1, "echo": True, "ignore_eos": True}
    values = [chat_row(i) for i in range(20)]
    values.append({"custom_id": "t", "method": "POST", "url": TEXT, "body": several})
    values.append(chat_row(21, logprobs=True, top_logprobs=2, mystery=1, max_tokens=None))
    summary, results, notes = batch(tiny_model, write(tmp_path / "in.jsonl", values), "--max-tokens", 5)
    assert [r["custom_id"] for r in results] == [v["custom_id"] for v in values]
    assert all(r["error"] is None and r["response"]["status_code"] == 200 for r in results)
    first = results[0]["response"]["body"]
    assert first["object"] == "chat.completion"
    assert first["choices"][0]["message"]["role"] == "assistant"
    assert first["choices"][0]["finish_reason"] == "length"
    assert first["usage"]["completion_tokens"] == 4
    choices = results[20]["response"]["body"]["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["text"][:3] for c in choices] == ["one", "one", "two", "two"]
    assert len(choices[0]["logprobs"]["tokens"]) == 6
    last = results[21]["response"]["body"]
    assert last["usage"]["completion_tokens"] == 5
    assert len(last["choices"][0]["logprobs"]["content"]) == 5
    assert "mystery" in notes
    assert (summary["rows"], summary["answered"], summary["errors"]) == (22, 22, 0)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_bad_rows_become_errors(tiny_model, tmp_path):
    bad = {
        "is not valid JSON": '{"custom_id": "x", \n',
        "must be a JSON object": "[1]\n",
        "custom_id must be": {"method": "POST", "url": CHAT, "body": {}},
        "is used by an earlier row": chat_row(0),
        "method must be": chat_row(2) | {"method": "GET"},
        "url must be": chat_row(3) | {"url": "/v1/embeddings"},
        "body must be": chat_row(4) | {"body": 7},
        "temperature must be": chat_row(5, temperature=-1),
        "temperature:": chat_row(6, temperature="hot"),
        "messages": {**chat_row(7), "body": {}},
        "the context holds": chat_row(8, messages=[{"role": "user", "content": "x" * 5000}]),
        "cannot be streamed": chat_row(9, stream=True),
        "max_tokens must be": chat_row(10, max_tokens=0),
        "tools[0].function": chat_row(11, tools=[{"type": "function"}]),
        "the prompt is empty": {"custom_id": "e", "method": "POST", "url": TEXT, "body": {"prompt": [[]]}},
    }
    source = write(tmp_path / "in.jsonl", [chat_row(0), "\n", *bad.values(), chat_row(1)])
    summary, results, _ = batch(tiny_model, source)
    assert (summary["answered"], summary["errors"]) == (2, len(bad))
    assert results[0]["error"] is None and results[-1]["error"] is None
    for expected, result in zip(bad, results[1:-1], strict=True):
        assert expected in result["error"]["message"]
        assert result["response"]["status_code"] == 400
        assert result["response"]["body"]["error"]["message"] == result["error"]["message"]


def test_what_is_answered_is_not_answered_again(tiny_model, tmp_path):
    source = write(tmp_path / "in.jsonl", [chat_row(i) for i in range(6)])
    _, before, _ = batch(tiny_model, source)
    write(source, [chat_row(9), *(chat_row(i) for i in (3, 1)), chat_row(0, max_tokens=5)])
    summary, after, _ = batch(tiny_model, source)
    assert (summary["answered"], summary["reused"]) == (2, 2)
    assert after[1:3] == [before[3], before[1]]
    again, _, notes = batch(tiny_model, source, "--seed", 5)
    assert again["reused"] == 0
    assert "left out" in notes


def test_an_answer_does_not_depend_on_its_neighbours(tiny_model, tmp_path):
    values = [chat_row(i, temperature=1) for i in range(8)]
    _, together, _ = batch(tiny_model, write(tmp_path / "in.jsonl", values))
    (tmp_path / "out.jsonl").unlink()
    _, alone, _ = batch(tiny_model, write(tmp_path / "in.jsonl", values[5:6]), "--dtype", "float32")
    assert texts(alone) == texts(together[5:6])


def test_resumes_after_kill(tiny_model, tmp_path):
    values = [chat_row(i, temperature=1, max_tokens=40) for i in range(24)]
    source, output = write(tmp_path / "in.jsonl", values), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    process = start("batch", tiny_model, source, "-o", output, *SMALL, "--max-num-seqs", 2)
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not output.exists()
    done = [line for line in partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 5 <= len(done) < 24
    with open(partial, "ab") as file:  # as if it had died in the middle of a line
        file.write(done[0][:50])
    summary, results, _ = batch(tiny_model, source)
    assert summary["reused"] == len(done)
    assert summary["answered"] == 24 - len(done)
    assert [r["custom_id"] for r in results] == [v["custom_id"] for v in values]
    assert [r for r in results if r["error"] is not None] == []
    kept = {json.loads(line)["custom_id"]: json.loads(line) for line in done}
    assert all(r == kept[r["custom_id"]] for r in results if r["custom_id"] in kept)
    output.unlink()
    _, whole, _ = batch(tiny_model, source)
    assert texts(whole) == texts(results)


def test_interrupted_then_resumed(tiny_model, tmp_path):
    source = write(tmp_path / "in.jsonl", [chat_row(i, max_tokens=60) for i in range(24)])
    partial = tmp_path / "out.jsonl.partial"
    process = start("batch", tiny_model, source, "-o", tmp_path / "out.jsonl", *SMALL, "--max-num-seqs", 1)
    deadline = time.monotonic() + 60
    while not partial.exists() or not partial.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"goes on from there" in errors
    summary, results, _ = batch(tiny_model, source)
    assert summary["reused"] >= 1
    assert len(results) == 24


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["in.jsonl", "-o", "in.jsonl"], "same file"),
        (["none.jsonl", "-o", "out.jsonl"], "none.jsonl"),
        (["in.jsonl", "-o", "no/where.jsonl"], "no such folder"),
        (["in.jsonl"], "--output"),
        (["in.jsonl", "-o", "out.jsonl", "--top-p", "7"], "top_p must be between"),
    ],
)
def test_wrong_usage(tiny_model, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [chat_row(0)])
    result = call("batch", tiny_model, *arguments, *SMALL)
    assert result.exit_code == 2
    assert says in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_options_and_result_file_are_checked_before_the_model_is_loaded(tmp_path):
    source = write(tmp_path / "in.jsonl", [chat_row(0)])
    for options, says in [(["--max-tokens", 0], "max_tokens"), (["--json", "no/x.json"], "there is no folder no")]:
        result = call("batch", "no-such-model", source, "-o", tmp_path / "out.jsonl", *options)
        assert result.exit_code == 2
        assert says in result.stderr


def test_an_empty_file_has_an_empty_result(tiny_model, tmp_path):
    summary, results, _ = batch(tiny_model, write(tmp_path / "in.jsonl", []))
    assert (summary["rows"], results) == (0, [])


def test_rows_longer_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    write(tmp_path / "in.jsonl", [chat_row(0, user="x" * 5000), chat_row(1)])
    first, second = rows.read(tmp_path / "in.jsonl", "")
    assert "longer than 1000 bytes" in str(first.error)
    assert second.custom_id == "row-1"
    assert rows.count(tmp_path / "in.jsonl") == 2


def test_one_writer_at_a_time(tmp_path):
    journal = Journal(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="another process"):
        Journal(tmp_path / "out.jsonl")
    journal.add("a", {"custom_id": "1", "response": None, "error": None})
    journal.close()
    again = Journal(tmp_path / "out.jsonl")
    assert "a" in again
    again.publish(["a"])
    again.close()
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_run_that_answered_nothing_ends_with_1(tiny_model, tmp_path):
    source = write(tmp_path / "in.jsonl", ["no JSON\n", "neither\n"])
    result = call("batch", tiny_model, source, "-o", tmp_path / "out.jsonl", *SMALL)
    assert result.exit_code == 1
    assert "2 errors" in result.stderr
    assert all(r["error"] for r in read(tmp_path / "out.jsonl"))


def test_rows_may_ask_for_a_form_and_a_bad_one_is_an_error_of_its_row(tiny_model, tmp_path):
    asked = {"response_format": {"type": "json_object", "schema": {"enum": [True, None]}}}
    values = [
        chat_row(0, structured_outputs={"choice": ["red", "blue"]}),
        chat_row(1, structured_outputs={"regex": "a("}),
        chat_row(2, **asked, max_tokens=20),
        chat_row(3),
    ]
    summary, results, _ = batch(tiny_model, write(tmp_path / "in.jsonl", values))
    content = [c["response"]["body"]["choices"][0]["message"]["content"] for c in results if c["error"] is None]
    assert content[0] in ("red", "blue") and content[1] in ("true", "null")
    assert results[1]["response"]["status_code"] == 400
    assert results[1]["response"]["body"]["error"]["param"] == "structured_outputs"
    assert (summary["answered"], summary["errors"]) == (3, 1)
