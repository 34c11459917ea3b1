"""What layers and techniques record themselves on: a program whose operations run without Python.

A layer's `record` says what its `__call__` does, as operations on numbered row buffers ("slots"). A `Target` takes
these operations. The native recorder (`runtime.recorder`) makes a program of them; `runtime.ledger` only adds up
what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dovetail.core.seams import Codec, Selector, Variant
from dovetail.ops.pages import Summaries
from dovetail.ops.rope import Rope
from dovetail.ops.skew import TurnedKeys
from dovetail.ops.stored import StoredTensor


class Normed(Protocol):
    """A norm over the last dimension: its weight [width], in float32 or float64, and epsilon."""

    @property
    def values(self) -> Any: ...

    @property
    def eps(self) -> float: ...


@dataclass(frozen=True)
class Weights:
    """The weights of a product as they are kept, with the rows of all parts one after the other.

    bytes: how many a product reads. activation: the arithmetic, "int8", "int16", "bf16" or "exact" (float32).
    parts: packed matrices; none if the native kernels cannot multiply them. bias: width_out values, or none.
    """

    width_in: int
    width_out: int
    bytes: int
    activation: str
    packed: Sequence[Any] = ()
    bias: Sequence[float] = ()

    @property
    def native(self) -> bool:
        return bool(self.packed)


@dataclass(frozen=True)
class Fused:
    """What an operation does in addition to a product: destination = product(norm(source)).

    norm: applied to the source. add: the result is added to what the destination holds. gate: the name of an
    activation; the destination is the activation of the first half of the columns, times the second half. sampled:
    only for the rows to sample from.
    """

    norm: Normed | None = None
    add: bool = False
    gate: str = ""
    sampled: bool = False


BARE = Fused()


@dataclass(frozen=True)
class Turning:
    """How queries and keys are prepared: norms per head (or none), a rotation (or none), the factor on queries."""

    rope: Rope | None
    q_norm: Normed | None
    k_norm: Normed | None
    scale: float


@dataclass(frozen=True)
class TurnedQueries:
    """Partial queries in a slot, and the partial keys that they are multiplied with (`ops.skew`). alpha: how far
    below the best score, in logits, a page is still read."""

    slot: int
    keys: TurnedKeys
    alpha: float


@dataclass(frozen=True)
class PageChoice:
    """How the rows of a layer choose pages when they may leave some unread.

    window: recent tokens that are always read. budget: pages that a row and KV head reads in all. leading: instead
    of a budget, how many pages are read in addition to the window; -1 for none. by: what ranks the pages; None
    takes the first pages. Layers with equal numbers share one rule, so a program has few rules.
    """

    window: int
    budget: int = 0
    leading: int = -1
    by: Summaries | TurnedQueries | None = None

    @property
    def adaptive(self) -> bool:
        """Whether rows may read fewer pages than the budget."""
        return isinstance(self.by, TurnedQueries)


class PageProgram(Protocol):
    """What a program does with completed pages, between steps."""

    def summarise(self, kind: str, layers: int, pages: list[int], out: int, vectors: int = 2) -> None: ...

    def seal_partial(
        self, layers: tuple[int, int], basis: int, width: int, out: int, pages: list[int]
    ) -> None: ...

    def unread(self) -> int:
        """How many pages of a KV head rows have left unread, over all steps."""


class Target(Protocol):
    """A program under construction. `x` is the slot of hidden rows; slots are shared by all layers."""

    layer: int  # the layer of the operations that come next; -1 outside of layers

    @property
    def x(self) -> int: ...

    @property
    def attended(self) -> int:
        """The slot of `attend`'s result: the outputs of all heads of each row."""

    @property
    def program(self) -> PageProgram: ...

    def slot(self, name: str, width: int, sampled: bool = False) -> int:
        """The number of a buffer for rows of `width` floats. Callers with the same name and width share it."""

    def embed(self, stored: StoredTensor, scale: float) -> None:
        """Write the embedding of the step's tokens, times `scale`, to `x`."""

    def angles(self, rope: Rope) -> None:
        """Compute cos and sin of the step's positions for `rope`, before the first layer that uses it."""

    def linear(self, source: int, destination: int, weights: Weights, fused: Fused = BARE) -> None:
        """A product, with the operations that are fused with it."""

    def norm_add(self, source: int, destination: int, norm: Normed) -> None:
        """destination += norm(source)."""

    def rope(self, source: int, layer: int, turning: Turning) -> None:
        """The columns of `source` are q, k and v. Prepare q and k, and write k and v."""

    def attend(self, layer: int, variant: Variant) -> None:
        """Attention of the prepared queries over the step's sequences, or over what the selector chooses. The
        result goes to `attended`."""

    def turn(self, source: int, layer: int, turning: Turning, keys: TurnedKeys) -> int:
        """Prepare and turn the projected queries in `source` (`ops.skew`). Returns a slot of partial queries."""

    def rebuild(self, ropes: Sequence[Rope]) -> Any:
        """Native `LowRankKeys`, which rebuild keys of aliases and rotate them by the rope of their layer. ropes:
        one for each layer of all stages. Prompts are added to them as requests come."""


class RecordedSelector(Selector):
    """A selector that can express `select` as operations of a native program."""

    guesses = False  # whether `choice_ahead` gives choices

    def choice(self, layer: int, to: Target) -> PageChoice | None:
        """How the rows of `layer` choose pages, just before its attention. None: they read everything."""
        raise NotImplementedError

    def choice_ahead(self, layer: int, to: Target) -> PageChoice | None:
        """The same as a guess, recorded behind the attention of the layer before, whose input is still in `to.x`.
        None: there is no guess, and `choice` is asked."""
        return None


class RecordedCodec(Codec):
    """A codec whose aliases a native program can read. Pages then move between tiers."""

    def record(self, to: Target) -> None:
        """Record how keys of aliases are rebuilt (`Target.rebuild`)."""
        raise NotImplementedError
