"""The session's own work, on an engine whose model is made up: ids, seeds, limits, refusals, late aborts."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail import session as module
from dovetail.core.engine import Engine
from dovetail.core.errors import CapacityError, RequestError
from dovetail.core.pages import PagePool
from dovetail.core.sampling import SamplingParams
from dovetail.core.scheduler import Limits
from dovetail.core.seams import Policy, Seams
from dovetail.core.types import Probe, SpanResult, TokenLogprobs
from dovetail.session import Session, mix, token_ids
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.core.test_scheduler import FakeExecutor, expected

TOKENIZER = ByteTokenizer()
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Clock:
    """Each look at it is a second later."""

    time = 0.0

    def now(self) -> float:
        self.time += 1.0
        return self.time


def session(pages: int = 64, seed: int = 7, vocab: int = 260, seams: Seams | None = None) -> Session:
    executor = FakeExecutor(4, 16)
    executor.clock = Clock()
    engine = Engine(executor, PagePool(pages, 4), seams or Seams(), Limits(60, 16, 8, vocab_size=vocab))
    config: Any = SimpleNamespace(seed=seed, max_model_len=60)
    return Session(engine, TOKENIZER, config, vocab)


def finish(s: Session) -> list[Any]:
    gained = []
    while s.busy:
        gained += s.step()
        s.engine.check()
    return gained


# -- preparing


def test_requests_are_numbered_and_named() -> None:
    s = session()
    first, named, third = (s.prepare([1], SamplingParams(n=2), name) for name in ("", "mine", ""))
    assert [a.request_id for a in (first, named, third)] == ["request-0", "mine", "request-2"]
    requests = [stream.request for stream in named.streams]
    assert [(r.id, r.index) for r in requests] == [("mine/0", 0), ("mine/1", 1)]
    assert [r.fork_of for r in requests] == [None, requests[0]]
    assert (first.prompt, s.prepare("ab", SamplingParams()).prompt) == (None, "ab")
    assert not s.answers and not s.busy


def test_seeds_come_from_the_request_or_from_the_engine_and_its_number() -> None:
    s = session(seed=7)
    given = s.prepare([1], SamplingParams(n=3, seed=5))
    own = s.prepare([1], SamplingParams(n=2))
    zero = s.prepare([1], SamplingParams(seed=0))
    assert [x.request.seed for x in given.streams] == [5, mix(5, 1), mix(5, 2)]
    assert [x.request.seed for x in own.streams] == [mix(7, 1), mix(mix(7, 1), 1)]
    assert zero.streams[0].request.seed == 0


def test_a_seed_gives_the_same_numbers_in_every_version() -> None:
    for seed, number in ((0, 0), (7, 1), (-5, 3), (2**64 - 1, 10**6)):
        x = (seed % 2**64 * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) % 2**64
        assert mix(seed, number) == (x ^ x // 2**31) * 0x94D049BB133111EB % 2**64
    assert len({mix(0, n) for n in range(1000)}) == 1000


def test_how_long_a_request_may_become() -> None:
    s = session()
    assert s.prepare([1, 2, 3], SamplingParams(max_tokens=9)).streams[0].request.max_total == 12
    assert s.prepare([1, 2, 3], SamplingParams(max_tokens=None)).streams[0].request.max_total == 60


def test_tokens_that_stop_are_the_models_and_those_asked_for_if_it_knows_them() -> None:
    s = session()
    s.eos_ids = frozenset({3, 999})
    stops = lambda **p: s.prepare([1], SamplingParams(**p)).streams[0].request.stop_ids  # noqa: E731
    assert stops() == {3}
    assert stops(stop_token_ids=[5]) == {3, 5}
    assert stops(stop_token_ids=[5], ignore_eos=True) == {5}
    assert stops(ignore_eos=True) == frozenset()
    s.eos_ids = frozenset({260, 259})
    assert stops() == {259}
    assert s.eos_ids != Session(s.engine, TOKENIZER, s.config, 260).eos_ids == set(TOKENIZER.eos_ids)


def test_what_a_measurement_asks_reaches_every_request() -> None:
    def see(at: int, rows: Any) -> None:
        pass

    s, params = session(), SamplingParams(n=2, prompt_logprobs=0)
    plain = s.prepare([1, 2, 3], params)
    probed = s.prepare([1, 2, 3], params, probe=Probe(dense_until=0, score_from=3, observe=see))
    assert [(x.request.dense_until, x.request.scored, x.request.observe) for x in plain.streams] == [
        (3, 0, None)
    ] * 2
    assert [(x.request.dense_until, x.request.scored, x.request.observe) for x in probed.streams] == [
        (0, 2, see)
    ] * 2
    assert (plain.score_from, probed.score_from) == (1, 3)


@pytest.mark.parametrize(
    ("probe", "field", "words"),
    [
        (Probe(dense_until=-2), "dense_until", "must be a position or -1, got -2"),
        (Probe(score_from=0), "score_from", "between 1 and the prompt's 3 tokens, got 0"),
        (Probe(score_from=4), "score_from", "between 1 and the prompt's 3 tokens, got 4"),
        (Probe(observe=lambda at, rows: None), "observe", "set prompt_logprobs=0"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(probe: Probe, field: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as info:
        session().prepare([1, 2, 3], SamplingParams(), probe=probe)
    assert info.value.param == field
    with pytest.raises(RequestError, match="between 1 and the prompt's 0 tokens, got 2"):
        session().prepare([], SamplingParams(), probe=Probe(score_from=2))
    assert session().prepare([], SamplingParams()).prompt_token_ids == []  # the engine says what is wrong


@pytest.mark.parametrize(("bad", "name"), [(260, "260"), (-1, "-1"), (2**70, str(2**70))])
def test_tokens_are_of_the_vocabulary(bad: int, name: str) -> None:
    s = session()
    given: list[tuple[str, list[int], dict[str, Any]]] = [("prompt", [0, bad], {})]
    if bad >= 0:
        given += [
            ("logit_bias", [0], {"logit_bias": {0: 1, bad: 1}}),
            ("stop_token_ids", [0], {"stop_token_ids": [bad]}),
        ]
    for field, prompt, params in given:
        with pytest.raises(
            RequestError, match=f"{field}: token id {name} is not in the vocabulary of 260"
        ) as info:
            s.prepare(prompt, SamplingParams(**params))
        assert info.value.param == field
    s.prepare([0, 259], SamplingParams(logit_bias={0: 1, 259: 1}, stop_token_ids=[0, 259]))


def test_what_is_no_prompt_is_refused_as_the_prompt() -> None:
    for value, words in (
        (b"ab", "a string or token ids, got bytes"), ({1: 2}, "a string or token ids, got dict"),
        (5, "a string or token ids, got 5"), ([1, True], "True is no token id"), ([1.0], "1.0 is no token id"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words) as info:
            token_ids(value)  # type: ignore[arg-type]
        assert info.value.param == "prompt"
    assert token_ids(range(3)) == [0, 1, 2]


# -- running


def test_an_answer_runs_from_its_submission_to_its_last_delta() -> None:
    s = session()
    answer = s.prepare([1, 2, 0], SamplingParams(max_tokens=4, **GREEDY))
    prepared = answer.arrival
    assert s.submit(answer) is answer and s.answers == {"request-0": answer} and s.busy
    assert answer.arrival > prepared
    gained = finish(s)
    assert [t for d in gained for t in d.token_ids] == expected([1, 2, 0], 4)
    assert [d.last for d in gained] == [False] * 3 + [True] and gained[0].time < gained[1].time
    assert s.answers == {} and s.step() == []
    again = s.prepare([1, 2, 0], SamplingParams(max_tokens=1, **GREEDY), "request-0")
    assert s.submit(again, arrival=0.0).arrival == 0.0  # its id is free, and it may have come at time 0


def test_a_stop_string_ends_the_request_in_the_engine_too() -> None:
    s = session()
    want = expected([1, 2, 0], 9)
    answer = s.submit(s.prepare([1, 2, 0], SamplingParams(max_tokens=9, stop=chr(want[2]), **GREEDY)))
    finish(s)
    assert answer.streams[0].token_ids == want[: want.index(want[2]) + 1]
    assert answer.streams[0].request.finish_reason == answer.streams[0].finish_reason == "stop"
    assert s.engine.steps == want.index(want[2]) + 1


def test_an_answer_that_is_refused_in_part_is_not_queued_at_all() -> None:
    s = session()
    answer = s.prepare([1, 2, 0], SamplingParams(n=3, max_tokens=4, **GREEDY))
    add, added = s.engine.add, []

    def failing(request: Any) -> None:
        if len(added) == 2:
            raise CapacityError("no more")
        added.append(request)
        add(request)

    s.engine.add = failing  # type: ignore[method-assign]
    with pytest.raises(CapacityError, match="no more"):
        s.submit(answer)
    assert [r.finish_reason for r in added] == ["abort", "abort"] and not s.busy and not s.answers
    s.engine.add = add  # type: ignore[method-assign]
    assert s.step() == []


def test_an_id_that_runs_is_refused_as_such() -> None:
    s = session()
    s.submit(s.prepare([1], SamplingParams(max_tokens=2), "same"))
    with pytest.raises(RequestError, match="a request with id 'same' is already running") as info:
        s.submit(s.prepare([1], SamplingParams(max_tokens=2), "same"))
    assert info.value.param == "request_id"


def test_aborting_ends_every_choice_once() -> None:
    s = session()
    answer = s.submit(s.prepare([1, 2, 0], SamplingParams(n=2, max_tokens=9, **GREEDY)))
    other = s.submit(s.prepare([2, 1], SamplingParams(max_tokens=3, **GREEDY)))
    s.step()
    ends = s.abort(answer, "disconnect")
    assert [(d.index, d.finish_reason, d.last) for d in ends] == [
        (0, "disconnect", False),
        (1, "disconnect", True),
    ]
    assert [x.request.finish_reason for x in answer.streams] == ["disconnect"] * 2
    assert s.abort(answer) == [] and list(s.answers.values()) == [other]
    assert s.abort(s.prepare([1], SamplingParams(), other.request_id))[0].finish_reason == "abort"
    assert list(s.answers.values()) == [other]  # not the one with its name that was never queued
    finish(s)
    assert other.streams[0].token_ids == expected([2, 1], 3)


def test_what_is_aborted_in_the_midst_of_a_step_ends_with_the_next_one() -> None:
    s = session()
    answer = s.submit(s.prepare([1, 2, 0], SamplingParams(max_tokens=9, **GREEDY)))
    executor: Any = s.engine.executor
    result = executor.result
    said: list[Any] = []

    def aborting(span: Any) -> SpanResult:
        executor.result = result
        said.append(s.abort(answer, "collected"))
        return result(span)

    executor.result = aborting
    (first,) = s.step()
    assert said == [[]] and not answer.finished and first.token_ids == expected([1, 2, 0], 1)
    assert [(d.finish_reason, d.token_ids, d.last) for d in s.step()] == [("collected", [], True)]
    assert not s.busy and not s.answers and s.step() == []


def test_a_request_that_shows_nothing_does_not_hide_what_the_next_ones_gained() -> None:
    class Slow(Policy):
        def shares(self, backlogs: Any, left: int, others: int) -> list[int]:
            return [4] * len(backlogs)

    s = session(seams=Seams(policy=Slow()))
    long = s.submit(s.prepare([1] * 10, SamplingParams(max_tokens=2, prompt_logprobs=0, **GREEDY)))
    short = s.submit(s.prepare([2, 1], SamplingParams(max_tokens=2, **GREEDY)))
    executor: Any = s.engine.executor
    result = executor.result
    executor.result = lambda span: replace(result(span), prompt_logprobs=[TokenLogprobs(1, -1.0, 1)])
    assert [d.answer for d in s.step()] == [short] and len(long.prompt_scores) == 1
    assert [d.token_ids for d in finish(s) if d.answer is short] == [expected([2, 1], 2)[1:]]


@pytest.mark.parametrize("end", ["finished", "aborted", "refused"])
def test_what_has_ended_is_forgotten(end: str) -> None:
    s = session()
    answer = s.prepare([1, 2, 0], SamplingParams(n=2, max_tokens=3, **GREEDY))
    s.submit(answer)
    s.step()
    if end == "aborted":
        s.abort(answer)
    elif end == "refused":
        with pytest.raises(RequestError):
            s.submit(s.prepare([1], SamplingParams(), answer.request_id))
    finish(s)
    seen = weakref.ref(answer)
    del answer
    gc.collect()
    assert seen() is None


# -- following


def test_following_shows_each_step_and_aborts_when_the_reader_leaves() -> None:
    s = session()
    show = lambda gained: [t for d in gained for t in d.token_ids]  # noqa: E731
    params = SamplingParams(max_tokens=4, **GREEDY)
    assert list(s.follow(s.prepare([1, 2, 0], params), show)) == [[t] for t in expected([1, 2, 0], 4)]
    left = s.prepare([2, 1], params)
    reader = s.follow(left, show)
    assert s.answers == {}  # nothing is queued for who never reads
    assert next(reader) == expected([2, 1], 1) and s.answers == {left.request_id: left}
    reader.close()
    assert left.streams[0].finish_reason == "abort" and not s.busy


def test_steps_of_others_serve_a_reader_too() -> None:
    s = session()
    answer = s.prepare([1, 2, 0], SamplingParams(max_tokens=6, **GREEDY))
    reader = s.follow(answer, lambda gained: [t for d in gained for t in d.token_ids])
    want = expected([1, 2, 0], 6)
    assert next(reader) == want[:1]
    s.step()
    assert next(reader) == want[1:3]
    s.step()
    s.step()
    s.step()
    assert next(reader) == want[3:] and next(reader, None) is None
    assert answer.streams[0].finish_reason == "length"


def test_an_answer_that_somebody_aborts_ends_its_reader() -> None:
    s = session()
    answer = s.prepare([1, 2, 0], SamplingParams(max_tokens=5, **GREEDY))
    reader = s.follow(answer, lambda gained: [d.finish_reason for d in gained])
    assert next(reader) == [None]
    s.abort(answer, "disconnect")
    steps = s.engine.steps
    assert next(reader) == ["disconnect"] and next(reader, None) is None
    assert s.engine.steps == steps


def test_who_follows_is_told_of_a_refusal() -> None:
    s = session(pages=4)
    with pytest.raises(CapacityError):
        next(s.follow(s.prepare([1] * 10, SamplingParams(max_tokens=20)), lambda gained: gained))
    assert not s.busy and Probe() == module.SERVING
