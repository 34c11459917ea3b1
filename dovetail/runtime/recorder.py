"""The native target: records a model's layers as a native program, replayed by one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.core.cost import Cost
from dovetail.core.errors import ConfigError
from dovetail.core.seams import Variant
from dovetail.host import lazy_torch
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import KernelVariant, kernel_variant
from dovetail.ops.pages import Summaries
from dovetail.ops.rope import Rope
from dovetail.ops.skew import TurnedKeys
from dovetail.ops.stored import StoredTensor
from dovetail.runtime.kv import KV
from dovetail.runtime.ledger import DEVICE, Ledger
from dovetail.runtime.residency import TieredStore, tiers_of
from dovetail.runtime.store import CodedTiles, TiledStore
from dovetail.runtime.target import (
    BARE,
    Fused,
    Normed,
    PageChoice,
    RecordedSelector,
    TurnedQueries,
    Turning,
    Weights,
)

if TYPE_CHECKING:
    from dovetail._native import Program


class Recorder(Ledger):
    """The program under construction, and the ledger of what its operations cost."""

    def __init__(self, program: Program, kv: KV, width: int) -> None:
        self._program = program
        self.kv = kv
        self.shape = add_shape(program, kv)
        super().__init__(kv.geometry, width, kv.token_bytes / kv.geometry.num_layers)
        heads, dim = kv.geometry.num_heads, kv.geometry.head_dim
        self.q = program.slot(heads * (-(-dim // 16) * 16))
        self._angles: dict[Rope, int] = {}
        self._variants: dict[int, tuple[Variant, KernelVariant]] = {}
        self._guessed: dict[int, int] = {}  # layers whose pages are chosen one layer earlier, and by which rule
        self._held: list[Any] = []  # objects whose memory the program has addresses of

    @property
    def program(self) -> Program:
        return self._program

    @property
    def moving(self) -> list[int]:
        """Slots whose rows later layers read: those of `x` and of the angles."""
        return [self.x, *self._angles.values()]

    def slot(self, name: str, width: int, sampled: bool = False) -> int:
        if (name, width) not in self._names:
            self._names[name, width] = self.program.slot(width, sampled)
        return self._names[name, width]

    def embed(self, stored: StoredTensor, scale: float) -> None:
        super().embed(stored, scale)
        if stored.format not in cpu.native().formats():
            stored = cpu.plain(stored)
        self._held.append(stored)
        data = stored.data
        self.program.embed(self.x, stored.format, data.ctypes.data, data.strides[0], stored.shape[1], scale)

    def angles(self, rope: Rope) -> None:
        super().angles(rope)
        if rope not in self._angles:
            self._angles[rope] = self.program.slot(2 * len(rope.freqs))
            self.program.angles(self._angles[rope], rope.freqs.tolist(), rope.temper)

    def linear(self, source: int, destination: int, weights: Weights, fused: Fused = BARE) -> None:
        super().linear(source, destination, weights, fused)
        if not weights.native:
            raise TypeError("only packed weights can be recorded")
        norm, eps = _numbers(fused.norm)
        self.program.linear(
            source, destination, list(weights.packed), weights.activation, norm=norm, eps=eps,
            bias=list(weights.bias), add=fused.add, gate=fused.gate, sampled=fused.sampled, )  # fmt: skip

    def norm_add(self, source: int, destination: int, norm: Normed) -> None:
        super().norm_add(source, destination, norm)
        self.program.norm_add(source, destination, *_numbers(norm))

    def rope(self, source: int, layer: int, turning: Turning) -> None:
        super().rope(source, layer, turning)
        (q_norm, q_eps), (k_norm, k_eps) = _numbers(turning.q_norm), _numbers(turning.k_norm)
        slots = source, self._angles_of(turning.rope), self.q
        self.program.rope(slots, layer, self.shape, turning.scale, q_norm, k_norm, q_eps or k_eps)

    def attend(self, layer: int, variant: Variant) -> None:
        if id(variant) not in self._variants:
            self._variants[id(variant)] = (variant, kernel_variant(variant, self.geometry.num_heads))
        v = self._variants[id(variant)][1]
        chosen = self._chosen(layer)
        if tiers_of(self.kv.k) is not None:
            self.program.fetch((layer, self.shape, chosen), v.window, layer in self._guessed)
        super().attend(layer, variant)
        self.program.attend((self.q, self.attended, layer, self.shape, chosen), v.window, v.address, v.params)
        self._choose_ahead(layer + 1)

    def turn(self, source: int, layer: int, turning: Turning, keys: TurnedKeys) -> int:
        to = super().turn(source, layer, turning, keys)
        weights, eps = _numbers(turning.q_norm)
        slots = source, self._angles_of(turning.rope), to
        basis = keys.basis[layer].ctypes.data
        self.program.turn(slots, self.shape, turning.scale, weights, eps, basis, keys.width)
        return to

    def rebuild(self, ropes: Sequence[Rope]) -> Any:
        tiers = tiers_of(self.kv.k)
        assert tiers is not None
        kv, distinct = self.kv, list(dict.fromkeys(ropes))
        keys = cpu.native().LowRankKeys(
            kv.k.kind, (kv.num_kv_heads, kv.head_dim, kv.page_size),
            [(rope.freqs.tolist(), rope.temper) for rope in distinct], [distinct.index(rope) for rope in ropes],
        )  # fmt: skip
        tiers.native.set_keys(keys)
        return keys

    def _angles_of(self, rope: Rope | None) -> int:
        return -1 if rope is None else self._angles[rope]

    def _chosen(self, layer: int) -> int:
        """Record how rows of `layer` choose pages. Returns the number of the rule; -1 means they read
        everything."""
        if layer in self._guessed:
            return self._guessed[layer]
        selector = self.kv.seams.selector
        if not isinstance(selector, RecordedSelector) or layer in self.kv.own_window:
            return -1
        choice = selector.choice(layer, self)
        return -1 if choice is None else self._pick(layer, choice)

    def _choose_ahead(self, layer: int) -> None:
        """Record what guesses the pages of `layer` and begins to move them."""
        selector = self.kv.seams.selector
        if layer == self.geometry.num_layers or layer in self.kv.own_window:
            return
        if isinstance(selector, RecordedSelector) and (choice := selector.choice_ahead(layer, self)) is not None:
            self._guessed[layer] = self._pick(layer, choice)
            if tiers_of(self.kv.k) is not None:
                self.program.fetch_ahead(layer, self._guessed[layer])

    def _pick(self, layer: int, choice: PageChoice) -> int:
        """Record what ranks the pages of `layer`. Returns the number of the rule."""
        rule = self.program.choosing(self.shape, choice.window, choice.budget, choice.leading, choice.adaptive)
        by = choice.by
        self._held.append(by)
        if isinstance(by, TurnedQueries):
            data, keys = by.keys.data, by.keys
            self.program.pick_partial(rule, by.slot, layer, data.address, keys.width, by.alpha)
            self._note_pick("pick_partial", data.nbytes / data.shape[0])
        elif isinstance(by, Summaries):
            if self.kv.page_size % 16 and not lazy_torch.installed():
                raise ConfigError(
                    f"pages of {self.kv.page_size} tokens are summarised by torch, which is not installed; use a "
                    f"--block-size that is a multiple of 16, or {lazy_torch.INSTALL}"
                )
            self.program.pick(rule, self.q, layer, by.kind, by.memory.address, by.vectors)
            self._note_pick("pick", by.memory.nbytes / by.memory.shape[0])
        else:
            self.program.pick(rule, self.q, layer, "bound", 0)
            self._note_pick("pick", 0)
        return rule

    def _note_pick(self, name: str, page_bytes: float) -> None:
        each = page_bytes / self.kv.page_size
        self.note(name, lambda load: Cost(bytes={DEVICE: each * load.read()}))


def _numbers(norm: Normed | None) -> tuple[list[float], float]:
    """Weight and epsilon as the program takes them. No norm is an empty list."""
    return ([], 0.0) if norm is None else (norm.values.tolist(), norm.eps)


def add_shape(program: Program, kv: KV) -> int:
    """Tell the program where K and V of layers like these lie, and what moves their pages. Returns the number of
    the shape."""
    k, v = kv.k.memory(), kv.v.memory()
    cells = len(kv.k.array) if isinstance(kv.k, TiledStore | CodedTiles | TieredStore) else 0
    shape = program.shape(
        kv.geometry.num_heads, kv.k.layout, kv.k.kind, (k[0], v[0], k[1], v[1]),
        (kv.pages_per_layer, kv.page_size, kv.num_kv_heads, kv.head_dim, cells),
    )  # fmt: skip
    if (tiers := tiers_of(kv.k)) is not None:
        program.set_tiers(tiers.native)
    return shape
