"""Whoever runs the plans owns the time: requests are timed by its clock, and the host's is never asked."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dovetail import LLM, SamplingParams
from dovetail.batch import rows
from dovetail.batch.journal import Journal
from dovetail.batch.runner import Runner
from dovetail.core.technique import Technique
from dovetail.core.types import SpanResult, StepPlan, StepResult
from dovetail.outputs import Metrics


class VirtualClock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds


class VirtualExecutor:
    """Says A, and needs a second for every step."""

    num_stages = 1

    def __init__(self) -> None:
        self.clock = VirtualClock()

    def run(self, plan: StepPlan) -> StepResult:
        self.clock.seconds += 1.0
        return StepResult([SpanResult((65,) * span.sample) for span in plan.spans])


VIRTUAL = Technique("virtual", ("executor",), lambda site: {"executor": VirtualExecutor()}, lossless=True)


def virtual(model: Path, **options: object) -> LLM:
    return LLM(model, use=VIRTUAL, threads=1, kv_memory="1MiB", block_size=16, **options)


def params(tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, n=n, ignore_eos=True)


@pytest.fixture
def no_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def leak() -> float:
        raise AssertionError("the host's time was asked for")

    for name in ("monotonic", "perf_counter", "time", "monotonic_ns", "perf_counter_ns", "time_ns"):
        monkeypatch.setattr(time, name, leak)


@pytest.fixture
def llm(tiny_model: Path) -> LLM:
    return virtual(tiny_model, max_num_seqs=2, max_num_batched_tokens=16)


def times(llm: LLM, prompts: list[str], *each: SamplingParams) -> list[Metrics]:
    return [output.metrics for output in llm.generate(prompts, list(each), progress=False)]


def test_each_step_takes_a_second(llm: LLM, no_host_time: None) -> None:
    assert times(llm, ["one", "two"], params(3), params(1)) == [Metrics(0, 1, 3, 1.0), Metrics(0, 1, 1, None)]
    # The second choice starts a step later, from the first one's pages.
    assert times(llm, ["more"], params(4, n=2)) == [Metrics(3, 1, 5, 6 / 4)]


def test_a_long_prompt_takes_a_step_for_every_chunk(llm: LLM, no_host_time: None) -> None:
    assert times(llm, ["x" * 40], params(3)) == [Metrics(0, 3, 5, 1.0)]


def test_who_waits_for_a_place_waits_by_the_same_clock(llm: LLM, no_host_time: None) -> None:
    found = times(llm, ["a", "b", "c"], params(2), params(4), params(3))
    assert found == [Metrics(0, 1, 2, 1.0), Metrics(0, 1, 4, 1.0), Metrics(0, 3, 5, 1.0)]


def test_an_arrival_may_lie_before_the_submission(llm: LLM, no_host_time: None) -> None:
    session = llm.session
    first = session.submit(session.prepare("a", params(3)))
    session.step()
    second = session.submit(session.prepare("b", params(1)), arrival=0.25)
    while session.busy:
        session.step()
    assert (first.metrics(), second.metrics()) == (Metrics(0, 1, 3, 1.0), Metrics(0.25, 1.75, 1.75, None))


def test_a_stream_shows_times_as_they_pass(llm: LLM, no_host_time: None) -> None:
    found = [output.metrics for output in llm.stream("a", params(3))]
    assert found == [Metrics(0, 1, 1, None), Metrics(0, 1, 2, 1.0), Metrics(0, 1, 3, 1.0)]


def test_every_delta_knows_how_long_it_was_waited_for(llm: LLM, no_host_time: None) -> None:
    session = llm.session
    session.submit(session.prepare("x" * 20, params(3, n=2)))
    found = []
    while session.busy:
        found += [(d.index, d.time, d.waited) for d in session.step()]
    assert [f for f in found if f[0] == 0] == [(0, 2, 2), (0, 3, 1), (0, 4, 1)]
    assert [t - w for i, t, w in found if i == 1] == [0, *[t for i, t, _ in found if i == 1][:-1]]


def test_a_batch_takes_as_long_as_its_steps(llm: LLM, tmp_path: Path) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 2, "ignore_eos": True, "n": 2}
    row = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    journal = Journal(tmp_path / "out.jsonl")
    try:
        runner = Runner(llm, journal, {})
        runner.run(rows.read(source, ""), lambda runner: None)
    finally:
        journal.close()
    assert runner.totals.answered == 1 and runner.totals.completion_tokens == 12
    assert runner.totals.seconds == llm.engine.steps > 0
