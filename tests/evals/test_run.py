"""Runs over settings: refused ones, idle techniques, interruptions, bounds, tables and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dovetail import LLM, cli, evals
from dovetail.bench.engine.points import Timing
from dovetail.bench.verdict import Bar, at_least
from dovetail.evals.bounds import Bound, decided
from dovetail.evals.journal import Journal
from dovetail.evals.multiple_choice import MultipleChoice
from dovetail.evals.needle import Needle
from dovetail.evals.perplexity import Perplexity
from dovetail.evals.plots import pareto
from dovetail.evals.run import TOKENS, decode_speed
from dovetail.evals.suite import Result, Suite
from dovetail.evals.tasks import Jsonl

MEASURED: list[str] = []
ANSWERS: dict[str, float | BaseException] = {}


@dataclass(frozen=True)
class Fake(Suite):
    """A suite whose figure is what ANSWERS says for the KV type; it generates a token if asked to."""

    tokens: int = 0

    name = "fake"
    quality = "good"
    columns = ("good", "decode_tokens_per_s")

    def measure(self, llm: Any, reference: Any) -> Result:
        kind = llm.config.kv_cache_dtype
        MEASURED.append(kind)
        answer = ANSWERS.get(kind, 1.0)
        if isinstance(answer, BaseException):
            raise answer
        if self.tokens:
            from dovetail import SamplingParams

            llm.generate([1] * 40, SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True))
        return {"good": answer, "tokens": 1, "seconds": 1.0, "tokens_per_s": 1.0}

    def text(self, result: Result) -> str:
        return f"good {result['good']}"


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    MEASURED.clear()
    ANSWERS.clear()
    monkeypatch.setitem(evals.SUITES, "fake", ("fake", "Fake"))
    monkeypatch.setattr(evals, "find", lambda name: Fake)
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("dovetail.evals.run.decode_speed", speed)


def speed(llm: Any, context: int, bars: Sequence[Bar]) -> dict[str, Any]:
    """Later engines are faster."""
    rate = 10.0 * len(MEASURED)
    return {
        "decode_tokens_per_s": rate, "decode_spread": [rate - 1, rate + 1], "decode_context": context,
        "decode_rates": [rate - 1, rate + 1] * 4,
    }  # fmt: skip


def evaluate(model: Path, *options: str):
    return CliRunner().invoke(cli.build(["eval"]), ["eval", str(model), "--suite", "fake", *options])


SWEEP = ("--sweep", "kv-cache-dtype=bf16,int8,int4")


def test_one_setting_is_a_flat_result(tiny_model: Path):
    done = evaluate(tiny_model, "--tokens", "0", "--json", "-")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["suite"], result["good"], result["activity"], result["use"]) == ("fake", 1.0, {}, [])
    assert {"machine", "versions", "commit", "config", "seconds", "tokens"} <= set(result)
    assert done.stdout.startswith("good 1.0\n")


def test_a_sweep_is_a_table_and_a_plot(tiny_model: Path, tmp_path: Path):
    ANSWERS.update(float32=4.0, bf16=3.0, int8=5.0, int4=1.0)
    plot = tmp_path / "sweep.png"
    done = evaluate(tiny_model, *SWEEP, "--plot", str(plot), "--json", str(tmp_path / "sweep.json"))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["setting", "good", "decode_tokens_per_s", "lowest", "highest"]
    # Of a slow good one, a fast bad one and one that another beats in both, the last is not marked.
    assert [line.split()[-1] for line in lines[1:]] == ["11", "21", "best", "best"]
    results = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert [r["setting"] for r in results] == ["plain", *(f"kv-cache-dtype={k}" for k in ("bf16", "int8", "int4"))]
    assert plot.stat().st_size > 1000


def test_an_impossible_setting_is_shown_and_the_others_run(tiny_model: Path):
    done = evaluate(tiny_model, "--sweep", "kv-cache-dtype=int8,int3", "--sweep", "sink-window:window=0,99")
    assert done.exit_code == 1  # the window that fits was idle
    states = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[1:]}
    assert states.pop("plain") == "11"  # its speed: the others were measured later, which is faster here
    assert states == {
        "kv-cache-dtype=int8": "best",
        "kv-cache-dtype=int3": "refused",
        "sink-window:window=0": "refused",
        "sink-window:window=99": "idle",
    }
    assert "int3" in done.stderr and "window >= 1" in done.stderr


def test_a_setting_that_was_refused_meets_no_bound_and_is_tried_again(tiny_model: Path):
    done = evaluate(tiny_model, "--sweep", "kv-cache-dtype=int3", "--min", "good=0.5")
    assert done.exit_code == 1
    ANSWERS["int8"] = KeyboardInterrupt()
    sweep = ("--sweep", "kv-cache-dtype=int3,int8")
    assert "1 of 3 results are kept" in evaluate(tiny_model, *sweep).stderr


def test_results_of_a_changed_model_are_not_taken_up(tiny_model: Path):
    ANSWERS["int8"] = KeyboardInterrupt()
    assert evaluate(tiny_model, *SWEEP).exit_code == 130
    os.utime(tiny_model, ns=(1, 1))
    MEASURED.clear()
    evaluate(tiny_model, *SWEEP)
    assert MEASURED == ["float32", "bf16", "int8"]


def test_speed_is_that_of_decoding(tiny_model: Path):
    llm = LLM(tiny_model)
    found = decode_speed(llm, 100)
    low, high = found["decode_spread"]
    assert 0 < low <= found["decode_tokens_per_s"] <= high and found["decode_context"] == 100
    assert decode_speed(llm, 5000)["decode_context"] == 4096 - 65
    assert decode_speed(LLM(tiny_model, max_model_len=64), 100) == {}


def test_one_impossible_setting_is_an_error(tiny_model: Path):
    done = evaluate(tiny_model, "--kv-cache-dtype", "int3")
    assert done.exit_code == 2 and "int3" in done.stderr
    done = evaluate(tiny_model, "--sweep", "kv-cache-dtype=int3", "--kv-cache-dtype", "int5")
    assert done.exit_code == 2 and "every setting was refused" in done.stderr


def test_a_technique_that_never_acted_fails_the_measurement(tiny_model: Path):
    idle = evaluate(tiny_model, "--use", "sink-window:sink=0,window=16", "--json", "-")
    assert idle.exit_code == 1 and "never acted" in idle.stderr
    assert json.loads(idle.stdout.splitlines()[-1])["state"] == "idle"
    acted = evaluate(tiny_model, "--use", "sink-window:sink=0,window=16", "--tokens", "3", "--json", "-")
    assert acted.exit_code == 0
    assert json.loads(acted.stdout.splitlines()[-1])["activity"]["sink-window"] > 0


def test_an_interrupted_sweep_goes_on_where_it_ended(tiny_model: Path):
    ANSWERS["int8"] = KeyboardInterrupt()
    first = evaluate(tiny_model, *SWEEP)
    assert first.exit_code == 130 and "2 of 4 results are kept" in first.stderr
    del ANSWERS["int8"]
    MEASURED.clear()
    second = evaluate(tiny_model, *SWEEP)
    assert second.exit_code == 0 and "2 of 4" in second.stderr
    assert second.stdout.count("earlier run") == 2
    assert MEASURED == ["int8", "int4"]
    MEASURED.clear()
    assert evaluate(tiny_model, *SWEEP).exit_code == 0  # that one was complete: the next is new
    assert len(MEASURED) == 4


def test_a_fresh_run_forgets_an_interrupted_one_and_other_options_are_another_run(tiny_model: Path):
    ANSWERS["int8"] = KeyboardInterrupt()
    evaluate(tiny_model, *SWEEP)
    MEASURED.clear()
    evaluate(tiny_model, *SWEEP, "--tokens", "1")
    assert MEASURED == ["float32", "bf16", "int8"]
    MEASURED.clear()
    evaluate(tiny_model, *SWEEP, "--fresh")
    assert MEASURED == ["float32", "bf16", "int8"]


def test_a_journal_believes_whole_lines_only(tmp_path: Path):
    journal = Journal({"a": 1})
    journal.add("one", {"x": 1})
    with open(journal.path, "ab") as file:
        file.write(b'["two", {"x": ')
    assert Journal({"a": 1}).found == {"one": {"x": 1}}
    Journal({"a": 1}).add("three", {"x": 3})
    assert set(Journal({"a": 1}).found) == {"one", "three"}
    assert Journal({"a": 2}).found == {}


@pytest.mark.parametrize(
    ("option", "code"), [(("--min", "good=1"), 0), (("--min", "good=1.1"), 1), (("--max", "good=0.9"), 1)]
)
def test_bounds_decide_the_exit_code(tiny_model: Path, option: tuple[str, str], code: int):
    assert evaluate(tiny_model, *option).exit_code == code


@pytest.mark.parametrize(
    ("option", "code", "verdict"),
    [
        (("--min", "decode_tokens_per_s=8"), 0, "met"),
        (("--max", "decode_tokens_per_s=8"), 1, "missed"),
        (("--min", "decode_tokens_per_s=10"), 0, "undecided"),
    ],
)
def test_a_speed_is_judged_by_its_interval(tiny_model: Path, option: tuple[str, str], code: int, verdict: str):
    done = evaluate(tiny_model, *option, "--json", "-")
    assert done.exit_code == code
    (bar,) = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert (bar["verdict"], bar["interval"], bar["figure"], bar["value"]) == (
        verdict, [9, 11], "decode_tokens_per_s", 10,
    )  # fmt: skip
    assert bar["meets"] is {"met": True, "missed": False, "undecided": None}[verdict]
    assert f"plain: {bar['needs']}: {verdict}: it is 10" in done.stderr


def test_more_parts_are_timed_where_a_bar_is_undecided(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Rates go up and down around 100 tokens per second."""
    answers: list[int] = []

    def measure(llm: LLM, prompts: Any, tokens: int) -> Timing:
        answers.append(tokens)
        return Timing(0.0, waits=tuple(1 / (90 + 20 * (i // TOKENS % 2)) for i in range(tokens)))

    monkeypatch.setattr("dovetail.evals.run.measure", measure)
    llm = LLM(tiny_model)
    clear, unclear = at_least(50), at_least(100)
    for bars, parts in (((), 4), ((clear,), 8), ((unclear,), 32), ((clear, unclear), 32)):
        assert len(decode_speed(llm, 100, bars)["decode_rates"]) == parts
    assert len(answers) == 4 + (1 + 2 + 8 + 8)


@pytest.mark.parametrize(
    ("suite", "result", "shares"),
    [
        (
            Needle(), {"accuracy": 0.75, "recall": 0.8, "grid": [{"trials": 12}, {"trials": 8}]},
            {"accuracy": (15, 20), "recall": (16, 20), "decode_tokens_per_s": None},
        ),
        (Jsonl, {"correct": 3, "total": 4, "accuracy": 0.75}, {"accuracy": (3, 4), "stderr": None}),
        (MultipleChoice, {"total": 10, "acc": 0.3, "acc_norm": 0.4}, {"acc": (3, 10), "acc_norm": (4, 10)}),
        (Perplexity(), {"perplexity": 15.0}, {"perplexity": None}),
    ],
)  # fmt: skip
def test_shares_of_trials_are_known_by_how_many_trials_there_were(
    suite: Any, result: Result, shares: dict[str, Any], tmp_path: Path
):
    if isinstance(suite, type):
        data = tmp_path / "rows.jsonl"
        data.write_text("{}")
        suite = suite(data=data)
    for key, share in shares.items():
        assert suite.share(result, key) == (share and pytest.approx(share))


def test_few_trials_leave_a_high_bar_undecided_and_miss_a_hopeless_one():
    result = {"accuracy": 1.0, "recall": 0.5, "grid": [{"trials": 6}]}
    high, hopeless, hit = decided(
        Needle(), result, [Bound.least("accuracy", 0.95), Bound.least("recall", 0.95), Bound.most("recall", 0.9)]
    )
    assert (high["meets"], hopeless["meets"], hit["meets"]) == (None, False, True)


def test_a_figure_that_was_not_measured_is_missed():
    (bar,) = decided(Fake(), {"good": 1.0}, [Bound.least("decode_tokens_per_s", 5)])
    assert bar["verdict"] == "missed" and bar["value"] is None and "no room" in bar["verdict_why"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--min", "bad=1"), "one of good, decode_tokens_per_s"),
        (("--min", "good"), "KEY=NUMBER"),
        (("--min", "good=much"), "not a number"),
        (("--max", "good=nan"), "not a number"),
        (("--use", "bogus", "--against", "plain"), "technique 'bogus' is unknown"),
        (("--window", "3"), "takes no --window; it takes --tokens"),
        (("--sweep", "nothing=1"), "neither a technique"),
        (("--against", "threads=1,2"), "must be one"),
        (("--plot", "plot.txt"), "must end in"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(tiny_model: Path, options: tuple[str, ...], why: str):
    done = evaluate(tiny_model, *options)
    assert done.exit_code == 2 and why in done.stderr
    assert MEASURED == []


def test_a_reference_is_a_row_where_a_suite_compares_nothing(tiny_model: Path):
    done = evaluate(
        tiny_model, "--against", "plain", "--kv-cache-dtype", "int8", *SWEEP[:1], "kv-cache-dtype=int4"
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["plain", "kv-cache-dtype=int4"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]):
    front = pareto(points)
    for i, (x, y) in enumerate(points):
        beaten = any((a >= x and b > y) or (a > x and b >= y) for a, b in points)
        assert (i in front) == (not beaten)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_every_option_of_every_suite_is_on_the_command_line():
    from dataclasses import fields
    from importlib import import_module

    from dovetail.cli.suite_options import OPTIONS

    used = set()
    for name, (module, kind) in evals.SUITES.items():
        if name != "fake":
            used |= {f.name for f in fields(getattr(import_module(f"dovetail.evals.{module}"), kind))}
    assert used == set(OPTIONS)
