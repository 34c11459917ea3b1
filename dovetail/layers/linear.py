"""Formats of weights and their linear layers: dense in the compute type, and packed for the native kernels.

A Format makes linear layers from stored weights. A layer multiplies when it is called. Its `record` adds the same
as an operation to a program (`runtime.target`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ModelError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.host.lazy_torch import torch
from dovetail.ops import cpu
from dovetail.ops.activations import FAKE, rule
from dovetail.ops.memory import as_tensor
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.target import BARE, Fused, Target, Weights

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Protocol):
    """x [rows, in] -> [rows, out], as a call or as an operation of a program."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def record(self, to: Target, source: int, destination: int, fused: Fused = BARE) -> None: ...


class Unrecorded:
    """A layer of a Format that cannot record. Its model runs operation by operation."""

    def __init__(self, call: Callable[[Tensor], Tensor], weights: Sequence[StoredTensor]) -> None:
        """weights: of which the Format made it. They say what a product costs, as they are stored."""
        self.call = call
        rows, size = sum(w.shape[0] for w in weights), sum(w.nbytes for w in weights)
        self.weights = Weights(weights[0].shape[1], rows, size, "exact")

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)

    def record(self, to: Target, source: int, destination: int, fused: Fused = BARE) -> None:
        to.linear(source, destination, self.weights, fused)


class Dense:
    """The default Format: weights are expanded once, at load. Weights that share an input become one matrix."""

    def __init__(self, dtype: str, device: str = "cpu") -> None:
        """dtype: one of `ops.memory.ELEMENTS`. device: as torch names it."""
        self.dtype = dtype
        self.device = device

    def linear(self, weights: Sequence[StoredTensor], bias: Sequence[StoredTensor]) -> DenseLinear:
        agree([w.name for w in weights], [_rows_of(w) for w in weights])
        if weights[0].activation == "tender":
            raise ModelError(
                f"{weights[0].name}: Tender rounds rows by their position, which only the native kernels do here; "
                "leave out --kernels torch"
            )
        return DenseLinear(self._joined(weights), self._joined(bias) if bias else None, weights[0])

    def _joined(self, parts: Sequence[StoredTensor]) -> Tensor:
        return as_tensor(_joined([p.values(self.dtype) for p in parts]), self.dtype).to(self.device)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def agree(names: Sequence[str], rows: Sequence[Any]) -> None:
    """ModelError if weights of one product want different rows. rows: what each of them wants."""
    for name, wanted in zip(names[1:], rows[1:], strict=True):
        if wanted != rows[0]:
            raise ModelError(
                f"{names[0]} and {name} have the same input, but take its rows differently (activations, or order "
                "of columns); quantize them together"
            )


def _rows_of(weight: StoredTensor) -> tuple[str, dict[str, bytes]]:
    return weight.activation, {name: array.tobytes() for name, array in sorted(weight.shared.items())}


class DenseLinear:
    """y = x W^T + b, with W [out, in] and b [out]. x is rounded as `stored.activation` says."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stored: StoredTensor) -> None:
        self.weight = weight
        self.bias = bias
        self.rule = rule(stored)
        self._fake = FAKE.get(stored.activation)

    def __call__(self, x: Tensor) -> Tensor:
        if self._fake is not None:
            rows = x.reshape(-1, x.shape[-1]).float().cpu().numpy()
            x = torch.from_numpy(self._fake(rows, self.rule)).to(x).view(x.shape)
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def record(self, to: Target, source: int, destination: int, fused: Fused = BARE) -> None:
        """For a ledger only: the native kernels cannot multiply this."""
        n, k = self.weight.shape
        activation = "bf16" if self.weight.dtype is torch.bfloat16 else "exact"
        to.linear(source, destination, Weights(k, n, self.weight.nbytes, activation), fused)


class Packed:
    """The Format of the native kernels: weights stay as the checkpoint stores them, in the kernels' layout.

    activations: of weights whose checkpoint does not say it (`StoredTensor.activation`). "int8" quantizes rows to
    int8 per 32 values where the weight has blocks (relative error of a product about 0.5 %), "int16" to 16-bit
    integers (0.002 %); "exact" multiplies float32 rows; bfloat16 weights take bfloat16 rows.
    """

    def __init__(self, dtype: str, activations: str, isa: str, threads: int) -> None:
        """dtype: "float32" or "bfloat16"."""
        self.dtype = dtype
        self.activations = activations
        self.isa = isa
        self.threads = threads

    def linear(self, weights: Sequence[StoredTensor], bias: Sequence[StoredTensor]) -> PackedLinear:
        parts = [self.pack(w) for w in weights]
        agree([w.name for w in weights], [p.row_rule for p in parts])
        return self.layer(parts, bias)

    def pack(self, weight: StoredTensor) -> Any:
        return cpu.pack(weight, self.dtype, self.threads)

    def layer(self, parts: Sequence[Any], bias: Sequence[StoredTensor]) -> PackedLinear:
        """The layer of weights that are packed already."""
        values = _joined([t.values() for t in bias]).tolist() if bias else []
        return PackedLinear(parts, values, self)

    def activation(self, parts: Sequence[Any]) -> str:
        asked = parts[0].activation
        if asked not in ("", "int16"):
            return str(asked)
        formats = {p.format for p in parts}
        if formats <= PLAIN_FORMATS.keys():
            return "bf16" if formats == {"BF16"} and self.dtype == "bfloat16" else "exact"
        if formats & (PLAIN_FORMATS.keys() | {"F8"}):
            return "exact"
        wanted = asked or self.activations
        return wanted if wanted in ("exact", "int16") else "int8"


class PackedLinear:
    """y = x W^T + b, as a call or as an operation of a recorded program."""

    def __init__(self, parts: Sequence[Any], bias: Sequence[float], fmt: Packed) -> None:
        self.format = fmt
        width_out, size = sum(p.n for p in parts), sum(p.bytes for p in parts)
        self.weights = Weights(parts[0].k, width_out, size, fmt.activation(parts), tuple(parts), tuple(bias))
        self._alone: tuple[Any, int, int] | None = None

    def __call__(self, x: Any) -> Any:
        """x [..., in], a tensor or a float32 array -> the same [..., out]."""
        rows = x if isinstance(x, np.ndarray) else x.float().numpy()
        out = self._product(rows.reshape(-1, self.weights.width_in)).reshape(*x.shape[:-1], self.weights.width_out)
        return out if isinstance(x, np.ndarray) else torch.from_numpy(out).to(x.dtype)

    def _product(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        program, source, target = self._program()
        w = self.weights
        program.set_rows(len(rows))
        program.run(0, 0)
        if len(rows):
            program.view(source, len(rows))[:, : w.width_in] = rows
            program.run(0, 1)
        found: NDArray[np.float32] = program.view(target, len(rows))[:, : w.width_out].copy()
        return found

    def record(self, to: Target, source: int, destination: int, fused: Fused = BARE) -> None:
        to.linear(source, destination, self.weights, fused)

    def _program(self) -> tuple[Any, int, int]:
        if self._alone is None:
            w = self.weights
            program = cpu.native().Program(self.format.isa, self.format.threads, False, False)
            source, target = program.slot(w.width_in), program.slot(w.width_out)
            program.linear(
                source, target, list(w.packed), w.activation, norm=[], eps=0.0, bias=list(w.bias),
                add=False, gate="", sampled=False,
            )  # fmt: skip
            self._alone = program, source, target
        return self._alone
