"""A target that makes no program. It adds up what recorded operations cost, and says which of them are native."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dovetail.core.cost import Cost, Load, Operation
from dovetail.core.seams import Geometry, SlidingWindow, Variant
from dovetail.ops.rope import Rope
from dovetail.ops.skew import TurnedKeys
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.kv import KV
from dovetail.runtime.model import Model
from dovetail.runtime.target import BARE, Fused, Normed, PageProgram, Turning, Weights

DEVICE = "device"  # the tier that a model's weights and KV lie in
# Of products with such rows of activations.
ARITHMETIC = {
    "exact": "float32", "bf16": "bf16", "int8": "int8", "int16": "int8", "int8-token": "int8",
    "fp8-token": "bf16", "atom": "int8", "tender": "int8",
}  # fmt: skip


class Ledger:
    """Operations of a program by layer, each with its cost (`core.cost`).

    kv_token_bytes: bytes of K and V of one token in one layer. Operations of techniques (summaries, guesses) state
    their bytes if these follow from the load. Which pages a row reads is known only after it has run, so attention
    states the cost of reading everything.
    """

    def __init__(self, geometry: Geometry, width: int, kv_token_bytes: float) -> None:
        self.geometry = geometry
        self.kv_token_bytes = kv_token_bytes
        self.operations: list[Operation] = []
        self.variants: list[Variant] = []  # of attention, each once
        self.layer = -1  # the layer of the operations that come next
        self._names: dict[tuple[str, int], int] = {}
        self._ropes: list[Rope] = []
        self._x = self.slot("x", width)
        self._attended = self.slot("attended", geometry.num_heads * geometry.head_dim)

    @property
    def x(self) -> int:
        return self._x

    @property
    def attended(self) -> int:
        return self._attended

    @property
    def program(self) -> PageProgram:
        raise TypeError("a ledger runs nothing, so nothing can be asked of its program")

    def slot(self, name: str, width: int, sampled: bool = False) -> int:
        return self._names.setdefault((name, width), len(self._names))

    def note(self, name: str, cost: Callable[[Load], Cost], native: bool = True) -> None:
        """Add an operation."""
        self.operations.append(Operation(name, self.layer, cost, native))

    def embed(self, stored: StoredTensor, scale: float) -> None:
        row = stored.nbytes / stored.shape[0]
        self.note("embed", lambda load: Cost(bytes={DEVICE: load.rows * row}))

    def angles(self, rope: Rope) -> None:
        if rope not in self._ropes:
            self._ropes.append(rope)
            n = len(rope.freqs)
            self.note("angles", lambda load: Cost({"float32": 4.0 * n * load.rows}))

    def linear(self, source: int, destination: int, weights: Weights, fused: Fused = BARE) -> None:
        size, each = weights.bytes, 2.0 * weights.width_in * weights.width_out
        arithmetic = ARITHMETIC[weights.activation]
        planes = 2 if weights.activation == "int16" else 1  # of bytes

        def cost(load: Load) -> Cost:
            rows = load.sampled if fused.sampled else load.rows
            return Cost({arithmetic: planes * each * rows}, {DEVICE: size if rows else 0.0})

        self.note("linear", cost, weights.native)

    def norm_add(self, source: int, destination: int, norm: Normed) -> None:
        n = len(norm.values)
        self.note("norm_add", lambda load: Cost({"float32": 5.0 * n * load.rows}))

    def rope(self, source: int, layer: int, turning: Turning) -> None:
        shape = self.geometry
        values = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        written = self.kv_token_bytes
        self.note(
            "rope_write", lambda load: Cost({"float32": 6.0 * values * load.rows}, {DEVICE: written * load.rows})
        )

    def attend(self, layer: int, variant: Variant) -> None:
        if not any(variant is known for known in self.variants):
            self.variants.append(variant)
        window = variant.window if isinstance(variant, SlidingWindow) else 0
        each = 4.0 * self.geometry.num_heads * self.geometry.head_dim
        token = self.kv_token_bytes
        self.note(
            "attend",
            lambda load: Cost({"attention": each * load.pairs(window)}, {DEVICE: token * load.read(window)}),
        )

    def turn(self, source: int, layer: int, turning: Turning, keys: TurnedKeys) -> int:
        shape = self.geometry
        each = 2.0 * shape.num_heads * shape.head_dim * keys.width
        self.note("turn", lambda load: Cost({"float32": each * load.rows}))
        return self.slot("turned", shape.num_heads * keys.width)

    def rebuild(self, ropes: Sequence[Rope]) -> Any:
        raise TypeError("a ledger runs nothing, so it rebuilds no keys")


def recorded(model: Model, kv: KV) -> Ledger:
    """A step through all stages of a model: its operations with their costs, without those of techniques."""
    ledger = Ledger(model.geometry, model.config.hidden_size, kv.token_bytes / model.geometry.num_layers)
    model.record_start(ledger)
    for stage in model.program:
        stage.record(ledger, lambda layer: None)
    model.record_head(ledger)
    return ledger
