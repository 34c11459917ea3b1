"""Choices by log-likelihood: against transformers, the cut between context and choice, sharing, bad rows."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dovetail import LLM
from dovetail.core.errors import ConfigError, RequestError
from dovetail.evals.multiple_choice import Choices, MultipleChoice, Texts, encode, log_likelihoods, parse
from dovetail.evals.perplexity import Perplexity
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.helpers.program import SMALL, call

EXACT = dict(kv_memory="16MiB", threads=1, dtype="float32", kv_cache_dtype="float32")
ROWS = [
    {"question": "Which one?", "choices": ["this", "that one", "é"], "answer": 2},
    {"context": "A man sits on a roof. He", "choices": ["falls.", "sings a long song."], "answer": "B"},
    {"prompt": "It is ", "choices": ["x", "yes", " no", "z"], "answer": "yes"},
    {"question": "ARC?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
]


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))


def write(path, rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def run(model, *words):
    result = call("eval", model, "--suite", "multiple-choice", *words, "--threads", 1, "--json", "-")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


def their_likelihood(model, context: bytes, continuation: bytes) -> float:
    ids = list(context + continuation)  # the tokenizer's ids are bytes
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(context), len(ids)))


def test_likelihoods_are_those_of_transformers(tiny_model, tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    found, text = run(tiny_model, "--data", file, "--dtype", "float32", "--kv-cache-dtype", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    parts = [
        (b"Question: Which one?\nAnswer:", [" this", " that one", " é"], 2),
        (b"A man sits on a roof. He", [" falls.", " sings a long song."], 1),
        (b"It is", [" x", " yes", "  no", " z"], 1),
        (b"Question: ARC?\nAnswer:", [" a", " b", " c"], 2),
    ]
    lengths = [[4, 8, 2], [6, 18], [1, 3, 3, 1], [1, 1, 1]]
    correct = normed = tokens = 0
    for item, (context, choices, right), sizes in zip(found["items"], parts, lengths, strict=True):
        theirs = [their_likelihood(model, context, c.encode()) for c in choices]
        assert item["loglikelihoods"] == pytest.approx(theirs, abs=1e-4)
        by_byte = [x / n for x, n in zip(theirs, sizes, strict=True)]
        assert item["answer"] == theirs.index(max(theirs))
        assert item["answer_norm"] == by_byte.index(max(by_byte))
        correct += item["answer"] == right
        normed += item["answer_norm"] == right
        tokens += sum(len(c.encode()) for c in choices)
    assert (found["acc"], found["acc_norm"], found["total"]) == (correct / 4, normed / 4, 4)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 4))
    assert found["tokens"] == tokens
    assert "of 4 questions" in text


def engine(tokenizer, limit=1000):
    return SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(max_model_len=limit))


@given(
    st.text(min_size=1).filter(str.strip), st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=3)
)
def test_a_choice_begins_where_the_context_without_its_white_space_ends(context, choices):
    found = encode(engine(ByteTokenizer()), Choices(context, tuple(choices), 0))
    for ids, first, length, choice in zip(found.ids, found.first, found.lengths, choices, strict=True):
        text = bytes(ids).decode()
        assert first == len(context.rstrip().encode())
        assert text.startswith(context) and text.endswith(choice) and length == len(choice.encode())
        between = text[len(context) : len(text) - len(choice)]
        assert between == ("" if context[-1].isspace() or choice[0].isspace() else " ")


class Merging:
    """Letters are tokens, and so is `e` with a space behind it, or `e l`."""

    def encode(self, text):
        out = []
        for part in text.replace("e l", "\0").replace("e ", "\1"):
            out.append({"\0": 1000, "\1": 1001}.get(part, ord(part)))
        return out


def test_tokens_that_join_context_and_choice_are_cut_by_the_contexts_length():
    found = encode(engine(Merging()), Choices("He", ("left", "x", "y"), 0))
    assert found.ids[0] == [ord("H"), 1000, ord("e"), ord("f"), ord("t")]
    assert found.first == [2, 2, 2]
    with pytest.raises(RequestError, match="choice 0 adds no token"):
        encode(engine(Merging()), Choices("He", ("l", "x"), 0))


def test_a_text_may_fill_the_context_but_not_more(tiny_model):
    llm = LLM(tiny_model, max_model_len=32, **EXACT)
    row = encode(llm, Choices("c" * 20, ("x" * 11, "y"), 0))
    assert len(row.ids[0]) == 32 and all(x < 0 for x in log_likelihoods(llm, [row])[0])
    with pytest.raises(RequestError, match="with choice 1 it has 33 tokens, but the context holds 32"):
        encode(llm, Choices("c" * 20, ("x", "y" * 12), 0))


def test_choices_share_their_context(tiny_model):
    llm = LLM(tiny_model, max_num_seqs=8, **EXACT)
    rows = [encode(llm, Choices(f"{i} " * 100, ("one", "two", "three"), 0)) for i in range(20)]
    scores = log_likelihoods(llm, rows)
    pages = (rows[0].first[0] - 1) // 16
    assert llm.engine.scheduler.stats.cached_tokens >= 20 * 2 * pages * 16
    alone = LLM(tiny_model, enable_prefix_caching=False, **EXACT)
    for row, found in list(zip(rows, scores, strict=True))[::7]:
        assert log_likelihoods(alone, [row])[0] == pytest.approx(found, abs=1e-4)


def test_a_technique_that_leaves_out_context_changes_the_scores(tiny_model, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"context": "word " * 30, "choices": ["x", "longer"], "answer": 0}])
    plain, _ = run(tiny_model, "--data", file)
    window, _ = run(tiny_model, "--data", file, "--use", "sink-window:sink=0,window=16")
    assert window["activity"]["sink-window"] > 0 and window["state"] == "measured"
    assert window["items"][0]["loglikelihoods"] != plain["items"][0]["loglikelihoods"]


def test_only_rows_that_score_a_choice_leave_pages_out(tiny_model):
    llm = LLM(tiny_model, use="sink-window:sink=0,window=16", **EXACT)
    question = list(b"word " * 30)
    row = Texts([[*question, *b"x"], [*question, *b"longer"]], [150, 150], [1, 6], 0)
    log_likelihoods(llm, [row])
    scored = [range(149, 150), range(149, 155)]  # the question's last row, and those of all tokens but the last
    assert llm.activity()["sink-window"] == sum((p + 1 - 16) // 16 for rows in scored for p in rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": None}, "has none"),
        ({"context": "both"}, "has question, context"),
        ({"question": "  "}, "question must be text"),
        ({"question": 3}, "question must be text"),
        ({"choices": None}, "choices must be a list of texts"),
        ({"choices": "abc"}, "choices must be a list of texts"),
        ({"choices": ["a", 2]}, "choices must be a list of texts"),
        ({"choices": {"label": ["A"]}}, "choices must be a list of texts"),
        ({"choices": {"text": ["a", "b"], "label": [1, 2]}}, "labels of choices must be"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 choices and 1 labels"),
        ({"choices": ["a"]}, "at least 2 choices"),
        ({"choices": ["a", " "]}, "choice 1 is empty"),
        ({"answer": None}, "answer must be the index"),
        ({"answer": 2}, "answer must be the index"),
        ({"answer": -1}, "answer must be the index"),
        ({"answer": True}, "answer must be the index"),
        ({"answer": "C"}, "answer must be the index"),
        ({"answer": ["a"]}, "answer must be the index"),
    ],
)
def test_bad_rows(change, words):
    with pytest.raises(RequestError, match=words):
        parse({"question": "q?", "choices": ["a", "b"], "answer": 0} | change)


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y", "z"], 1, 1),
        (["x", "y", "z"], "z", 2),
        (["x", "y", "z"], "B", 1),
        (["B", "A"], "A", 1),  # a text counts before a letter
        ({"text": ["x", "y"], "label": ["y", "x"]}, "x", 1),  # and a label before a text
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["x", "y"]}, "B", 1),
    ],
)
def test_what_an_answer_means(choices, answer, right):
    assert parse({"question": "q?", "choices": choices, "answer": answer}).right == right


def test_bad_rows_are_named_and_the_others_run(tiny_model, tmp_path):
    long = {"context": "c" * 200, "choices": ["a", "b"], "answer": 0}
    file = write(tmp_path / "rows.jsonl", ["nonsense\n", ROWS[0], {"question": "q"}, long, ROWS[1], ROWS[2]])
    found, text = run(tiny_model, "--data", file, "--limit", 3, "--max-model-len", 100)
    assert [i["line"] for i in found["items"]] == [2, 5]
    assert (found["total"], found["refused"]) == (2, 3)
    assert "3 left out: line 1: " in text and "line 4: with choice 0 it has 202 tokens" in text
    write(file, ["nonsense\n"])
    result = call("eval", tiny_model, "--suite", "multiple-choice", "--data", file, *SMALL)
    assert result.exit_code == 2 and "no row that can be used" in result.stderr


def test_impossible_options(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="needs a file of rows as --data"):
        MultipleChoice()
    with pytest.raises(ConfigError, match="--limit must be at least 1"):
        MultipleChoice(data=file, limit=0)


def test_perplexity_scores_as_before(tiny_model, tmp_path):
    """The other user of `score`: its `dense` is one number for all windows."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    found = Perplexity(corpus=str(file), window=64, windows=2, dense=16).measure(LLM(tiny_model, **EXACT), None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    text = file.read_bytes()
    means = [their_likelihood(model, w[:1], w[1:]) / 63 for w in (text[:64], text[64:128])]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(means) / 2), rel=1e-4)
