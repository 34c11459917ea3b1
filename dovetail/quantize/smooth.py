"""SmoothQuant: magnitude moves from rows of activations to weights (Xiao et al., 2211.10438, equation 4).

Input j of a linear layer is divided by s_j = max|x_j|^a / max|w_j|^(1 - a), and column j of its weight is
multiplied. What makes that input takes the division, so the function stays the same: the gain of a norm before q,
k, v, gate and up, rows of v_proj before o_proj, rows of up_proj before down_proj. Query heads that share a head of
v share its s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.host.lazy_torch import torch
from dovetail.ops.memory import rounded, widened
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.layer import Layer

if TYPE_CHECKING:
    from torch import Tensor

# Norms whose rows enter a site, where there are norms behind attention and MLP and where there are not.
_NORMS = {
    "qkv": ("input_layernorm", "input_layernorm"),
    "gate_up": ("post_attention_layernorm", "pre_feedforward_layernorm"),
}
_MAKERS = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}  # linear layers whose rows make the input of a site


@dataclass(frozen=True)
class Smoothed:
    """columns: by site, the s [K] that columns of its weights are multiplied by. rows: by full name of a linear
    layer, the s [N] that its outputs are divided by. tensors: norms and biases that changed, by full name."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def weight(self, layer: Layer, site: str) -> Tensor:
        """The weights of a site, one below the other, in float32."""
        weights = [layer.weight(name) for name in layer.linears(site)]
        for name, weight in zip(layer.linears(site), weights, strict=True):
            if name in self.rows:
                weight /= self.rows[name][:, None]
        return torch.cat(weights) * self.columns[site] if site in self.columns else torch.cat(weights)


def smoothed(layer: Layer, most: Mapping[str, Tensor], options: Mapping[str, Any]) -> Smoothed:
    """What SmoothQuant makes of a block. most: by site, the largest magnitude of each input [K]. options: of the
    recipe, `smoothquant` (a, in (0, 1]) and `dtype` (of norms and biases in the checkpoint)."""
    found, strength, kind = Smoothed(), float(options["smoothquant"]), str(options["dtype"])
    for site, maker in _MAKERS.items():
        weight = layer.joined(site).abs().amax(0)
        own = _per_output(layer, site, most[site]), _per_output(layer, site, weight)
        factor = _factor(*own, strength)
        name = layer.prefix + maker
        found.rows[name] = factor
        found.columns[site] = factor if site == "down" else _per_head(layer, factor)
        config = layer.checkpoint.config
        if config.qkv_bias if site == "o" else config.mlp_bias:
            bias = layer.checkpoint.tensor(f"{name}.bias")
            found.tensors[bias.name] = StoredTensor.of(bias.name, bias.values() / factor.numpy())
    for site, names in _NORMS.items():
        factor = _factor(most[site], found.weight(layer, site).abs().amax(0), strength)
        name = f"{layer.prefix}{names[layer.checkpoint.config.post_norms]}.weight"
        gain = layer.checkpoint.tensor(name).values().astype(np.float32, copy=True)
        # The gain is rounded to what the checkpoint stores first, so the product is the same.
        offset = np.float32(layer.checkpoint.architecture.norm_offset)
        stored = widened(rounded(gain / factor.numpy() - offset, kind), kind) + offset
        exact = np.where(stored == 0, np.float32(1), gain / np.where(stored == 0, np.float32(1), stored))
        found.columns[site] = torch.from_numpy(exact)
        found.tensors[name] = StoredTensor.of(name, stored)
    return found


def _factor(most: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Equation 4, for the largest magnitudes of inputs and of columns.

    The largest s is 1, which changes no code: so no gain becomes too small for a file that stores it less 1.
    """
    found = most.clamp_min(1e-5) ** strength / weight.clamp_min(1e-5) ** (1 - strength)
    return found / found.max()


def _per_output(layer: Layer, site: str, values: Tensor) -> Tensor:
    """Largest magnitudes by input of o_proj -> by output of v_proj, over the query heads that share it."""
    c = layer.checkpoint.config
    if site == "down":
        return values
    return values.reshape(c.num_kv_heads, -1, c.head_dim).amax(1).flatten()


def _per_head(layer: Layer, factor: Tensor) -> Tensor:
    """Factors by output of v_proj -> by input of o_proj."""
    c = layer.checkpoint.config
    heads = factor.reshape(c.num_kv_heads, 1, c.head_dim)
    return heads.expand(-1, c.num_heads // c.num_kv_heads, -1).flatten()
