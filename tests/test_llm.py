"""The Python API on a tiny model: argument shapes, streams beside each other, Ctrl-C."""

from __future__ import annotations

import contextlib
import itertools
import signal
from pathlib import Path

import numpy as np
import pytest

from dovetail import LLM, ConfigError, RequestError, SamplingParams
from dovetail.host.interrupts import uninterrupted

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, dtype="float32", threads=1, kv_memory="1MiB")


def test_prompts_come_in_many_shapes(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    want = llm.generate("hello", PARAMS)[0].outputs[0].token_ids
    for prompts in ("hello", ["hello"], ids, [ids], tuple(ids), np.array(ids), (p for p in ["hello"])):
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS)] == [want]
    assert [o.outputs[0].token_ids for o in llm.generate(np.array([ids, ids]), PARAMS)] == [want] * 2
    assert llm.generate([], PARAMS) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    lengths = [3, 1, 5]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    with pytest.raises(RequestError, match="2 prompts but 3"):
        llm.generate(["a", "b"], params)


def test_progress_counts_every_answer_once(llm: LLM, monkeypatch) -> None:
    told: list[int] = []

    @contextlib.contextmanager
    def counter(what, total, enabled):
        yield told.append

    monkeypatch.setattr("dovetail.show.progress.counter", counter)
    lengths = [3, 1, 5, 3]
    params = [SamplingParams(temperature=1, max_tokens=n, n=2, ignore_eos=True) for n in lengths]
    llm.generate(["a", "b", "c", "d"], params)
    assert sum(told) == len(lengths)
    assert told[-1] == 1


@pytest.mark.parametrize("prompts", [b"ab", None, 5, {"prompt": "x"}, ["ok", None], ["ok", {"a": 1}]])
def test_what_is_no_prompt_is_refused_and_nothing_runs(llm: LLM, prompts) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompts, PARAMS)
    assert not llm.session.busy


def test_wrong_arguments_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="SamplingParams"):
        llm.generate("x", {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="messages"):
        llm.chat([])
    with pytest.raises(ConfigError, match="speed"):
        LLM("nowhere", speed=3)


def test_streams_beside_each_other_each_get_their_end(llm: LLM) -> None:
    alone = [list(llm.stream(p, PARAMS))[-1].outputs[0].text for p in "ab"]
    pairs = list(itertools.zip_longest(llm.stream("a", PARAMS), llm.stream("b", PARAMS)))
    for i in (0, 1):
        last = [p[i] for p in pairs if p[i] is not None][-1]
        assert last.finished
        assert last.outputs[0].text == alone[i]
    stream = llm.stream("a", PARAMS)
    next(stream)
    llm.generate("something else", PARAMS)
    assert list(stream)[-1].outputs[0].text == alone[0]


@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupt_waits_for_the_step_and_frees_everything(llm: LLM, at: int) -> None:
    run, calls, ended = llm.engine.executor.run, [], []

    def interrupting(plan):
        calls.append(plan)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        result = run(plan)
        ended.append(plan)
        return result

    llm.engine.executor.run = interrupting
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one prompt", "another"], PARAMS)
    finally:
        llm.engine.executor.run = run
    assert len(calls) == len(ended) == at
    assert not llm.session.busy
    assert not llm.session.answers
    llm.engine.check()
    assert llm.generate("hello", PARAMS)[0].finished


def test_an_interrupt_handler_of_the_program_is_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_activity_is_counted_per_technique(tiny_model: Path) -> None:
    llm = LLM(
        tiny_model, dtype="float32", threads=1, kv_memory="1MiB", use=["ngram:min_n=1", "sink-window:window=8"]
    )
    llm.generate("abcabcabc " * 6, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert llm.config.use == ("ngram:tokens=4,min_n=1,max_n=4", "sink-window:sink=4,window=8")
    assert all(count > 0 for count in llm.activity().values())
