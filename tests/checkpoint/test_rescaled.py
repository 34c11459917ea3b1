"""A rescaled checkpoint computes what the original does, from other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hf_models import save_model

from dovetail.checkpoint.export import export
from dovetail.checkpoint.rescaled import Rescaled
from dovetail.models import open_checkpoint

KINDS = ("llama", "qwen2", "qwen3", "gemma3_text")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same(kind: str, tmp_path: Path) -> None:
    reference = save_model(tmp_path / "m", kind, **({"mlp_bias": True} if kind == "llama" else {}))
    checkpoint = open_checkpoint(tmp_path / "m")
    export(Rescaled(checkpoint, 3), tmp_path / "r", "float32")
    tokens = torch.arange(40)[None] * 7 % 260
    with torch.inference_mode():
        expected = reference.eval()(tokens).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "r").eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.1
    rescaled = open_checkpoint(tmp_path / "r")
    for name in checkpoint.names():
        a, b = checkpoint.tensor(name).values(), rescaled.tensor(name).values()
        moved = any(part in name for part in ("v_proj", "o_proj.w", "up_proj", "down_proj.w"))
        if moved or "model.layers" not in name:
            assert np.array_equal(a, b) != moved, name
    assert np.all(rescaled.tensor("model.layers.1.input_layernorm.weight").values() == 1)


def test_the_seed_decides(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    name = "model.layers.0.mlp.down_proj.weight"
    one, same, other = (Rescaled(checkpoint, seed).tensor(name).values() for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
