"""The native attention engine against a plain torch statement of it, and the invariants of its plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.core.seams import SlidingWindow, Variant
from dovetail.ops import cpu
from dovetail.ops.attention.paged import PagedAttention, Shape, State, merge_states
from dovetail.ops.cpu import isas
from dovetail.ops.template import ALiBi, BlockDiagonal, Sinks, SoftCap, with_tables
from dovetail.runtime.codes import quantize_int4, quantize_int8

pytestmark = pytest.mark.skipif(not isas(), reason="the native kernels were not built")
SHAPE = Shape(6, 2, 24, 4)
LOOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Case:
    """Random ragged requests over a pool of shuffled pages, some sharing a prefix."""

    def __init__(
        self, seed: int, lengths, rows, shape: Shape = SHAPE, dtype=torch.float32, shared: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        self.shape, self.lengths = shape, lengths
        size = shape.page_size
        counts = [-(-n // size) for n in lengths]
        ids = random.permutation(sum(counts) + 3).tolist()
        self.lists = []
        for i, count in enumerate(counts):
            keep = min(shared, lengths[i], lengths[0]) // size if i else 0
            first = self.lists[0] if i else []
            self.lists.append(first[:keep] + [ids.pop() for _ in range(count - keep)])
        generator = torch.Generator().manual_seed(seed)
        pages = sum(counts) + 3
        self.k = torch.randn(pages, size, shape.num_kv_heads, shape.head_dim, generator=generator).to(dtype)
        self.v = torch.randn(pages, size, shape.num_kv_heads, shape.head_dim, generator=generator).to(dtype)
        self.q = torch.randn(sum(rows), shape.num_heads, shape.head_dim, generator=generator)
        self.qo = [0, *np.cumsum(rows).tolist()]
        self.indptr = [0, *np.cumsum([len(x) for x in self.lists]).tolist()]
        self.last = [n - (max(1, -(-n // size)) - 1) * size for n in lengths]

    def run(self, layout: str = "NHD", variant: Variant | None = None, order=None, **how) -> State:
        k, v, lists = self.k, self.v, self.lists
        if order is not None:
            k, v = k[order], v[order]
            back = np.argsort(order)
            lists = [[int(back[p]) for p in x] for x in lists]
        if layout == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        engine = PagedAttention(self.shape, layout=layout, variant=variant, **how)
        engine.plan(self.qo, self.indptr, [p for x in lists for p in x], self.last)
        self.stats = engine.stats()
        return engine.run_state(self.q, k, v)

    def reference(self, variant: Variant | None = None) -> State:
        s, outs, lses = self.shape, [], []
        variant = with_tables(variant or Variant())
        head = torch.arange(s.num_heads)[:, None, None]
        for i, n in enumerate(self.lengths):
            q = self.q[self.qo[i] : self.qo[i + 1]].double().transpose(0, 1)
            k, v = (
                t[self.lists[i]].flatten(0, 1)[:n].double().repeat_interleave(s.num_heads // s.num_kv_heads, 1)
                for t in (self.k, self.v)
            )
            scores = q @ k.permute(1, 2, 0) * s.head_dim**-0.5
            q_pos, k_pos = torch.arange(n - q.shape[1], n)[:, None], torch.arange(n)
            readable = variant.mask(q_pos, k_pos, head) & (k_pos <= q_pos)
            scores = variant.score(scores, q_pos, k_pos, head).masked_fill(~readable, -torch.inf)
            lse = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
            outs.append((weights @ v.transpose(0, 1)).transpose(0, 1))
            lses.append(lse.T)
        return State(torch.cat(outs).float(), torch.cat(lses).float())


def same(a: State, b: State) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 4, 16, 48])
def test_matches_the_reference(isa: str, dtype: torch.dtype, page_size: int) -> None:
    for shape in (Shape(6, 2, 24, page_size), Shape(4, 4, 64, page_size), Shape(9, 1, 80, page_size)):
        case = Case(1, [1, 7, 64, 129, 300], [1, 3, 64, 1, 40], shape, dtype)
        got, want = case.run(isa=isa, threads=2), case.reference()
        torch.testing.assert_close(got.out, want.out, atol=LOOSE[dtype], rtol=LOOSE[dtype])
        torch.testing.assert_close(got.lse, want.lse, atol=LOOSE[dtype], rtol=LOOSE[dtype])


@given(
    st.lists(st.tuples(st.integers(1, 420), st.integers(1, 40)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([0, 128, 260]),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_no_plan_changes_a_bit(requests, threads, shared, seed) -> None:
    lengths, rows = [n for n, _ in requests], [min(n, r) for n, r in requests]
    case = Case(seed, lengths, rows, shared=shared)
    plain = case.run(threads=1, cascade=False, split=False)
    assert same(case.run(threads=threads), plain)
    assert same(case.run(threads=threads, cascade=False), plain)
    assert same(case.run(layout="HND", threads=threads), plain)
    order = np.random.default_rng(seed).permutation(len(case.k))
    assert same(case.run(order=order, threads=threads), plain)
    want = case.reference()
    torch.testing.assert_close(plain.out, want.out, atol=3e-6, rtol=3e-6)


def test_every_key_is_read_once_per_sequence_and_shared_ones_once() -> None:
    alone = Case(0, [300, 300, 300, 50], [1, 2, 1, 1], shared=256)
    alone.run(threads=2, cascade=False)
    assert alone.stats["tokens_read"] == alone.stats["tokens_without_sharing"] == 950
    alone.run(threads=2)
    assert alone.stats["tokens_read"] == 950 - 2 * 256  # the fourth is shorter than the first chunk
    assert alone.stats["shared_rows"] == 4


def test_a_prefix_shared_by_some_and_a_longer_one_by_fewer() -> None:
    shape = Shape(2, 1, 16, 16)
    case = Case(0, [600, 600, 600], [1, 1, 1], shape)
    first, second, third = case.lists
    second[:32], third[:16] = first[:32], first[:16]
    shared = case.run(threads=2)
    assert case.stats["tokens_read"] == 600 + 88 + (600 - 256)
    assert same(shared, case.run(threads=2, cascade=False))


VARIANTS = [
    SlidingWindow(20), SlidingWindow(300), SoftCap(5.0), ALiBi(6), Sinks(4, 16), BlockDiagonal(32),
    SoftCap(8.0, SlidingWindow(70)),
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
def test_variants(variant: Variant) -> None:
    case = Case(3, [5, 200, 333], [5, 1, 50])
    got, want = case.run(variant=variant, threads=2), case.reference(variant)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-5, rtol=1e-5)
    assert same(case.run(variant=variant, threads=1, split=False), got)


def test_rows_that_may_read_nothing_give_zero() -> None:
    class Never(Variant):
        def mask(self, q_pos, k_pos, head):
            return k_pos > q_pos

    state = Case(3, [5], [2]).run(variant=Never())
    assert not state.out.any()
    assert bool((state.lse == -torch.inf).all())
    case = Case(3, [5], [2])
    engine = PagedAttention(SHAPE)
    engine.plan([0, 1, 2], [0, 0, 2], case.lists[0], [0, 1], starts=[0, 4])
    state = engine.run_state(case.q, case.k, case.v)
    assert not state.out[0].any()
    assert torch.isfinite(state.lse[1]).all()


def test_tokens_beyond_a_sequence_are_never_read() -> None:
    case = Case(3, [5, 130], [1, 1])
    want = case.run()
    for i, n in enumerate(case.lengths):
        inside = n - (len(case.lists[i]) - 1) * SHAPE.page_size
        case.k[case.lists[i][-1], inside:] = float("nan")
        case.v[case.lists[i][-1], inside:] = float("nan")
    assert same(case.run(), want)


def test_states_of_parts_merge_to_the_whole() -> None:
    shape = Shape(4, 2, 32, 16)
    case = Case(2, [400], [1], shape)
    whole = case.run()
    engine = PagedAttention(shape)
    parts = []
    for pages, last in ((case.lists[0][:10], 16), (case.lists[0][10:], case.last[0])):
        engine.plan([0, 1], [0, len(pages)], pages, [last])
        parts.append(engine.run_state(case.q, case.k, case.v))
    a, b = parts
    for merged in (merge_states(a, b), merge_states(b, a)):
        torch.testing.assert_close(merged.out, whole.out, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(merged.lse, whole.lse, atol=1e-6, rtol=1e-6)
    empty = State(torch.zeros_like(a.out), torch.full_like(a.lse, -torch.inf))
    assert same(merge_states(a, empty), a)
    assert same(merge_states(empty, empty), empty)


def test_each_kv_head_reads_its_own_list() -> None:
    shape = Shape(4, 2, 16, 16)
    case = Case(5, [640], [1], shape)
    pages = case.lists[0]
    chosen = [[0, 3, 7, 39], [2, 5, 11, 39]]
    engine = PagedAttention(shape, threads=2)
    lists = [[pages[p] for p in c] for c in chosen]
    where = [[16 * p for p in c] for c in chosen]
    engine.plan([0, 1], [0, 4], lists, [16], positions=where, starts=[639])
    got = engine.run(case.q, case.k, case.v)
    for h, c in enumerate(chosen):
        k, v = (t[[pages[p] for p in c]].flatten(0, 1)[:, h] for t in (case.k, case.v))
        for g in range(2):
            weights = torch.softmax(case.q[0, 2 * h + g] @ k.T / 4, -1)
            torch.testing.assert_close(got[0, 2 * h + g], weights @ v, atol=1e-5, rtol=1e-5)
    engine.plan([0, 1], [0, 4], lists, [16], positions=where, starts=[100])  # page 7 is later, and so is 11
    early = engine.run(case.q, case.k, case.v)
    k, v = (t[[pages[p] for p in (0, 3)]].flatten(0, 1)[:, 0] for t in (case.k, case.v))
    torch.testing.assert_close(early[0, 0], torch.softmax(case.q[0, 0] @ k.T / 4, -1) @ v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(qo_indptr=[0, 1, 1]), "one entry more"),
        (dict(indptr=[0, 3]), "every list needs"),
        (dict(last_page_len=[0]), "must be in 1..4"),
        (dict(last_page_len=[5]), "must be in 1..4"),
        (dict(indices=[0, -1]), "at least 0"),
        (dict(indices=[[0, 1]] * 3), "give 1 or 2"),
        (dict(qo_indptr=[0, 9]), "more rows than keys"),
        (dict(indices=[[0, 1]], positions=[[0, 4]]), "starts"),
        (dict(starts=[]), "0 starts were given for 1 requests"),
        (dict(starts=[0, 0]), "2 starts were given for 1 requests"),
        (dict(starts=[-1]), "starts must be at least 0"),
        (dict(starts=[2**30]), "starts must be .* below 1073741824"),
        (dict(qo_indptr=[0, 2], starts=[2**30 - 1]), "beyond position 1073741823"),
        (dict(positions=[[0, -4]], starts=[7]), "positions must be at least 0"),
        (dict(positions=[[0, 2**30 - 3]], starts=[7]), "positions must be"),
        (dict(positions=[[0]], starts=[7]), r"positions of \[1\] pages .* lists of \[2\]"),
        (dict(positions=[[]], starts=[7]), r"positions of \[0\] pages"),
        (dict(indices=[[0, 1], [0, 1]], positions=[[0, 4, 8, 12]], starts=[7]), r"positions of \[4\] pages"),
        (dict(indices=[0, 2**31]), "indices must be"),
        (dict(indices=[0.0, 1.0]), "whole numbers, got .*float64"),
        (dict(indices=torch.zeros(2, dtype=torch.int64, device="meta")), "indices must be"),
        (dict(indptr=[[0, 2]]), "flat"),
        (dict(qo_indptr=[], indptr=[], last_page_len=[]), "one entry more"),
    ],
)
def test_wrong_plans_are_refused(change: dict, text: str) -> None:
    plan = dict(qo_indptr=[0, 1], indptr=[0, 2], indices=[0, 1], last_page_len=[4]) | change
    with pytest.raises(ConfigError, match=text):
        PagedAttention(SHAPE).plan(**plan)


def test_more_keys_than_can_be_counted_are_refused() -> None:
    with pytest.raises(ConfigError, match="request 0 has 1610612736 keys"):
        PagedAttention(Shape(6, 2, 24, 2**29)).plan([0, 1], [0, 3], [0, 1, 2], [2**29])


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda x: np.array(x, np.uint16)])
def test_lists_may_be_arrays(kind, many: bool) -> None:
    case = Case(6, [5, 150], [2, 7])
    flat = [p for x in case.lists for p in x]
    engine = PagedAttention(SHAPE)
    engine.plan(*map(kind, (case.qo, case.indptr, [flat, flat] if many else flat, case.last)))
    assert same(engine.run_state(case.q, case.k, case.v), case.run())
    engine.plan(case.qo, case.indptr, [kind(flat), kind(flat)], case.last, starts=kind([3, 143]))
    assert same(engine.run_state(case.q, case.k, case.v), case.run())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(threads=0), "threads must be a whole number from 1"),
        (dict(threads=-1), "threads"),
        (dict(threads=10**9), "threads"),
        (dict(threads=1.5), "threads"),
        (dict(isa="sse9"), f"isa 'sse9' cannot be used here; possible: {', '.join(isas())}"),
        (dict(shape=Shape(6, 0, 24, 4)), "num_kv_heads must be"),
        (dict(shape=Shape(6, 4, 24, 4)), "do not divide"),
        (dict(shape=Shape(6, 2, 24, 0)), "page_size must be"),
        (dict(shape=Shape(6, 2, 514, 4)), "head_dim must be even and at most 512"),
        (dict(shape=Shape(6, 2, 7, 4)), "head_dim must be even"),
    ],
)
def test_impossible_engines_are_refused(change: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PagedAttention(**(dict(shape=SHAPE) | change))


def test_without_the_native_kernels_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", lambda: None)
    with pytest.raises(ConfigError, match="were not built"):
        PagedAttention(SHAPE)


@pytest.mark.parametrize("window", [0, -1, True, 2.5, None])
def test_windows_of_nothing_are_refused(window) -> None:
    with pytest.raises(ConfigError, match="at least 1 key"):
        SlidingWindow(window)


@pytest.mark.parametrize("window", [2**30, 2**31 - 1, 2**31, 2**40])
def test_wide_windows_read_everything(window: int) -> None:
    case = Case(3, [5, 200], [5, 50])
    assert same(case.run(variant=SlidingWindow(window)), case.run())
    assert same(case.run(variant=SlidingWindow(20, SlidingWindow(window))), case.run(variant=SlidingWindow(20)))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_int8_pages_are_read_as_codes_times_scales(layout: str) -> None:
    case = Case(4, [5, 150], [2, 7])
    codes, scales = zip(*(quantize_int8(t) for t in (case.k, case.v)), strict=True)
    k, v, *by = (t.transpose(1, 2) if layout == "HND" else t for t in (*codes, *scales))
    engine = PagedAttention(SHAPE, layout=layout, threads=2)
    engine.plan(case.qo, case.indptr, [p for x in case.lists for p in x], case.last)
    got = engine.run(case.q, k, v, scales=(by[0], by[1]))
    case.k, case.v = (c.float() * s[..., None] for c, s in zip(codes, scales, strict=True))
    torch.testing.assert_close(got, case.reference().out, atol=3e-6, rtol=3e-6)
    with pytest.raises(ConfigError, match="scales are"):
        engine.run(case.q, k, v, scales=(by[0][:1], by[1]))
    with pytest.raises(ConfigError, match="int8 with scales"):
        engine.run(case.q, k.float(), v.float(), scales=(by[0], by[1]))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_int4_pages_are_read_as_minimum_plus_scale_times_code(layout: str) -> None:
    case = Case(4, [5, 150], [2, 7])
    codes, scales = zip(*(quantize_int4(t) for t in (case.k, case.v)), strict=True)
    k, v, *by = (t.transpose(1, 2) if layout == "HND" else t for t in (*codes, *scales))
    engine = PagedAttention(SHAPE, layout=layout, threads=2)
    engine.plan(case.qo, case.indptr, [p for x in case.lists for p in x], case.last)
    got = engine.run(case.q, k, v, scales=(by[0], by[1]))
    for name, c, s in zip("kv", codes, scales, strict=True):
        values = torch.stack([c & 15, c >> 4], -1).flatten(-2).float() * s[..., :1] + s[..., 1:]
        setattr(case, name, values)
    torch.testing.assert_close(got, case.reference().out, atol=3e-6, rtol=3e-6)
    with pytest.raises(ConfigError, match="scales are"):
        engine.run(case.q, k, v, scales=(by[0][..., 0], by[1][..., 0]))
    with pytest.raises(ConfigError, match="k is"):
        engine.run(case.q, k.repeat(1, 1, 1, 2), v, scales=(by[0], by[1]))


def test_wrong_tensors_are_refused() -> None:
    engine = PagedAttention(SHAPE)
    with pytest.raises(ConfigError, match="nothing is planned"):
        engine.run(torch.zeros(1, 6, 24), torch.zeros(2, 4, 2, 24), torch.zeros(2, 4, 2, 24))
    engine.plan([0, 1], [0, 2], [0, 1], [4])
    q, k = torch.zeros(1, 6, 24), torch.zeros(2, 4, 2, 24)
    with pytest.raises(ConfigError, match="q is"):
        engine.run(q[:, :5], k, k)
    with pytest.raises(ConfigError, match="k is"):
        engine.run(q, k[:1], k[:1])
    with pytest.raises(ConfigError, match="v is"):
        engine.run(q, k, k.half())
    for at, name in enumerate("qkv"):
        given = [q, k, k]
        given[at] = given[at].to("meta")
        with pytest.raises(ConfigError, match=f"{name} is on meta"):
            engine.run(*given)
    codes, by = k.to(torch.int8), torch.ones(2, 4, 2)
    with pytest.raises(ConfigError, match="scales is on meta"):
        engine.run(q, codes, codes, scales=(by, by.to("meta")))
    with pytest.raises(ConfigError, match="1 tensors of scales"):
        engine.run(q, codes, codes, scales=(by,))  # type: ignore[arg-type]
