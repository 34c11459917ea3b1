"""The recorded program: a row's result depends on nothing but its own sequence, in every precision."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.sampling import SamplingParams
from dovetail.ops.cpu import emulated, isas
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.native import NativeExecutor
from tests.helpers.examples import examples
from tests.tiny import TinyCheckpoint, finish, make_request, run_all, run_staggered, tiny_config, tiny_engine

pytestmark = pytest.mark.skipif(not isas(), reason="the native kernels were not built")
BEST = isas()[0] if isas() else ""
NEW = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
PROMPTS = [tuple(i * 7 % 61 for i in range(40)), (1, 2, 3), tuple(i * 5 % 11 for i in range(150)), (9,)]
CHECKPOINT = TinyCheckpoint(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16))


def engine_of(kernels: str = BEST, kv: str = "bf16", page_size: int = 16, **changes):
    changes = {"pages": 64 * 16 // page_size, "threads": 2, "max_num_batched_tokens": 512, **changes}
    engine = tiny_engine(
        checkpoint=CHECKPOINT, dtype=changes.pop("dtype", "float32"), kernels=kernels, kv_cache_dtype=kv,
        page_size=page_size, **changes,
    )  # fmt: skip
    assert isinstance(engine.executor, NativeExecutor)
    return engine


@cache
def alone(kv: str, page_size: int, dtype: str, prompt: tuple[int, ...]) -> list[int]:
    engine = engine_of(kv=kv, page_size=page_size, dtype=dtype, enable_prefix_caching=False, threads=1)
    return run_all(engine, [prompt], GREEDY)[0]


prompts = st.lists(
    st.builds(lambda a, n: tuple((i * 3 + a) % 7 for i in range(n)), st.integers(0, 3), st.integers(1, 180)),
    min_size=1, max_size=5,
)  # fmt: skip


@given(
    prompts,
    st.sampled_from(
        [("float32", 16), ("bf16", 16), ("bf16", 32), ("int8", 8), ("int4", 16), ("fp8", 32), ("bf16", 1)]
    ),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
    st.sampled_from([3, 17, 64, 512]),
    st.booleans(),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
)
@examples(60)
def test_same_text_under_any_schedule(batch, store, dtype, drafts, budget, caching, arrivals) -> None:
    kv, page_size = store
    use = ["ngram:tokens=3,min_n=1,max_n=2"] if drafts else []
    engine = tiny_engine(
        *use, checkpoint=CHECKPOINT, dtype=dtype, kernels=BEST, kv_cache_dtype=kv, page_size=page_size,
        pages=480 // page_size, max_num_batched_tokens=budget, enable_prefix_caching=caching, threads=2,
    )  # fmt: skip
    requests = [make_request(engine, f"r{i}", p, GREEDY) for i, p in enumerate(batch)]
    run_staggered(engine, requests, arrivals)
    assert [r.output for r in requests] == [alone(kv, page_size, dtype, p) for p in batch]


@pytest.mark.parametrize("kernels", (*isas(), *emulated()))
@pytest.mark.parametrize(
    ("kv", "page_size"), [("float32", 16), ("bf16", 48), ("int8", 8), ("int4", 16), ("fp8", 32), ("bf16", 1)]
)
def test_logprobs_match_the_reference(kernels: str, kv: str, page_size: int) -> None:
    """The torch ops on the same KV type: what differs is rounding (and, in bf16, that of queries and weights)."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    want = scores(tiny_engine(
        checkpoint=CHECKPOINT, dtype="float32", kv_cache_dtype=kv, page_size=page_size, pages=1024 // page_size
    ), params)  # fmt: skip
    got = scores(engine_of(kernels, kv, page_size), params)
    if page_size % 16 or kv in ("float32", "bf16"):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 if kv == "float32" else 0.15)
        assert (got - want).abs().mean() < (5e-5 if kv != "bf16" else 0.03)
    else:  # rounded queries change codes of the next layers; tests/ops/test_coded_kv.py is exact
        exact = scores(engine_of(kernels, "float32", page_size), params)
        assert (got - want).abs().mean() < 0.25 * (exact - want).abs().mean()


def scores(engine, params) -> torch.Tensor:
    values = []
    for prompt in PROMPTS:
        engine.add(make_request(engine, f"r{len(prompt)}", prompt, params))
        while engine.busy:
            for progress in engine.step():
                values += [p.logprob for p in progress.prompt_logprobs]
    return torch.tensor(values)


@pytest.mark.parametrize("kernels", (*isas(), *emulated()))
def test_integer_text_is_the_same_on_every_instruction_set(kernels: str) -> None:
    """In float32, with float32 KV, the order of operations is the same everywhere."""
    want = run_all(engine_of("scalar", "float32"), PROMPTS, GREEDY)
    assert run_all(engine_of(kernels, "float32"), PROMPTS, GREEDY) == want


def test_a_shared_prefix_is_read_once() -> None:
    prefix = tuple(i * 7 % 61 for i in range(300))
    engine = engine_of(pages=128)
    first = make_request(engine, "first", prefix, GREEDY)
    engine.add(first)
    finish(engine)
    batch = [(*prefix, i, i + 1) for i in range(6)]
    requests = [make_request(engine, f"r{i}", p, GREEDY) for i, p in enumerate(batch)]
    for r in requests:
        engine.add(r)
    engine.step()
    stats = engine.executor.program.attention_stats()
    assert stats["shared_rows"] > 0
    assert stats["tokens_read"] <= stats["tokens_without_sharing"] - 5 * 256
    finish(engine)
    assert [r.output for r in requests] == [alone("bf16", 16, "float32", p) for p in batch]


def test_a_broken_row_ends_its_own_request_only() -> None:
    weight = CHECKPOINT.tensor("model.embed_tokens.weight")
    values = weight.values().copy()
    values[50] = float("nan")
    broken = TinyCheckpoint(replace(CHECKPOINT.config, tie_word_embeddings=False))
    broken.put(replace(weight, name="lm_head.weight"))
    broken.put(StoredTensor.of(weight.name, values))
    engine = tiny_engine(
        checkpoint=broken, dtype="float32", kernels=BEST, kv_cache_dtype="bf16", page_size=16, pages=32, threads=2
    )
    sick, well = (make_request(engine, n, p, GREEDY) for n, p in (("a", (1, 50, 3)), ("b", (1, 2, 3))))
    for r in (sick, well):
        engine.add(r)
    finish(engine)
    assert (sick.finish_reason, well.finish_reason) == ("error", "length")
    later = make_request(engine, "c", tuple(range(40)), GREEDY)  # on the sick request's pages
    engine.add(later)
    finish(engine)
    assert later.finish_reason == "length"
