"""Points fit or say why not; a timing is what the events of a run say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail import LLM
from dovetail.bench.engine import points
from dovetail.bench.engine.points import DECODE, STREAMS, Point, Prompts, measure, obstacle
from dovetail.core.errors import RequestError


class Scripted:
    """A session whose requests gain the tokens that a script says, at its times."""

    def __init__(self, script, error=None):
        self.script, self.error, self.at = list(script), error, -1
        self.answers = []

    def prepare(self, prompt, params):
        answer = SimpleNamespace(streams=[SimpleNamespace(token_ids=[])], error=self.error, left=params.max_tokens)
        self.answers.append(answer)
        return answer

    def submit(self, answer):
        return answer

    @property
    def busy(self):
        return self.at + 1 < len(self.script)

    def step(self):
        self.at += 1
        for answer, more in zip(self.answers, self.script[self.at][1], strict=True):
            taken = min(more, answer.left)
            answer.streams[0].token_ids += [0] * taken
            answer.left -= taken

    def now(self):
        return 0.0 if self.at < 0 else self.script[self.at][0]


@st.composite
def scripts(draw):
    """(tokens, steps): each a time and the tokens that every request gains, until all have `tokens`."""
    tokens, streams = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    left, now, steps = [tokens] * streams, 0.0, []
    while any(left):
        gains = [min(n, 4 - draw(st.integers(0, 4))) for n in left]  # the simplest example is a short one
        left = [n - gain for n, gain in zip(left, gains, strict=True)]
        now += draw(st.integers(1, 8))
        steps.append((now, gains))
    return tokens, steps


@given(scripts())
def test_a_timing_is_what_the_events_say(found):
    tokens, steps = found
    session = Scripted(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points.time, "perf_counter", session.now)
        timing = measure(SimpleNamespace(session=session), [[1]] * len(steps[0][1]), tokens)
    counts, total = [], [0] * len(steps[0][1])
    for _, gains in steps:
        total = [n + gain for n, gain in zip(total, gains, strict=True)]
        counts.append(total)
    began = min(i for i, c in enumerate(counts) if 0 not in c)
    ended = min(i for i, c in enumerate(counts) if tokens in c)
    assert timing.first == steps[began][0]
    if ended <= began:
        assert (timing.rate, timing.step, timing.waits) == (0, 0, ())
        return
    seconds = steps[ended][0] - steps[began][0]
    gained = sum(counts[ended]) - sum(counts[began])
    assert timing.rate == pytest.approx(gained / seconds)
    assert timing.step == pytest.approx(seconds / (ended - began))
    assert timing.tokens_per_step * len(total) / timing.step == pytest.approx(timing.rate)
    if len(total) == 1:
        assert len(timing.waits) == gained
        assert sum(timing.waits) == pytest.approx(seconds)


def test_a_prompt_that_is_given_up_is_an_error():
    llm = SimpleNamespace(session=Scripted([(1.0, [1])], error="not a number"))
    with pytest.raises(RequestError, match="not a number"):
        measure(llm, [[1]], 1)


def test_prompts_are_new_every_time_and_the_same_in_every_run():
    one, again = Prompts(300), Prompts(300)
    first = one.take(50, 4)
    assert len({tuple(p) for p in (*first, *one.take(50, 4))}) == 8
    assert first == again.take(50, 4)
    assert all(75 <= token < 270 for prompt in first for token in prompt)


@pytest.mark.parametrize("quick", [True, False])
def test_points_have_the_sizes_of_the_contract(quick):
    sizes: dict[str, list[int]] = {}
    for at in points.points(quick):
        sizes.setdefault(at.figure, []).append(at.size)
        if at.figure == STREAMS:
            assert at.prompt + at.tokens / 2 == 105
    assert list(sizes.values()) == [[128, 512, 2048], [16, 1024, 4096], [8, 32]]


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 60), st.integers(2, 9), st.integers(1, 5), st.integers(5, 40), st.integers(1, 20))
def test_what_fits_runs_together(tiny_model, context, seqs, streams, prompt, tokens):
    """Beside what says no, an engine where the point is said to fit starts all requests and preempts none."""
    at = Point(STREAMS, streams, prompt, tokens, streams)
    llm = _small(tiny_model, context, seqs)
    why = obstacle(at, llm.config)
    if prompt + tokens > context:
        assert "context" in why
    elif streams > seqs:
        assert "at once" in why
    elif why is None:
        answers = [
            llm.session.submit(llm.session.prepare(p, _greedy(tokens))) for p in Prompts(260).take(prompt, streams)
        ]
        while (
            len(llm.engine.scheduler.running) < streams
            and llm.session.busy
            and not any(a.finished for a in answers)
        ):
            llm.session.step()
        assert not llm.engine.scheduler.waiting
        while llm.session.busy:
            llm.session.step()
        assert llm.engine.scheduler.stats.preemptions == 0
    else:
        assert "pages" in why and streams > 1


def _greedy(tokens):
    from dovetail import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def _small(model, context, seqs):
    size = 512 * 16  # bytes of a page
    return LLM(
        model, threads=1, max_model_len=context, max_num_seqs=seqs, kv_memory=size * -(-context // 16) * 2,
        kernels="torch", max_num_batched_tokens=4096,
    )  # fmt: skip


def test_one_request_that_fits_needs_no_spare_page(tiny_model):
    llm = LLM(tiny_model, threads=1, max_model_len=64, kv_memory=64 << 10)
    assert obstacle(Point(DECODE, 60, 60, 4), llm.config) is None
    assert "context" in str(obstacle(Point(DECODE, 60, 60, 5), llm.config))
