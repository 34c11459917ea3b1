from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.rounds import in_turns
from dovetail.bench.serving.figures import latencies, saturated, summarize
from dovetail.bench.serving.load import Run
from dovetail.bench.serving.merge import merged, ratios
from dovetail.bench.serving.request import Record
from dovetail.bench.serving.slo import SLO
from dovetail.bench.serving.table import highest, report
from dovetail.core.errors import ConfigError

TIMES = st.floats(0, 1e4, allow_nan=False).map(lambda seconds: round(seconds, 6))


def record(arrival: float = 0.0, gaps: list[float] | None = None, **more) -> Record:
    """Sent when due; chunks with text after each of `gaps` seconds, the end right after the last."""
    gaps = [0.1, 0.01, 0.01] if gaps is None else gaps
    chunks = [arrival + sum(gaps[: i + 1]) for i in range(len(gaps))]
    return Record(arrival, 10, len(gaps), sent=arrival, chunks=chunks, ended=chunks[-1], finished=True, **more)


@given(st.lists(st.none() | TIMES, max_size=20))
def test_latencies_leave_out_what_is_not_known(values) -> None:
    known = [value * 1e3 for value in values if value is not None]
    found = latencies(values)
    if not known:
        assert found is None
        return
    assert found is not None
    assert found["mean"] == pytest.approx(np.mean(known))
    assert [found[f"p{q}"] for q in (50, 90, 99)] == pytest.approx(list(np.percentile(known, (50, 90, 99))))


def test_times_of_a_request() -> None:
    one = Record(1.0, 10, 4, sent=1.5, chunks=[2.0, 2.25, 2.75], ended=3.0, completion_tokens=5)
    assert (one.lateness, one.ttft, one.e2e) == (0.5, 0.5, 1.5)
    assert one.tpot == (1.5 - 0.5) / 4
    assert one.itl == [0.25, 0.5]
    assert record(gaps=[0.5]).tpot is None
    unsent = Record(1.0, 10, 4)
    assert (unsent.lateness, unsent.ttft, unsent.e2e, unsent.tpot, unsent.itl, unsent.ok) == (
        *[None] * 4,
        [],
        False,
    )


@st.composite
def records(draw) -> Record:
    found = record(draw(TIMES), draw(st.lists(st.floats(0, 2), min_size=1, max_size=5)))
    if draw(st.booleans()):
        found.error = draw(st.sampled_from(["timeout", "HTTP 503"]))
    return found


LIMIT = st.none() | st.floats(0.01, 5)


@given(st.lists(records(), min_size=1, max_size=20), LIMIT, LIMIT, LIMIT)
def test_goodput_counts_whole_answers_within_every_limit(found, ttft, tpot, e2e) -> None:
    found.sort(key=lambda r: r.arrival)
    good = 0
    for r in found:
        first, whole = r.chunks[0] - r.sent, r.ended - r.sent
        per_token = (whole - first) / (len(r.chunks) - 1) if len(r.chunks) > 1 else 0
        within = (ttft is None or first <= ttft) and (tpot is None or per_token <= tpot)
        good += r.error is None and within and (e2e is None or whole <= e2e)
    point = summarize(Run(found, 1), SLO(ttft, tpot, e2e))
    assert point["slo_attainment"] == good / len(found)
    assert point["goodput"] * point["duration_s"] == pytest.approx(good if point["duration_s"] else 0)
    assert point["completed"] == sum(r.error is None for r in found)
    assert sum(e["count"] for e in point["errors"].values()) == len(found) - point["completed"]


def test_summary() -> None:
    lost = Record(4.0, 10, 3, sent=4.0, error="HTTP 503", message="busy")
    later = Record(5.0, 10, 3, error="not sent")
    found = [
        record(0.0, [1.0, 1.0], prompt_tokens=12, completion_tokens=4, cached_tokens=8),
        record(2.0),
        lost,
        later,
    ]
    point = summarize(Run(found, 2), None)
    assert (point["requests"], point["completed"], point["duration_s"]) == (4, 2, pytest.approx(2.12))
    assert point["offered_rate"] == 4 / 5.0
    assert point["achieved_rate"] == pytest.approx(2 / 2.12)
    assert (point["input_tokens"], point["output_tokens"], point["max_tokens"]) == (22, 7, 5)
    assert (point["cached_tokens"], point["tokens_counted_by"]) == (8, "both")
    assert point["output_tokens_per_s"] == pytest.approx(7 / 2.12)
    assert point["errors"] == {
        "HTTP 503": {"count": 1, "message": "busy"},
        "not sent": {"count": 1, "message": ""},
    }
    assert "goodput" not in point and point["lateness_ms"] == {"p99": 0.0, "max": 0.0}


def test_nothing_answered_is_no_division_by_zero() -> None:
    found = [Record(0.0, 1, 1, error="not sent"), Record(0.0, 1, 1, sent=0.1, error="timeout")]
    point = summarize(Run(found, 1), SLO(ttft=1.0))
    assert (point["achieved_rate"], point["goodput"], point["offered_rate"]) == (0.0, 0.0, None)
    assert point["saturated"] and point["ttft_ms"] is None
    assert "-" in report([{"target": "a", "rate": 1.0, **point}])


