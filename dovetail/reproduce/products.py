"""Products of rows and weights, as the engine's program runs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dovetail.bench.kernels.attention import Kernels
from dovetail.ops import cpu
from dovetail.ops.stored import StoredTensor


class Products:
    """Rows times some weights, one after the other, as one program."""

    def __init__(self, weights: Sequence[StoredTensor], activation: str, kernels: Kernels) -> None:
        n, k = weights[0].shape
        self.program = cpu.native().Program(kernels.isa, kernels.threads, False, False)
        self.shape, self.count = (n, k), len(weights)
        self.slots = self.program.slot(k, False), self.program.slot(n, False)
        for weight in weights:
            self.program.linear(
                *self.slots, [cpu.pack(weight, "float32", kernels.threads)], activation, norm=[], eps=0.0, bias=[],
                add=False, gate="", sampled=False,
            )  # fmt: skip

    def set(self, x: NDArray[np.float32], positions: Sequence[int]) -> None:
        """Rows [rows, K] and their positions in one sequence, ascending."""
        stop = positions[-1] + 1
        self.program.clear()
        self.program.add(positions[0], stop, [0] * stop, [], [0] * stop, 0, 0, rows=list(positions))
        self.program.run(0, 0)
        self.program.view(self.slots[0], len(x))[:, : self.shape[1]] = x

    def run(self) -> None:
        self.program.run(0, self.count)

    def results(self, rows: int) -> NDArray[np.float32]:
        """Of the last weight: [rows, N]."""
        found: NDArray[np.float32] = self.program.view(self.slots[1], rows)[:, : self.shape[0]]
        return found
