"""Needles: contexts of an exact length, needles in their places, a question that is read sparsely, and scores."""

from __future__ import annotations

import contextlib
import json
import re
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Probe
from dovetail.evals import needle
from dovetail.evals.haystack import NEAR, haystack
from dovetail.evals.needle import Needle
from dovetail.evals.retrieval import KEYS, VARIANTS, recall, retrieval
from dovetail.evals.trial import Trial, trial
from dovetail.llm import LLM
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.helpers.program import SMALL, call

TOKENIZER = ByteTokenizer()
WORDS = ["a", "Is it? ", "so. ", "line\n", "3.14", "é。", "x" * 90]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map("".join)
PAGE, WINDOW = 16, 64
SPARSE = f"sink-window:sink=4,window={WINDOW}"


def hay(text: str) -> Any:
    return haystack(text, "text", TOKENIZER)


def sentence_starts(text: str) -> set[int]:
    ends = re.finditer(r"\n|。|[.!?](?=\s)", text)
    return {len(text[: m.end()].encode()) for m in ends} | {0, len(text.encode())}


@given(texts)
def test_lines_and_sentences_begin_where_the_text_says(text):
    found = hay(text)
    assert bytes(found.tokens).decode() == text
    assert found.starts[0] == 0
    assert sorted(sentence_starts(text)) == found.starts


@given(texts, st.integers(0, 400), st.floats(0, 100), st.randoms(use_true_random=False))
def test_a_place_is_the_nearest_sentence_or_the_depth_itself(text, size, depth, random):
    found = hay(text)
    begin = random.choice(found.starts[:-1])
    starts = {s % len(found.tokens) for s in sentence_starts(text)}
    wanted = round(size * depth / 100)
    allowed = [p for p in range(size + 1) if p == size or (begin + p) % len(found.tokens) in starts]
    distance = min(abs(p - wanted) for p in allowed)
    place = found.place(begin, size, depth)
    assert abs(place - wanted) == (distance if distance <= NEAR else 0)
    assert place in allowed or distance > NEAR
    assert (found.place(begin, size, 0), found.place(begin, size, 100)) == (0, size)


