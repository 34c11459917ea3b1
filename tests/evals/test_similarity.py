"""Likeness of answers: the measures by definition, and engines against engines."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail import LLM, SamplingParams
from dovetail.core.errors import ConfigError
from dovetail.evals.prompts import TEXTS, prompts
from dovetail.evals.similarity import Similarity, edit_similarity, leading, rouge_l, words
from tests.helpers.program import SMALL, call

ENGINE = dict(kv_memory="4MiB", threads=1)
FEW = dict(limit=3, tokens=12)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(tiny_model, **ENGINE)


def longest_common(a, b):
    """By the definition, over all subsequences of the shorter one."""
    if len(a) > len(b):
        a, b = b, a
    best = 0
    for mask in range(1 << len(a)):
        chosen = [x for i, x in enumerate(a) if mask >> i & 1]
        rest = iter(b)
        if all(x in rest for x in chosen):
            best = max(best, len(chosen))
    return best


def distance(a, b):
    """Levenshtein's distance by its recurrence."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(a, b):
    common = longest_common(a, b)
    if not a or not b:
        expected = float(a == b)
    elif not common:
        expected = 0.0
    else:
        precision, recall = common / len(b), common / len(a)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-12)


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_similarity_is_by_levenshtein(a, b):
    expected = 1 - distance(a, b) / max(len(a), len(b)) if a or b else 1.0
    assert edit_similarity(a, b) == pytest.approx(expected, abs=1e-12)


@given(st.text(max_size=40), st.text(max_size=40))
def test_measures_are_symmetric_between_0_and_1_and_1_for_the_same(a, b):
    for measure in (rouge_l, edit_similarity):
        assert measure(a, a) == 1
        assert 0 <= measure(a, b) <= 1
        assert measure(a, b) == pytest.approx(measure(b, a))


def test_words_are_letters_and_digits_in_lower_case():
    assert words("It's 3.5 km -- Größe_x, NO!") == ["it", "s", "3", "5", "km", "größe", "x", "no"]
    assert rouge_l("The cat sat.", "the CAT sat") == 1


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_leading_tokens(a, b):
    n = leading(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_identical_engines_are_exactly_alike(llm):
    suite = Similarity(**FEW)
    reference = suite.refer(llm)
    result = suite.measure(llm, reference)
    tokens = sum(len(answer.token_ids) for _, answer in reference.values)
    assert [result[k] for k in ("exact", "identical", "rougeL", "edit")] == [1.0] * 4
    assert (result["prompts"], result["answers"], result["tokens"]) == ("built-in", 3, tokens)
    assert result["exact_tokens"] == pytest.approx(tokens / 3) and result["tokens_per_s"] > 0
    assert "100.0% of 3 answers identical" in suite.text(result)


def test_figures_are_means_over_the_prompts(tiny_model, llm):
    suite = Similarity(**FEW)
    reference = suite.refer(llm)
    other = LLM(tiny_model, kv_cache_dtype="int4", **ENGINE)
    result = suite.measure(other, reference)
    params = SamplingParams(temperature=0, max_tokens=12)
    pairs = [(answer, other.generate([prompt], params)[0].outputs[0]) for prompt, answer in reference.values]
    exact = [leading(a.token_ids, b.token_ids) / max(len(a.token_ids), len(b.token_ids)) for a, b in pairs]
    assert result["exact"] == pytest.approx(sum(exact) / 3)
    assert result["identical"] == sum(e == 1 for e in exact) / 3
    assert result["edit"] == pytest.approx(sum(edit_similarity(a.text, b.text) for a, b in pairs) / 3)
    assert result["exact"] < 1, "int4 keys and values must change some answer of a random model"


def test_an_answer_that_is_shorter_is_not_identical(llm):
    suite = Similarity(**FEW)
    reference = suite.refer(llm)
    lengths = [len(answer.token_ids) for _, answer in reference.values]
    for _, answer in reference.values:
        answer.token_ids.pop()
    result = suite.measure(llm, reference)
    assert result["identical"] == 0 and result["exact"] == pytest.approx(sum((n - 1) / n for n in lengths) / 3)


def test_built_in_prompts_are_about_two_dozen_different_ones():
    assert 20 <= len(set(TEXTS)) == len(TEXTS) <= 30
    assert prompts(None).values[0].messages[0]["content"] == TEXTS[0]


def test_prompts_from_files(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text('Hello\n\n{"prompt": "as it is"}\n')
    assert [p.plain for p in prompts(text).values] == ["Hello", '{"prompt": "as it is"}']
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": "a"}, {"messages": chat}, {"question": "why?"}, {"messages": []}, {"prompt": " "}, {}]
    rows += [{"prompt": "a", "question": "b"}, {"prompt": 3}, {"messages": [{"role": "user"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = prompts(file)
    assert [line for line, _ in found.rows] == [1, 2, 3]
    assert [list(p.messages) for p in found.values[:2]] == [[{"role": "user", "content": "a"}], chat]
    assert found.values[2].plain == "Question: why?\nAnswer:"
    reasons = [r.why for r in found.refused]
    words = ["non-empty", "not empty", "has none", "has prompt, question", "must be text", "needs content"]
    assert all(word in why for word, why in zip(words, reasons, strict=True)), reasons


def test_command_line_sweep(tiny_model, tmp_path):
    destination = tmp_path / "out.json"
    words = (
        "--tokens",
        8,
        "--limit",
        2,
        "--sweep",
        "kv-cache-dtype=int4",
        "--min",
        "exact=0.01",
        "--against",
        "plain",
    )
    result = call("eval", tiny_model, "--suite", "similarity", *words, *SMALL, "--json", destination)
    assert result.exit_code in (0, 1)
    assert "rougeL" in result.stdout.splitlines()[0]
    found = json.loads(destination.read_text())
    assert found["against"] == "plain"
    first, second = found["results"]
    assert (first["exact"], first["identical"], first["rougeL"], first["edit"]) == (1, 1, 1, 1)
    assert 0 <= second["edit"] <= 1 and second["answers"] == 2
    assert result.exit_code == (second["exact"] < 0.01)


def test_a_lossless_technique_changes_no_answer(tiny_model):
    words = ("--use", "ngram", "--tokens", 40, "--limit", 4, "--min", "identical=1")
    result = call("eval", tiny_model, "--suite", "similarity", *words, *SMALL, "--json", "-")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["identical"] == 1 and found["activity"]["ngram"] > 0


def test_prompts_that_are_too_long_are_left_out(tiny_model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("short\n" + "long " * 100 + "\nagain\n")
    words = ("--prompts", file, "--tokens", 8, "--max-model-len", 128)
    result = call("eval", tiny_model, "--suite", "similarity", *words, *SMALL, "--json", "-")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["answers"], found["refused"], found["refusals"][0]["line"]) == (2, 1, 2)
    assert "1 left out: line 2: " in result.stdout and "the context holds 128" in result.stdout
    result = call("eval", tiny_model, "--suite", "similarity", *words[:2], "--tokens", 127, *words[4:], *SMALL)
    assert result.exit_code == 2 and "no row that can be used" in result.stderr


@pytest.mark.parametrize("options", [{"tokens": 0}, {"limit": 0}, {"limit": -1}])
def test_impossible_options(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"--{name} must be at least 1"):
        Similarity(**options)
