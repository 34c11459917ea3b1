"""Rotary position embedding (RoFormer, section 3.4), half-split layout, with the published scalings.

For pair i of a head at position p, angle = p * f_i with f_i = theta^(-2i/d) before scaling:
(x_i, x_{i+d/2}) -> (x_i cos - x_{i+d/2} sin, x_{i+d/2} cos + x_i sin).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ModelError
from dovetail.core.model import RopeConfig
from dovetail.host.lazy_torch import torch

Floats = NDArray[np.float32]


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[Floats, float]:
    """Frequencies [head_dim / 2] (float32) and the factor on cos and sin that a scaling asks for."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # A power in float64, rounded once, is what transformers' power gives. numpy's float32 power differs by a bit.
    base: Floats = np.float32(1) / np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)
    p = rope.parameters
    if rope.kind in ("default", "dynamic"):  # dynamic is the identity within the trained context
        return base, 1.0
    if rope.kind == "linear":
        return base / p["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(base, p), 1.0
    if rope.kind == "yarn":
        return _yarn(base, rope)
    if rope.kind == "factors":
        factors: Floats = np.array(rope.factors, np.float32)
        return base / factors, 1.0
    if rope.kind == "none":
        return np.zeros_like(base), 1.0  # every angle is 0
    raise ModelError(f"rope scaling '{rope.kind}' is unknown")


def _llama3(base: Floats, p: Mapping[str, float]) -> Floats:
    """Llama 3.1: long waves divided by `factor`, short ones kept, a linear blend between."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * base / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clip(0, 1)
    return base / p["factor"] * (1 - blend) + base * blend


def _yarn(base: Floats, rope: RopeConfig) -> tuple[Floats, float]:
    """YaRN (arXiv 2309.00071), sections 3.2 to 3.4: interpolate by wavelength, and temper the logits."""
    p, half = rope.parameters, len(base)
    original, factor = p["original_max_position_embeddings"], p["factor"]

    def pair(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair(p.get("beta_fast") or 32.0), pair(p.get("beta_slow") or 1.0)
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((np.arange(half, dtype=np.float32) - low) / max(high - low, 0.001)).clip(0, 1)
    scaled = base / factor * ramp + base * (1 - ramp)
    return scaled, _yarn_temper(p, factor)


def _yarn_temper(p: Mapping[str, float], factor: float) -> float:
    def temper(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor"):
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return temper(p["mscale"]) / temper(p["mscale_all_dim"])
    return temper(1.0)


class Rope:
    """cos and sin for a batch. `rotates` is false where every angle is 0, so that nobody needs to apply them."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.freqs, self.temper = frequencies(rope, head_dim)
        self.rotates = rope.kind != "none"

    def angles(self, positions: Any, dtype: Any) -> tuple[Any, Any]:
        """positions [rows] -> cos, sin [rows, 1, head_dim / 2] in `dtype`, computed in float32 (float64 for
        float64). Arrays give arrays, and tensors tensors."""
        if isinstance(positions, np.ndarray):
            wide = np.promote_types(dtype, np.float32)
            angle = positions[:, None, None].astype(wide) * self.freqs.astype(wide)
            return (np.cos(angle) * self.temper).astype(dtype), (np.sin(angle) * self.temper).astype(dtype)
        like = torch.promote_types(dtype, torch.float32)
        angle = positions[:, None, None].to(like) * torch.from_numpy(self.freqs).to(positions.device, like)
        return (angle.cos() * self.temper).to(dtype), (angle.sin() * self.temper).to(dtype)


def rotate(x: Any, angles: tuple[Any, Any]) -> Any:
    """x [rows, heads, head_dim], an array or a tensor -> the same, rotated."""
    cos, sin = angles
    a, b = _halves(x)
    return _joined(a * cos - b * sin, b * cos + a * sin)


def unrotate(x: Any, angles: tuple[Any, Any]) -> Any:
    """The inverse of `rotate` for x [rows, heads, head_dim]: rotated back by the same angles, and divided by their
    factor."""
    cos, sin = angles
    a, b = _halves(x)
    square = cos * cos + sin * sin
    return _joined((a * cos + b * sin) / square, (b * cos - a * sin) / square)


def _halves(x: Any) -> tuple[Any, Any]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _joined(a: Any, b: Any) -> Any:
    return np.concatenate([a, b], -1) if isinstance(a, np.ndarray) else torch.cat([a, b], -1)
