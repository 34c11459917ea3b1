"""`dovetail bench compare`: what two results have in common, against a plain walk over both."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.compare import compare, figures, spread
from tests.helpers.program import call

ORIGIN = {
    "machine": {"cpu": "A", "threads": 2},
    "versions": {"dovetail": "1"},
    "commit": "abc",
    "config": {"use": []},
}

keys = st.sampled_from(["a", "b", "c", "16", "machine", "spread", "samples"])
leaves = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=True), st.booleans(), st.none(), st.text(max_size=2),
    st.lists(st.floats(-5, 5), min_size=1, max_size=3),
)  # fmt: skip
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12)


def walk(value, place=()):
    """Places of numbers, one after the other, without recursion."""
    found, left = {}, [(place, value)]
    while left:
        place, value = left.pop()
        if isinstance(value, dict):
            left += [((*place, k), v) for k, v in value.items() if k not in ("machine", "spread", "samples")]
        elif type(value) in (int, float) and math.isfinite(value):
            found[place] = value
    return found


@given(trees)
def test_figures_are_the_finite_numbers(tree):
    assert dict(figures(tree)) == walk(tree)


@given(st.dictionaries(keys, trees, max_size=4), st.dictionaries(keys, trees, max_size=4))
def test_every_figure_is_in_both_or_in_one(first, second):
    first, second = ORIGIN | {"x": 1, "ours": first}, ORIGIN | {"x": 2, "ours": second}
    ours, theirs = (
        {".".join(p): v for p, v in walk({"x": r["x"], "ours": r["ours"]}).items()} for r in (first, second)
    )
    found = compare(first, second)
    assert {n: (f["a"], f["b"]) for n, f in found["figures"].items()} == {
        n: (ours[n], theirs[n]) for n in ours if n in theirs
    }
    assert set(found["only_a"]) == set(ours) - set(theirs)
    assert set(found["only_b"]) == set(theirs) - set(ours)
    for f in found["figures"].values():
        assert f["ratio"] == (f["b"] / f["a"] if f["a"] else None)
    assert found["figures"]["x"]["ratio"] == 2


ranges = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)


@given(ranges, ranges)
def test_beyond_means_that_no_value_lies_in_both_ranges(first, second):
    def result(low, high):
        return ORIGIN | {"rate": {"16": (low + high) / 2}, "spread": {"rate": {"16": [low, high]}}}

    figure = compare(result(*first), result(*second))["figures"]["rate.16"]
    both = set(range(first[0], first[1] + 1)) & set(range(second[0], second[1] + 1))
    assert figure["beyond"] == (not both)
    assert (list(figure["spread_a"]), list(figure["spread_b"])) == (first, second)


def test_spread_of_the_nearest_object_and_of_the_peers_layout():
    ours = {
        "rate": {"16": 1.0}, "seconds": 3,
        "spread": {"rate": {"16": [0.5, 2]}, "seconds": "text", "ratio": {"rate": {"16": [1, 1.5]}}},
        "ratio": {"rate": {"16": 1.2}},
        "against": {"rate": {"16": 7.0}, "spread": {"rate": {"16": [6, 8]}}},
    }  # fmt: skip
    assert spread(ours, ("rate", "16")) == (0.5, 2)
    assert spread(ours, ("ratio", "rate", "16")) == (1, 1.5)
    assert spread(ours, ("against", "rate", "16")) == (6, 8)
    assert spread(ours, ("seconds",)) is None
    points = {"points": [{"rate": 1.0, "x": 3, "spread": {"x": [2, 4]}}, {"rate": 2.0, "x": 5}]}
    assert spread(points, ("points", "1.0", "x")) == (2, 4)
    assert spread(points, ("points", "2.0", "x")) is None
    peers = {
        "peer": "x",
        "ratios": {"d": 1.5},
        "ours": {"d": 3},
        "spread": {"d": {"ours": [2, 4], "ratio": [1, 2]}},
    }
    assert spread(peers, ("ours", "d")) == (2, 4)
    assert spread(peers, ("ratios", "d")) == (1, 2)
    assert spread(peers, ("theirs", "d")) is None


def test_objects_in_a_list_are_told_apart_by_their_name_if_they_have_one():
    named = [{"name": "q", "value": 1}, {"name": "r", "value": 2}]
    assert dict(figures({"claims": named})) == {("claims", "q", "value"): 1, ("claims", "r", "value"): 2}
    points = [{"target": "x", "rate": 1, "p50": 5}, {"target": "x", "rate": 2, "p50": 6}]
    assert [place[1] for place, _ in figures({"points": points})] == ["1", "1", "2", "2"]
    points[1] |= {"target": "y", "rate": 1}
    assert [place[1] for place, _ in figures({"points": points})] == ["x/1", "x/1", "y/1", "y/1"]
    twice = [{"name": "q", "value": 1}, {"name": "q", "value": 2}, {"value": 3}]
    assert [place[1] for place, _ in figures({"rows": twice})] == ["0", "1", "2"]


def write(path, value, before=""):
    path.write_text(before + (value if isinstance(value, str) else json.dumps(value)))
    return path


def result(**changes):
    base = {
        "model": "m",
        "rounds": 2,
        "decode": {"16": 100.0, "1024": 50.0},
        "spread": {"decode": {"16": [90, 110]}},
    }
    return ORIGIN | base | changes


def run(tmp_path, a, b, status=0):
    first, second = write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)
    found = call("bench", "compare", first, second, "--json", tmp_path / "c.json")
    assert found.exit_code == status, found.stderr
    return found, json.loads((tmp_path / "c.json").read_text()) if status == 0 else None


def test_the_same_thing_twice(tmp_path):
    shown, found = run(tmp_path, result(), result())
    assert shown.stdout.startswith("The same machine, versions, commit, configuration and measurement.")
    assert (found["same_machine"], found["differs"]) == (True, {})
    assert (found["only_a"], found["only_b"]) == ([], [])
    assert found["figures"]["decode.16"] == {
        "a": 100.0, "b": 100.0, "ratio": 1.0, "spread_a": [90, 110], "spread_b": [90, 110], "beyond": False,
    }  # fmt: skip
    assert found["figures"]["decode.1024"]["beyond"] is None


def test_differences_are_said_first_and_marked(tmp_path):
    other = result(
        machine={"cpu": "B", "threads": 2}, versions={"dovetail": "1", "torch": "2"}, commit="def", rounds=5,
        config={"use": ["ngram"]}, decode={"16": 200.0, "4096": 1.0}, spread={"decode": {"16": [180, 220]}},
    )  # fmt: skip
    shown, found = run(tmp_path, result(), other)
    assert shown.stdout.startswith("These are different machines")
    assert found["differs"] == {
        "machine": {"cpu": ["A", "B"]}, "versions": {"torch": [None, "2"]}, "commit": {"": ["abc", "def"]},
        "config": {"use": [[], ["ngram"]]}, "asked": {"rounds": [2, 5]},
    }  # fmt: skip
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["machine.cpu", "A", "B"] in rows and ["config.use", "none", "ngram"] in rows
    assert ["versions.torch", "-", "2"] in rows and ["commit", "abc", "def"] in rows
    assert ["decode.16", "100", "200", "2", "*", "90", "to", "110", "180", "to", "220"] in rows
    assert "only in a: 1 figures: decode.1024" in shown.stdout
    assert "only in b: 1 figures: decode.4096" in shown.stdout


def test_a_machine_that_says_less_may_be_the_same(tmp_path):
    _, found = run(tmp_path, result(machine={"cpu": "A", "cores": 2}), result())
    assert found["same_machine"]


@pytest.mark.parametrize(
    ("mine", "yours", "differs"),
    [
        ({"slo": None}, {"slo": {"ttft_ms": 500.0}}, {"slo.ttft_ms": [None, 500.0]}),
        (
            {"workload": {"seed": 0, "salt": ":a", "input_tokens": {"low": 1, "high": 2}}},
            {"workload": {"seed": 1, "salt": ":b", "input_tokens": {"low": 1, "high": 3}}},
            {"workload.seed": [0, 1], "workload.input_tokens.high": [2, 3]},
        ),
        ({"sampling": {}}, {"sampling": {"temperature": 0.5}}, {"sampling.temperature": [None, 0.5]}),
        ({"window": 512, "windows": 4, "dense": 9}, {"window": 256, "windows": 4, "dense": 8},
         {"window": [512, 256], "dense": [9, 8]}),
        ({"results": [{"setting": "a", "shots": 1}]}, {"results": [{"setting": "a", "shots": 2}]},
         {"results.a.shots": [1, 2]}),
        ({"targets": [{"target": "m", "url": "x", "options": [], "config": {"use": []}}]},
         {"targets": [{"target": "m", "url": "y", "options": [], "config": {"use": ["ngram"]}}]},
         {"targets.0.config.use": [[], ["ngram"]]}),
    ],
)  # fmt: skip
def test_what_was_asked_is_no_figure(tmp_path, mine, yours, differs):
    shown, found = run(tmp_path, result(**mine), result(**yours))
    assert found["differs"] == {"asked": differs}
    assert set(found["figures"]) == {"decode.16", "decode.1024"}
    assert "The same machine" not in shown.stdout and f"asked.{next(iter(differs))}" in shown.stdout


def test_single_answers_are_no_figures():
    suite = {"accuracy": 0.5, "items": [{"line": 1, "correct": 1}], "refusals": [{"line": 3, "why": "no answer"}]}
    assert dict(figures({"results": [{"setting": "a", **suite}]})) == {("results", "a", "accuracy"): 0.5}


def test_the_last_line_of_what_was_printed_will_do(tmp_path):
    first = write(tmp_path / "a.txt", result(), before="a table\n  1  2\n")
    second = write(tmp_path / "b.json", json.dumps(result(), indent=2))
    assert call("bench", "compare", first, second).exit_code == 0


def test_stored_results_can_be_compared(tmp_path):
    from pathlib import Path

    stored = sorted(Path(__file__).parents[2].glob("bench/results/*.txt"))
    assert stored
    for path in stored:
        done = call("bench", "compare", path, path, "--json", tmp_path / "c.json")
        assert done.exit_code == 0, done.stderr
        figures = json.loads((tmp_path / "c.json").read_text())["figures"]
        assert figures and all(f["ratio"] in (1, None) for f in figures.values())
        if "peer" in json.loads(path.read_text().splitlines()[-1]):
            assert figures["ratios.decode_16"]["spread_a"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"machine": {}, ', "is not valid JSON"),
        ("a table\nand no more", "is not valid JSON"),
        ('{"decode": 1}', "no machine and no versions"),
        ('{"machine": {}, "versions": 3, "decode": 1}', "is no result of a measurement: it has no versions"),
        ('{"machine": {}, "versions": {}, "x": NaN}', "NaN"),
        ('{"machine": {}, "versions": {}, "other": 1}', "no figure in common"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path, text, says):
    for pair in ((result(), text), (text, result())):
        shown, _ = run(tmp_path, *pair, status=2)
        assert says in shown.stderr
        assert shown.stdout == ""


def test_files_that_are_not_there(tmp_path):
    there = write(tmp_path / "a.json", result())
    assert call("bench", "compare", there, tmp_path / "none.json").exit_code == 2
    assert call("bench", "compare", there, tmp_path).exit_code == 2
    assert call("bench", "compare", there).exit_code == 2
