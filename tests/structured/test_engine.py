"""Answers of random models have the form that was asked for, whatever else is asked and whatever happens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dovetail.core.engine import Engine, Progress
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Drafter, Guess, Room
from dovetail.core.types import Request
from dovetail.ops.cpu import isas
from dovetail.structured.grammar import Grammar, GrammarError
from tests.helpers.examples import examples
from tests.helpers.forms import CLOSING, END, TOKENS, grammar, schemas, text
from tests.tiny import finish, make_request, run_staggered, tiny_engine

NATIVE = {"dtype": "float32", "kv_cache_dtype": "float32", "page_size": 16, "kernels": (isas() or ("",))[0]}
KINDS = [NATIVE, {}] if isas() else [{}]
NGRAM = "ngram:tokens=4,min_n=1,max_n=2"

options = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5]), "seed": st.integers(0, 2**32)},
    optional={
        "top_k": st.sampled_from([1, 5, 40]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.1, 0.5]),
        "repetition_penalty": st.just(1.2),
        "frequency_penalty": st.just(0.4),
        "logprobs": st.integers(0, 3),
        "min_tokens": st.integers(0, 12),
    },
)


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 150, "stop_token_ids": [END], "logit_bias": CLOSING, **more})


def constrained(engine: Engine, start: Grammar, name: str = "r", **more: Any) -> Request:
    asked = params(**more)
    return make_request(engine, name, [3, 5, 9], asked, constraint=start.matcher(set(asked.stop_token_ids or ())))


def answers(
    starts: Sequence[Grammar], asked: Sequence[dict[str, Any]], *use: str, **engine: Any
) -> list[list[int]]:
    built = tiny_engine(*use, **{"pages": 96, **engine})
    requests = [constrained(built, g, f"r{i}", **o) for i, (g, o) in enumerate(zip(starts, asked, strict=True))]
    free = make_request(built, "free", [3, 5, 9], SamplingParams(temperature=0, max_tokens=40))
    run_staggered(built, [*requests, free], [0, 1, 3, 3, 5])
    for r in requests:
        assert r.finish_reason in ("stop", "length") and r.constraint.error is None
    return [[t for t in r.output if t != END] for r in requests] + [free.output]


def compiled(schema: Any) -> Grammar:
    try:
        return grammar(json=schema)
    except GrammarError:
        assume(False)
        raise


@given(st.lists(st.tuples(schemas, options), min_size=1, max_size=3))
@examples(25)
def test_answers_are_valid_and_the_same_under_any_schedule(asked: list[Any]) -> None:
    check_schedules(KINDS[0], asked)


@given(st.lists(st.tuples(schemas, options), min_size=1, max_size=3))
@examples(5)
def test_so_they_are_on_the_reference_operations(asked: list[Any]) -> None:
    check_schedules({}, asked)


def check_schedules(kind: dict[str, Any], asked: list[Any]) -> None:
    """Beside others, with drafts, and in a pool so small that requests are preempted."""
    starts, how = [compiled(schema) for schema, _ in asked], [o for _, o in asked]
    together = answers(starts, how, **kind)
    assert answers(starts, how, NGRAM, **kind) == together
    for i, (schema, option) in enumerate(asked):
        assert answers(starts[i : i + 1], [option], **kind)[0] == together[i]
        if len(together[i]) < 150:
            Draft202012Validator(schema).validate(json.loads(text(together[i])))
    how = [{**o, "max_tokens": 40, "logit_bias": {}} for o in how]
    assert answers(starts, how, NGRAM, **{**kind, "page_size": 4, "pages": 13}) == answers(starts, how, **kind)


@pytest.mark.parametrize("use", [(), (NGRAM,)], ids=["plain", "drafts"])
@pytest.mark.parametrize(
    ("form", "matches"),
    [
        ({"regex": "[ab]{3,9}"}, "[ab]{3,9}"),
        ({"regex": "(ab|abc)+-?[0-9]"}, "(ab|abc)+-?[0-9]"),
        ({"choice": ["abc", "ab", "true", "x, y"]}, "abc|ab|true|x, y"),
        ({"grammar": 'start: "{" item ("," item)* "}"\nitem: /[a-c]{2}/'}, r"\{[a-c]{2}(,[a-c]{2})*\}"),
    ],
)
def test_expressions_choices_and_grammars(use: tuple[str, ...], form: dict[str, Any], matches: str) -> None:
    for seed in range(12):
        engine = tiny_engine(*use, **KINDS[0])
        r = constrained(engine, grammar(**form), temperature=1.5, seed=seed)
        engine.add(r)
        finish(engine)
        written = text([t for t in r.output if t != END])
        assert r.finish_reason == "stop" and re.fullmatch(matches, written), written


def test_drafts_are_accepted_in_an_answer_with_a_form() -> None:
    """Greedy, so the text repeats itself soon."""
    engine = tiny_engine(NGRAM, **KINDS[0])
    r = constrained(engine, grammar(regex="[ab]{60}"), temperature=0, logit_bias={})
    engine.add(r)
    finish(engine)
    assert re.fullmatch("[ab]{60}", text(r.output))
    assert engine.scheduler.stats.accepted > 5 and engine.steps < len(r.output)


@pytest.mark.parametrize("guess", [-1, 61, 2**40])
def test_guesses_outside_the_vocabulary_are_cut_before_the_form_sees_them(guess: int) -> None:
    class Guesser(Drafter):
        def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> list[Guess]:
            return [Guess([TOKENS.index(b"a"), guess]) for _ in requests]

    engine = tiny_engine(**KINDS[0])
    engine.seams.drafter = Guesser()
    r = constrained(engine, grammar(regex="[ab]{20}"), temperature=0, logit_bias={TOKENS.index(b"a"): 50.0})
    engine.add(r)
    finish(engine)
    assert text(r.output) == "a" * 20
    assert engine.scheduler.stats.accepted >= 8


def stepwise(engine: Engine) -> list[Progress]:
    return [p for _ in range(500) if engine.busy for p in engine.step()]


def test_a_failed_step_leaves_the_form_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(fail: bool) -> list[int]:
        engine = tiny_engine(NGRAM)
        plain, calls = engine.executor.run, iter(range(1000))

        def flaky(plan: Any) -> Any:
            result = plain(plan)
            if next(calls) % 3 == 1 and fail:
                raise MemoryError
            return result

        monkeypatch.setattr(engine.executor, "run", flaky)
        r = constrained(engine, grammar(json={"type": "array", "items": {"type": "integer"}}), temperature=0.8)
        engine.add(r)
        while engine.busy:
            try:
                engine.step()
            except MemoryError:
                engine.check()
        return r.output

    assert run(True) == run(False)


def test_the_end_of_a_text_needs_no_token_and_may_have_one() -> None:
    for form, ends in (({"choice": ["ab"]}, False), ({"regex": "(ab)+"}, True)):
        engine = tiny_engine(**KINDS[0])
        r = constrained(engine, grammar(**form), temperature=0, logit_bias={END: 100})
        engine.add(r)
        finish(engine)
        assert (r.finish_reason, r.stop_reason) == ("stop", END if ends else None)
        assert text([t for t in r.output if t != END]) == "ab"
        assert (r.output[-1] == END) is ends


def test_min_tokens_go_as_far_as_the_form_allows() -> None:
    for form, length in (({"regex": "(ab)+"}, 12), ({"regex": "(a|b){1,4}"}, 4)):
        engine = tiny_engine(**KINDS[0])
        r = constrained(engine, grammar(**form), temperature=0, logit_bias={END: 100}, min_tokens=12)
        engine.add(r)
        finish(engine)
        assert r.finish_reason == "stop"
        assert len([t for t in r.output if t != END]) >= length - 2 and text([t for t in r.output if t != END])


def test_an_answer_that_cannot_go_on_is_an_error_and_troubles_nobody() -> None:
    for kind in KINDS:
        engine = tiny_engine(**kind)
        bad = constrained(engine, grammar(regex="a{2}[QR]"), "bad")
        good = constrained(engine, grammar(regex="[ab]{9}"), "good")
        engine.add(bad)
        engine.add(good)
        errors = [(p.request.id, p.error) for p in stepwise(engine) if p.error]
        assert [name for name, _ in errors] == ["bad"] and "no token of the vocabulary" in str(errors[0][1])
        assert (bad.finish_reason, good.finish_reason) == ("error", "stop")
        assert engine.pool.num_free + sum(map(len, engine.scheduler.reuse.held)) == engine.pool.num_pages


def test_log_probabilities_are_the_models_own() -> None:
    """As without a form: they are those before penalties, bias and masks, and their number is the tokens'."""
    engine = tiny_engine(**KINDS[0])
    r = constrained(engine, grammar(choice=["ab", "x"]), temperature=0, logprobs=3)
    engine.add(r)
    entries = [e for p in stepwise(engine) for e in p.logprobs]
    assert [e.token for e in entries] == r.output
    free = make_request(engine, "free", [3, 5, 9], SamplingParams(temperature=0, max_tokens=1, logprobs=3))
    engine.add(free)
    (first,) = [e for p in stepwise(engine) for e in p.logprobs]
    assert entries[0].top == first.top
    assert any(t not in {TOKENS.index(x) for x in (b"a", b"ab", b"x")} for t, _ in first.top)
