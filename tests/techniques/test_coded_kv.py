"""Techniques over KV of codes: exact where they are exact, and the same text however a step is cut."""

from __future__ import annotations

from functools import cache

import pytest

from dovetail.core.sampling import SamplingParams
from dovetail.ops.cpu import isas
from dovetail.runtime.codes import CODES
from dovetail.runtime.native import NativeExecutor
from dovetail.techniques import MODULES, technique
from tests.runtime.test_residency import LOSSY
from tests.tiny import NEEDED, TinyCheckpoint, run_all, tiny_config, tiny_engine

LAYERS = 4
CHECKPOINT = TinyCheckpoint(tiny_config(hidden_size=64, intermediate_size=96, head_dim=24, num_layers=LAYERS))
PROMPTS = [tuple((i * i * k + i // 3) % 61 for i in range(n)) for k, n in ((7, 170), (5, 100), (3, 9))]
GREEDY = SamplingParams(temperature=0, max_tokens=20)
KERNELS = ["torch", *isas()[:1]]
TIGHT = 40 + LAYERS * 12  # cells: a layer of all pages, and what a step writes


def texts(use: str, kv: str, kernels: str, prompts: list[tuple[int, ...]], **changes: int) -> list[list[int]]:
    base: dict[str, int] = dict(pages=40, page_size=16, max_num_batched_tokens=512, num_kv_cells=40 * LAYERS)
    engine = tiny_engine(
        *([use] if use else []), checkpoint=CHECKPOINT, kernels=kernels, dtype="float32", kv_cache_dtype=kv,
        **(base | changes),
    )  # fmt: skip
    if kernels != "torch":
        assert isinstance(engine.executor, NativeExecutor)
    found = run_all(engine, prompts, GREEDY)
    if use in LOSSY:
        assert engine.seams.selector.dropped > 0  # type: ignore[attr-defined]
    return found


@cache
def alone(use: str, kv: str, kernels: str) -> list[list[int]]:
    """Each prompt by itself in one chunk, with room for everything."""
    return [texts(use, kv, kernels, [p])[0] if len(p) > 150 or not use else [] for p in PROMPTS]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", CODES)
@pytest.mark.parametrize("name", sorted(n for n in MODULES if technique(NEEDED.get(n, n)).exact_at))
def test_at_its_exact_setting_a_technique_gives_the_plain_text(name: str, kv: str, kernels: str) -> None:
    exact = f"{name}:" + ",".join(f"{k}={v}" for k, v in technique(name).exact_at.items())
    assert texts(exact, kv, kernels, PROMPTS, num_kv_cells=TIGHT) == alone("", kv, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", CODES)
@pytest.mark.parametrize("use", LOSSY)
def test_lossy_text_does_not_depend_on_steps_and_cells(use: str, kv: str, kernels: str) -> None:
    want = alone(use, kv, kernels)[0]
    found = texts(use, kv, kernels, PROMPTS, num_kv_cells=TIGHT, max_num_batched_tokens=33, threads=2)
    assert found[0] == want


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", CODES)
def test_a_shared_prefix_and_drafts_change_no_text(kv: str, kernels: str) -> None:
    longer = [(*PROMPTS[0], *more) for more in ((), (1, 2), (3,) * 20)]
    want = [texts("", kv, kernels, [p])[0] for p in longer]
    assert texts("ngram:tokens=3,min_n=1,max_n=2", kv, kernels, longer, max_num_batched_tokens=64) == want
