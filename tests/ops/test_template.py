"""One definition of a variant, evaluated in every language: as it is on tensors, traced on tensors, compiled."""

from __future__ import annotations

import hashlib
import math
import operator
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dovetail.core.errors import ConfigError, DovetailError
from dovetail.core.seams import SlidingWindow, Variant
from dovetail.host import machine
from dovetail.ops import template
from dovetail.ops.attention import Keys, Rows, attend_dense, attend_pages
from dovetail.ops.template import (
    ALiBi,
    BlockDiagonal,
    Compiled,
    CompileError,
    Sinks,
    SoftCap,
    TraceError,
    compile_variant,
    exp,
    log,
    maximum,
    minimum,
    sqrt,
    tanh,
    trace,
    where,
    window,
    with_tables,
)
from dovetail.ops.template.compiled import COMPILERS, FLAGS, GCC_FLAGS
from dovetail.ops.template.cpp import cpp
from dovetail.ops.template.variants import alibi_slopes

COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
HEADS = 6

SHIPPED: dict[str, Variant] = {
    "causal": Variant(),
    "soft-cap": SoftCap(30.0),
    "alibi": ALiBi(HEADS),
    "sliding window": SlidingWindow(50),
    "sinks": Sinks(4, 32),
    "block-diagonal": BlockDiagonal(24),
    "nested": SoftCap(20.0, SlidingWindow(70, ALiBi(8, BlockDiagonal(100)))),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def directly(variant: Variant, scores: Tensor, q_pos: Tensor, k_pos: Tensor, head: Tensor) -> Tensor:
    """What the methods give when they are called with tensors."""
    bound = with_tables(variant)
    readable = bound.mask(q_pos, k_pos, head) & (k_pos <= q_pos)
    new = torch.where(readable, bound.score(scores, q_pos, k_pos, head), -torch.inf)
    return new.to(scores.dtype).expand_as(scores)


def inputs(seed: int, dtype: torch.dtype = torch.float32, first: int = 0) -> tuple[Tensor, ...]:
    """Random scores [HEADS, 9 queries, 133 keys], positions from `first` on."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(HEADS, 9, 133, generator=generator, dtype=torch.float64).to(dtype) * 20
    q_pos = first + torch.randint(0, 140, (9, 1), generator=generator)
    k_pos = first + torch.randperm(140, generator=generator)[:133]
    return scores, q_pos, k_pos, torch.arange(HEADS)[:, None, None]


def natively(compiled: Compiled, scores: Tensor, q_pos: Tensor, k_pos: Tensor, head: Tensor) -> Tensor:
    """The compiled function, row by row."""
    out = scores.clone()
    keys = k_pos.to(torch.int32).numpy()
    for h in range(len(scores)):
        for i in range(scores.shape[1]):
            compiled(out[h, i].numpy(), keys, int(q_pos[i]), h)
    return out


def assert_close(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-35, equal_nan=True)


# Shipped variants


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_traced_shipped_variants_are_the_definitions_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    given = inputs(1, dtype)
    got = trace(SHIPPED[name]).torch(*given)
    assert got.dtype == dtype
    assert torch.equal(got, directly(SHIPPED[name], *given))


@needs_compiler
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("first", [0, 1 << 20])
def test_compiled_shipped_variants_agree_with_torch(name: str, first: int, kernels: Path) -> None:
    compiled = compile_variant(SHIPPED[name], folder=kernels)
    given = inputs(2, first=first)
    assert_close(natively(compiled, *given), compiled.traced.torch(*given))
    empty = np.zeros(0, np.float32)
    compiled(empty, np.zeros(0, np.int32), 3, 0)


def test_shipped_masks_say_what_their_papers_say() -> None:
    q, k = torch.arange(40)[:, None], torch.arange(40)
    read = {
        name: trace(v).torch(torch.zeros(40, 40), q, k, torch.tensor(0)) > -torch.inf
        for name, v in {"w": SlidingWindow(5), "s": Sinks(3, 5), "b": BlockDiagonal(8)}.items()
    }
    assert read["w"][20].nonzero().flatten().tolist() == [16, 17, 18, 19, 20]
    assert read["s"][20].nonzero().flatten().tolist() == [0, 1, 2, 16, 17, 18, 19, 20]
    assert read["s"][1].nonzero().flatten().tolist() == [0, 1]
    assert read["b"][20].nonzero().flatten().tolist() == [16, 17, 18, 19, 20]


def test_alibi_has_the_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(16) == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    # As the authors' get_slopes(12): those of 8 heads, then every other one of 16.
    assert alibi_slopes(12) == pytest.approx([2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert alibi_slopes(1) == (2.0**-8,)
    assert [len(alibi_slopes(n)) for n in range(1, 70)] == list(range(1, 70))


@pytest.mark.parametrize(
    ("kind", "settings"), [(SoftCap, [0.0]), (ALiBi, [0]), (Sinks, [-1, 3]), (Sinks, [1, 0]), (BlockDiagonal, [0])]
)
def test_impossible_settings_are_refused(kind: type[Variant], settings: list[float]) -> None:
    with pytest.raises(ConfigError, match=kind.__name__):
        kind(*settings)


# Attention


def naive(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """q [rows, heads, d] at positions 0..., k and v [rows, KV heads, d], one query and head at a time."""
    rows, heads, d = q.shape
    out = torch.empty_like(q)
    for row in range(rows):
        for head in range(heads):
            kv = head // (heads // k.shape[1])
            scores = k[: row + 1, kv] @ q[row, head] * d**-0.5
            new = directly(variant, scores, torch.tensor(row), torch.arange(row + 1), torch.tensor(head))
            out[row, head] = torch.softmax(new, 0) @ v[: row + 1, kv]
    return out


@dataclass(frozen=True)
class HeadWindows(Variant):
    windows: tuple[int, ...]

    def mask(self, q_pos, k_pos, head):
        return k_pos > q_pos - self.windows[head]


@pytest.mark.parametrize("variant", [ALiBi(HEADS), HeadWindows((1, 9, 2, 30, 3, 5)), SoftCap(0.5, ALiBi(HEADS))])
def test_the_reference_gives_each_head_its_own(variant: Variant) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(12, HEADS, 8).double(), torch.randn(12, 2, 8).double(), torch.randn(12, 2, 8).double()
    want = naive(q, k, v, variant)
    layout = Rows(torch.arange(12), [(torch.tensor([0]), torch.arange(12)[None], 12)])
    torch.testing.assert_close(attend_dense(q, lambda spans, length: (k[None], v[None]), variant, layout), want)
    paged = [t.transpose(0, 1).reshape(1, 2, 3, 4, 8).expand(12, -1, -1, -1, -1) for t in (k, v)]
    keys = Keys(*paged, torch.arange(12).view(1, 1, 3, 4).expand(12, 2, 3, 4))
    torch.testing.assert_close(attend_pages(q, keys, variant, torch.arange(12)), want)


def test_a_variant_may_give_plain_numbers() -> None:
    class Mean(Variant):
        def score(self, score, q_pos, k_pos, head):
            return 0

        def mask(self, q_pos, k_pos, head):
            return True

    torch.manual_seed(0)
    q, k, v = torch.randn(5, 2, 4).double(), torch.randn(5, 2, 4).double(), torch.randn(5, 2, 4).double()
    layout = Rows(torch.arange(5), [(torch.tensor([0]), torch.arange(5)[None], 5)])
    got = attend_dense(q, lambda spans, length: (k[None], v[None]), Mean(), layout)
    torch.testing.assert_close(got[4], v.mean(0))
    given = inputs(0)
    assert torch.equal(trace(Mean()).torch(*given), directly(Mean(), *given))


# Random definitions


@dataclass(frozen=True)
class Formula(Variant):
    """Trees of (operation, arguments), evaluated on whatever the methods are called with."""

    value: tuple
    allowed: tuple
    gain: float = 0.75
    stride: int = 5
    floats: tuple[float, ...] = (0.5, -1.25, 3.0, 0.1, 7.0, -0.3)
    wholes: tuple[int, ...] = (3, 1, -4, 11, 6, 2)

    def score(self, score, q_pos, k_pos, head):
        return self.run(self.value, {"score": score, "q_pos": q_pos, "k_pos": k_pos, "head": head})

    def mask(self, q_pos, k_pos, head):
        return self.run(self.allowed, {"q_pos": q_pos, "k_pos": k_pos, "head": head})

    def run(self, tree: Any, names: dict[str, Any]) -> Any:
        if not isinstance(tree, tuple):
            return names[tree] if tree in names else getattr(self, tree) if isinstance(tree, str) else tree
        op, *args = tree
        values = [self.run(a, names) for a in args]
        if op in ("floats", "wholes"):
            return getattr(self, op)[values[0]]
        return getattr(template, op)(*values) if hasattr(template, op) else getattr(operator, op)(*values)


Trees = st.SearchStrategy
Grown = Callable[[Trees], Trees]


def trees(leaves: Trees, *grown: Grown) -> Trees:
    return st.recursive(leaves, lambda inner: st.one_of(*(g(inner) for g in grown)), max_leaves=6)


def of(*ops: str, **fixed: Any) -> Grown:
    """Operations of one, two arguments, the second of which may be given."""
    return lambda inner: st.tuples(st.sampled_from(ops), inner, fixed.get("second", inner))


def one(*ops: str) -> Grown:
    return lambda inner: st.tuples(st.sampled_from(ops), inner)


INPUTS = st.sampled_from(["q_pos", "k_pos", "head"])
NUMBERS = st.integers(-9, 9) | st.just("stride")
DIVISORS = st.integers(1, 40) | st.integers(-40, -1) | st.just("stride")
INTS = trees(
    INPUTS | NUMBERS | st.just(("wholes", ("mod", "k_pos", 6))) | st.just(("wholes", "head")),
    of("add", "sub", "minimum", "maximum"),
    of("mul", second=NUMBERS),
    of("floordiv", "mod", second=DIVISORS),
    one("neg", "abs"),
)
VARYING_INTS = st.tuples(st.sampled_from(["add", "sub"]), st.sampled_from(["q_pos", "k_pos"]), INTS)
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
CONDITIONS = trees(
    st.tuples(st.sampled_from(COMPARISONS), VARYING_INTS, INTS),
    of("and_", "or_", "xor"),
    one("invert"),
    lambda inner: st.tuples(st.just("where"), inner, inner, inner),
)
FLOATS = trees(
    st.sampled_from(["score", "score", "gain", ("floats", "head"), ("floats", ("mod", "q_pos", 6))])
    | VARYING_INTS.map(lambda tree: ("mul", tree, 0.5))  # products of whole numbers may exceed 64 bits
    | st.floats(-8, 8, width=16),
    of("add", "sub", "mul", "minimum", "maximum"),
    lambda inner: inner.map(lambda tree: ("truediv", "score", ("add", "score", tree))),
    one("neg", "abs", "floor"),
    lambda inner: st.tuples(st.just("where"), CONDITIONS, inner, inner),
)
EXACT = st.builds(Formula, FLOATS, CONDITIONS)


def positive(tree: Any) -> tuple:
    return ("add", ("abs", tree), 0.5)


FUNCTIONS = FLOATS.flatmap(
    lambda tree: st.sampled_from(
        [
            ("exp", ("minimum", tree, 20.0)),
            ("tanh", ("truediv", tree, 16.0)),
            ("log", positive(tree)),
            ("sqrt", positive(tree)),  # torch's is not always the nearest float32
            ("exp", ("neg", ("abs", ("truediv", tree, 8.0)))),
        ]
    )
)
# One function of an exact argument, scaled: rounding differences are not magnified.
SMOOTH = st.builds(Formula, st.tuples(st.just("mul"), FUNCTIONS, st.sampled_from(["gain", -2.5])), CONDITIONS)


@given(EXACT | SMOOTH, st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=150, deadline=None)
def test_traced_random_definitions_are_the_definitions_bit_for_bit(variant, seed, dtype) -> None:
    given = inputs(seed, dtype)
    want = directly(variant, *given)
    torch.testing.assert_close(trace(variant).torch(*given), want, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@given(variant=EXACT, seed=st.integers(0, 99), first=st.sampled_from([0, 1, 1 << 28]))
@settings(max_examples=15, deadline=None)
def test_compiled_exact_definitions_are_torchs_bit_for_bit(variant, seed, first, kernels: Path) -> None:
    given = inputs(seed, first=first)
    compiled = compile_variant(variant, folder=kernels)
    got, want = natively(compiled, *given), compiled.traced.torch(*given)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@given(variant=SMOOTH, seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_compiled_smooth_definitions_agree_with_torch(variant, seed, kernels: Path) -> None:
    given = inputs(seed)
    compiled = compile_variant(variant, folder=kernels)
    assert_close(natively(compiled, *given), compiled.traced.torch(*given))


@given(CONDITIONS)
@settings(max_examples=80, deadline=None)
def test_windows_are_sound(allowed) -> None:
    traced = trace(Formula("score", allowed))
    found = window(traced)
    q, k, head = torch.arange(90)[:, None], torch.arange(90), torch.arange(HEADS)[:, None, None]
    read = traced.torch(torch.zeros(HEADS, 90, 90), q, k, head) == 0
    farthest = int(((q - k) * read).max())
    assert found is None or found >= farthest


# Whole numbers and functions in C++


def only_score(function: Callable[..., Any]) -> Variant:
    class Only(Variant):
        def score(self, score, q_pos, k_pos, head):
            return function(score, q_pos, k_pos, head)

    return Only()


@needs_compiler
@pytest.mark.parametrize(
    "function",
    [
        lambda s, q, k, h: (k - q) // 7,
        lambda s, q, k, h: (k - q) % 7,
        lambda s, q, k, h: (q - k) // -7,
        lambda s, q, k, h: (k - q) % -7,
        lambda s, q, k, h: q // (k % 5 + 1),
        lambda s, q, k, h: (q * k) % 1009,
        lambda s, q, k, h: -(q * k) // 1_000_003 % 4096,
        lambda s, q, k, h: minimum(q * k, 99) + abs(k - q) % 3,
        lambda s, q, k, h: where(q + k + 1 > k * q, q + k + 1, 0) % 257,
        lambda s, q, k, h: (k - 1_000_000_000_000) % 4093,
        lambda s, q, k, h: (k % 1000) ** 3 % 127,
    ],
)
def test_whole_numbers_are_exact_in_kernels(function: Callable[..., Any], kernels: Path) -> None:
    variant = only_score(function)
    generator = torch.Generator().manual_seed(5)
    k_pos = torch.randint(0, 1 << 30, (500,), generator=generator)
    q_pos = torch.tensor([[(1 << 30) - 1], [12345]])
    k_pos[:100] %= 12346
    given = torch.zeros(1, 2, 500), q_pos, k_pos, torch.tensor(0)
    got = natively(compile_variant(variant, folder=kernels), *given)
    assert torch.equal(got, trace(variant).torch(*given))


@needs_compiler
@pytest.mark.parametrize(("ours", "exact"), [(tanh, np.tanh), (exp, np.exp), (log, np.log), (sqrt, np.sqrt)])
def test_functions_in_kernels_are_within_2e_7_for_every_kind_of_float(ours, exact, kernels: Path) -> None:
    compiled = compile_variant(only_score(lambda s, q, k, h: ours(s)), folder=kernels)
    x = np.arange(0, 1 << 32, 1009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    got = x.copy()
    compiled(got, np.zeros(len(x), np.int32), 0, 0)
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
        rounded = want.astype(np.float32)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(np.isinf(got), np.isinf(rounded))
    normal = np.isfinite(rounded) & (np.abs(want) > 1.2e-38)
    assert np.max(np.abs(got[normal] / want[normal] - 1)) < 2e-7
    tiny = np.isfinite(rounded) & ~normal
    assert np.max(np.abs(got[tiny] - want[tiny]), initial=0) < 3e-45


@needs_compiler
@pytest.mark.parametrize("value", [0.1, -0.0, 1e300, -1e300, math.nan, 3, 2**62, 1e-45, 16777217])
def test_constants_and_parameters_are_torchs(value: float, kernels: Path) -> None:
    @dataclass(frozen=True)
    class Times(Variant):
        by: float

        def score(self, score, q_pos, k_pos, head):
            return score * self.by

    given = inputs(3)
    for variant in (Times(value), only_score(lambda s, q, k, h: s * value)):
        got = natively(compile_variant(variant, folder=kernels), *given)
        want = trace(variant).torch(*given)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(got), torch.signbit(want)) or math.isnan(value)


# What is known about a variant


def test_the_default_is_recognised() -> None:
    class Same(Variant):
        def score(self, score, q_pos, k_pos, head):
            return score

        def mask(self, q_pos, k_pos, head):
            return (q_pos >= k_pos) & (q_pos >= k_pos)

    class Everything(Variant):
        def mask(self, q_pos, k_pos, head):
            return True

    assert all(trace(v).is_causal for v in (Variant(), Same(), Everything()))
    assert trace(SlidingWindow(5)).keeps_scores
    assert not trace(SoftCap(5)).keeps_scores
    assert not any(trace(v).is_causal for name, v in SHIPPED.items() if name != "causal")


def masked(condition: Callable[..., Any]) -> Variant:
    class Masked(Variant):
        def mask(self, q_pos, k_pos, head):
            return condition(q_pos, k_pos, head)

    return Masked()


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (Variant(), None),
        (SlidingWindow(50), 49),
        (SlidingWindow(9, SlidingWindow(7)), 6),
        (SoftCap(3, SlidingWindow(7)), 6),
        (Sinks(4, 9), None),
        (BlockDiagonal(16), 15),
        (HeadWindows((3, 17, 5)), 16),
        (masked(lambda q, k, h: k >= q - 5), 5),
        (masked(lambda q, k, h: q - 5 <= k), 5),
        (masked(lambda q, k, h: 2 * (q - k) < 11), 5),
        (masked(lambda q, k, h: ~(q - k > 6)), 6),
        (masked(lambda q, k, h: abs(q - k) < 5), 4),
        (masked(lambda q, k, h: abs(k - q) < 5), 4),
        (masked(lambda q, k, h: q == k), 0),
        (masked(lambda q, k, h: (q - k == 3) | (q - k == 8)), 8),
        (masked(lambda q, k, h: q // 4 - k // 4 <= 2), 11),
        (masked(lambda q, k, h: q - k % 8 < 5), 11),
        (masked(lambda q, k, h: q + 1 < 9), 7),
        (masked(lambda q, k, h: q * 3 - k < 20), 6),
        (masked(lambda q, k, h: maximum(q - k, 3) < 9), 8),
        (masked(lambda q, k, h: where(k % 2 == 0, q - k < 10, q - k < 4)), 9),
        (masked(lambda q, k, h: q - k < 10 + h % 3), 11),
        (masked(lambda q, k, h: k > q // 2), None),
        (masked(lambda q, k, h: k < 4), None),
        (masked(lambda q, k, h: 1.0 * (q - k) < 4.5), None),
        (masked(lambda q, k, h: (q - k < 4) ^ (k < 3)), None),
        (masked(lambda q, k, h: q < k), 0),
    ],
)
def test_windows_are_found(variant: Variant, expected: int | None) -> None:
    assert window(trace(variant)) == expected


def test_tables_say_for_how_many_heads_they_are() -> None:
    assert trace(SoftCap(3.0)).num_heads is None
    assert trace(ALiBi(12, HeadWindows((1, 2, 3)))).num_heads == 3

    @dataclass(frozen=True)
    class Grouped(Variant):
        bias: tuple[float, ...] = (1.0, 2.0, 3.0)
        near: tuple[float, ...] = (1.0,) * 8

        def score(self, score, q_pos, k_pos, head):
            return score + self.bias[head // 4] + self.near[minimum(abs(q_pos - k_pos), 7)]

    assert trace(Grouped()).num_heads == 12


def test_attributes_are_no_part_of_the_source() -> None:
    for one, other in [
        (SoftCap(3.0), SoftCap(4.5)),
        (SlidingWindow(5, ALiBi(8)), SlidingWindow(500, ALiBi(8))),
        (Sinks(1, 2), Sinks(30, 40)),
        (BlockDiagonal(3), BlockDiagonal(4)),
    ]:
        assert cpp(trace(one).program) == cpp(trace(other).program)


@needs_compiler
def test_what_python_computes_from_attributes_is_a_parameter_or_a_branch(kernels: Path) -> None:
    @dataclass(frozen=True)
    class Scaled(Variant):
        cap: float
        steps: int = 3

        @property
        def inverse(self):
            return 1 / self.cap

        def score(self, score, q_pos, k_pos, head):
            for _ in range(self.steps):
                score = score * self.inverse if self.cap > 2 else score + math.sqrt(self.cap)
            return score

    given = inputs(4)
    one, other, branch = (compile_variant(Scaled(c), folder=kernels) for c in (3.0, 7.0, 1.5))
    assert one.path == other.path != branch.path
    assert one.params.tolist() == [np.float32(1 / 3)]
    for compiled, cap in ((one, 3.0), (other, 7.0), (branch, 1.5)):
        want = directly(Scaled(cap), *given)
        assert torch.equal(compiled.traced.torch(*given), want)
        assert_close(natively(compiled, *given), want)


@needs_compiler
def test_definitions_written_with_torch_classes_and_arrays(kernels: Path) -> None:
    class Loose(Variant):
        slope = 0.25
        caps = (5.0, 6.0)

        def __init__(self):
            self.parts = [SlidingWindow(9), Sinks(2, 5)]
            self.bias = np.linspace(0, 1, HEADS, dtype=np.float32)
            self.name = "loose"
            self.on = True

        def score(self, score, q_pos, k_pos, head):
            distance = torch.maximum(q_pos - k_pos, q_pos * 0)
            assert self.on and self.name == "loose"
            return self.caps[1] * torch.tanh(score - self.slope * distance) + self.bias[head]

        def mask(self, q_pos, k_pos, head):
            first, second = (p.mask(q_pos, k_pos, head) for p in self.parts)
            return first | second

    given = inputs(6)
    compiled = compile_variant(Loose(), folder=kernels)
    assert_close(natively(compiled, *given), directly(Loose(), *given))

    @dataclass(frozen=True, slots=True)
    class Tight(Variant):
        slopes: tuple[float, ...]

        def score(self, score, q_pos, k_pos, head):
            return score * self.slopes[head]

    tight = Tight(tuple(range(1, 7)))
    assert torch.equal(trace(tight).torch(*given), directly(tight, *given))


def test_long_definitions_do_not_recurse() -> None:
    def score(s, q, k, h):
        for _ in range(2000):
            s = s * 0.999 + 0.5
        return s

    given = inputs(0)
    variant = only_score(score)
    assert torch.equal(trace(variant).torch(*given), directly(variant, *given))
    assert window(trace(variant)) is None


def test_equal_parts_are_computed_once() -> None:
    variant = only_score(lambda s, q, k, h: exp(s * 2.0) + exp(s * 2.0) - 1 / exp(s * 2.0))
    assert sum(step.op == "exp" for step in trace(variant).program.steps) == 1


@needs_compiler
@pytest.mark.parametrize("name", [n for n in SHIPPED if n not in ("block-diagonal", "nested")])
def test_the_loop_is_vector_code(name: str, tmp_path: Path) -> None:
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("only GCC is asked")
    source = tmp_path / "variant.cpp"
    source.write_text(cpp(trace(SHIPPED[name]).program))
    command = [COMPILER, *FLAGS, *GCC_FLAGS, "-fopt-info-vec-optimized", "-o", tmp_path / "variant.so", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "loop vectorized" in done.stderr


# Definitions that cannot be traced


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda s, q, k, h: s if k < 3 else 2 * s, "write where(condition, a, b)"),
        (lambda s, q, k, h: where((k < 3) and (q > 4), s, 0), "& | ~ between conditions"),
        (lambda s, q, k, h: where(not k < 3, s, 0), "has no truth"),
        (lambda s, q, k, h: where(1 < k < 3, s, 0), "a < b < c"),
        (lambda s, q, k, h: min(s, 4.0), "minimum and maximum"),
        (lambda s, q, k, h: math.tanh(s), "tanh, exp, log"),
        (lambda s, q, k, h: [1.0, 2.0][h], "keep lists of numbers as attributes"),
        (lambda s, q, k, h: sum(range(k)), "range, int, float"),
        (lambda s, q, k, h: list(s), "cannot be looped over"),
        (lambda s, q, k, h: s**0.5, "write sqrt(x)"),
        (lambda s, q, k, h: 2**s, "write sqrt(x)"),
        (lambda s, q, k, h: s // 2, "write floor(a / b)"),
        (lambda s, q, k, h: s + q // k, "write maximum(divisor, 1)"),
        (lambda s, q, k, h: s + q * k * q, "64 bits"),
        (lambda s, q, k, h: s + q * 2**70, "64 bits"),
        (lambda s, q, k, h: s + (k < 3), "write where(condition, 1, 0)"),
        (lambda s, q, k, h: where(k, s, 0), "the first argument of where is for conditions"),
        (lambda s, q, k, h: where(k & 3, s, 0), "& is for conditions"),
        (lambda s, q, k, h: torch.ones(3) * s, "a tensor cannot be part"),
        (lambda s, q, k, h: s * torch.ones(3), "a tensor cannot be part"),
        (lambda s, q, k, h: torch.clamp(s, 0, 1), "torch.clamp is not one of tanh"),
        (lambda s, q, k, h: s.clamp(0, 1), "AttributeError: 'Expr' object has no attribute 'clamp'"),
        (lambda s, q, k, h: s + "x", "cannot be part of a traced expression"),
        (lambda s, q, k, h: s + 1j, "cannot be part of a traced expression"),
        (lambda s, q, k, h: k < 3, "gives a condition, not a score"),
        (lambda s, q, k, h: None, "None cannot be part"),
    ],
)
def test_what_cannot_be_traced_says_what_to_write(score: Callable[..., Any], words: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace(only_score(score))
    assert words in str(caught.value)
    assert "Only.score" in str(caught.value)
    assert "the torch reference" in str(caught.value)


def test_errors_name_the_line_of_the_definition() -> None:
    with pytest.raises(TraceError, match=r"Only\.score \(test_template.py, line \d+\) cannot be traced"):
        trace(only_score(lambda s, q, k, h: s if s > 0 else 0))
    with pytest.raises(TraceError, match=r"Masked\.mask gives a number"):
        trace(masked(lambda q, k, h: k))


@dataclass(frozen=True)
class Lookup(Variant):
    index: Callable[..., Any]
    bias: tuple[float, ...] = (1.0, 2.0, 3.0)
    large: tuple[int, ...] = (1, 1 << 25)

    def score(self, score, q_pos, k_pos, head):
        return score + self.index(self, score, q_pos, k_pos)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (lambda v, s, q, k: v.bias[q - k], "index of bias may be negative; write maximum(index, 0)"),
        (lambda v, s, q, k: v.bias[k], "write minimum(index, 2)"),
        (lambda v, s, q, k: v.bias[s], "bias[...] takes a whole number, not a float"),
        (lambda v, s, q, k: v.large[k % 2], "must be within 2^24"),
    ],
)
def test_tables_are_never_read_beyond_their_ends(index: Callable[..., Any], words: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace(Lookup(index))
    assert words in str(caught.value)


@needs_compiler
def test_heads_beyond_a_table_read_its_last_number(kernels: Path) -> None:
    compiled = compile_variant(ALiBi(4), folder=kernels)
    scores = np.zeros(3, np.float32)
    compiled(scores, np.arange(3, dtype=np.int32), 2, 4000)
    assert scores.tolist() == [-(2.0**-8) * d for d in (2, 1, 0)]


# The cache


@pytest.fixture
def counting(tmp_path: Path) -> tuple[str, Callable[[], int]]:
    """A compiler that counts how often it compiles."""
    log_file, script = tmp_path / "calls", tmp_path / "c++"
    script.write_text(f'#!/bin/sh\ncase " $* " in *" -o "*) echo >>"{log_file}";; esac\nexec "{COMPILER}" "$@"\n')
    script.chmod(0o755)
    return str(script), lambda: len(log_file.read_text()) if log_file.exists() else 0


def works(compiled: Compiled, cap: float) -> bool:
    scores = np.array([3.0], np.float32)
    compiled(scores, np.zeros(1, np.int32), 0, 0)
    return scores[0] == pytest.approx(cap * math.tanh(3 / cap), rel=1e-6)


@needs_compiler
def test_what_was_compiled_is_not_compiled_again(counting, tmp_path: Path) -> None:
    compiler, calls = counting
    first = compile_variant(SoftCap(2.0), folder=tmp_path / "k", compilers=[compiler])
    assert (first.address, calls()) != (0, 0)
    again = compile_variant(SoftCap(9.0), folder=tmp_path / "k", compilers=[compiler])
    assert (again.path, again.address, calls()) == (first.path, first.address, 1)
    assert again.source == first.source
    assert works(first, 2.0) and works(again, 9.0)
    compile_variant(SoftCap(2.0, ALiBi(4)), folder=tmp_path / "k", compilers=[compiler])
    assert calls() == 2
    assert len(list((tmp_path / "k").iterdir())) == 2


@needs_compiler
@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:900] + b"\1" + b[901:]]
)
def test_a_damaged_file_is_compiled_again(counting, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    compiler, calls = counting
    path = compile_variant(SoftCap(2.0), folder=tmp_path / "a", compilers=[compiler]).path
    whole = path.read_bytes()
    broken = tmp_path / "b" / path.name  # elsewhere: the first is mapped into this process
    broken.parent.mkdir()
    broken.write_bytes(damage(whole))
    compiled = compile_variant(SoftCap(2.0), folder=tmp_path / "b", compilers=[compiler])
    assert (compiled.path, calls()) == (broken, 2)
    assert works(compiled, 2.0)
    assert len(broken.read_bytes()) == len(whole)


@needs_compiler
def test_processes_may_compile_the_same_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, numpy as np\n"
        "from dovetail.ops.template import SoftCap, compile_variant\n"
        "c = compile_variant(SoftCap(2.0), folder=pathlib.Path(sys.argv[1]))\n"
        "s = np.array([3.0], np.float32)\n"
        "c(s, np.zeros(1, np.int32), 0, 0)\n"
        "print(s[0])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "k")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=100)[0].strip() for p in running]
    assert [p.returncode for p in running] == [0, 0]
    assert len(set(said)) == 1 and float(said[0]) == pytest.approx(2 * math.tanh(1.5))
    assert [p.suffix for p in (tmp_path / "k").iterdir()] == [".so"]


@needs_compiler
def test_kernels_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))
    assert compile_variant(SoftCap(2.0)).path.parent == tmp_path / "kernels"


def test_without_a_compiler_the_error_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        compile_variant(SoftCap(2.0), folder=tmp_path, compilers=["no-such-compiler", "nor-this"])
    assert "looked for no-such-compiler, nor-this" in str(caught.value)
    assert "the torch reference for this variant instead" in str(caught.value)
    assert isinstance(caught.value, template.TemplateError) and isinstance(caught.value, DovetailError)


@needs_compiler
def test_a_failing_compiler_is_told_of_or_passed_over(tmp_path: Path) -> None:
    failing, silly = tmp_path / "failing", tmp_path / "silly"
    failing.write_text("#!/bin/sh\necho no licence today >&2\nexit 3\n")
    silly.write_text('#!/bin/sh\nwhile [ "$#" -gt 0 ]; do [ "$1" = -o ] && echo junk >"$2"; shift; done\n')
    for script in (failing, silly):
        script.chmod(0o755)
    with pytest.raises(CompileError, match="exit status 3, no licence today") as caught:
        compile_variant(SoftCap(2.0), folder=tmp_path / "k", compilers=[str(failing), str(silly)])
    assert f"{silly}: " in str(caught.value)
    compiled = compile_variant(SoftCap(2.0), folder=tmp_path / "k", compilers=[str(failing), str(silly), COMPILER])
    assert works(compiled, 2.0)


@needs_compiler
def test_where_nothing_can_be_kept_it_still_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        compiled = compile_variant(SoftCap(2.0), folder=tmp_path / "file" / "kernels")
    assert works(compiled, 2.0) and not compiled.path.exists()


@needs_compiler
def test_what_is_kept_needs_no_compiler(tmp_path: Path) -> None:
    path = compile_variant(SoftCap(2.0), folder=tmp_path).path
    compiled = compile_variant(SoftCap(3.0), folder=tmp_path, compilers=["no-such-compiler"])
    assert compiled.path == path and works(compiled, 3.0)


@needs_compiler
def test_what_another_processor_compiled_is_left_alone(
    counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, calls = counting
    compile_variant(SoftCap(2.0), folder=tmp_path / "k", compilers=[compiler])
    monkeypatch.setattr(machine, "processor", lambda: "another")
    compile_variant(SoftCap(2.0), folder=tmp_path / "k", compilers=[compiler])
    assert calls() == 2


@needs_compiler
def test_kept_files_of_another_system_are_compiled_again(counting, tmp_path: Path) -> None:
    compiler, calls = counting
    path = compile_variant(SoftCap(2.0), folder=tmp_path / "a", compilers=[compiler]).path
    foreign = tmp_path / "b" / path.name
    foreign.parent.mkdir()
    foreign.write_bytes(b"no library" + hashlib.sha256(b"no library").digest())
    compiled = compile_variant(SoftCap(2.0), folder=tmp_path / "b", compilers=[compiler])
    assert calls() == 2 and works(compiled, 2.0)


@needs_compiler
def test_arrays_of_another_kind_are_refused(kernels: Path) -> None:
    compiled = compile_variant(Variant(), folder=kernels)
    scores, k_pos = np.zeros(4, np.float32), np.zeros(4, np.int32)
    for wrong in ((scores.astype(np.float64), k_pos), (scores, k_pos[:3]), (scores, k_pos.astype(np.int64))):
        with pytest.raises(ValueError, match="must be"):
            compiled(*wrong, 0, 0)
