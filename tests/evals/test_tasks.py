"""Tasks with right answers: scorers, worked examples, files of rows, GSM8K."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail import LLM, SamplingParams
from dovetail.core.errors import ConfigError, RequestError
from dovetail.evals.prompts import Example, encode, row_prompt, text_prompt
from dovetail.evals.scorers import first_letter, last_number, scorer
from dovetail.evals.suite import build
from dovetail.evals.tasks import Gsm8k, Jsonl
from tests.helpers.hf_models import edit_json, save_model
from tests.helpers.program import SMALL, call

ENGINE = dict(kv_memory="4MiB", threads=1)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))


def write(path, rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def run(model, suite, *words):
    result = call("eval", model, "--suite", suite, *words, *SMALL, "--json", "-")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


# -- scorers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1,080,000\nOr about 3 a head.", "1080000"),
        ("#### 5 then #### -7 miles", "-7"),
        ("The profit is $70,000.", "70000"),
        ("It costs $1,234.50.", "1234.5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("−12 degrees", "-12"),
        ("16-3=13, and 20-13", "13"),
        ("(4)-3", "3"),
        ("from 1,2,3", "3"),
        ("half of it, .5", "0.5"),
        ("18.00 %", "18"),
        ("**42**.", "42"),
        (r"\boxed{42}", "42"),
        (r"so \boxed{7}. Then \boxed{\$1,234 \text{ in 3 years}}, or 5 a day.", "1234"),
        (r"#### 8, not \boxed{9}", "8"),
        (r"\boxed{none} of the 6", "6"),
        ("first 7, and nothing after ####", "7"),
        ("none", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 2), st.booleans(), st.sampled_from(["", ".", " eggs.", "\n"])
)
def test_a_number_is_found_however_it_is_written(value, places, dollar, after):
    written = f"{abs(value):,.{places}f}"
    sign = "-" if value < 0 else ""
    text = f"Of 3 and 4 it is {sign}{'$' if dollar else ''}{written}{after}"
    assert last_number(text) == value
    assert scorer("number").correct(text, f"#### {value}")
    assert not scorer("number").correct(text, f"#### {value + 1}")


@given(st.text())
def test_any_text_can_be_read(text):
    assert (last_number(text) is None) or any(c.isdigit() for c in text)
    assert first_letter(text) in (None, *"ABCDE")


@pytest.mark.parametrize(
    ("name", "answer", "right", "correct"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("exact", "", "Paris", False),
        ("contains", "It is PARIS, of course", " Paris ", True),
        ("contains", "It is Rome", "Paris", False),
        ("number", "so 18.0", "work\n#### 18", True),
        ("number", "so eighteen", "18", False),
        ("choice", "The answer is (C).", "C", True),
        ("choice", "B) Because A is wrong", "B", True),
        ("choice", "Bees and CDs: D", "D", True),
        ("choice", "b", "B", False),
        ("choice", "F", "E", False),
        (r"regex:is (\w+)", "it is 3, no, it is 4", "it is 4", True),
        (r"regex:is (\w+)", "it is 3, no, it is 4", "4", True),
        (r"regex:is (\w+)", "it is 3", "4", False),
        (r"regex:is (\w+)", "4", "4", False),
        (r"regex:\d+", "1 and 22", "22", True),
        (r"regex:x(y)?", "x", "y", False),
    ],
)
def test_scorers(name, answer, right, correct):
    assert scorer(name).correct(answer, right) is correct


def test_a_right_answer_that_says_nothing_is_refused():
    for name, right in (("number", "no digit"), ("choice", "42"), ("exact", " "), ("regex:a(b)?", "")):
        with pytest.raises(RequestError, match="the answer has no"):
            scorer(name).expected(right)


@pytest.mark.parametrize(
    ("name", "words"), [("best", "exact, contains"), ("regex:(", "is no pattern"), ("regex:", "after the colon")]
)
def test_wrong_scorers(name, words):
    with pytest.raises(ConfigError, match=words):
        scorer(name)


# -- prompts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(tiny_model, **ENGINE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The same model without a chat template."""
    directory = tmp_path_factory.mktemp("models") / "base"
    save_model(directory, num_hidden_layers=2, max_position_embeddings=4096)
    edit_json(directory / "tokenizer_config.json", chat_template=None)
    return directory


