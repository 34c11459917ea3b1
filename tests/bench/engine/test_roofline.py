"""The bytes of a step: what the engine keeps, counted another way."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from dovetail import LLM
from dovetail.bench.engine import roofline
from dovetail.ops.cpu import isas

native = pytest.mark.skipif(not isas(), reason="the native kernels were not built")


def linear_values(model: Path) -> int:
    """Values of the matrices of a checkpoint's products; the embedding is none."""
    with safe_open(str(model / "model.safetensors"), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(a[0] * a[1] for name, a in shapes.items() if len(a) == 2 and "embed" not in name)


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_weights_of_the_reference_are_its_parameters(tiny_model: Path, dtype: str, each: int) -> None:
    llm = LLM(tiny_model, threads=1, kernels="torch", dtype=dtype, kv_memory=1 << 20)
    assert roofline.weight_bytes(llm) == linear_values(tiny_model) * each
    assert "torch" in roofline.weights_kept(llm)


@native
def test_packed_weights_are_the_same_whoever_runs_them(tiny_model: Path) -> None:
    recorded = LLM(tiny_model, threads=1, kv_memory=1 << 20)
    by_operation = LLM(tiny_model, threads=1, kv_memory=1 << 20, use="sink-window")
    assert roofline.weight_bytes(recorded) == roofline.weight_bytes(by_operation)
    assert roofline.weight_bytes(recorded) >= linear_values(tiny_model) * 4
    assert roofline.weights_kept(recorded) == roofline.weights_kept(by_operation) == "packed"


@pytest.mark.parametrize(("kv", "each"), [("float32", 4), ("float64", 8)])
def test_a_token_of_context_adds_its_k_and_v(tiny_model: Path, kv: str, each: int) -> None:
    llm = LLM(tiny_model, threads=1, kernels="torch", kv_cache_dtype=kv, kv_memory=1 << 20)
    layers, heads, dim = 2, 2, 8
    grown = roofline.step_bytes(llm, 101) - roofline.step_bytes(llm, 1)
    assert grown == 100 * 2 * layers * heads * dim * each


def test_who_decides_what_is_read_is_named(tiny_model: Path) -> None:
    for use, says in (((), None), ("ngram", None), (["ngram", "sink-window"], "sink-window decides")):
        why = roofline.uncounted(LLM(tiny_model, threads=1, kv_memory=1 << 20, use=use))
        assert (why is None) == (says is None) and (says or "") in (why or "")
