from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.runtime.codes import CODES, E4M3, quantize_fp8, quantize_int8
from dovetail.runtime.store import TiledStore, store_type, tiles_type
from tests.helpers.examples import examples
from tests.tiny import break_token, finish, make_request, run_all, tiny_engine


@given(st.integers(0, 2**31), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
@examples(30)
def test_int8_is_within_half_a_step_per_token_and_head(seed: int, size: float) -> None:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(seed)) * size
    codes, scales = quantize_int8(x)
    assert codes.dtype == torch.int8
    assert ((codes * scales[..., None] - x).abs() <= scales[..., None] * 0.5001).all()
    alone, scale = quantize_int8(x[2:3, 1:2])
    assert torch.equal(alone[0, 0], codes[2, 1])
    assert torch.equal(scale[0, 0], scales[2, 1])


def test_int8_of_zeros_is_zero() -> None:
    codes, scales = quantize_int8(torch.zeros(2, 2, 4))
    assert not codes.any()
    assert not scales.any()


@given(st.integers(0, 2**31), st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e37]))
@examples(30)
def test_fp8_is_the_nearest_e4m3_per_token_and_head(seed: int, size: float) -> None:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(seed)) * size
    codes, scales = quantize_fp8(x)
    at = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).clamp(-448, 448)
    table = torch.from_numpy(E4M3)
    nearest = (at[..., None] - table[~table.isnan()]).abs().amin(-1)
    assert torch.equal((at - table[codes.long()]).abs(), nearest)
    alone, scale = quantize_fp8(x[2:3, 1:2])
    assert torch.equal(alone[0, 0], codes[2, 1])
    assert torch.equal(scale[0, 0], scales[2, 1])


def test_e4m3_is_torch_s() -> None:
    want = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(E4M3).nan_to_num(9999), want.nan_to_num(9999))


@pytest.mark.parametrize("dim", [2, 16, 24, 80, 128])
@pytest.mark.parametrize("kind", CODES)
def test_tiles_of_codes_hold_what_rows_of_codes_hold(kind: str, dim: int) -> None:
    shape = (2, 64, 3, dim)
    keys, values = tiles_type(kind).pair(shape, kind, 32)
    rows = store_type(kind)[0](shape, kind, "cpu")
    random = torch.Generator().manual_seed(dim)
    slots, x = torch.randperm(64, generator=random)[:40], torch.randn(40, 3, dim, generator=random)
    each = slots[:12].view(2, 1, 6).expand(2, 3, 6)
    for store in (keys, values, rows):
        store.write(1, slots, -x)
        store.write(1, slots, x)  # over what was there
        store.copy(np.arange(32), np.arange(32, 64))
    for store in (keys, values):
        assert not store.read(0, slots).any()
        assert torch.equal(store.read(1, slots[None]), rows.read(1, slots[None]))
        assert torch.equal(store.read_heads(1, each), rows.read_heads(1, each))
        page = store.pages(np.array([[3, 2, 3]]))[0]
        assert np.array_equal(page, rows.read(1, torch.arange(32)).numpy())  # page 3 is a copy of page 2


@pytest.mark.parametrize(
    ("name", "tolerance"), [("float64", 0), ("float32", 0), ("bf16", 0.01), ("fp8", 0.04), ("int8", 0.02)]
)
def test_every_store_writes_reads_and_copies(name: str, tolerance: float) -> None:
    kind, dtype = store_type(name)
    store = kind((3, 8, 2, 4), dtype, "cpu")
    values = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([1, 6, 3])
    store.write(1, slots, values)
    assert not store.read(0, slots).any()
    read = store.read(1, slots)
    assert (read.float() - values).abs().max() <= tolerance * values.abs().max()
    assert torch.equal(store.read(1, slots.view(3, 1))[:, 0], read)
    heads = store.read_heads(1, slots[None, None].expand(1, 2, 3))
    assert torch.equal(heads[0].transpose(0, 1), read)
    store.copy(np.array([6]), np.array([0]))
    assert torch.equal(store.read(1, torch.tensor([0])), read[1:2])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_copying_a_page_of_tiles_allocates_no_more_than_the_page(kind: str) -> None:
    layers, slots, heads, dim = 3, 64 * 16, 2, 24
    store = TiledStore.pair((layers, slots, heads, dim), kind, 16)[0]
    values = torch.randn(16, heads, dim, generator=torch.Generator().manual_seed(1)).to(getattr(torch, kind))
    old, new = torch.arange(80, 96), torch.arange(16, 32)
    for layer in range(layers):
        store.write(layer, old, values * (layer + 1))
    tracemalloc.start()
    store.copy(old.numpy(), new.numpy())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for layer in range(layers):
        assert torch.equal(store.read(layer, new), store.read(layer, old))
        assert torch.equal(store.read(layer, new), values * (layer + 1))
    assert layers * store.array[0].nbytes <= most < 4 * layers * store.array[0].nbytes


def test_unknown_types_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"int3.*float32, bf16, float16, fp8, int8"):
        store_type("int3")


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8"])
def test_text_with_a_narrow_kv_does_not_depend_on_the_schedule(name: str) -> None:
    prompts = [tuple((i * 5 + j) % 7 for i in range(20)) for j in range(3)]
    params = SamplingParams(temperature=0, max_tokens=20)
    whole = [run_all(tiny_engine(kv_cache_dtype=name), [p], params)[0] for p in prompts]
    chopped = run_all(
        tiny_engine("ngram", kv_cache_dtype=name, pages=24, max_num_batched_tokens=5), prompts, params
    )
    assert chopped == whole


def test_nan_left_in_a_page_by_one_request_does_not_reach_the_next() -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    want = run_all(tiny_engine(enable_prefix_caching=False), [(1, 2, 3)], params)
    engine = tiny_engine(enable_prefix_caching=False)
    engine.executor.kv.k.data.fill_(float("nan"))
    engine.executor.kv.v.data.fill_(float("nan"))
    assert run_all(engine, [(1, 2, 3)], params) == want


def test_a_request_whose_logits_are_nan_ends_with_an_error_and_the_others_go_on() -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    want = run_all(tiny_engine(), [(1, 2, 3)], params)[0]
    engine = tiny_engine()
    break_token(engine, 50)
    good, bad = make_request(engine, "good", (1, 2, 3), params), make_request(engine, "bad", (1, 50), params)
    for r in (bad, good):
        engine.add(r)
    finish(engine)
    assert bad.finish_reason == "error"
    assert good.output == want
