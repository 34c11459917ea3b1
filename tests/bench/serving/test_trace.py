from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.bench.serving.trace import Kind, Trace, TraceRequest
from dovetail.core.errors import RequestError


def words(text: str) -> int:
    return len(text.split())


def read(path: Path, content: str | bytes) -> tuple[list[TraceRequest], Trace]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    trace = Trace(path, words)
    return list(trace), trace


def mooncake(at, input_length, output_length, hash_ids) -> str:
    return json.dumps(
        {"timestamp": at, "input_length": input_length, "output_length": output_length, "hash_ids": hash_ids}
    )


def turns(*said) -> dict:
    return {"id": "x", "conversations": [{"from": speaker, "value": value} for speaker, value in said]}


def test_azure(tmp_path) -> None:
    rows, trace = read(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109",
    )
    assert trace.kind is Kind.AZURE and trace.broken == 0
    assert [(r.input_tokens, r.output_tokens) for r in rows] == [(374, 44), (396, 109)]
    assert rows[1].arrival - rows[0].arrival == pytest.approx(4.314579, abs=1e-6)


def test_azure_columns_are_found_by_name_and_times_may_have_a_zone(tmp_path) -> None:
    rows, _ = read(
        tmp_path / "a.csv",
        "\ufeffGeneratedTokens,TIMESTAMP,ContextTokens\n"
        "7,2024-05-10 00:00:00.009930+00:00,5\n"
        "8,2024-05-10 00:00:01,6\n",
    )
    assert [(r.input_tokens, r.output_tokens) for r in rows] == [(5, 7), (6, 8)]
    assert rows[1].arrival - rows[0].arrival == pytest.approx(0.99007)


def test_broken_lines_are_counted_and_the_rest_is_read(tmp_path) -> None:
    bad = ["", "2023-11-16 18:15:46,1", "yesterday,1,2", "2023-11-16 18:15:46,-1,2", "2023-11-16 18:15:46,x,2"]
    bad += ["2023-11-16 18:15:46,1,2,3", "2023-11-16 18:15:46,0,2", "2023-11-16 18:15:46,99999999999,2", "\0\xff"]
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,1,2", *bad, "2023-11-16 18:15:47,3,4"]
    rows, trace = read(tmp_path / "a.csv", "\n".join(lines).encode("latin-1"))
    assert [(r.input_tokens, r.output_tokens) for r in rows] == [(1, 2), (3, 4)]
    assert trace.broken == len(bad) - 1  # a blank line is none
    assert trace.reason is not None and trace.reason.startswith("line 4: ")


def test_azure_without_its_columns_is_refused(tmp_path) -> None:
    with pytest.raises(RequestError, match="no column contexttokens, generatedtokens"):
        read(tmp_path / "a.csv", "TIMESTAMP,tokens\n2023-11-16 18:15:46,1\n")


def test_mooncake(tmp_path) -> None:
    lines = [mooncake(0, 6758, 500, [0, 1, 2]), mooncake(3000, 7, 1, [])]
    rows, trace = read(tmp_path / "m.jsonl", "\n".join(lines))
    assert trace.kind is Kind.MOONCAKE and trace.broken == 0
    assert rows == [TraceRequest(6758, 500, 0.0, (0, 1, 2)), TraceRequest(7, 1, 3.0)]


@pytest.mark.parametrize(
    "bad",
    [
        mooncake(0, 6758, 500, [0])[:-5],
        mooncake(None, 1, 1, [0]),
        mooncake(True, 1, 1, [0]),
        mooncake(0, 1.5, 1, [0]),
        mooncake(0, 1, 0, [0]),
        mooncake(0, 1, 1, ["a"]),
        mooncake(0, 1, 1, None),
        mooncake(float("nan"), 1, 1, [0]),
        mooncake(float("inf"), 1, 1, [0]),
        mooncake(10**400, 1, 1, [0]),
        mooncake(0, 10**400, 1, [0]),
        "[1]",
        "[" * 100_000,
        b"\xff\xfe",
        "7",
    ],
    ids=lambda bad: str(bad)[:20],
)
def test_broken_mooncake_lines(tmp_path, bad) -> None:
    good = mooncake(0, 5, 6, [1]).encode()
    rows, trace = read(
        tmp_path / "m.jsonl", b"\n".join([good, bad.encode() if isinstance(bad, str) else bad, good])
    )
    assert len(rows) == 2 and trace.broken == 1
    assert trace.reason is not None and trace.reason.startswith("line 2: ")


def test_sharegpt_takes_the_first_question_and_the_length_of_its_answer(tmp_path) -> None:
    values = [
        turns(("human", "how are you"), ("gpt", "I am fine"), ("human", "good")),
        turns(("system", "be brief"), ("gpt", "hello"), ("user", "who"), ("assistant", "a model")),
    ]
    rows, trace = read(tmp_path / "s.json", json.dumps(values, indent=1))
    assert trace.kind is Kind.SHAREGPT and not trace.kind.timed and trace.broken == 0
    assert rows == [TraceRequest(3, 3, prompt="how are you"), TraceRequest(1, 2, prompt="who")]


def test_broken_conversations_are_counted(tmp_path) -> None:
    good = turns(("human", "a b"), ("gpt", "c"))
    bad = [7, {}, {"conversations": 7}, turns(), turns(("human", "a")), turns(("gpt", "a"), ("human", "b"))]
    bad += [
        turns(("human", ""), ("gpt", "a")),
        turns(("human", 5), ("gpt", "a")),
        turns(("human", "a"), ("gpt", "")),
    ]
    rows, trace = read(tmp_path / "s.json", json.dumps([good, *bad, good]))
    assert len(rows) == 2 and trace.broken == len(bad)
    assert trace.reason is not None and trace.reason.startswith("conversation 2: ")


def test_a_sharegpt_file_that_ends_early_is_read_as_far_as_it_goes(tmp_path) -> None:
    text = json.dumps([turns(("human", f"number {i}"), ("gpt", "yes")) for i in range(3)])
    rows, trace = read(tmp_path / "s.json", text[:-40])
    assert [r.prompt for r in rows] == ["number 0", "number 1"]
    assert trace.broken == 1 and "nothing after it was read" in (trace.reason or "")


def test_reading_twice_counts_once(tmp_path) -> None:
    _, trace = read(tmp_path / "m.jsonl", "broken\n")
    assert list(trace) == [] and trace.broken == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("\ufeff [\n]", Kind.SHAREGPT),
        ('{"timestamp": 0}', Kind.MOONCAKE),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", Kind.AZURE),
    ],
)
def test_without_a_known_suffix_the_contents_tell(tmp_path, content, kind) -> None:
    assert read(tmp_path / "trace.txt", content)[1].kind is kind


def test_what_is_no_trace_is_refused(tmp_path) -> None:
    with pytest.raises(RequestError, match="no trace is recognised"):
        read(tmp_path / "trace.txt", "hello")
    with pytest.raises(RequestError, match="does not begin with"):
        read(tmp_path / "s.json", '{"a": 1}')
    with pytest.raises(RequestError, match="cannot be read"):
        Trace(tmp_path / "none.txt", words)
    with pytest.raises(RequestError, match="cannot be read"):
        list(Trace(tmp_path / "none.csv", words))
