"""The native sampler gives the tokens of the torch reference, whatever the options, the rows and the machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.sampling import SamplingParams
from dovetail.ops.cpu import isas, native
from dovetail.runtime.native_sampler import choose
from dovetail.runtime.odds import odds
from dovetail.runtime.sampler import Row, sample
from tests.helpers.examples import examples
from tests.helpers.rows import mask_of, row
from tests.tiny import make_request, run_all, run_staggered, tiny_engine

pytestmark = pytest.mark.skipif(not isas(), reason="the native kernels were not built")
BELOW_ONE = 1 - 2.0**-53


@cache
def program_of(isa: str, threads: int, width: int) -> tuple[Any, int]:
    program = native().Program(isa, threads, True, True)
    return program, program.slot(width, True)


def loaded(logits: np.ndarray, isa: str = "", threads: int = 1) -> tuple[Any, int]:
    """A program with logits [rows, vocabulary] in a slot. What lies behind a row must not count."""
    program, slot = program_of(isa, threads, logits.shape[1])
    program.set_rows(len(logits))
    program.sample(list(range(len(logits))))
    program.run(0, 0)
    view = program.view(slot, len(logits))
    view[:] = 1e30
    view[:, : logits.shape[1]] = logits
    return program, slot


def native_tokens(logits: np.ndarray, rows: Sequence[Row], isa: str = "", threads: int = 1) -> list[int]:
    return choose(*loaded(logits, isa, threads), rows)


def reference(logits: np.ndarray, rows: Sequence[Row]) -> list[int]:
    tokens, _, sound = sample(torch.from_numpy(logits.copy()), rows)
    return [t if ok else -1 for t, ok in zip(tokens, sound, strict=True)]


def random_logits(rows: int, width: int, spread: float, step: float = 0.0, seed: int = 0) -> np.ndarray:
    """Normal logits; with a step, rounded to multiples of it, so that many are equal."""
    x = np.random.default_rng(seed).standard_normal((rows, width)) * spread
    return (np.round(x / step) * step if step else x).astype(np.float32)


options = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 5e-324, 1e-6, 0.3, 0.8, 1.0, 2.5, 100.0])},
    optional={
        "top_k": st.sampled_from([-1, 1, 2, 40, 61, 700, 2**31 - 1]),
        "top_p": st.sampled_from([5e-324, 1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
        "min_p": st.sampled_from([1e-12, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.1, 1.3, 3.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.3, 1.1]),
        "logit_bias": st.dictionaries(st.integers(0, 60), st.floats(-100, 100, width=32), max_size=5),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(st.integers(0, 60), max_size=4),
        "share": st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),  # of the tokens that a mask allows
    },
)


def masked(params: dict[str, Any], width: int, seed: int) -> dict[str, Any]:
    """The options with a random mask, if they speak of one."""
    if "share" not in params:
        return params
    chosen = np.random.default_rng(seed).random(width) < params["share"]
    rest = {name: value for name, value in params.items() if name != "share"}
    return {**rest, "mask": mask_of(np.flatnonzero(chosen), width)}


@given(
    st.lists(options, min_size=1, max_size=6),
    st.sampled_from([61, 64, 65, 128, 1000, 9001]),
    st.sampled_from([(0.0, 0.0), (0.01, 0.0), (1.0, 0.0), (1.0, 0.25), (5.0, 0.0), (20.0, 0.5)]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(isas() or ("",)),
)
@examples(150)
def test_tokens_are_those_of_the_reference(mixed, width: int, shape, seed: int, isa: str) -> None:
    logits = random_logits(len(mixed), width, *shape, seed=seed)
    rows = [
        row([7, 7, 3 + i], i % 3, [1, 2, 2], [9, 7], seed=seed + i, **masked(params, width, seed + i))
        for i, params in enumerate(mixed)
    ]
    assert native_tokens(logits, rows, isa) == reference(logits, rows)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 63, 1025])
def test_any_size_of_vocabulary(width: int) -> None:
    rows = [row(seed=i, **p) for i, p in enumerate([{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0}])]
    logits = random_logits(len(rows), width, 2.0)
    assert native_tokens(logits, rows) == reference(logits, rows)
    assert all(0 <= t < width for t in native_tokens(logits, rows))


REAL = 49152
REAL_OPTIONS = (
    (0.8, 50, 0.95, 0.0), (0.8, 0, 1.0, 0.0), (1.0, 0, 0.95, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 1000, 1.0, 0.0),
    (100.0, 0, 0.9, 0.0), (1.0, 0, 0.9, 0.05), (0.0, 0, 1.0, 0.0), (1e-6, 20000, 0.99, 0.0),
)  # fmt: skip


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_every_instruction_set_and_every_number_of_threads_and_the_reference_agree(spread: float) -> None:
    logits = random_logits(len(REAL_OPTIONS), REAL, spread)
    names = ("temperature", "top_k", "top_p", "min_p")
    rows = [row(seed=i, **dict(zip(names, o, strict=True))) for i, o in enumerate(REAL_OPTIONS)]
    want = reference(logits, rows)
    for isa in isas():
        for threads in (1, 2, 3):
            assert native_tokens(logits, rows, isa, threads) == want, (isa, threads)


def test_a_token_depends_on_no_other_row() -> None:
    params = [{}, {"top_k": 2}, {"temperature": 0}, {"top_p": 0.5, "min_p": 0.01}, {"frequency_penalty": 1.0}]
    logits = random_logits(40, 3000, 2.0)
    rows = [row([3, 3, 4], seed=i, **params[i % len(params)]) for i in range(40)]
    together = native_tokens(logits, rows, threads=2)
    assert together == [native_tokens(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    assert together[::-1] == native_tokens(logits[::-1], rows[::-1], threads=2)


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -2.0, 0.3, -0.5, 0.9, -3.0, 0.1], np.float32)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ((1.0, 0, 1.0, 0.0), range(12)),
        ((0.5, 0, 1.0, 0.0), range(12)),
        ((100.0, 0, 1.0, 0.0), range(12)),
        ((1.0, 3, 1.0, 0.0), (0, 5, 1)),
        ((1.0, 0, 0.6, 0.0), (0, 5, 1)),
        ((1.0, 5, 0.8, 0.0), (0, 5, 1, 9)),
        ((1.0, 0, 1.0, 0.2), (0, 1, 2, 5, 9)),
    ],
)
def test_shares_of_the_noise_are_the_probabilities(how: tuple, kept: Sequence[int]) -> None:
    """Noise in even steps: each kept token gets its share of them, to within the two ends of its interval."""
    n = 4000
    program, slot = loaded(np.broadcast_to(LOGITS, (n, len(LOGITS))))
    counts = Counter(program.choose(slot, [(*how, (i + 0.5) / n) for i in range(n)]))
    p = np.exp(LOGITS.astype(np.float64) / how[0])
    total = sum(p[t] for t in kept)
    assert set(counts) <= set(kept)
    assert all(abs(counts[t] - n * p[t] / total) <= 1 for t in kept)


def test_the_ends_of_the_noise() -> None:
    logits = np.array([[-np.inf, 1.0, 3.0, 2.0, -200.0]], np.float32)
    for how, first, last in (
        ((1.0, 0, 1.0, 0.0), 1, 3), ((1.0, 0, 0.9999, 0.0), 2, 1), ((1.0, 2, 1.0, 0.0), 2, 3)
    ):  # fmt: skip
        program, slot = loaded(logits)
        got = [program.choose(slot, [(*how, noise)])[0] for noise in (0.0, BELOW_ONE)]
        assert got == [first, last]


def test_of_equal_logits_the_first_are_kept() -> None:
    logits = np.zeros((1, 5000), np.float32)
    logits[0, ::2] = -0.0  # is not less than 0
    for how, most in (((1.0, 7, 1.0, 0.0), 6), ((1.0, 0, 0.5, 0.0), 2499), ((1.0, 2000, 0.5, 0.0), 999)):
        program, slot = loaded(logits)
        assert program.choose(slot, [(*how, BELOW_ONE)]) == [most]
        assert program.choose(slot, [(*how, 0.0)]) == [0]
    assert native_tokens(logits, [row(temperature=0)]) == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 40, 69])
def test_unsound_rows_have_no_token_and_trouble_nobody(bad: float, at: int) -> None:
    logits = np.tile(random_logits(1, 70, 1.0), (3, 1))
    logits[1, at] = bad
    forbidden = {"stop_token_ids": [at], "min_tokens": 1}  # what is forbidden still tells that something is wrong
    forbidden_too = {"mask": mask_of({*range(70)} - {at}, 70)}
    for params in (
        {"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 5}, forbidden, forbidden_too, {"repetition_penalty": 2.0}
    ):  # fmt: skip
        rows = [row(prompt=[at], **params) for _ in range(3)]
        got = native_tokens(logits, rows)
        assert got[1] == -1
        assert got[0] == got[2] >= 0
        assert got == reference(logits, rows)


def test_nothing_allowed_and_one_token_allowed() -> None:
    nothing = np.full((1, 20), -np.inf, np.float32)
    one = nothing.copy()
    one[0, 13] = -5.0
    for params in ({"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 1.0}, {"top_k": 1}):
        assert native_tokens(nothing, [row(**params)]) == [-1]
        assert native_tokens(one, [row(**params)]) == [13]
        assert native_tokens(one, [row(stop_token_ids=[13], min_tokens=1, **params)]) == [-1]


def test_options_that_leave_the_likeliest_only() -> None:
    logits = random_logits(1, 3000, 1.0)
    best = [int(logits.argmax())]
    for params in (
        {"top_k": 1},
        {"top_p": 5e-324},
        {"min_p": 1.0},
        {"temperature": 5e-324},
        {"temperature": 1e-6},
    ):
        assert {tuple(native_tokens(logits, [row(seed=s, **params)])) for s in range(20)} == {tuple(best)}, params


def test_huge_differences_do_not_overflow() -> None:
    logits = np.array([[3e38, -3e38, 2.9e38]], np.float32)
    assert native_tokens(logits, [row(temperature=100.0)]) == [0]
    tiny = np.array([[0.0, -1e-45, -1e-40]], np.float32)
    rows = [row(seed=s, temperature=1e-30) for s in range(5)]
    assert [native_tokens(tiny, [r]) for r in rows] == [reference(tiny, [r]) for r in rows]


def test_logits_stay_as_they_are_and_changes_end_with_the_step() -> None:
    logits = LOGITS[None]
    changed = row([0], temperature=0, frequency_penalty=2.0, logit_bias={5: -100})
    program, slot = loaded(logits)
    assert choose(program, slot, [changed]) == [1]
    np.testing.assert_array_equal(program.view(slot, 1)[:, : logits.shape[1]], logits)
    assert native_tokens(logits, [row(temperature=0)]) == [0]


def test_what_does_not_fit_is_refused() -> None:
    program, slot = loaded(LOGITS[None])
    with pytest.raises(ValueError, match="each row"):
        program.choose(slot, [])
    with pytest.raises(ValueError, match="each token"):
        program.shift(0, [1], [])
    for token in (-1, len(LOGITS)):
        program, slot = loaded(LOGITS[None])
        program.shift(0, [token], [1.0])
        with pytest.raises(ValueError, match="vocabulary"):
            program.choose(slot, [(1.0, 0, 1.0, 0.0, 0.5)])
    program, slot = loaded(LOGITS[None])
    for how in (
        (-1.0, 0, 1.0, 0.0, 0.5),
        (1.0, 0, 0.0, 0.0, 0.5),
        (1.0, 0, 1.0, 1.1, 0.5),
        (1.0, 0, 1.0, 0.0, 1.0),
    ):
        with pytest.raises(ValueError, match="range"):
            program.choose(slot, [how])


def test_a_mask_with_fewer_bits_than_tokens_is_refused() -> None:
    logits = random_logits(1, 100, 1.0)
    assert native_tokens(logits, [row(mask=mask_of([99], 100))]) == [99]
    with pytest.raises(ValueError, match="fewer bits"):
        native_tokens(logits, [row(mask=mask_of([1], 96))])


def test_odds_are_close_to_e_and_their_sums_are_exact() -> None:
    logits = torch.from_numpy(random_logits(1, REAL, 6.0))
    got = odds(logits, torch.tensor([0.7], dtype=torch.float64))[0]
    exact = torch.exp((logits[0].double() - logits.max()) / 0.7)
    assert float((got - exact).abs().sum() / exact.sum()) < 1e-6
    assert float(got.max()) == 1
    order = torch.randperm(REAL, generator=torch.Generator().manual_seed(0))
    assert math.fsum(got.tolist()) == float(got.sum()) == float(got[order].cumsum(0)[-1])


# -- in the engine --------------------------------------------------------------------------------------

MIXED = (
    SamplingParams(temperature=0.9, seed=1, max_tokens=16),
    SamplingParams(temperature=0, max_tokens=16, logprobs=2),
    SamplingParams(temperature=1.2, top_k=9, top_p=0.9, seed=2, max_tokens=16, logprobs=1),
    SamplingParams(
        temperature=1.0, top_p=0.8, repetition_penalty=1.3, frequency_penalty=0.5, seed=3, max_tokens=16
    ),
    SamplingParams(temperature=0, max_tokens=16, logit_bias={4: 3.0}, presence_penalty=1.0),
)
PROMPTS = [tuple((i * 5 + j) % 11 for i in range(20)) for j in range(len(MIXED))]


def texts(*use: str, kernels: str = "", together: bool = True) -> list[list[int]]:
    engine = tiny_engine(
        *use, kernels=kernels or isas()[0], dtype="float32", kv_cache_dtype="float32", page_size=16, pages=64
    )
    if not together:
        return [run_all(engine, [p], s)[0] for p, s in zip(PROMPTS, MIXED, strict=True)]
    requests = [make_request(engine, f"r{i}", p, s) for i, (p, s) in enumerate(zip(PROMPTS, MIXED, strict=True))]
    run_staggered(engine, requests, [0, 2, 3, 5, 5])
    return [r.output for r in requests]


def test_sampled_text_is_the_same_under_any_schedule_and_on_every_instruction_set() -> None:
    alone = texts(together=False)
    assert all(len(t) == 16 for t in alone)
    assert texts() == alone
    assert texts("ngram:tokens=3,min_n=1,max_n=2") == alone
    for isa in isas():
        assert texts(kernels=isa) == alone, isa


def test_the_text_is_the_one_that_the_reference_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    want = texts()

    def slow(program: Any, slot: int, rows: Sequence[Row]) -> list[int]:
        return reference(program.view(slot, len(rows))[:, :61], rows)

    monkeypatch.setattr("dovetail.runtime.native.choose", slow)
    assert texts("ngram:tokens=3,min_n=1,max_n=2") == want
