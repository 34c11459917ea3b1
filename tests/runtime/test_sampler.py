from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.types import Span, TokenLogprobs
from dovetail.runtime import sampler
from dovetail.runtime.sampler import (
    UNSOUND,
    by_span,
    describe,
    known,
    prompt_logprobs,
    sample,
    shape_logits,
    uniform,
)
from tests.helpers.rows import mask_of, row

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


def test_noise_is_what_it_was() -> None:
    """A seed gives the same text in every version: splitmix64's steps, written once more."""
    for seed, position in ((0, 0), (1, 0), (0, 1), (-5, 7), (2**64 - 1, 2**40)):
        x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        assert uniform(seed, position) == (x ^ x >> 31) // 2**11 / 2**53
    assert [uniform(0, 0), uniform(-5, 7)] == [0.2250473824744238, 0.551750313779154]


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
    torch.testing.assert_close(shape_logits(logits[None], [r])[0], expected)


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


def test_a_mask_allows_what_it_says_whatever_else_is_asked() -> None:
    for params in (
        {"temperature": 0},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_p": 0.5},
        {"logit_bias": {0: 100}},
    ):
        r = row(mask=mask_of([3, 9, 10], V), **params)
        assert {sample(LOGITS[None], [r])[0][0] for _ in range(3)} <= {3, 9, 10}
    assert sample(LOGITS[None], [row(temperature=0, mask=mask_of([3, 10], V))])[0] == [3]
    assert sample(LOGITS[None], [row(temperature=0, mask=mask_of([3, 10], V), logit_bias={10: 9})])[0] == [10]
    early = row(temperature=0, mask=mask_of([3, 10], V), stop_token_ids=[3], min_tokens=1)
    assert sample(LOGITS[None], [early])[0] == [10]
    nothing = row(temperature=0, mask=mask_of([], V))
    assert sample(LOGITS.expand(2, -1), [nothing, early])[2] == [False, True]


def test_log_probabilities_are_those_of_the_model_whatever_the_mask() -> None:
    plain, masked = row(temperature=0, logprobs=2), row(temperature=0, logprobs=2, mask=mask_of([10], V))
    tokens, known, _ = sample(LOGITS.expand(2, -1), [plain, masked])
    assert tokens == [0, 10]
    assert known[1].top == known[0].top
    assert known[1].logprob == float(torch.log_softmax(LOGITS, -1)[10])


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
    assert describe(LOGITS[None].numpy(), [10], [1])[0].rank == V


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


def test_what_makes_a_row_more_than_the_largest_logit() -> None:
    plain = row(temperature=0)
    assert plain.plain and not plain.changed
    assert not row(temperature=0.5).plain and not row(temperature=0.5).changed
    masked = row(temperature=0, mask=mask_of(range(V), V))
    assert masked.changed and not masked.plain
    assert not row(temperature=0, logprobs=0).plain and not row(temperature=0, logprobs=0).changed
    for change in ({"logit_bias": {1: 1.0}}, {"frequency_penalty": 0.1}, {"min_tokens": 1}):
        assert row(temperature=0, **change).changed and not row(temperature=0, **change).plain
    for written, ahead, early in ((0, 0, True), (2, 0, True), (3, 0, False), (1, 1, True), (2, 1, False)):
        assert row([7] * written, ahead=ahead, min_tokens=3).too_early is early
    assert row([7, 7], ahead=3, prompt=[1, 2, 3]).position == 3 + 2 + 3


def test_presence_counts_once_and_frequency_each_time() -> None:
    for change in ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 2.0}):
        got = shape_logits(LOGITS[None], [row([3, 3, 4], ahead=1, drafts=[5, 6], **change)])[0]
        want = LOGITS.clone()
        if "repetition_penalty" in change:
            for t in (1, 2, 3, 4, 5):
                want[t] = want[t] / 2 if want[t] > 0 else want[t] * 2
        else:
            for t, count in ((3, 2), (4, 1), (5, 1)):
                want[t] -= 0.5 * (count if "frequency_penalty" in change else 1)
        torch.testing.assert_close(got, want)
    assert torch.equal(LOGITS[None], shape_logits(LOGITS[None], [row()]))


def test_shaping_leaves_the_logits_and_the_other_rows_alone() -> None:
    logits = LOGITS.repeat(3, 1)
    rows = [row(), row(logit_bias={2: -3.0, 4: 1.5}), row(min_tokens=2, stop_token_ids=[0, 5])]
    got = shape_logits(logits, rows)
    assert torch.equal(logits, LOGITS.repeat(3, 1))
    assert torch.equal(got[0], LOGITS)
    assert (got[1] - LOGITS).nonzero().flatten().tolist() == [2, 4] and got[1, 2] == LOGITS[2] - 3
    assert got[2].isinf().nonzero().flatten().tolist() == [0, 5] and got[2, 0] < 0


