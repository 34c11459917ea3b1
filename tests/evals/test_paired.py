"""Differences between settings that answered the same questions."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.verdict import share_interval
from dovetail.evals.bounds import DIFFERENCE, Bound, decided
from dovetail.evals.paired import Paired
from dovetail.evals.tasks import Jsonl
from tests.helpers.program import SMALL, call

counts = st.integers(0, 40)
tables = st.builds(Paired, counts, counts, counts, counts).filter(lambda p: p.trials > 0)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))


# Newcombe 1998, method 10: the difference of the first from the second.
@pytest.mark.parametrize(
    ("cells", "low", "high"), [((36, 12, 2, 0), 0.0569, 0.3404), ((0, 29, 1, 0), 0.6666, 0.9882)]
)
def test_the_interval_is_the_published_one(cells, low, high):
    interval = Paired(*cells).interval()
    assert (-interval.high, -interval.low) == pytest.approx((low, high), abs=6e-5)


@given(tables)
def test_the_interval_holds_the_difference_and_turns_round_with_it(table):
    interval = table.interval()
    assert -1 <= interval.low <= table.difference <= interval.high <= 1
    assert interval.high - interval.low > 0
    turned = Paired(table.both, table.second, table.first, table.neither)
    assert turned.difference == -table.difference
    assert (turned.interval().low, turned.interval().high) == pytest.approx((-interval.high, -interval.low))
    assert turned.p_value() == pytest.approx(table.p_value())


@pytest.mark.parametrize(
    ("lost", "gained", "both"), [(0.1, 0.1, 0.5), (0.2, 0.1, 0.4), (0.02, 0.08, 0.7), (0.3, 0.0, 0.5)]
)
def test_the_interval_holds_the_true_difference_often_enough(lost, gained, both):
    """Over all outcomes of 14 questions, each with its chance."""
    n, neither, held = 14, 1 - lost - gained - both, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                table = Paired(a, b, c, n - a - b - c)
                ways = math.factorial(n) // math.prod(map(math.factorial, (a, b, c, table.neither)))
                chance = ways * both**a * lost**b * gained**c * neither**table.neither
                interval = table.interval()
                held += chance * (interval.low <= gained - lost <= interval.high)
    assert held > 0.94


def test_pairs_know_a_difference_better_than_two_shares():
    table = Paired(120, 12, 4, 64)
    interval = table.interval()
    first, second = share_interval(132, 200), share_interval(124, 200)
    assert (
        interval.high - interval.low
        < 0.6 * ((first.high - first.low) ** 2 + (second.high - second.low) ** 2) ** 0.5
    )


@given(tables)
def test_the_test_is_a_throw_of_coins(table):
    n, least = table.first + table.second, min(table.first, table.second)
    tail = sum(math.comb(n, k) for k in range(n + 1) if k <= least or k >= n - least) / 2**n
    assert table.p_value() == pytest.approx(tail)


def test_questions_that_only_one_was_asked_are_left_out():
    table = Paired.of(
        {1: True, 2: True, 3: False, 4: False, 5: True}, {2: True, 3: True, 4: False, 5: False, 6: True}
    )
    assert table == Paired(1, 1, 1, 1)


# -- in a run ----------------------------------------------------------------------------------------------


def evaluate(model, *words):
    result = call("eval", model, "--suite", "jsonl", "--tokens", 6, *words, *SMALL, "--json", "-")
    return result, json.loads(result.stdout.splitlines()[-1]) if result.exit_code in (0, 1) else {}


@pytest.fixture
def data(tiny_model, tmp_path):
    """Questions of which the model answers half."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"number {i}", "answer": "?"} for i in range(8)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, found = evaluate(tiny_model, "--data", file)
    for item, row in zip(found["items"][:4], rows, strict=False):
        row["answer"] = item["answer"]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_settings_of_a_run_are_paired_with_the_first(tiny_model, data):
    done, found = evaluate(
        tiny_model, "--data", data, "--sweep", "kv-cache-dtype=int3,int4", "--min", "difference=-1"
    )
    first, refused, second = found["results"]
    assert "paired" not in first and "paired" not in refused
    paired = second["paired"]
    right = [sum(i["correct"] for i in r["items"]) for r in (first, second)]
    assert (paired["to"], paired["questions"]) == ("plain", 8)
    assert paired["difference"] == (right[1] - right[0]) / 8 == (paired["gained"] - paired["lost"]) / 8
    assert "difference" in done.stdout.splitlines()[0] and f"{paired['difference']:+.1%}" in done.stdout
    assert first["bars"] == [] and second["bars"][0]["verdict"] == "met"


def test_a_result_is_paired_with_an_earlier_one(tiny_model, data, tmp_path):
    earlier = tmp_path / "earlier.json"
    call("eval", tiny_model, "--suite", "jsonl", "--data", data, "--tokens", 6, *SMALL, "--json", earlier)
    done, found = evaluate(tiny_model, "--data", data, "--compare", earlier, "--kv-cache-dtype", "bf16")
    assert (found["paired"]["to"], found["paired"]["questions"]) == ("plain", 8)
    assert "on the same 8 questions" in done.stdout
    data.write_text(data.read_text() + '{"prompt": "one more", "answer": "!"}\n')
    done, _ = evaluate(tiny_model, "--data", data, "--compare", earlier)
    assert done.exit_code == 2 and "no result of the suite jsonl on the same questions" in done.stderr
    done = call("eval", tiny_model, "--suite", "perplexity", "--compare", earlier)
    assert done.exit_code == 2 and "has no questions" in done.stderr


@pytest.mark.parametrize(("bound", "verdict"), [(-0.5, "met"), (-0.05, "undecided"), (0.5, "missed")])
def test_a_difference_is_judged_by_its_interval(tmp_path, bound, verdict):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    suite, result = Jsonl(data=file), {"paired": Paired(30, 3, 2, 5).to_dict()}
    (bar,) = decided(suite, result, [Bound.least(DIFFERENCE, bound)])
    assert (bar["verdict"], bar["value"]) == (verdict, -1 / 40)
    assert decided(suite, {}, [Bound.least(DIFFERENCE, bound)]) == []


def test_a_bar_on_a_difference_needs_something_to_differ_from(tiny_model, data):
    done, _ = evaluate(tiny_model, "--data", data, "--min", "difference=0")
    assert done.exit_code == 2 and "with one of accuracy, stderr, decode_tokens_per_s" in done.stderr
