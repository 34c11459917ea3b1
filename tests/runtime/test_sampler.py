from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.sampler import describe, sample, uniform
from tests.helpers.rows import row

V = 12


def draw(logits: torch.Tensor, n: int, **params) -> Counter[int]:
    rows = [row(seed=s, **params) for s in range(n)]
    return Counter(sample(logits.expand(n, -1), rows)[0])


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -2.0, 0.3, -0.5, 0.9, -3.0, 0.1])


def chi_square(counts: Counter[int], probs: torch.Tensor, n: int) -> float:
    assert all(probs[t] > 0 for t in counts)
    return sum((counts[t] - n * p) ** 2 / (n * p) for t, p in enumerate(probs.tolist()) if p > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    n = 4000
    probs = torch.softmax(LOGITS / temperature, -1)
    assert chi_square(draw(LOGITS, n, temperature=temperature), probs, n) < 31.3  # 11 degrees, p = 0.001


def test_top_k_top_p_and_min_p_against_a_plain_definition() -> None:
    probs = torch.softmax(LOGITS, -1)
    order = probs.argsort(descending=True).tolist()
    for params in ({"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.2}, {"top_k": -1}):
        keep = order[: params["top_k"]] if params.get("top_k", 0) > 0 else list(order)
        if "top_p" in params:
            total = sum(probs[t] for t in keep)
            mass = np.cumsum([float(probs[t] / total) for t in keep])
            keep = keep[: int((mass < params["top_p"]).sum()) + 1]
        if "min_p" in params:
            keep = [t for t in keep if probs[t] >= params["min_p"] * probs.max()]
        want = torch.zeros(V)
        want[keep] = probs[keep] / probs[keep].sum()
        assert chi_square(draw(LOGITS, 3000, **params), want, 3000) < 31.3, params


def test_a_token_does_not_depend_on_its_batch_mates() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, V, generator=generator)
    options = [{}, {"top_k": 2}, {"temperature": 0}, {"top_p": 0.5, "min_p": 0.1}, {"frequency_penalty": 1.0}]
    rows = [row([3, 3, 4], seed=i, **options[i % len(options)]) for i in range(40)]
    together = sample(logits, rows)[0]
    assert together == [sample(logits[i : i + 1], [r])[0][0] for i, r in enumerate(rows)]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
def test_noise_is_in_range_and_pure(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_noise_is_even_over_seeds_and_positions() -> None:
    for values in ([uniform(0, p) for p in range(10000)], [uniform(s, 5) for s in range(10000)]):
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 19 degrees, p = 0.001


def test_penalties_against_their_formulas() -> None:
    logits = LOGITS.clone()
    r = row(
        [3, 3, 4], temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, logprobs=0
    )
    expected = logits.clone()
    for t in {1, 2, 3, 4}:
        expected[t] = expected[t] / 1.3 if expected[t] > 0 else expected[t] * 1.3
    for t, count in ((3, 2), (4, 1)):
        expected[t] -= 0.4 + 0.2 * count
    from dovetail.runtime.sampler import _shape

    torch.testing.assert_close(_shape(logits[None], [r])[0], expected)


def test_drafts_count_as_written_for_the_rows_after_them() -> None:
    params = {"temperature": 0, "frequency_penalty": 2.0}
    drafted = row([0], ahead=2, drafts=[0, 5], **params)
    written = row([0, 0, 5], **params)
    for r in (drafted, written):
        assert sample(LOGITS[None], [r])[0] == [1]
    assert sample(LOGITS[None], [row([0], drafts=[0, 5], **params)])[0] == [5]


def test_bias_can_force_and_forbid() -> None:
    assert sample(LOGITS[None], [row(temperature=0, logit_bias={10: 100})])[0] == [10]
    assert sample(LOGITS[None], [row(temperature=0, logit_bias={0: -100, 5: -100})])[0] == [1]


def test_min_tokens_forbids_the_end_until_then() -> None:
    params = {"temperature": 0, "stop_token_ids": [0], "min_tokens": 2}
    assert [sample(LOGITS[None], [row([7] * n, **params)])[0][0] for n in range(4)] == [5, 5, 0, 0]
    assert sample(LOGITS[None], [row([7], ahead=1, drafts=[7], **params)])[0] == [0]


def test_logprobs_against_log_softmax() -> None:
    rows = [row(temperature=0, logprobs=3), row(temperature=0), row(temperature=1.0, logprobs=0, seed=3)]
    tokens, known, _ = sample(LOGITS.expand(3, -1), rows)
    reference = torch.log_softmax(LOGITS, -1)
    assert known[1] is None
    assert known[0].token == 0
    assert known[0].rank == 1
    assert [t for t, _ in known[0].top] == [0, 5, 1]
    for _, lp in known[0].top:
        assert any(math.isclose(lp, float(x), rel_tol=1e-6) for x in reference)
    assert math.isclose(known[2].logprob, float(reference[tokens[2]]), rel_tol=1e-6)
    assert known[2].top == ()
    assert describe(LOGITS[None], [10], [1])[0].rank == V


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unsound_logits_are_reported_for_their_row_only(bad: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    for params in ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        tokens, _, sound = sample(logits, [row(**params) for _ in range(3)])
        assert sound == [True, False, True]
        assert tokens[0] == tokens[2]


def test_extreme_temperatures_neither_overflow_nor_choose_at_random() -> None:
    for params in ({"temperature": 1e-308}, {"temperature": 5e-324}, {"temperature": 1e-6, "top_k": 4}):
        assert draw(LOGITS * 5, 20, **params) == {0: 20}
    assert draw(LOGITS, 20, top_p=5e-324, top_k=1) == {0: 20}
    assert len(draw(LOGITS, 400, temperature=100.0)) == V


def test_a_row_with_every_token_forbidden_is_an_error_and_not_a_token() -> None:
    forbidden = row(temperature=0, stop_token_ids=list(range(V)), min_tokens=1)
    _, _, sound = sample(LOGITS.expand(2, -1), [forbidden, row(temperature=0)])
    assert sound == [False, True]


def test_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    assert len(draw(LOGITS, 2000, top_k=10**6, temperature=3.0)) == V
