"""The nouns: what a request and a plan say about themselves."""

from __future__ import annotations

import pytest

from dovetail.core.errors import RequestError
from dovetail.core.pages import PagePool, PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import UNLIMITED, Probe, Request, Sealed, Span, StepPlan


def request(prompt: list[int], **more: int) -> Request:
    return Request("r", prompt, SamplingParams(), PageTable(PagePool(1, 4)), max_total=9, seed=0, **more)  # type: ignore[arg-type]


def test_a_new_request_has_its_prompt_and_nothing_else() -> None:
    prompt = [5, 6, 7]
    r = request(prompt)
    assert (r.tokens, r.drafts, r.output, r.num_output) == (prompt, [], [], 0)
    assert (r.computed, r.stage, r.flying, r.scored, r.preemptions, r.index) == (0, 0, 0, 0, 0, 0)
    assert (r.cached_tokens, r.salt, r.finish_reason, r.stop_reason, r.fork_of) == (-1, "", None, None, None)
    r.tokens.append(8)
    assert (r.output, r.num_output, prompt) == ([8], 1, [5, 6, 7])


def test_rows_read_everything_to_the_end_of_the_prompt_unless_another_place_is_given() -> None:
    assert request([5, 6, 7]).dense_until == 3
    assert request([5, 6, 7], dense_until=0).dense_until == 0
    assert request([5, 6, 7], dense_until=2).dense_until == 2
    assert (Probe().dense_until, Probe().score_from, Probe().observe) == (-1, 1, None)


def test_a_plan_counts_its_tokens_and_describes_itself() -> None:
    r = request([5, 6, 7])
    spans = (Span(r, 0, 3, 1, 1), Span(r, 3, 4), Span(r, 4, 9, rows=(4, 7)))
    plan = StepPlan(spans, ((1, 2),), (Sealed("r", 0, (4,)),), (5, 6), ("gone",))
    assert [s.num_rows for s in spans] == [3, 1, 2] and plan.num_tokens == 6
    assert [list(s.positions) for s in spans] == [[0, 1, 2], [3], [4, 7]]
    assert StepPlan(()).num_tokens == 0
    assert plan.describe() == {
        "spans": [
            {"request": "r", "start": 0, "stop": 3, "stage": 1, "sample": 1},
            {"request": "r", "start": 3, "stop": 4, "stage": 0, "sample": 0},
            {"request": "r", "start": 4, "stop": 9, "stage": 0, "sample": 0, "rows": [4, 7]},
        ],
        "sealed": plan.sealed, "reopened": (5, 6), "copies": ((1, 2),), "released": ("gone",),
    }  # fmt: skip


def test_rows_of_a_span_ascend_within_it() -> None:
    r = request([5, 6, 7])
    for rows in ((4,), (8,), (4, 8), (5, 6, 7), range(4, 9)):
        assert list(Span(r, 4, 9, rows=rows).positions) == list(rows)
    for rows in ((), (3,), (9,), (3, 5), (5, 9), (5, 6, 9), (5, 5), (6, 5), (5, 6, 6), (5, 7, 6)):
        with pytest.raises(ValueError, match=r"must ascend and lie in \[4, 9\)"):
            Span(r, 4, 9, rows=rows)


def test_unlimited_is_beyond_every_context() -> None:
    assert SamplingParams(max_tokens=2**31 - 1).max_tokens < UNLIMITED  # type: ignore[operator]


def test_a_refusal_carries_what_a_server_answers_with() -> None:
    plain = RequestError("no")
    assert (str(plain), plain.param, plain.status, plain.type) == ("no", None, 400, "invalid_request_error")
    other = RequestError("busy", param="model", status=503, type="overloaded")
    assert (other.param, other.status, other.type) == ("model", 503, "overloaded")
