"""Variants from the literature. Each changes what `inner` says, which is plain causal attention by default.

`dovetail.core.seams.SlidingWindow` is one more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Array, Variant
from dovetail.ops.template.functions import tanh


class _Nested(Variant):
    inner: Variant

    def score(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.inner.score(score, q_pos, k_pos, head)

    def mask(self, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.inner.mask(q_pos, k_pos, head)


@dataclass(frozen=True)
class SoftCap(_Nested):
    """Scores between -cap and cap: cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    cap: float
    inner: Variant = field(default_factory=Variant)

    def __post_init__(self) -> None:
        if not 0 < self.cap < math.inf:
            raise ConfigError(f"SoftCap needs a finite cap above zero, got {self.cap}")

    def score(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.cap * tanh(self.inner.score(score, q_pos, k_pos, head) / self.cap)


@dataclass(frozen=True)
class ALiBi(_Nested):
    """Linear biases instead of positions in the embedding (arXiv 2108.12409, section 3): score - slope * distance,
    with a slope for each of `num_heads` query heads."""

    num_heads: int
    inner: Variant = field(default_factory=Variant)
    slopes: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes", alibi_slopes(self.num_heads))

    def score(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.inner.score(score, q_pos, k_pos, head) - self.slopes[head] * (q_pos - k_pos)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8/n), 2^(-16/n), ... for n heads, a power of two.

    For another n, those of the next lower power m, then the first, third, ... of 2m, as in the authors' code.
    """
    if num_heads < 1:
        raise ConfigError(f"ALiBi needs at least one head, got {num_heads}")
    lower = 1 << (num_heads.bit_length() - 1)
    own = [2.0 ** (-8 * i / lower) for i in range(1, lower + 1)]
    between = [2.0 ** (-4 * i / lower) for i in range(1, 2 * lower, 2)]
    return tuple((own + between)[:num_heads])


@dataclass(frozen=True)
class Sinks(_Nested):
    """Only the first `sinks` keys and the last `window`, the query's own included (StreamingLLM, arXiv
    2309.17453, section 3.2). Unlike there, positions stay what they are.
    """

    sinks: int
    window: int
    inner: Variant = field(default_factory=Variant)

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ConfigError(f"Sinks needs sinks >= 0 and window >= 1, got {self.sinks} and {self.window}")

    def mask(self, q_pos: Array, k_pos: Array, head: Array) -> Array:
        near = (k_pos < self.sinks) | (k_pos > q_pos - self.window)
        return self.inner.mask(q_pos, k_pos, head) & near


@dataclass(frozen=True)
class BlockDiagonal(_Nested):
    """Only keys of the query's own block of `block` positions, as in a block-diagonal mask."""

    block: int
    inner: Variant = field(default_factory=Variant)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"BlockDiagonal needs a block of at least one position, got {self.block}")

    def mask(self, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.inner.mask(q_pos, k_pos, head) & (k_pos // self.block == q_pos // self.block)
