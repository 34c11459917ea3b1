"""The Format of the native CPU kernels: weights stay as the checkpoint stores them, in the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.ops import cpu
from dovetail.ops.stored import StoredTensor


class Packed:
    """activations: "int8" quantizes rows to int8 per 32 values where the weight has blocks (relative error of a
    product about 0.5 %); "exact" multiplies float32 rows; bfloat16 weights take bfloat16 rows.
    """

    def __init__(self, dtype: torch.dtype, activations: str, isa: str, threads: int) -> None:
        self.dtype = dtype
        self.activations = activations
        self.isa = isa
        self.threads = threads

    def linear(self, weights: Sequence[StoredTensor], bias: Sequence[StoredTensor]) -> PackedLinear:
        parts = [cpu.pack(w, self.dtype, self.threads) for w in weights]
        values = torch.cat([t.dequantize(torch.float32) for t in bias]).tolist() if bias else []
        return PackedLinear(parts, values, self)

    def activation(self, parts: Sequence[Any]) -> str:
        formats = {p.format for p in parts}
        if formats <= {"F32", "F16", "BF16"}:
            return "bf16" if formats == {"BF16"} and self.dtype is torch.bfloat16 else "exact"
        mixed = formats & {"F32", "F16", "BF16"}
        return "exact" if mixed else self.activations


class PackedLinear:
    """y = x W^T + b. Called with a tensor it runs alone; a recorded program runs it among its other operations."""

    def __init__(self, parts: Sequence[Any], bias: list[float], fmt: Packed) -> None:
        self.parts = list(parts)
        self.bias = bias
        self.format = fmt
        self.activation = fmt.activation(parts)
        self.width_in = parts[0].k
        self.width_out = sum(p.n for p in parts)
        self._alone: tuple[Any, int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        program, source, target = self._program()
        rows = x.flatten(0, -2)
        program.set_rows(len(rows))
        program.run(0, 0)
        if len(rows):
            program.view(source, len(rows))[:, : self.width_in] = rows.float().numpy()
            program.run(0, 1)
        out = torch.from_numpy(program.view(target, len(rows))[:, : self.width_out].copy())
        return out.to(x.dtype).view(*x.shape[:-1], self.width_out)

    def _program(self) -> tuple[Any, int, int]:
        if self._alone is None:
            program = cpu.native().Program(self.format.isa, self.format.threads, (1, 1, 2), False, False)
            source, target = program.slot(self.width_in), program.slot(self.width_out)
            program.linear(
                source, target, self.parts, self.activation, norm=[], eps=0.0, bias=self.bias, add=False, gate="",
                sampled=False,
            )  # fmt: skip
            self._alone = program, source, target
        return self._alone