@given(texts, st.integers(0, 400), st.lists(st.floats(0, 100), max_size=4), st.randoms(use_true_random=False))
def test_hiding_adds_the_needles_and_changes_nothing_else(text, size, depths, random):
    found = hay(text)
    begin = random.choice(found.starts[:-1])
    needles = [(depth, [1000 + i] * (i + 1)) for i, depth in enumerate(depths)]
    tokens = found.hide(begin, size, needles)
    circle = (found.tokens * (2 + size // len(found.tokens)))[begin : begin + size]
    assert [t for t in tokens if t < 1000] == circle
    for i, (depth, hidden) in enumerate(needles):
        at = tokens.index(1000 + i)
        assert tokens[at : at + i + 1] == hidden and tokens.count(1000 + i) == i + 1
        before = sum(t < 1000 for t in tokens[:at])
        assert before == found.place(begin, size, depth)


def make(kind: tuple[str, int], number: int = 0, tokenizer: Any = TOKENIZER, text: str = "Some text. ") -> Trial:
    llm = SimpleNamespace(config=SimpleNamespace(seed=0), tokenizer=tokenizer)
    return trial(kind, llm, haystack(text, "text", tokenizer), number)


@settings(max_examples=50)
@given(
    st.sampled_from(VARIANTS), st.integers(2, 6), st.integers(0, 99), st.integers(1, 2000), st.integers(0, 100),
    st.booleans(),
)  # fmt: skip
def test_context_and_question_are_exactly_as_long_as_asked(variant, count, number, more, depth, bos):
    tokenizer = ByteTokenizer(add_bos=bos)
    found = make((variant, 1 if variant == "single" else count), number, tokenizer)
    length = found.fixed + more
    context = found.context(length, depth)
    assert len(context) + len(found.question) == length
    assert (context[0] == tokenizer.bos_id) == bos
    text = tokenizer.decode(context)
    assert all(text.count(needle) == 1 for needle in found.task.needles)
    assert found.task.question.strip() + "\n" not in text + "\n"
    before = text[: text.index(found.task.needles[0])]
    others = sum(len(needle) for needle in found.task.needles[1:] if needle in before)
    assert abs(len(before) - others - more * depth / 100) <= len("Some text. ")


@given(st.sampled_from(VARIANTS), st.integers(2, len(KEYS)), st.integers(0, 1000))
def test_the_needles_give_what_the_question_asks(variant, count, seed):
    task = retrieval(variant, 1 if variant == "single" else count, Random(seed))
    numbers = [re.findall(r"\d{6}", needle) for needle in task.needles]
    given_, keys = [n for (n,) in numbers], [next(iter(_keys(needle)), "") for needle in task.needles]
    assert len(set(given_)) == len(given_)
    asked = _keys(task.question)
    assert [n for n, key in zip(given_, keys, strict=True) if key in asked or not asked] == list(task.values)
    assert len(set(keys)) == (1 if variant in ("single", "multivalue") else count)
    assert len(asked) == {"single": 0, "multiquery": count}.get(variant, 1)
    if variant in ("single", "multikey"):  # the needle completes the question word by word
        assert task.needles[0].strip() == f"{task.question.strip()} {task.values[0]}."


def _keys(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text) if word in KEYS]


@pytest.mark.parametrize(
    ("values", "answer", "share"),
    [
        (["123456"], " 123456.\nAnd so on", 1),
        (["123456"], "it is 1123456", 0),
        (["123456"], "123,456", 0),
        (["123456"], "", 0),
        (["123456", "654321"], " 654321 and 123456", 1),
        (["123456", "654321"], " 654321, 654321", 0.5),
        (["123456", "654321", "111111", "222222"], "222222", 0.25),
    ],
)
def test_an_answer_has_whole_numbers(values, answer, share):
    assert recall(values, answer) == share


class Reader:
    """Answers as a model would that reads the last `sight` tokens before the question, and nothing else."""

    def __init__(self, sight: int, seed: int = 0) -> None:
        self.sight = sight
        self.tokenizer = TOKENIZER
        self.config = SimpleNamespace(max_model_len=4096, seed=seed)
        self.prompts: list[list[int]] = []

    def generate(self, prompts: list, params: SamplingParams, *, probes: list[Probe], progress: bool) -> list:
        assert not progress
        self.prompts += prompts
        return [self._answer(p, probe.dense_until) for p, probe in zip(prompts, probes, strict=True)]

    def _answer(self, prompt: list[int], end: int) -> Any:
        context, question = TOKENIZER.decode(prompt[:end][-self.sight :]), TOKENIZER.decode(prompt[end:])
        said = [v for key in _keys(question) or [""] for v in re.findall(rf"magic.*{key}.* is (\d+)", context)]
        answer = SimpleNamespace(text=", ".join(said), token_ids=[1, 2, 3])
        return SimpleNamespace(outputs=[answer], num_cached_tokens=10, error=None)


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of 6000 tokens."""
    path = tmp_path_factory.mktemp("corpora") / "play.txt"
    path.write_text("To be, or not to be. That is the question.\nWhether it is nobler to suffer, I ask you\n" * 70)
    return str(path)


def measure(llm: Any, **options: Any) -> dict[str, Any]:
    return Needle(**options).measure(llm, None)


def test_a_reader_of_the_end_finds_what_is_there(play):
    found = measure(Reader(700), corpus=play, lengths="512..2048", depths="100,0,60", trials=3)
    right = {(r["length"], r["depth"]): r["correct"] for r in found["grid"]}
    assert list(right) == [(n, d) for n in (512, 1024, 2048) for d in (0, 60, 100)]
    assert [key for key, correct in right.items() if correct == 3] == [
        (512, 0), (512, 60), (512, 100), (1024, 60), (1024, 100), (2048, 100),
    ]  # fmt: skip
    assert sum(right.values()) == 18
    assert found["accuracy"] == found["recall"] == pytest.approx(18 / 27)
    assert found["tokens"] == 9 * (512 + 1024 + 2048) - 27 * 10 + 27 * 3
    assert found["tokens_per_s"] == found["tokens"] / found["seconds"]


def test_progress_counts_every_trial(play, monkeypatch):
    seen: list[tuple[int, list[int]]] = []

    @contextlib.contextmanager
    def counter(what: str, total: int) -> Any:
        seen.append((total, []))
        yield seen[-1][1].append

    monkeypatch.setattr(needle, "counter", counter)
    measure(Reader(1), corpus=play, lengths="512,1024", depths="0,50,100", trials=2)
    assert seen == [(12, [3, 3, 3, 3])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_can_be_answered(variant, play):
    found = measure(Reader(4096), corpus=play, lengths="2048", trials=2, variant=variant)
    assert found["accuracy"] == 1
    assert found["needles"] == (1 if variant == "single" else 4)
    half = measure(Reader(1000), corpus=play, lengths="2048", depths="100", trials=8, variant=variant)
    if variant in ("multivalue", "multiquery"):  # the others are anywhere
        assert 0.25 < half["recall"] < 1 and half["accuracy"] < half["recall"]
    else:
        assert half["accuracy"] == 1


def test_the_seed_decides_and_nothing_else(play):
    one, same, other = Reader(1), Reader(1), Reader(1, seed=1)
    for llm in (one, same, other):
        measure(llm, corpus=play, lengths="1024", trials=2, variant="multikey")
    assert one.prompts == same.prompts
    assert not any(p in one.prompts for p in other.prompts)
    assert len({tuple(p) for p in one.prompts}) == len(one.prompts) == 10


def test_default_lengths_double_and_end_with_the_longest_that_fits(play):
    found = measure(Reader(1), corpus=play, trials=1, depths="0")
    assert [r["length"] for r in found["grid"]] == [1024, 2048, 3584]


def test_a_short_corpus_is_repeated_and_says_so(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be. That is the question.\n" * 20)
    llm = Reader(4096)
    assert measure(llm, lengths="512", corpus=str(short))["repeated"] is False
    found = measure(llm, lengths="512,1024", corpus=str(short))
    assert found["repeated"] is True
    assert found["accuracy"] == 1
    assert "(repeated)" in Needle().text(found)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lengths": "1024,8192"}, r"8192 tokens and 16 of answer are more than the context of 4096.* 4080"),
        ({"lengths": "64"}, "64 tokens are too few for 1 needles and the question"),
        ({"lengths": "1024", "needles": 30, "variant": "multikey"}, "too few for 30 needles"),
        ({"lengths": "1024;2048"}, "--lengths '1024;2048'"),
        ({"lengths": "2048..1024"}, "is not a range"),
        ({"lengths": ""}, "not a whole number"),
        ({"depths": "0,101"}, "0 to 100, got 101"),
        ({"depths": "-1"}, "not a whole number"),
        ({"depths": "half"}, "not a whole number"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"variant": "many"}, "the known ones are single, multikey"),
        ({"needles": 2}, "--variant single takes 1 needles, and --needles is 2"),
        ({"needles": 1, "variant": "multivalue"}, "takes 2 to 64 needles"),
        ({"needles": 65, "variant": "multikey"}, "takes 2 to 64 needles"),
        ({"corpus": "nowhere.txt"}, "no such file"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(options, why, play):
    llm = Reader(1)
    with pytest.raises(ConfigError, match=why):
        measure(llm, **{"corpus": play} | options)
    assert not llm.prompts


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        measure(Reader(1), corpus=str(tmp_path / "empty.txt"))


def test_a_context_without_room_for_default_lengths_is_refused(play):
    llm = Reader(1)
    llm.config.max_model_len = 500
    with pytest.raises(ConfigError, match="give shorter --lengths"):
        measure(llm, corpus=play)


@pytest.fixture(scope="module")
def sparse(tiny_model) -> LLM:
    return LLM(tiny_model, use=SPARSE, kv_memory="16MiB", block_size=PAGE)


def test_the_question_is_read_sparsely_from_its_first_row_on(sparse):
    """The one generated token needs no row of its own: all pages dropped are dropped by the question."""
    found = trial(("single", 1), sparse, hay("Some text. " * 40), 0)
    found.__dict__["room"] = 1
    before = sparse.activity()["sink-window"]
    list(found.run(sparse, 500, [50]))
    first = 500 - len(found.question)
    droppable = [max(0, p + 1 - WINDOW) // PAGE for p in range(first, 500)]
    assert sparse.activity()["sink-window"] - before == sum(n - 1 for n in droppable)  # all but the sink's page


def test_depths_share_what_comes_before_the_needle(tiny_model, play):
    llm = LLM(tiny_model, kv_memory="16MiB")
    options = dict(corpus=play, lengths="1024,2048", trials=2, depths="0,50,100")
    found = measure(llm, **options)
    again = measure(LLM(tiny_model, kv_memory="16MiB"), **options)
    assert 2 * 2048 * 2 < found["tokens"] < 2 * (2048 * 2.5 + 1024 * 1.5) + 600
    timed = ("seconds", "tokens_per_s")
    assert {k: v for k, v in found.items() if k not in timed} == {k: v for k, v in again.items() if k not in timed}


RESULT = {
    "state": "measured",
    "model": "m", "setting": "plain", "suite": "needle", "corpus": "pydoc", "repeated": False, "variant": "single",
    "needles": 1, "accuracy": 0.5, "recall": 0.5, "seconds": 2.0, "tokens_per_s": 100.0,
    "decode_tokens_per_s": 50.0, "decode_spread": [40.0, 60.0], "decode_context": 2048,
    "grid": [
        {"length": n, "depth": d, "trials": 2, "correct": c, "recall": c / 2}
        for n, d, c in [(1024, 0, 2), (1024, 100, 1), (2048, 0, 0), (2048, 100, 1)]
    ],
}  # fmt: skip


def test_the_table_has_a_cell_for_each_length_and_depth():
    assert Needle().text(RESULT).splitlines() == [
        "tokens  0%   100%",
        "  1024  2/2  1/2",
        "  2048  0/2  1/2",
        "accuracy 50.0% (4 of 8): single, 1 needle in pydoc, 2.0 s, 100 tokens/s",
    ]


def test_each_result_is_a_heat_map_and_several_are_points_too():
    axes = Needle().draw([RESULT]).axes[0]
    (image,) = axes.images
    assert image.get_array().tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert image.get_clim() == (0, 1)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1024", "2048"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0%", "100%"]
    assert axes.get_xlabel() and axes.get_ylabel()
    assert sorted(t.get_text() for t in axes.texts) == ["0%", "100%", "50%", "50%"]
    several = Needle().draw([RESULT, {**RESULT, "setting": "other", "accuracy": 1.0}]).axes
    assert [len(axes.images) for axes in several[:3]] == [1, 1, 0]
    assert [axes.get_title().split(":")[0] for axes in several[:2]] == ["m, plain", "m, other"]
    assert several[2].get_ylabel() == "accuracy"


def test_the_command_measures_and_writes(tiny_model, tmp_path, play, monkeypatch):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))
    result = call(
        "eval", tiny_model, "--suite", "needle", "--corpus", play, "--lengths", 512, "--depths", "0,100",
        "--trials", 1, "--use", SPARSE, "--json", "-", "--plot", tmp_path / "heat.png", *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [(r["length"], r["depth"], r["trials"]) for r in found["grid"]] == [(512, 0, 1), (512, 100, 1)]
    assert found["activity"]["sink-window"] > 0
    assert (tmp_path / "heat.png").stat().st_size > 1000
    assert call("eval", tiny_model, "--suite", "perplexity", "--depths", "0", *SMALL).exit_code == 2