@given(st.integers(20, 60), st.floats(0.01, 30), st.integers(0, 1000))
def test_a_server_that_keeps_up_is_not_saturated_however_long_an_answer_takes(n, seconds, seed) -> None:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0, n))
    assert not saturated([record(float(at), [seconds]) for at in arrivals])


def queue(n: int, rate: float, seconds: float) -> list[Record]:
    """One server that answers one request after the other, each in `seconds`; arrivals at equal gaps."""
    free, found = 0.0, []
    for i in range(n):
        at = (i + 1) / rate
        free = max(free, at) + seconds
        found.append(record(at, [free - at]))
    return found


def shared(n: int, rate: float, seconds: float) -> list[Record]:
    """A server that all open requests share in equal parts; requests all end near the end of the load."""
    total = n * seconds
    return [record((i + 1) / rate, [max(total - (i + 1) / rate + i * 1e-3, seconds)]) for i in range(n)]


@pytest.mark.parametrize("serve", [queue, shared])
def test_a_server_that_is_offered_more_than_it_can_do_is_saturated(serve) -> None:
    assert saturated(serve(40, 2.0, 1.0), 1.0)
    assert not saturated(queue(40, 0.8, 1.0), 1.0)


def test_missing_answers_are_not_kept_up_with() -> None:
    found = [record(float(i), [0.1]) for i in range(1, 21)]
    assert not saturated(found)
    for r in found[:3]:
        r.error = "HTTP 503"
    assert saturated(found)


def test_slo() -> None:
    assert SLO.parse("ttft=500ms, tpot=50ms") == SLO(0.5, 0.05)
    assert SLO.parse("e2e=1m").to_dict() == {"e2e_ms": 60000.0}
    assert SLO(e2e=1.0).met(record(gaps=[0.5, 0.4]))
    assert not SLO(e2e=1.0).met(record(gaps=[0.5, 0.6]))
    assert not SLO(e2e=1.0).met(record(error="timeout"))


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "itl=5ms", "ttft=0", "ttft=1s,ttft=2s", "ttft=fast"])
def test_impossible_objectives(text) -> None:
    with pytest.raises(ConfigError):
        SLO.parse(text)


def test_report_of_two_targets() -> None:
    points = []
    for target, seconds in (("ours", 0.1), ("theirs", 0.2)):
        for rate in (2.0, 1.0, "max"):
            found = [record(0.0 if rate == "max" else (i + 1) / rate, [seconds, seconds]) for i in range(20)]
            points.append({"target": target, "rate": rate} | summarize(Run(found, 1), SLO(ttft=0.15)))
    assert highest(points) == [
        {"target": "ours", "unsaturated": 2.0, "slo_met": 2.0},
        {"target": "theirs", "unsaturated": 2.0, "slo_met": None},
    ]
    text = report(points, ratios(points, ("ours", "theirs")))
    lines = text.partition("does better\n")[2].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "max"]
    assert lines[1].split()[-4:] == ["2", "2", "2", "2"]
    assert "theirs: highest rate at which 90% of the requests meet the SLO: none" in text
    assert math.isclose(points[0]["ttft_ms"]["p50"], 100)


def test_rounds_are_merged_to_medians_and_compared_one_by_one() -> None:
    loads = []
    for number, (ours, theirs) in enumerate(((0.1, 0.2), (0.1, 0.5), (0.2, 0.8))):
        for target, seconds in in_turns((("ours", ours), ("theirs", theirs)), number):
            found = [record(float(i), [seconds, seconds]) for i in range(1, 21)]
            if number == 2:
                for one in found[: 5 if target == "ours" else 1]:
                    one.error = "timeout"
            loads.append({"target": target, "rate": 1.0} | summarize(Run(found, 1), None))
    loads.append(loads[0])  # the other's round was interrupted
    (row,) = ratios(loads, ("ours", "theirs"))
    assert row["ttft_ms"]["p50"] == pytest.approx({"median": 4, "low": 2, "high": 5})
    assert row["achieved_rate"]["low"] < 1 and "goodput" not in row
    ours, theirs = merged(loads[:-1])
    assert [p["target"] for p in (ours, theirs)] == ["ours", "theirs"]
    assert ours["ttft_ms"]["p50"] == pytest.approx(100)
    assert ours["spread"]["ttft_ms"]["p50"] == pytest.approx([100, 200])
    assert (ours["saturated"], loads[5]["saturated"], loads[4]["saturated"]) == (False, False, True)
    assert (ours["errors"]["timeout"]["count"], theirs["errors"]["timeout"]["count"]) == (5, 1)
    assert (ours["completed"], ours["spread"]["completed"]) == (20, [15, 20])
    assert "(2.00-5.00)" in report([ours, theirs], [row])
