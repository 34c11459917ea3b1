"""The gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dovetail.layers.loader import Loader
from dovetail.layers.norm import Norm, added
from dovetail.runtime.target import Fused, Target

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by the names of `core.model.ACTIVATIONS`
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


class MLP:
    """y = down(act(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, load: Loader, prefix: str) -> None:
        c = load.config
        self.gate_up = load.linear(f"{prefix}.gate_proj", f"{prefix}.up_proj", bias=c.mlp_bias)
        self.down = load.linear(f"{prefix}.down_proj", bias=c.mlp_bias)
        self.activation, self.width = c.hidden_act, c.intermediate_size

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, width], normed -> [rows, width]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)

    def record(self, to: Target, norm: Norm, post: Norm | None) -> None:
        """Record x += post(mlp(norm(x))) on the program's buffers."""
        gated = to.slot("gated", self.width)
        self.gate_up.record(to, to.x, gated, Fused(norm=norm, gate=self.activation))
        added(to, gated, self.down, post)
