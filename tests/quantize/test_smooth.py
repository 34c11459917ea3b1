"""SmoothQuant's moves do not change the function, and even out what is moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dovetail.models import open_checkpoint
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.calibration import SITES
from dovetail.quantize.layer import Layer
from dovetail.quantize.smooth import smoothed
from tests.helpers.hf_models import save_model

SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
TOKENS = torch.arange(40)[None] * 7 % 260


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {}), ("gemma3_text", {})],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_function_stays_the_same(kind: str, more: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Gains are rounded to what a file stores, and the columns behind them make up for it."""
    save_model(tmp_path / "m", kind, **SIZE, **more)
    checkpoint = open_checkpoint(tmp_path / "m")
    changed: dict[str, StoredTensor] = {}
    random = np.random.default_rng(0)
    for index in range(2):
        layer = Layer(checkpoint, index)
        most = {s: torch.from_numpy(2.0 ** random.uniform(-6, 6, layer.width(s))).float() for s in SITES}
        found = smoothed(layer, most, {"smoothquant": 0.5, "dtype": dtype})
        changed |= found.tensors
        for site in SITES:
            assert found.columns[site].min() > 0 and len(found.columns[site].unique()) > 8
            start, weight = 0, found.weight(layer, site).numpy()
            for name in layer.linears(site):
                rows = checkpoint.shape(f"{name}.weight")[0]
                changed[f"{name}.weight"] = StoredTensor.of(f"{name}.weight", weight[start : start + rows])
                start += rows
    before, after = (_logits(tmp_path / "m", tensors) for tensors in ({}, changed))
    assert float((after - before).norm() / before.norm()) < 2e-5


def _logits(path: Path, changed: dict[str, StoredTensor]) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    values = {}
    for name in checkpoint.names():
        offset = checkpoint.architecture.norm_offset if name.endswith("norm.weight") else 0.0
        stored = changed[name] if name in changed else checkpoint.tensor(name)
        values[name] = torch.from_numpy(stored.values() - np.float32(offset))
    model.load_state_dict(values, strict=False)
    with torch.inference_mode():
        return model(TOKENS).logits


def test_magnitudes_of_rows_and_columns_meet(tmp_path: Path) -> None:
    """With a strength of 1/2, max|x_j| / s_j is in the same proportion to max|w_j| s_j for all j (section 4)."""
    save_model(tmp_path / "m", **SIZE)
    layer = Layer(open_checkpoint(tmp_path / "m"), 0)
    most = {s: torch.linspace(0.1, 50, layer.width(s)) for s in SITES}
    found = smoothed(layer, most, {"smoothquant": 0.5, "dtype": "float32"})
    for site in ("qkv", "gate_up", "down"):
        ratio = most[site] / found.columns[site] / found.weight(layer, site).abs().amax(0)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0.0)
