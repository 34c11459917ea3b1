"""What layers and techniques record themselves on: a program whose operations run without Python.

A layer's `record` says what its `__call__` does, as operations on numbered row buffers ("slots"). A `Target` takes
them: the native recorder (`runtime.recorder`) makes a program of them, and `runtime.ledger` only adds up what they
cost.
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
    """A norm over the last dimension: weight [width] and epsilon."""

    @property
    def weight(self) -> Any: ...

    @property
    def eps(self) -> float: ...


@dataclass(frozen=True)
class Weights:
    """Weights of a product as they are kept: rows of all parts one after the other.

    bytes: that a product reads. activation: the arithmetic of its products, "int8", "bf16" or "exact" (float32).
    parts: packed matrices; there are none where the native kernels do not multiply them. bias: width_out values,
    or none.
    """

    width_in: int
    width_out: int
    bytes: int
    activation: str
    parts: Sequence[Any] = ()
    bias: Sequence[float] = ()

    @property
    def native(self) -> bool:
        return bool(self.parts)


@dataclass(frozen=True)
class Fused:
    """What one operation does around a product: destination = product(norm(source)).

    norm: of the source. add: to what the destination holds. gate: the destination is this activation of the first
    half of the columns, times the second half. sampled: only of the rows to sample from.
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
    """Partial queries in a slot, and the partial keys that they are scored against (`ops.skew`). alpha: how far
    below
    the best score, in logits, a page is still read."""

    slot: int
    keys: TurnedKeys
    alpha: float


@dataclass(frozen=True)
class PageChoice:
    """What the rows of a layer read where they may leave pages unread.

    window: recent tokens that are always read. budget: pages that a row and KV head reads in all. leading: pages
    beside those of the window, instead of a budget; -1 for none. by: what ranks them; None takes the first pages.
    Layers with equal numbers choose by one rule, so a program is made for few of them.
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
        """Pages of a head that rows left unread, in all steps."""


class Target(Protocol):
    """A program under construction. `x` is the slot of hidden rows; slots are shared by all layers."""

    layer: int  # that the operations belong to which come next; -1 outside of layers

    @property
    def x(self) -> int: ...

    @property
    def attended(self) -> int:
        """What `attend` gives: the heads' outputs of each row."""

    @property
    def program(self) -> PageProgram: ...

    def slot(self, name: str, width: int, sampled: bool = False) -> int:
        """A buffer for rows of `width` floats, the same for every caller of that name and width."""

    def embed(self, stored: StoredTensor, scale: float) -> None:
        """Rows of the embedding of the step's tokens, times `scale`, into `x`."""

    def angles(self, rope: Rope) -> None:
        """cos and sin of the step's positions, for `rope`, before the first layer that rotates by it."""

    def linear(self, source: int, destination: int, weights: Weights, fused: Fused = BARE) -> None:
        """A product, and what is fused with it."""

    def norm_add(self, source: int, destination: int, norm: Normed) -> None:
        """destination += norm(source)."""

    def rope(self, source: int, layer: int, turning: Turning) -> None:
        """Of source's columns (q, k, v): prepare q and k, write k and v."""

    def attend(self, layer: int, variant: Variant) -> None:
        """Attention of the prepared queries over the step's sequences into `attended`, or over what the selector
        chooses."""

    def turn(self, source: int, layer: int, turning: Turning, keys: TurnedKeys) -> int:
        """Projected queries of `source`, prepared and turned (`ops.skew`) -> a slot of partial queries."""

    def rebuild(self, rope: Rope) -> Any:
        """Native `LowRankKeys` of aliases, rotated by `rope`; they say which keys these are as requests come."""


class RecordedSelector(Selector):
    """A selector that says what `select` does as operations of a native program."""

    def choice(self, layer: int, to: Target) -> PageChoice | None:
        """What the rows of `layer` read, chosen before its attention. None: everything."""
        raise NotImplementedError

    def choice_ahead(self, layer: int, to: Target) -> PageChoice | None:
        """The same, guessed behind the attention of the layer before it: `to.x` still is the input of that. None:
        there is no guess, and `choice` is asked."""
        return None


class RecordedCodec(Codec):
    """A codec whose aliases a native program can read, where pages move between tiers."""

    def record(self, to: Target) -> None:
        """Say how their keys are rebuilt (`Target.rebuild`)."""
        raise NotImplementedError