def test_a_token_at_the_edge_of_top_p_is_kept_until_the_sum_is_reached() -> None:
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0])  # a quarter each
    for top_p, kept in ((0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1e-9, 1)):
        found = draw(logits, 300, top_p=top_p)
        assert sorted(found) == list(range(kept)), top_p
    assert sorted(draw(logits, 300, top_k=3, top_p=0.67)) == [0, 1, 2]  # of the three, two are less
    assert sorted(draw(logits, 300, top_k=3, top_p=0.66)) == [0, 1]


def test_the_noise_picks_the_first_token_whose_sum_exceeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for edge in ([0.0, 0.0], [float("-inf"), 0.0]):  # where the first token's sum is the noise, the next one is it
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, noise=0.5 if edge[0] == 0 else 0.0: noise)
        assert sample(torch.tensor([edge]), [row()])[0] == [1]
    logits = torch.tensor([[0.0, 0.0, float("-inf"), 0.0]])
    for noise, token in ((0.0, 0), (0.33, 0), (0.34, 1), (0.67, 3), (1 - 2.0**-53, 3)):
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, noise=noise: noise)
        for change in ({}, {"top_k": 3}, {"top_p": 0.999}):
            assert sample(logits, [row(**change)])[0] == [token]


def test_seed_and_position_make_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(sampler, "uniform", lambda *about: asked.append(about) or 0.5)
    sample(LOGITS.repeat(3, 1), [row([7], seed=11), row(temperature=0), row([7, 7], ahead=1, drafts=[1], seed=12)])
    assert asked == [(11, 3), (12, 5)]


def test_results_of_a_span_end_before_its_first_unsound_row() -> None:
    about = [TokenLogprobs(t, -1.0, 1) for t in range(6)]
    given = [about[0], None, about[2], about[3], about[4], about[5]]
    found = by_span([2, 0, 3, 1], [10, 11, 12, 13, 14, 15], given, [True, True, True, False, True, False])
    assert [list(s.tokens) for s in found] == [[10, 11], [], [12], []]
    assert [list(s.logprobs) for s in found] == [[about[0]], [], [about[2]], []]
    assert [s.error for s in found] == [None, None, UNSOUND, UNSOUND]
    assert by_span([], [], [], []) == []


def test_rows_that_ask_for_nothing_or_have_no_token_are_not_described() -> None:
    rows = [row(), row(logprobs=2), row(logprobs=1), row(logprobs=0)]
    found = known(LOGITS.repeat(4, 1).numpy(), rows, [0, 3, -1, 5])
    assert found[0] is None is found[2]
    assert (found[1].token, found[1].rank, [t for t, _ in found[1].top]) == (3, 8, [0, 5])
    assert (found[3].token, found[3].rank, found[3].top) == (5, 2, ())
    assert known(LOGITS[None].numpy(), [row()], [0]) == [None]
    assert known(LOGITS[None].numpy(), [row(logprobs=0)], [0])[0].top == ()


def test_descriptions_have_as_many_of_the_best_as_each_row_asks_for() -> None:
    logits = torch.stack([LOGITS, -LOGITS])
    first, second = describe(logits.numpy(), [5, 10], [2, 20])
    want = torch.log_softmax(logits, -1)
    assert (first.token, first.rank, [t for t, _ in first.top]) == (5, 2, [0, 5])
    assert (second.token, second.rank, len(second.top)) == (10, 1, V)
    assert math.isclose(first.logprob, float(want[0, 5]), rel_tol=1e-6)
    for about, row_of in ((first, want[0]), (second, want[1])):
        assert all(math.isclose(lp, float(row_of[t]), rel_tol=1e-6) for t, lp in about.top)


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 256])
def test_scores_of_a_prompt_come_from_the_rows_before_its_tokens(
    monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
) -> None:
    monkeypatch.setattr(sampler, "LOGIT_ROWS", rows_at_a_time)
    prompt = [3, 1, 4, 1, 5, 9]
    table = torch.randn(len(prompt), V, generator=torch.Generator().manual_seed(0))
    want, rows_of = torch.log_softmax(table, -1), table.numpy()
    for start, stop, scored in ((0, 6, 0), (0, 4, 0), (2, 5, 0), (0, 6, 3), (2, 6, 4), (4, 6, 1), (0, 3, 5)):
        request = row(prompt=prompt, prompt_logprobs=1).request
        seen: list[tuple[int, int]] = []
        request.scored, request.observe = scored, lambda at, rows, seen=seen: seen.append((at, len(rows)))
        found = prompt_logprobs(
            Span(request, start, stop), lambda at, start=start: rows_of[[start + i for i in at]]
        )
        rows = range(max(start, scored), min(stop, len(prompt) - 1))
        assert [about.token for about in found] == [prompt[i + 1] for i in rows]
        for i, about in zip(rows, found, strict=True):
            assert math.isclose(about.logprob, float(want[i, prompt[i + 1]]), rel_tol=1e-6)
            assert [t for t, _ in about.top] == [int(table[i].argmax())]
        assert sum(n for _, n in seen) == len(rows) and all(n <= rows_at_a_time for _, n in seen)
        assert [at for at, _ in seen] == list(rows)[::rows_at_a_time]
