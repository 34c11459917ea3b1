"""Summaries of pages, their scores and the choice among them: the definitions, and the native operations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail import LLM, SamplingParams
from dovetail.ops.cpu import emulated, isas
from dovetail.ops.pages import (
    KINDS,
    codes,
    decoded,
    landmark_scores,
    landmarks,
    num_vectors,
    outliers,
    packed,
    page_scores,
    pick,
    summary,
    unpacked,
)

SEEDS = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_the_bound_is_above_every_product(seed: int, chunk: int, chunks: int, heads: int, group: int) -> None:
    keys, q = random(seed, 5, chunk * chunks, heads, 8).double(), random(seed + 1, 2, heads * group, 8).double()
    scores = page_scores(q, summary(keys, "bound", chunk).expand(2, -1, -1, -1, -1), "bound")
    products = torch.einsum("rhgd,pthd->rhgpt", q.unflatten(1, (heads, group)), keys)
    assert (scores >= products.amax((2, 4)) - 1e-12).all()
    whole = page_scores(q, summary(keys, "bound", chunk * chunks).expand(2, -1, -1, -1, -1), "bound")
    assert (scores <= whole + 1e-12).all()  # the smaller the chunks, the tighter
    if chunk == 1:  # exact
        torch.testing.assert_close(scores, products.amax((2, 4)))


@settings(deadline=None)
@given(SEEDS, st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_a_group_scores_as_its_best_query_does(seed: int, kind: str, tokens: int, heads: int, group: int) -> None:
    """Opposite queries of a group do not cancel."""
    keys, q = random(seed, 5, tokens, heads, 8).double(), random(seed + 1, 2, heads * group, 8).double()
    q[:, -1] = -q[:, 0]
    found = summary(keys, kind, tokens).expand(2, -1, -1, -1, -1)
    scores = page_scores(q, found, kind)
    each = [page_scores(x, found, kind) for x in q.unflatten(1, (heads, group)).unbind(2)]
    torch.testing.assert_close(scores, torch.stack(each).amax(0))


@settings(deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 40))
def test_pages_of_one_token_are_chosen_by_their_products(seed: int, tokens: int, count: int) -> None:
    keys, q = random(seed, tokens, 1, 2, 8), random(seed + 1, 1, 2, 8)
    scores = page_scores(q, summary(keys, "bound", 1)[None], "bound")
    chosen = pick(scores, torch.tensor([tokens]), torch.tensor([count]))[0]
    for head in range(2):
        products = keys[:, 0, head].double() @ q[0, head].double()
        best = products.topk(min(count, tokens)).indices
        assert [p for p in chosen[head].tolist() if p >= 0] == sorted(best.tolist())


@settings(deadline=None)
@given(SEEDS, st.integers(1, 20), st.integers(1, 3))
def test_mean_and_deviation_are_the_tokens(seed: int, chunk: int, chunks: int) -> None:
    keys = random(seed, 3, chunk * chunks, 2, 8).double()
    found = summary(keys, "mean_std", chunk)
    assert found.shape == (3, 2, 2 * chunks, 8)
    for c in range(chunks):
        mean, std = found[:, :, 2 * c], found[:, :, 2 * c + 1]
        some = keys[:, c * chunk : (c + 1) * chunk]
        torch.testing.assert_close(mean, some.mean(1))
        deviation = ((some - some.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
        torch.testing.assert_close(std, 4 / 8**0.5 * deviation)


chunked = st.sampled_from([(1, 1), (4, 2), (8, 8), (6, 3), (4, 1)])  # tokens of a page and of a chunk


@settings(deadline=None)
@given(SEEDS, chunked, st.integers(1, 3), st.integers(1, 4), st.data())
def test_pages_score_by_their_best_landmark_by_brute_force(
    seed: int, sizes: tuple[int, int], heads: int, group: int, data: Any
) -> None:
    (tokens, chunk), pages = sizes, 5
    keys, q = random(seed, pages, tokens, heads, 8).double(), random(seed + 1, 2, heads * group, 8).double()
    competing = torch.rand(2, heads, pages, generator=torch.Generator().manual_seed(seed)) < 0.7
    found = landmarks(keys, chunk)
    assert found.shape == (pages, heads, tokens // chunk, 8)
    scores = landmark_scores(q, found.expand(2, -1, -1, -1, -1), competing)
    for row, head in itertools.product(range(2), range(heads)):
        means = keys[:, :, head].unflatten(1, (-1, chunk)).mean(2)
        best = torch.zeros(pages).double()
        for g in range(group):
            exps = (means @ q[row, head * group + g] / 8**0.5).exp() * competing[row, head][:, None]
            best = torch.maximum(best, (exps / exps.sum().clamp_min(1e-300)).amax(1))
        torch.testing.assert_close(scores[row, head].exp(), best)


@settings(deadline=None)
@given(SEEDS, chunked)
def test_a_landmark_bounds_the_weight_of_its_chunk_from_below(seed: int, sizes: tuple[int, int]) -> None:
    tokens, chunk = sizes
    keys, q = random(seed, 3, tokens, 1, 8).double(), random(seed + 1, 8).double()
    mass = (keys[:, :, 0] @ q / 8**0.5).exp().unflatten(1, (-1, chunk)).sum(2)
    assert (chunk * (landmarks(keys, chunk)[:, 0] @ q / 8**0.5).exp() <= mass * (1 + 1e-12)).all()


@settings(deadline=None)
@given(SEEDS, chunked, st.integers(1, 3), st.integers(0, 9))
def test_outliers_are_the_pages_of_the_tokens_least_like_their_landmark(
    seed: int, sizes: tuple[int, int], heads: int, count: int
) -> None:
    tokens, chunk = sizes
    keys = random(seed, 7, tokens, heads, 8).double()
    keys[2] = keys[2, :1]  # identical keys: cosine 1
    found = outliers(keys.numpy(), chunk, count)
    for head in range(heads):
        alike = []
        for page in keys[:, :, head]:
            chunks = page.unflatten(0, (-1, chunk))
            alike.append(min(float(torch.cosine_similarity(c, c.mean(0, True)).min()) for c in chunks))
        worst = sorted(range(7), key=lambda p: (round(alike[p] * 2**20), p))[:count]
        assert found[head].nonzero()[0].tolist() == sorted(worst)


def test_identical_keys_make_exact_landmarks_and_no_outliers_but_the_first() -> None:
    keys = random(0, 6, 1, 2, 8).expand(-1, 8, -1, -1)
    torch.testing.assert_close(landmarks(keys, 4), keys[:, :2].transpose(1, 2))
    assert outliers(keys.numpy(), 4, 2).tolist() == [[True, True, *[False] * 4]] * 2


def test_nan_landmarks_never_win_and_do_not_spoil_the_others() -> None:
    keys, q = random(0, 4, 4, 1, 8), random(1, 1, 2, 8)
    keys[2, 1] = float("nan")
    everything, sound = torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([True, True, False, True])[None, None]
    found = landmarks(keys, 4)[None]
    assert torch.equal(landmark_scores(q, found, everything), landmark_scores(q, found, sound))
    assert outliers(keys.numpy(), 4, 1)[0].tolist() == [False, False, True, False]


numbers = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, float("-inf")])


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=12), st.data())
def test_the_best_pages_by_brute_force(scores: list[float], data: Any) -> None:
    eligible = data.draw(st.integers(0, len(scores)))
    count = data.draw(st.integers(0, len(scores) + 2))
    found = pick(torch.tensor(scores)[None, None], torch.tensor([eligible]), torch.tensor([count]))[0, 0].tolist()
    wanted = sorted(sorted(range(eligible), key=lambda i: (-scores[i], i))[:count])
    assert [p for p in found if p >= 0] == wanted


@settings(deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_larger_budgets_read_what_smaller_ones_do(seed: int, pages: int) -> None:
    scores, eligible = random(seed, 1, 2, pages), torch.tensor([pages])
    chosen = [pick(scores, eligible, torch.tensor([n])) for n in range(pages + 1)]
    for small, large in itertools.pairwise(chosen):
        for head in range(2):
            assert set(small[0, head].tolist()) - {-1} <= set(large[0, head].tolist())


@settings(deadline=None)
@given(SEEDS, st.integers(1, 20), st.integers(1, 3), st.integers(1, 4))
def test_codes_are_wrong_by_half_a_step_at_most(seed: int, tokens: int, heads: int, group: int) -> None:
    keys, q = random(seed, 5, tokens, heads, 8).double(), random(seed + 1, 2, heads * group, 8).double()
    found = codes(keys)
    assert found.shape == (5, heads, 3 + tokens, 8)
    assert set(found[:, :, 3:].unique().tolist()) <= {0, 1, 2, 3}
    back, parts, largest = decoded(found), found[:, :, 1], found[:, :, 2]
    step = parts * largest / 255  # [pages, KV heads, head_dim]
    lost = largest / 255 / 2 * 3  # of a range, whose third is rounded to 255ths
    assert ((back - keys.transpose(1, 2)).abs() <= (step / 2 + lost)[:, :, None] + 1e-12).all()
    scores = page_scores(q, found.expand(2, -1, -1, -1, -1), "codes")
    grouped = q.unflatten(1, (heads, group))
    products = torch.einsum("rhgd,phtd->rhgpt", grouped, back)
    # Half a byte's unit in each dimension, three times at most.
    unit = grouped.abs().amax(-1)[..., None] / 127 * largest[None, :, :, 0].transpose(1, 2)[:, :, None] / 2 * 3 * 8
    assert ((scores - products.amax((2, 4))).abs() <= unit.amax(2) + 1e-9).all()


def test_keys_without_a_range_are_themselves() -> None:
    keys = random(0, 2, 1, 2, 8).expand(-1, 16, -1, -1)
    assert torch.equal(decoded(codes(keys)), keys.transpose(1, 2))
    q = random(1, 1, 4, 8)
    scores = page_scores(q, codes(keys)[None], "codes")
    torch.testing.assert_close(scores, torch.einsum("rhgd,phd->rhgp", q.unflatten(1, (2, 2)), keys[:, 0]).amax(2))
    assert page_scores(q * 0, codes(keys)[None], "codes").count_nonzero() == 0


@settings(deadline=None)
@given(
    SEEDS, st.integers(1, 40), st.sampled_from(["float32", "float64", "bfloat16"]), st.sampled_from([3, 16, 24])
)
def test_packed_codes_are_the_same_again(seed: int, tokens: int, kind: str, dim: int) -> None:
    dtype = getattr(torch, kind)
    found = codes(random(seed, 4, tokens, 2, dim).to(dtype))
    vectors = num_vectors("codes", tokens, 0, dtype.itemsize)
    data = packed(found, torch.empty(1, 2, vectors, -(-dim // 16) * 16, dtype=dtype))
    assert torch.equal(unpacked(data, dim, tokens), found)


@pytest.mark.parametrize("kv", ["float32", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("block", [16, 48])
def test_native_codes_are_the_definition(tiny_model: Path, kv: str, block: int) -> None:
    if not isas():
        pytest.skip("the native kernels were not built")
    llm = LLM(
        tiny_model, use="quest:budget=144,skip_layers=0,score=codes", kv_cache_dtype=kv, block_size=block,
        kv_memory="64MiB",
    )  # fmt: skip
    llm.generate([[i * i % 250 for i in range(200)]], SamplingParams(temperature=0, max_tokens=9), progress=False)
    executor: Any = llm.engine.executor
    summaries, cache = llm.engine.seams.selector.summaries, executor.kv  # type: ignore[attr-defined]
    sealed = torch.arange(200 // block)
    for layer in range(2):
        got = summaries.data[layer * cache.pages_per_layer + sealed]
        keys = cache.keys(layer, sealed).to(got.dtype)
        found = unpacked(got, cache.head_dim, block)
        torch.testing.assert_close(found, codes(keys).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["bound", "mean_std"])
@pytest.mark.parametrize("kv", ["float32", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize(("block", "chunk"), [(16, 0), (32, 0), (8, 0), (16, 4), (32, 8), (48, 24)])
def test_native_summaries_are_the_definitions(
    tiny_model: Path, kind: str, kv: str, block: int, chunk: int
) -> None:
    if not isas():
        pytest.skip("the native kernels were not built")
    use = f"quest:budget=144,skip_layers=0,score={kind},chunk={chunk}"
    llm = LLM(tiny_model, use=use, kv_cache_dtype=kv, block_size=block)
    llm.generate([[i % 250 for i in range(200)]], SamplingParams(temperature=0, max_tokens=9), progress=False)
    executor: Any = llm.engine.executor
    summaries, cache = llm.engine.seams.selector.summaries, executor.kv  # type: ignore[attr-defined]
    assert summaries.program is not None
    sealed = torch.arange(200 // block)  # the last ones are summarised in the next step
    for layer in range(2):
        got = summaries.data[layer * cache.pages_per_layer + sealed]
        want = summary(cache.keys(layer, sealed).to(got.dtype), kind, chunk or block).to(got.dtype)
        loose = 0.01 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got[..., : cache.head_dim], want, rtol=loose, atol=1e-5)
        if kind == "bound":
            assert torch.equal(got[..., : cache.head_dim], want)


TEXT = [[(7 * i * i + i // 3) % 250 for i in range(n)] for n in (300, 40, 170)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def texts(model: Path, **options: Any) -> list[list[int]]:
    llm = LLM(model, dtype="float32", **options)
    found = [o.outputs[0].token_ids for o in llm.generate(TEXT, GREEDY, progress=False)]
    assert options.get("use") is None or llm.activity()["quest"] > 0
    llm.engine.check()
    return found


@pytest.mark.parametrize("isa", [*isas(), *emulated()])
@pytest.mark.parametrize(
    "use",
    [
        "quest:budget=64,skip_layers=0",
        "quest:budget=96,skip_layers=1,score=mean_std",
        "quest:budget=64,skip_layers=0,score=bound,chunk=4",
        "quest:budget=64,skip_layers=0,score=codes",
    ],
)
def test_every_instruction_set_reads_what_the_reference_reads(tiny_model: Path, isa: str, use: str) -> None:
    assert texts(tiny_model, use=use, kernels=isa) == texts(tiny_model, use=use, kernels="torch")


@pytest.mark.parametrize(
    ("kv", "block"), [("int8", 8), ("int4", 24), ("fp8", 24), ("float32", 24), ("float32", 8)]
)
def test_codes_choose_the_same_pages_in_every_layout(tiny_model: Path, kv: str, block: int) -> None:
    if not isas():
        pytest.skip("the native kernels were not built")
    options: dict[str, Any] = {
        "use": f"quest:budget={max(64, 3 * block)},skip_layers=0", "kv_cache_dtype": kv, "block_size": block,
    }  # fmt: skip
    assert texts(tiny_model, **options) == texts(tiny_model, kernels="torch", **options)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([1, 7, 33, 128]), st.integers(1, 3),
    st.sampled_from(["float32", "bf16", "fp8", "int8", "int4"]), st.sampled_from([16, 8]), st.booleans(),
)  # fmt: skip
def test_native_text_is_the_same_under_any_schedule(
    tiny_model: Path, tokens: int, seqs: int, kv: str, block: int, drafts: bool
) -> None:
    use = ["quest:budget=64,skip_layers=0"]
    alone = texts(tiny_model, use=use, kv_cache_dtype=kv, block_size=block)
    use += ["ngram:tokens=3,min_n=1,max_n=2"] if drafts else []
    llm = LLM(
        tiny_model, use=use, dtype="float32", kv_cache_dtype=kv, block_size=block, max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
    )  # fmt: skip
    found = [o.outputs[0].token_ids for o in llm.generate(TEXT, GREEDY, progress=False)]
    assert found == alone
