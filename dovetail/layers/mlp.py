"""The gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dovetail.host.lazy_torch import torch
from dovetail.layers.loader import Loader
from dovetail.layers.norm import Norm, added
from dovetail.runtime.target import Fused, Target

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by the names of `core.model.ACTIVATIONS`
    "silu": lambda x: torch.nn.functional.silu(x),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": lambda x: torch.relu(x),
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
