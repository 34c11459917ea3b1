"""From prompts to answers: text, stop strings, n answers on shared pages, log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.engine import Progress
from dovetail.core.errors import RequestError
from dovetail.core.pages import PagePool, PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request, Span
from dovetail.outputs import Answer, Delta, Stream, text_of
from dovetail.session import Session
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.tiny import TinyCheckpoint, tiny_config, tiny_engine

CHECKPOINT = TinyCheckpoint(tiny_config(vocab_size=260))
TOKENIZER = ByteTokenizer()


def session(*use: str, **changes) -> Session:
    from dovetail.config import Config

    engine = tiny_engine(*use, checkpoint=CHECKPOINT, pages=changes.pop("pages", 128), **changes)
    config = Config(
        model="tiny", architecture="llama", use=use, dtype="float64", device="cpu", threads=1,
        kernels="torch", activations="exact",
        kv_cache_dtype="float64", kv_memory=0, block_size=4, num_kv_pages=128, max_model_len=512,
        max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=True, seed=0,
    )  # fmt: skip
    return Session(engine, TOKENIZER, config, 260)


def answer(s: Session, prompt, params: SamplingParams):
    a = s.submit(s.prepare(prompt, params))
    while not a.finished:
        s.step()
        s.engine.check()
    return a.output()


# -- streams of text --------------------------------------------------------------------------------------

texts = st.text(alphabet="abé✓", max_size=24)


@given(texts, st.lists(st.text(alphabet="abé✓", min_size=1, max_size=4), max_size=3), st.booleans(), st.data())
@settings(max_examples=300)
def test_stop_strings_against_a_plain_search(text: str, stops: list[str], include: bool, data) -> None:
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, max_tokens=None, ignore_eos=True)
    request = Request("r", [1], params, PageTable(PagePool(1, 4)), 999, seed=0)
    stream = Stream(request, TOKENIZER)
    ids = TOKENIZER.encode(text)
    shown = ""
    while ids and stream.finish_reason is None:
        n = data.draw(st.integers(1, len(ids)))
        now, ids = ids[:n], ids[n:]
        if not ids:
            request.finish_reason = "length"
        stream.push(Progress(request, now))
        output = stream.output().text
        assert output.startswith(shown), "text that was shown may never change"
        shown = output
    hits = [(end, text[:end].rfind(s), s) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    if hits:
        end = min(h[0] for h in hits)
        start, stop = min(h[1:] for h in hits if h[0] == end)
        assert shown == text[: start + (len(stop) if include else 0)]
        assert (stream.finish_reason, stream.stop_reason) == ("stop", stop)
    else:
        assert shown == text


def test_tokens_after_a_stop_string_in_the_same_step_are_dropped() -> None:
    params = SamplingParams(stop="b", max_tokens=None)
    request = Request("r", [1], params, PageTable(PagePool(1, 4)), 999, seed=0)
    stream = Stream(request, TOKENIZER)
    stream.push(Progress(request, TOKENIZER.encode("aabaa")))
    assert stream.output().text == "aa"
    assert stream.token_ids == TOKENIZER.encode("aab")


def test_stop_strings_give_the_same_text_with_drafts() -> None:
    prompt = "abcabcabcabc"
    free = answer(session(), prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)).outputs[0]
    stop = free.text[20:22]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=[stop])
    one = answer(session(), prompt, params).outputs[0]
    two = answer(session("ngram:min_n=1,tokens=6"), prompt, params).outputs[0]
    assert one.finish_reason == "stop"
    assert one == two
    assert one.text == free.text[: free.text.index(stop)]


def test_a_stop_token_ends_the_text_before_it_and_is_counted() -> None:
    free = answer(session(), "hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)).outputs[0]
    token = free.token_ids[7]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[token])
    out = answer(session(), "hello", params).outputs[0]
    first = free.token_ids.index(token)
    assert out.token_ids == free.token_ids[: first + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    later = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[token], min_tokens=first + 3
    )
    assert len(answer(session(), "hello", later).outputs[0].token_ids) >= first + 3


# -- n answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [128, 24])
@pytest.mark.parametrize("caching", [True, False])
def test_n_answers_equal_n_single_requests_and_share_the_prompt(pages: int, caching: bool) -> None:
    from dovetail.session import mix

    prompt = "the quick brown fox jumps"
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    s = session(pages=pages, enable_prefix_caching=caching)
    out = answer(s, prompt, params)
    assert [o.index for o in out.outputs] == [0, 1, 2, 3]
    for i, o in enumerate(out.outputs):
        alone = SamplingParams(temperature=1.0, seed=mix(5, i) if i else 5, max_tokens=12, ignore_eos=True)
        assert answer(session(), prompt, alone).outputs[0].token_ids == o.token_ids
    assert len({tuple(o.token_ids) for o in out.outputs}) == 4
    if not caching:
        assert s.engine.pool.num_free == pages


def test_seeds_repeat_and_their_absence_does_not() -> None:
    s = session()
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    free = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    assert answer(s, "x", seeded).outputs[0].text == answer(s, "x", seeded).outputs[0].text
    assert answer(s, "x", free).outputs[0].text != answer(s, "x", free).outputs[0].text


# -- log-probabilities ------------------------------------------------------------------------------------


def reference_logprobs(ids: list[int]) -> torch.Tensor:
    engine = tiny_engine(checkpoint=CHECKPOINT, pages=128)
    x = engine.executor
    request = Request("r", ids, SamplingParams(), PageTable(engine.pool), 999, seed=0)
    request.table.grow(0, len(ids))
    with torch.inference_mode():
        batch = x.builder.build([Span(request, 0, len(ids))])
        return torch.log_softmax(x.model.logits(x.model.program[0](x.model.embed(batch.tokens), batch, x.kv)), -1)


@pytest.mark.parametrize("budget", [64, 5])
def test_prompt_logprobs_are_complete_whatever_the_chunks(budget: int) -> None:
    s = session(max_num_batched_tokens=budget)
    ids = TOKENIZER.encode("some longer prompt to score")
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=1, ignore_eos=True)
    answer(s, ids, params)  # the second time nothing of it may come from the prefix cache
    out = answer(s, ids, params)
    want = reference_logprobs(ids + out.outputs[0].token_ids)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(ids)
    for i in range(1, len(ids)):
        entry = out.prompt_logprobs[i]
        assert math.isclose(entry[ids[i]].logprob, float(want[i - 1, ids[i]]), abs_tol=1e-9)
        assert entry[ids[i]].rank == int((want[i - 1] > want[i - 1, ids[i]]).sum()) + 1
        assert 2 <= len(entry) <= 3
    for j, token in enumerate(out.outputs[0].token_ids):
        found = out.outputs[0].logprobs[j][token]
        assert math.isclose(found.logprob, float(want[len(ids) - 1 + j, token]), abs_tol=1e-9)
        assert found.rank == 1
    total = sum(x[t].logprob for x, t in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True))
    assert math.isclose(out.outputs[0].cumulative_logprob, total)


# -- refusals and cancelling ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ([260], {}, "260"),
        ([-1], {}, "-1"),
        ([True], {}, "True"),
        ("x", {"logit_bias": {999: 1.0}}, "999"),
        ("x", {"stop_token_ids": [260]}, "260"),
        ("x" * 600, {}, "600"),
        ("x", {"max_tokens": 10**6}, "max_tokens"),
        ("\ud800", {}, "."),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing_behind(prompt, params, words) -> None:
    s = session()
    with pytest.raises(RequestError, match=words):
        answer(s, prompt, SamplingParams(**params))
    assert not s.busy
    assert not s.answers
    s.engine.check()
    assert s.engine.pool.num_free == 128


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": float("nan")}, {"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.1},
        {"top_k": -2}, {"top_k": 1.5}, {"min_p": float("inf")}, {"n": 0}, {"n": True}, {"n": 10**9},
        {"max_tokens": 0}, {"min_tokens": -1}, {"min_tokens": 20, "max_tokens": 10}, {"logprobs": 21},
        {"repetition_penalty": 0}, {"presence_penalty": 3}, {"frequency_penalty": float("nan")}, {"stop": [""]},
        {"stop": [3]}, {"stop_token_ids": [-1]}, {"logit_bias": {1: float("nan")}}, {"logit_bias": {"x": 1}},
        {"logit_bias": [1]}, {"seed": 2**70}, {"logit_bias": dict.fromkeys(range(2000), 0.0)},
    ],
)  # fmt: skip
def test_impossible_sampling_values_are_refused_by_name(params) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert caught.value.param in params
    assert caught.value.param in str(caught.value)


def test_aborting_frees_everything_and_is_final() -> None:
    s = session(enable_prefix_caching=False)
    a = s.submit(s.prepare("hello there", SamplingParams(n=3, max_tokens=50, ignore_eos=True)))
    b = s.submit(s.prepare("general", SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)))
    for _ in range(4):
        s.step()
    s.abort(a)
    s.engine.check()
    assert a.finished
    assert {o.finish_reason for o in a.output().outputs} == {"abort"}
    while s.busy:
        s.step()
    assert b.output().outputs[0].finish_reason == "length"
    assert s.engine.pool.num_free == 128


def test_an_id_that_is_running_is_refused() -> None:
    s = session()
    params = SamplingParams(max_tokens=4)
    s.submit(s.prepare("a", params, "same"))
    with pytest.raises(RequestError, match="same"):
        s.submit(s.prepare("b", params, "same"))


def test_refusing_a_duplicate_leaves_the_running_one_alone() -> None:
    s = session()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = s.submit(s.prepare("a", params, "same"))
    second = s.prepare("b", params, "same")
    with pytest.raises(RequestError):
        s.submit(second)
    s.abort(second)
    while s.busy:
        s.step()
    assert first.output().outputs[0].finish_reason == "length"


def test_an_end_of_sequence_id_outside_the_vocabulary_harms_nobody() -> None:
    s = session()
    s.eos_ids = frozenset({5000})
    out = answer(s, "x", SamplingParams(temperature=0, max_tokens=4, min_tokens=2)).outputs[0]
    assert len(out.token_ids) == 4


def test_text_that_was_shown_before_min_tokens_is_not_taken_back() -> None:
    params = SamplingParams(stop=["abcd", "b"], min_tokens=2, max_tokens=None)
    request = Request("r", [1], params, PageTable(PagePool(1, 4)), 999, seed=0)
    stream = Stream(request, TOKENIZER)
    seen = []
    for char in "zbxb":
        stream.push(Progress(request, TOKENIZER.encode(char)))
        seen.append(stream.output().text)
    assert seen == ["z", "zb", "zbx", "zbx"]
    assert stream.finish_reason == "stop"


TYPES = [np.array([65, 66]), torch.tensor([65, 66]), (65, 66), iter([65, 66]), [np.int64(65), 66]]


@pytest.mark.parametrize("ids", TYPES, ids=lambda x: type(x).__name__)
def test_token_ids_come_in_many_types(ids) -> None:
    assert session().prepare(ids, SamplingParams()).prompt_token_ids == [65, 66]


@pytest.mark.parametrize("prompt", [b"ab", {"prompt": "x"}, None, 5, [1.5], ["a"], [None]])
def test_what_is_no_prompt_is_refused_by_name(prompt) -> None:
    with pytest.raises(RequestError, match="prompt"):
        session().prepare(prompt, SamplingParams())


# -- what steps bring -------------------------------------------------------------------------------------

FEW = dict.fromkeys(TOKENIZER.encode("ab"), 100.0)


def add_up(gained: list[Delta], answers: list[Answer]) -> list[list[Delta]]:
    """The deltas of each choice as one. Each choice ends once, with its last one, and each answer once."""
    found: dict[tuple[str, int], Delta] = {}
    for delta in gained:
        earlier = found.setdefault((delta.answer.request_id, delta.index), delta)
        if earlier is not delta:
            assert earlier.finish_reason is None
            earlier.add(delta)
    assert sum(d.finish_reason is not None for d in found.values()) == sum(len(a.streams) for a in answers)
    assert sum(d.last for d in found.values()) == len(answers)
    return [[found[a.request_id, i] for i in range(len(a.streams))] for a in answers]


def facts(delta: Delta) -> tuple[object, ...]:
    return (delta.text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_reason)


asked = st.builds(
    lambda n, most, stop, seed: SamplingParams(
        n=n, max_tokens=most, stop=stop, seed=seed, logit_bias=FEW, logprobs=1, ignore_eos=True
    ),
    st.integers(1, 3), st.integers(1, 9), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
    st.integers(0, 99),
)  # fmt: skip


@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=30), asked, st.integers(0, 12)), min_size=1, max_size=4),
    st.sampled_from([(), ("ngram:min_n=1,tokens=4",)]),
)
@settings(max_examples=25, deadline=None)
def test_what_steps_bring_adds_up_to_the_answers(jobs, use) -> None:
    """Also where an answer is aborted after so many steps, and where one reader's steps bring another's tokens."""
    s = session(*use, max_num_batched_tokens=16)
    answers = [s.submit(s.prepare(text, params)) for text, params, _ in jobs]
    read: list[Delta] = []
    followed = s.prepare("abab", jobs[0][1])
    follower = s.follow(followed, read.extend)
    gained: list[Delta] = []
    take = s.step

    def step() -> list[Delta]:
        s.engine.check()
        gained.extend(found := take())
        return found

    s.step = step
    for i in range(13):
        for answer, (_, _, until) in zip(answers, jobs, strict=True):
            if i == until:
                gained += s.abort(answer)
        if i % 3 == 0:
            next(follower, None)
        else:
            s.step()
    list(follower)
    s.engine.check()
    assert not s.busy and not s.answers
    shared = [d for d in gained if d.answer is not followed]
    for found, answer in zip(add_up(shared, answers), answers, strict=True):
        assert [facts(d) for d in found] == [facts(d) for d in answer.whole()]
        assert [(d.text, d.token_ids) for d in found] == [(o.text, o.token_ids) for o in answer.output().outputs]
    (found,) = add_up(read, [followed])
    assert [facts(d) for d in found] == [facts(d) for d in followed.whole()]


def test_text_that_was_held_back_is_shown_when_an_answer_is_aborted() -> None:
    s = session()
    params = SamplingParams(logit_bias={TOKENIZER.encode("a")[0]: 100.0}, stop=["aaab"], max_tokens=9, seed=0)
    a = s.submit(s.prepare("x", params))
    shown = "".join(d.text for _ in range(4) for d in s.step())
    (end,) = s.abort(a)
    assert (shown, end.text, end.finish_reason, end.last) == ("a", "aaa", "abort", True)
    assert s.abort(a) == []


def test_who_stops_following_aborts_the_answer() -> None:
    s = session(enable_prefix_caching=False)
    a = s.prepare("hello", SamplingParams(max_tokens=50, ignore_eos=True))
    pieces = s.follow(a, text_of)
    next(pieces)
    pieces.close()
    assert a.output().outputs[0].finish_reason == "abort"
    assert not s.busy and s.engine.pool.num_free == 128


def test_following_ends_when_another_aborts_the_answer() -> None:
    s = session()
    a = s.prepare("hello", SamplingParams(max_tokens=50, ignore_eos=True))
    reasons: list[list[str | None]] = []
    for found in s.follow(a, lambda gained: [d.finish_reason for d in gained]):
        reasons.append(found)
        s.abort(a, "enough")
    assert reasons == [[None], ["enough"]]
    assert s.engine.steps == 1
