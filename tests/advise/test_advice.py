"""Workloads, predictions, and what is recommended."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dovetail.advise.advice import CLOSE, Loss, Timing, advise, check
from dovetail.advise.workload import BUILT_IN, Workload, synthetic, traced
from dovetail.bench.serving.workload import Limits
from dovetail.core.errors import ConfigError, RequestError

LOAD = synthetic(100, 101, 4)


def timing(prompt: float, decode: float, size: float | None = 1e6, share: float | None = 0.9, runs=()) -> Timing:
    step = {"rate": decode, "batch": 4, "bytes": size, "memory_share": share}
    return Timing([prompt], [step], list(runs))


# -- workloads -------------------------------------------------------------------------------------------


def test_the_built_in_workloads_are_one_stream_long_prompts_and_many_streams():
    assert list(BUILT_IN) == ["chat", "summarise", "batch"]
    one, long, many = BUILT_IN.values()
    assert one.at_once == 1 and many.at_once == 32 and long.prompt_tokens > 10 * long.output_tokens
    assert str(one) == "chat: 1 x (256 + 256 tokens), 1 at once"


def test_the_time_of_a_workload():
    """400 tokens of prompts and 400 of answers behind each first one."""
    assert LOAD.seconds(200.0, 50.0) == 400 / 200 + 400 / 50
    mixed = Workload("mixed", ((10, 1), (30, 21)), 8)
    assert (mixed.at_once, mixed.prompt_tokens, mixed.output_tokens, mixed.context, mixed.longest) == (
        2,
        20,
        11,
        25,
        51,
    )
    assert mixed.seconds(40.0, 10.0) == 1 + 2
    assert "on average" in str(mixed)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_numbers(numbers):
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        synthetic(*numbers)


def test_a_trace_gives_its_first_requests_that_fit(tmp_path: Path):
    trace = tmp_path / "azure.csv"
    rows = [(900, 5), (50, 7), (60, 8), (70, 9)]
    lines = [f"2023-11-16 18:17:0{i}.0,{p},{o}" for i, (p, o) in enumerate(rows)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, "broken,1,1"]))
    found, read = traced(trace, 3, Limits(context=512, rows=2), len)
    assert found == Workload("azure.csv", ((50, 7), (60, 8)), 3)
    assert read.skipped == 1
    with pytest.raises(RequestError, match="none of its requests can be used: 4 are longer than the context of 8"):
        traced(trace, 3, Limits(context=8, rows=2), len)


# -- losses ----------------------------------------------------------------------------------------------


def test_a_loss_is_the_mean_over_windows_and_knows_its_error():
    reference, worse = Loss(10.0, [10.0, 20.0, 5.0]), Loss(0.0, [10.1, 20.4, 5.05])
    logs = [math.log(1.01), math.log(1.02), math.log(1.01)]
    assert worse.beyond(reference) == pytest.approx(math.exp(sum(logs) / 3) - 1)
    mean = sum(logs) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / 2)
    assert worse.error(reference) == pytest.approx(deviation / math.sqrt(3))
    assert reference.beyond(reference) == 0
    assert Loss(1.0, [1.0]).error(Loss(1.0, [1.0])) is None


# -- advice ----------------------------------------------------------------------------------------------

rates = st.floats(1.0, 1e4)
settings = st.lists(st.tuples(rates, rates, st.floats(-0.01, 0.2)), min_size=1, max_size=6)


@given(settings, st.floats(0, 0.1))
def test_what_is_recommended_is_allowed_and_nothing_allowed_is_clearly_faster(found, most):
    timings = {f"s{i}": timing(p, d) for i, (p, d, _) in enumerate(found)}
    losses = {f"s{i}": loss for i, (_, _, loss) in enumerate(found)} | {"s0": 0.0}
    advice = advise(LOAD, timings, losses, most)
    seconds = {name: t.predicted(LOAD) for name, t in timings.items()}
    allowed = {name for name in timings if losses[name] <= most}
    assert advice.recommended in allowed
    assert seconds[advice.recommended] <= min(seconds[n] for n in allowed) * (1 + CLOSE)
    faster = [n for n in allowed if seconds[n] < seconds[advice.recommended]]
    assert all(max(0, losses[n]) >= max(0, losses[advice.recommended]) for n in faster)
    assert set(advice.slower) == {n for n in timings if seconds[n] > seconds["s0"] * (1 + CLOSE)}
    for name in timings:
        beaten = any(
            seconds[n] <= seconds[name]
            and max(0, losses[n]) <= max(0, losses[name])
            and (seconds[n], max(0, losses[n])) != (seconds[name], max(0, losses[name]))
            for n in timings
        )
        assert (name in advice.front) == (not beaten)


def test_where_memory_takes_the_time_fewer_bits_win():
    timings = {"plain": timing(400, 10, 100e6), "w4a16": timing(300, 30, 30e6), "w8a8": timing(800, 18, 55e6)}
    advice = advise(LOAD, timings, {"plain": 0.0, "w4a16": 0.008, "w8a8": 0.001}, 0.01)
    assert (advice.recommended, advice.bound) == ("w4a16", "memory")
    share = 0.9 * 40 / 41
    assert advice.memory_share == pytest.approx(share)
    assert f"Reading memory takes {share:.0%} of the time of plain, so fewer bits" in advice.reason
    assert "w4a16 takes 0.36 times the time and moves 0.30 times the bytes" in advice.reason
    assert advice.slower == {}


def test_where_arithmetic_takes_the_time_it_says_why_fewer_bits_are_slower():
    timings = {
        "plain": timing(400, 100, 100e6, 0.2),
        "w4a16": timing(300, 80, 30e6, 0.1),
        "w8a8": timing(800, 180, 55e6, 0.2),
    }
    advice = advise(LOAD, timings, {"plain": 0.0, "w4a16": 0.008, "w8a8": 0.001}, 0.01)
    assert (advice.recommended, advice.bound) == ("w8a8", "arithmetic")
    assert "narrower arithmetic wins" in advice.reason
    assert list(advice.slower) == ["w4a16"]
    assert "moves 0.30 times the bytes in a step; arithmetic takes the time here" in advice.slower["w4a16"]


def test_a_long_prompt_takes_the_memory_share_away():
    long = synthetic(4000, 2, 4)
    assert timing(100, 10, share=1.0).memory_share(long) == pytest.approx(0.4 / (160 + 0.4))


def test_too_large_a_loss_is_not_recommended_however_fast():
    timings = {"plain": timing(100, 10), "fast": timing(1000, 100), "near": timing(100, 10.1)}
    losses = {"plain": 0.0, "fast": 0.0101, "near": 0.004}
    advice = advise(LOAD, timings, losses, 0.01)
    assert advice.recommended == "plain"  # as fast as "near", and with less loss
    assert "Nothing that loses at most 1.0% is faster." in advice.reason
    assert advise(LOAD, timings, losses, 0.02).recommended == "fast"


def test_what_is_not_counted_is_said():
    advice = advise(LOAD, {"plain": timing(100, 10, None, None)}, {"plain": 0.0}, 0.01)
    assert (advice.bound, advice.memory_share) == (None, None) and "not known" in advice.reason


@given(st.lists(st.tuples(rates, rates), min_size=2, max_size=5))
def test_the_check_compares_whole_runs_of_what_is_allowed(found):
    timings = {f"s{i}": timing(1, predicted, runs=[measured]) for i, (predicted, measured) in enumerate(found)}
    losses: dict[str, Any] = dict.fromkeys(timings, 0.0)
    assume(len({m for _, m in found}) == len(found))
    advice = advise(LOAD, timings, losses, 0.0)
    checked = check(advice, timings, losses, 0.0)
    measured = {name: t.runs[0] for name, t in timings.items()}
    assert measured[checked["best"]] == checked["best_s"] == min(measured.values())
    assert checked["ratio"] == measured[advice.recommended] / checked["best_s"] >= 1
    assert checked["meets"] == (checked["ratio"] <= 1.05)
    lossy = {**losses, checked["best"]: 0.5} if checked["best"] != "s0" else losses
    if lossy is not losses:
        assert check(advise(LOAD, timings, lossy, 0.0), timings, lossy, 0.0)["best"] != checked["best"]
