"""Records a model's layers as a native program: operations on numbered row buffers, replayed by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dovetail.core.seams import Variant
from dovetail.layers.norm import Norm
from dovetail.layers.packed import PackedLinear
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import KernelVariant, kernel_variant
from dovetail.ops.pages import Summaries
from dovetail.ops.rope import Rope
from dovetail.ops.skew import TurnedKeys
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.kv import KV
from dovetail.runtime.recorded import RecordedSelector
from dovetail.runtime.residency import TieredStore, tiers_of
from dovetail.runtime.store import TiledStore


class Recorder:
    """The program under construction. Buffers are shared by all layers: `x` holds the hidden rows."""

    def __init__(self, program: Any, kv: KV, width: int) -> None:
        self.program = program
        self.kv = kv
        self.geometry = geometry = kv.geometry
        self.x = program.slot(width)
        heads, dim = geometry.num_heads, geometry.head_dim
        self.q = program.slot(heads * (-(-dim // 16) * 16))
        self.attended = program.slot(heads * dim)
        self.weight_bytes = 0  # that the recorded products read, as they are packed
        self._angles: dict[Rope, int] = {}
        self._slots: dict[tuple[str, int], int] = {}
        self._variants: dict[int, tuple[Variant, KernelVariant]] = {}
        self._sparsity = (0, 0, 0)  # of the layers that choose pages: window, budget, leading
        self._adaptive = False  # whether they may choose fewer
        self._guessed: set[int] = set()  # layers whose pages are chosen in the layer before
        self._positions = False  # whether a variant asks where the chosen pages lie
        self._held: list[Any] = []  # what the program's addresses point into

    def slot(self, name: str, width: int, sampled: bool = False) -> int:
        """A buffer for rows of `width` floats, the same for every caller of that name and width."""
        if (name, width) not in self._slots:
            self._slots[name, width] = self.program.slot(width, sampled)
        return self._slots[name, width]

    def embed(self, stored: StoredTensor) -> None:
        """Rows of the embedding of the step's tokens into `x`."""
        if stored.format not in cpu.native().formats():
            stored = cpu.plain(stored, torch.float32)
        self._held.append(stored)
        data = stored.data
        self.program.embed(self.x, stored.format, data.data_ptr(), data.stride(0), stored.shape[1], 1.0)

    def angles(self, rope: Rope) -> None:
        """cos and sin of the step's positions, for `rope`."""
        if rope not in self._angles:
            self._angles[rope] = self.program.slot(2 * len(rope.freqs))
            self.program.angles(self._angles[rope], rope.freqs.tolist(), rope.temper)

    def linear(
        self, source: int, target: int, layer: Callable[[Tensor], Tensor], *, norm: Norm | None = None,
        add: bool = False, gate: str = "", sampled: bool = False,
    ) -> None:  # fmt: skip
        """target = layer(norm(source)); or += with `add`; or act(gate half) * up half of the columns."""
        if not isinstance(layer, PackedLinear):
            raise TypeError(f"only packed weights can be recorded, not {type(layer).__name__}")
        self.weight_bytes += sum(p.bytes for p in layer.parts)
        weights = norm.weight.float().tolist() if norm else []
        self.program.linear(
            source, target, layer.parts, layer.activation, norm=weights, eps=norm.eps if norm else 0.0,
            bias=layer.bias, add=add, gate=gate, sampled=sampled,
        )  # fmt: skip

    def rope(self, source: int, layer: int, rope: Rope, norms: tuple[Norm | None, Norm | None]) -> None:
        """Rotate q and k of source's columns (q, k, v), norm them before where the model does; write k and v."""
        q_norm, k_norm = ([] if n is None else n.weight.float().tolist() for n in norms)
        eps = next((n.eps for n in norms if n is not None), 0.0)
        self.program.rope(source, self._angles[rope], self.q, layer, q_norm, k_norm, eps)

    def attend(self, layer: int, variant: Variant) -> None:
        """Attention of `q` over the step's sequences into `attended`, or over what the selector chooses."""
        if id(variant) not in self._variants:
            self._variants[id(variant)] = (variant, kernel_variant(variant, self.geometry.num_heads))
        v = self._variants[id(variant)][1]
        selector, chosen = self.kv.seams.selector, False
        if isinstance(selector, RecordedSelector) and layer not in self.kv.own_window:
            chosen = selector.record(layer, self)
        if chosen:
            self._positions |= bool(v.window or v.address)
            self.program.sparsify(*self._sparsity, self._positions, self._adaptive)
        if tiers_of(self.kv.k) is not None:
            self.program.fetch(layer, v.window, chosen, layer in self._guessed)
        self.program.attend((self.q, self.attended, layer, chosen), v.window, v.address, v.params)
        self._ahead(layer + 1)

    def _ahead(self, layer: int) -> None:
        """What guesses the pages of `layer`, and begins to move them."""
        selector = self.kv.seams.selector
        if layer == self.geometry.num_layers or layer in self.kv.own_window:
            return
        if isinstance(selector, RecordedSelector) and selector.record_ahead(layer, self):
            self._guessed.add(layer)
            if tiers_of(self.kv.k) is not None:
                self.program.fetch_ahead(layer)

    def pick(self, layer: int, summaries: Summaries, window: int, budget: int) -> None:
        """Choose pages of `layer` by their summaries (`ops.pages`): a row reads `budget` pages, of which those of
        the last `window` tokens are not chosen but given. Both are the same in all layers. Pages whose keys a
        codec keeps as they are come first."""
        self._sparsity = (window, budget, -1)
        self._held.append(summaries)
        self.program.pick(self.q, layer, summaries.kind, summaries.data.data_ptr(), summaries.vectors)

    def rebuild(self, rope: Rope) -> Any:
        """Native `LowRankKeys` of aliases, rotated by `rope`; they say which keys these are as requests come."""
        tiers = tiers_of(self.kv.k)
        assert tiers is not None
        kv = self.kv
        keys = cpu.native().LowRankKeys(
            kv.k.kind, (kv.num_kv_heads, kv.head_dim, kv.page_size), rope.freqs.tolist(), rope.temper
        )
        tiers.native.set_keys(keys)
        return keys

    def turn(self, source: int, rope: Rope, norm: Norm | None, keys: TurnedKeys, layer: int) -> int:
        """Projected queries of `source`, normed where the model does, rotated and turned (`ops.skew`) -> a slot of
        partial queries for `layer`."""
        to = self.slot("turned", self.geometry.num_heads * keys.width)
        weights, eps = ([], 0.0) if norm is None else (norm.weight.float().tolist(), norm.eps)
        self.program.turn((source, self._angles[rope], to), weights, eps, keys.basis[layer].data_ptr(), keys.width)
        return to

    def pick_partial(self, layer: int, source: int, keys: TurnedKeys, rule: tuple[float, int, int]) -> None:
        """Choose pages of `layer` by partial queries in `source` and `keys`. rule: alpha, window, and the budget
        of pages as in `pick`, which is the most that a row reads."""
        alpha, window, budget = rule
        self._sparsity, self._adaptive = (window, budget, -1), True
        self._held.append(keys)
        self.program.pick_partial(source, layer, keys.data.data_ptr(), keys.width, alpha)

    def pick_first(self, layer: int, count: int, window: int) -> None:
        """The first `count` pages of `layer` beside those of the last `window` tokens."""
        self._sparsity = (window, 0, count)
        self.program.pick(self.q, layer, "bound", 0)


def connect(program: Any, kv: KV) -> None:
    """Give the program the addresses of K and V, and what moves their pages."""
    k, v = kv.k.memory(), kv.v.memory()
    cells = len(kv.k.data) if isinstance(kv.k, TiledStore | TieredStore) else 0
    program.set_kv(
        kv.k.layout, kv.k.kind, (k[0], v[0], k[1], v[1]),
        (kv.pages_per_layer, kv.page_size, kv.num_kv_heads, kv.head_dim, cells),
    )  # fmt: skip
    if (tiers := tiers_of(kv.k)) is not None:
        program.set_tiers(tiers.native)
