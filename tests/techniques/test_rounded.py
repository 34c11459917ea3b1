"""Weights that are rounded while they are loaded."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.technique import compose
from dovetail.ops.cpu import isas
from dovetail.techniques import technique
from tests.tiny import TinyCheckpoint, run_all, tiny_config, tiny_engine

WIDE = TinyCheckpoint(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16))
FACT = frozenset({"weights that are not quantized"})
SPECS = ["w8a8-int8", "w8a8-fp8", "w4a16:group=32", "w4a8:group=32", "w8a8-int8:head=int8"]
PROMPTS = [(1, 2, 3, 4, 5), tuple(i * 7 % 61 for i in range(40)), (9,)]
PARAMS = SamplingParams(temperature=0, max_tokens=12)
KERNELS = ["torch", *isas()[:1]]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("spec", SPECS)
def test_all_linear_layers_are_rounded_and_text_depends_on_nothing_else(spec: str, kernels: str) -> None:
    options: dict[str, Any] = {
        "checkpoint": WIDE,
        "kernels": kernels,
        "dtype": "float32",
        "kv_cache_dtype": "float32",
    }
    together = tiny_engine(spec, max_num_batched_tokens=7, **options)
    texts = run_all(together, PROMPTS, PARAMS)
    steps = together.executor.calls  # type: ignore[attr-defined]
    assert technique(spec).activity(together.seams) == steps * (7 * 2 + ("head" in spec)) > 0
    assert texts == [run_all(tiny_engine(spec, **options), [p], PARAMS)[0] for p in PROMPTS]


def test_rounding_changes_the_text() -> None:
    """Else the test above would prove nothing."""
    options: dict[str, Any] = {"checkpoint": WIDE, "dtype": "float32", "kv_cache_dtype": "float32"}
    longer = SamplingParams(temperature=0, max_tokens=64)
    texts = [run_all(tiny_engine(*use, **options), PROMPTS, longer) for use in ((), *((s,) for s in SPECS[:4]))]
    assert all(texts[0] != other for other in texts[1:])


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="w4a16 needs weights that are not quantized"):
        compose(technique("w4a16"))


def test_two_formats_and_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="w4a16 and w8a8-int8 both fill the 'format' seam"):
        compose(technique("w4a16"), technique("w8a8-int8"), facts=FACT)
    with pytest.raises(ConfigError, match="group must be 32, 64 or 128, got 48"):
        technique("w4a16:group=48")
    with pytest.raises(ConfigError, match="head must be asis or int8, got 'no'"):
        technique("w8a8-fp8:head=no")
