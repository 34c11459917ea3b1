"""What techniques say that they keep beside K and V is what is allocated, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.config import key_bytes
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Geometry
from dovetail.core.technique import Beside
from dovetail.models import geometry
from dovetail.ops.cpu import isas, padded
from dovetail.techniques import technique
from tests.tiny import TinyCheckpoint, make_request, tiny_config, tiny_engine

CHECKPOINT = TinyCheckpoint(tiny_config(num_layers=3, head_dim=40))  # padded to 48, landmarks to 64
SHAPE = geometry(CHECKPOINT.config)
PAGES, SIZE = 24, 16
PROMPT = tuple(i * i * 7 % 61 for i in range(10 * SIZE + 5))
KERNELS = ["torch", *isas()[:1]]


def engine_of(spec: str, kernels: str, kv: str, checkpoint: TinyCheckpoint = CHECKPOINT) -> Any:
    """One that generates: its summaries exist, and its prompt is factorised."""
    tiered = kernels != "torch"
    engine = tiny_engine(
        spec, checkpoint=checkpoint, kernels=kernels, dtype="float32", kv_cache_dtype=kv, page_size=SIZE,
        pages=PAGES, num_kv_cells=PAGES * 3 if tiered else 0,
    )  # fmt: skip
    request = make_request(engine, "r", PROMPT, SamplingParams(temperature=0, max_tokens=16))
    engine.add(request)
    while request.num_output < 3:
        engine.step()
    return engine


def said(spec: str, kv: str, kernels: str, shape: Geometry = SHAPE) -> Beside:
    return technique(spec).beside(shape, SIZE, key_bytes(kv, 0 if kernels == "torch" else SIZE))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["float32", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize(
    "score", ["codes", "bound", "bound,chunk=4", "mean_std", "mean_std,chunk=8"], ids=lambda s: s.replace(",", " ")
)
def test_summaries_of_quest(score: str, kv: str, kernels: str) -> None:
    spec = f"quest:budget=64,skip_layers=1,score={score}"
    selector = engine_of(spec, kernels, kv).seams.selector
    assert selector.dropped > 0
    assert said(spec, kv, kernels) == Beside(page=selector.summaries.data.nbytes // PAGES)
    assert selector.summaries.data.nbytes % PAGES == 0


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["float32", "bf16", "int4"])
@pytest.mark.parametrize("partial", [0.5, 0.325, 1])
def test_partial_keys_of_infinigen(partial: float, kv: str, kernels: str) -> None:
    """20, 13 and 40 columns: native programs keep an even number."""
    spec = f"infinigen:alpha=2,budget=64,skip_layers=1,partial={partial}"
    selector = engine_of(spec, kernels, kv).seams.selector
    assert selector.dropped > 0
    native = getattr(selector, "_native", None)
    assert (native is None) == (kernels == "torch")
    data = (native or selector.keys).data
    columns = selector.keys.basis.shape[-1]
    even = columns + columns % 2 if native is None else columns  # what the reference keeps is not padded
    assert said(spec, kv, kernels) == Beside(page=data.nbytes * even // (columns * PAGES))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["float32", "bf16", "int4"])
@pytest.mark.parametrize(
    "form", ["rank=8,chunk=8", "rank=7,chunk=4,energy=0.999999", "rank=0,chunk=16", "rank=8,score=codes"]
)
@pytest.mark.parametrize("windows", [(), (12, None, None)], ids=["plain", "sliding"])
def test_landmarks_and_prompts_of_shadowkv(
    form: str, kv: str, kernels: str, windows: tuple[int | None, ...]
) -> None:
    spec = f"shadowkv:{form},budget=128,outliers=1"
    checkpoint = TinyCheckpoint(tiny_config(num_layers=3, head_dim=40, sliding_windows=windows))
    shape = geometry(checkpoint.config)
    engine = engine_of(spec, kernels, kv, checkpoint)
    prompts, kept = engine.seams.codec.prompts, engine.seams.selector.summaries
    prompt = prompts.of("r")
    held = len(PROMPT) // SIZE  # pages
    assert len(prompt.aliases) == held == prompt.outliers.shape[2]
    rows = 2 * prompt.outliers.nbytes + sum(k.coefficients.nbytes for k in prompt.keys.values())
    basis = sum(k.basis.nbytes for k in prompt.keys.values())
    angles, packed = 2 * padded(SHAPE.head_dim // 2) * 4, padded(SHAPE.head_dim) / SHAPE.head_dim  # natively
    request = basis + round(basis * packed)
    assert said(spec, kv, kernels, shape) == Beside(
        page=kept.data.nbytes // PAGES + rows // held + angles, request=request
    )
    assert kept.data.nbytes % PAGES == rows % held == 0