def test_examples_are_earlier_turns_of_the_conversation(llm):
    examples = [Example(text_prompt("1+1?"), "2"), Example(row_prompt({"question": "2+2?"}), "4")]
    turns = ["1+1?", "2", "2+2?", "4", "3+3?"]
    roles = ["user", "assistant"] * 2 + ["user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    assert encode(llm, text_prompt("3+3?"), examples) == llm.chat_tokens(messages)


def test_examples_are_paragraphs_without_a_chat_template(base):
    llm = LLM(base, **ENGINE)
    examples = [Example(text_prompt("1+1="), "2"), Example(row_prompt({"question": "2+2?"}), "4")]
    text = "1+1= 2\n\nQuestion: 2+2?\nAnswer: 4\n\n3+3="
    assert encode(llm, text_prompt("3+3="), examples) == llm.tokenizer.encode(text)
    chat = row_prompt({"messages": [{"role": "user", "content": "Hi"}]})
    for prompt, before in ((chat, []), (text_prompt("Hi"), [Example(chat, "Ho")])):
        with pytest.raises(RequestError, match="no chat template"):
            encode(llm, prompt, before)


# -- suites ----------------------------------------------------------------------------------------------


def test_a_models_own_answers_are_right_and_others_wrong(tiny_model, llm, tmp_path):
    rows = [{"prompt": f"number {i}", "answer": "?"} for i in range(6)]
    file = write(tmp_path / "rows.jsonl", rows)
    options = ("--data", file, "--tokens", 9)
    found, _ = run(tiny_model, "jsonl", *options)
    assert (found["accuracy"], found["correct"], found["total"], found["stderr"]) == (0, 0, 6, 0)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    said = [o.outputs[0] for o in llm.chat(chats, SamplingParams(temperature=0, max_tokens=9))]
    cut = sum(o.finish_reason == "length" for o in said)
    assert (found["tokens"], found["unfinished"]) == (sum(len(o.token_ids) for o in said), cut) and 0 < cut < 6
    own = [item["answer"] for item in found["items"]]
    for i, answer in enumerate(own[:2]):
        rows[i]["answer"] = answer
    found, text = run(tiny_model, "jsonl", "--data", write(file, rows), "--tokens", 9)
    assert [i["correct"] for i in found["items"]] == [True, True, False, False, False, False]
    assert [i["line"] for i in found["items"]] == [1, 2, 3, 4, 5, 6]
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 6))
    assert "2 of 6 by exact" in text and f"{cut} cut off" in text


def test_examples_are_not_scored_and_the_limit_counts_what_is(tiny_model, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": i} for i in range(9)])
    found, _ = run(tiny_model, "jsonl", "--data", file, "--shots", 2, "--limit", 3, "--tokens", 4)
    assert (found["shots"], found["total"]) == (2, 3)
    assert [i["line"] for i in found["items"]] == [3, 4, 5]


def test_an_answer_of_a_paragraph_ends_with_it(base, tmp_path, monkeypatch):
    asked = []
    generate = LLM.generate

    def spy(self, prompts, params, **more):
        asked.append(params.stops)
        return generate(self, prompts, params, **more)

    monkeypatch.setattr(LLM, "generate", spy)
    file = write(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}] * 3)
    for shots in (0, 1):
        run(base, "jsonl", "--data", file, "--shots", shots, "--tokens", 4)
    assert asked == [(), ("\n\n",)]


def test_bad_rows_are_named_and_the_others_run(tiny_model, tmp_path):
    rows = [
        {"question": "one?", "answer": "#### 1"}, "{broken\n", {"question": "two?"}, {"answer": "3"},
        {"question": "four?", "answer": "no number"}, {"question": "x" * 300, "answer": "5"},
        {"question": "six?", "answer": True}, {"question": "seven?", "answer": 7},
    ]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    options = ("--data", file, "--scorer", "number", "--tokens", 4, "--max-model-len", 128)
    found, text = run(tiny_model, "jsonl", *options)
    assert (found["total"], found["refused"]) == (2, 6)
    reasons = {r["line"]: r["why"] for r in found["refusals"]}
    assert list(reasons) == [2, 3, 4, 5, 6]
    words = ["not valid JSON", "answer must be", "has none", "no number", "the context holds 128"]
    assert all(w in why for w, why in zip(words, reasons.values(), strict=True)), reasons
    assert "6 left out: line 2: " in text and "and 3 more" in text
    write(file, rows[1:3])
    result = call("eval", tiny_model, "--suite", "jsonl", *options, *SMALL)
    assert result.exit_code == 2 and "no row that can be used: line 1:" in result.stderr


def test_gsm8k_finds_its_file(tiny_model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"has no gsm8k_test\*.jsonl or test.jsonl"):
        Gsm8k(data=folder)
    plain = write(folder / "test.jsonl", [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}] * 3)
    assert Gsm8k(data=folder).file() == plain
    named = write(folder / "gsm8k_test_2.jsonl", [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}] * 2)
    assert Gsm8k(data=folder).file() == named and Gsm8k(data=plain).file() == plain
    found, _ = run(tiny_model, "gsm8k", "--data", folder, "--tokens", 4)
    assert (found["suite"], found["scorer"], found["total"], found["shots"]) == ("gsm8k", "number", 2, 0)
    assert (Gsm8k(data=plain).limit, Gsm8k(data=plain).tokens) == (200, 512)


def test_gsm8k_says_where_to_get_it(tiny_model, tmp_path):
    for words in ((), ("--data", tmp_path / "nowhere")):
        result = call("eval", tiny_model, "--suite", "gsm8k", *words, *SMALL)
        assert result.exit_code == 2 and "https://github.com/openai/grade-school-math" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scorer": "best"}, "--scorer 'best' is unknown"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"tokens": 0}, "--tokens must be at least 1"),
        ({"shots": -1}, "--shots must be at least 0"),
        ({"data": None}, "needs a file of rows as --data"),
    ],
)
def test_impossible_options_are_known_before_a_model_is_loaded(tmp_path, options, words):
    given = {"data": write(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}])} | options
    with pytest.raises(ConfigError, match=words):
        build(Jsonl, given)


def test_a_suite_takes_only_its_own_options(tiny_model):
    result = call("eval", tiny_model, "--suite", "similarity", "--shots", 2, *SMALL)
    assert result.exit_code == 2 and "the suite similarity takes no --shots" in result.stderr
