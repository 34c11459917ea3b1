"""The same function in other weights, whose values lie on no grid.

Weights that were quantized and dequantized lie on a grid, and quantizing them again looks better than it is. A
decoder leaves freedom that moves them off it:

- The weight of a norm goes into the columns of the linear layers that follow it, and becomes 1.
- A channel of v is multiplied, and the columns of o_proj that read it are divided, by one number.
- A row of up_proj is multiplied, and a column of down_proj is divided, by one number.

The numbers are random, between 1/2 and 2, from a seed.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.checkpoint import Checkpoint
from dovetail.core.errors import ModelError
from dovetail.ops.stored import StoredTensor

_NAME = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
_READERS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}  # of a norm's rows
Floats = NDArray[np.float32]


class Rescaled:
    """See `Checkpoint`: another one, rescaled. Tensors are float32, and are made when they are asked for."""

    def __init__(self, original: Checkpoint, seed: int) -> None:
        self.original, self.seed = original, seed
        self.path, self.architecture, self.config = original.path, original.architecture, original.config
        self.generation_config, self.bytes, self.files = original.generation_config, original.bytes, original.files
        self.names, self.shape, self.release = original.names, original.shape, original.release
        self.tokenizer = original.tokenizer

    def format(self, name: str) -> str:
        return "F32"

    def tensor(self, name: str) -> StoredTensor:
        stored = self.original.tensor(name)
        match = _NAME.fullmatch(name)
        if match is None:
            return StoredTensor.of(name, stored.values())
        prefix, layer, part = match[1], int(match[2]), match[3].split(".")
        if ".".join(part) in (_ATTENTION_NORM, self._mlp_norm()):
            return StoredTensor.of(name, np.ones(stored.shape, np.float32))
        values = stored.values()
        linear, weight = part[-2], part[-1] == "weight"
        if linear in _READERS and weight:
            norm = _ATTENTION_NORM if part[0] == "self_attn" else self._mlp_norm()
            values = values * self.original.tensor(prefix + norm).values()
        if linear in ("v_proj", "up_proj"):
            factors = self._factors(layer, linear)
            values = values * (factors[:, None] if weight else factors)
        elif linear == "down_proj" and weight:
            values = values / self._factors(layer, "up_proj")
        elif linear == "o_proj" and weight:
            values = values / self._of_heads(self._factors(layer, "v_proj"))
        if not np.isfinite(values).all():
            raise ModelError(f"{name}: has values that are not finite")
        return StoredTensor.of(name, values)

    def _mlp_norm(self) -> str:
        return "pre_feedforward_layernorm.weight" if self.config.post_norms else "post_attention_layernorm.weight"

    def _factors(self, layer: int, linear: str) -> Floats:
        """Of each output of a layer."""
        generator = np.random.default_rng([self.seed, layer, linear == "up_proj"])
        c = self.config
        count = c.intermediate_size if linear == "up_proj" else c.num_kv_heads * c.head_dim
        return (2.0 ** generator.uniform(-1, 1, count)).astype(np.float32)

    def _of_heads(self, factors: Floats) -> Floats:
        """Factors of the channels of v -> of the channels of attention's output, whose heads share those of v."""
        c = self.config
        heads = factors.reshape(c.num_kv_heads, 1, c.head_dim)
        return np.repeat(heads, c.num_heads // c.num_kv_heads, 1).reshape(-1)


_ATTENTION_NORM = "input_layernorm.weight"
