"""What techniques count: pages left unread, by the layers that choose."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.sampling import SamplingParams
from dovetail.ops.cpu import isas
from dovetail.techniques import technique
from tests.tiny import TinyCheckpoint, make_request, run_all, tiny_config, tiny_engine

LAYERS = 4
PROMPT, NEW = tuple(i * i * 7 % 61 for i in range(150)), 12
PARAMS = SamplingParams(temperature=0, max_tokens=NEW)
KERNELS = ["torch", *isas()[:1]]


def engine_of(spec: str, kernels: str, *windows: int | None) -> Any:
    checkpoint = TinyCheckpoint(tiny_config(num_layers=LAYERS, sliding_windows=windows))
    return tiny_engine(
        spec, checkpoint=checkpoint, kernels=kernels, dtype="float32", kv_cache_dtype="float32", page_size=16,
        pages=16, num_kv_cells=16 * LAYERS if kernels != "torch" else 0,
    )  # fmt: skip


SPARSE = {
    "quest": "quest:budget=64,skip_layers=0",
    "shadowkv": "shadowkv:rank=8,budget=96,outliers=2",
    "sink-window": "sink-window:sink=4,window=20",
    "infinigen": "infinigen:alpha=1e9,budget=64,skip_layers=1",
}
ROOMY = {
    "quest": "quest:budget=256,skip_layers=0",
    "shadowkv": "shadowkv:rank=8,budget=256,outliers=2",
    "sink-window": "sink-window:sink=4,window=256",
    "infinigen": "infinigen:alpha=inf,budget=256,skip_layers=1",
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", SPARSE)
def test_what_is_left_unread_is_counted_where_the_first_layers_slide(name: str, kernels: str) -> None:
    """Layers with a window of their own choose nothing; what is counted is what a layer without one leaves out."""
    counts = []
    for windows in ((12, 12, None, None), (12, None, 12, None), ()):
        engine = engine_of(SPARSE[name], kernels, *windows)
        run_all(engine, [PROMPT], PARAMS)
        counts.append(technique(SPARSE[name]).activity(engine.seams))
    assert all(counts)
    layers = [2, 2, 3] if name == "infinigen" else [1, 1, 1]  # which chooses so many in each layer by itself
    each = sum(left_unread(name, p) for p in range(len(PROMPT), len(PROMPT) + NEW - 1))
    assert counts == [n * each for n in layers]


def left_unread(name: str, position: int) -> int:
    """Pages that one head of a row leaves unread."""
    if name == "sink-window":
        return (position + 1 - 20) // 16 - 1
    return position // 16 + 1 - {"quest": 4, "shadowkv": 6, "infinigen": 4}[name]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ROOMY)
@pytest.mark.parametrize("windows", [(), (12, 12, None, None)], ids=["plain", "sliding"])
def test_nothing_is_counted_where_the_budget_covers_the_context(
    name: str, kernels: str, windows: tuple[int | None, ...]
) -> None:
    engine = engine_of(ROOMY[name], kernels, *windows)
    request = make_request(engine, "r", PROMPT, PARAMS)
    engine.add(request)
    while engine.busy:
        engine.step()
    assert request.num_output == NEW
    assert technique(ROOMY[name]).activity(engine.seams) == 0
