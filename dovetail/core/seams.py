"""The questions that techniques answer, each with its contract and a default that does nothing.

A default is a real answer, so nobody asks whether a technique is present. Seams see a whole batch at a
time. `Array` is a tensor on the device; `batch` is `runtime.batch.Batch`; `kv` is `runtime.kv.KV`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray
from dovetail.core.types import (
    ALL,
    UNLIMITED,
    Array,
    PageSet,
    Request,
    StepPlan,
    StepResult,
    Stored,
)  # fmt: skip

EVERY_ROW = slice(None)


class Policy:
    """In what order, how much? Default: first come, first served, as much as fits."""

    def order(self, waiting: Sequence[Request]) -> Sequence[Request]:
        """The waiting requests in the order of admission: a permutation."""
        return waiting

    def share(self, request: Request, left: int) -> int:
        """How many of the step's `left` tokens the request may take, at least 1. Asked where it wants more."""
        return left


class Drafter:
    """What might come next? Default: no guess. Never changes the text, only how many steps it takes."""

    def propose(self, requests: Sequence[Request], limits: Sequence[int], total: int) -> Sequence[list[int]]:
        """For each request, guessed tokens that follow `request.tokens`: at most its limit, and `total` in all.

        What is beyond either, or no token of the vocabulary, is cut off.
        """
        return [[] for _ in requests]

    def observe(self, request: Request, drafts: Sequence[int], accepted: int) -> None:
        """The first `accepted` of `drafts` were right."""

    def forget(self, request: Request) -> None:
        """The request has ended or was preempted; drop what is remembered about it."""


class Reuse(Protocol):
    """What is already computed? Default: `core.prefix.RadixPrefix`.

    `match`: what is stored of the request's first `limit` tokens; a place to compute some of it again is one
    whose `computed` is below what its pages hold.
    `store`: keep the committed whole pages of the first `limit` tokens. `evict`: free up to n pages, or
    give up all that begins as a request does; how many are free now.
    `held` is what `PagePool.check` is told: the lists of pages that this store holds a reference to.
    """

    @property
    def held(self) -> Iterable[Sequence[int]]: ...

    def match(self, request: Request, limit: int) -> Stored: ...
    def store(self, request: Request, limit: int) -> None: ...
    def evict(self, what: int | Request) -> int: ...


class RowFilter:
    """Which rows continue past a cut? Default: all.

    A dropped row keeps its hidden state of that layer, and writes no K and V in later layers: later rows read
    what its slots hold, so whoever drops a row sees to it that they hold something (stored KV, say).
    """

    def keep(self, layer: int, hidden: Array, batch: Any) -> Any:
        """EVERY_ROW, or the int64 indices of the rows of `hidden` [rows, width] that go on after `layer`."""
        return EVERY_ROW


class Codec:
    """How are pages stored for rows that may leave some unread? Default: as written. Rows that read everything
    read what was written; the numeric KV type is configuration.

    Dense parts of running requests have at most `capacity` whole pages, counted per request: others wait.
    """

    capacity: int = UNLIMITED

    def seal(self, requests: Sequence[Request], kv: Any) -> Mapping[str, IntArray]:
        """The dense parts, `tokens[:dense_until]`, are committed, and from now on rows may leave pages unread.

        For each request id aliases of its first pages, int64 [n], each at least `kv.num_pages`: where such a row
        chooses its page j < n, it sees it under number alias[j]. A request that is absent has none.
        `kv.keys(layer, pages)` reads what was written. In stage s of a program, numbers are higher by
        s * `kv.stage_pages`.
        """
        return {}

    def open(self, layer: int, pages: Array, kv: tuple[Array, Array]) -> tuple[Array, Array]:
        """K and V of `pages` [rows, KV heads, n], some of them aliases, as attention shall see them.

        kv: what was written to the pages that they stand for, each [rows, KV heads, n, page_size, head_dim].
        """
        return kv

    def drop(self, ids: Sequence[str]) -> None:
        """Requests have ended or start over. Most of them are named without ever having been sealed."""


class Selector:
    """Which pages does a row read? Default: all.

    The core drops nothing that a row's position does not allow: the `window` most recent tokens and every
    row before `dense_until` are read in full, so the answer never depends on chunking or drafts.
    """

    window: int = UNLIMITED

    def seal(self, pages: Array, kv: Any) -> None:
        """Summarise the completed `pages` [n] (int64), by physical page; a page is sealed again when reused."""

    def select(self, layer: int, q: Array, batch: Any) -> PageSet:
        """The droppable pages to read, for rows `batch.sparse_rows`, of which there is at least one.

        q: queries [rows, heads, head_dim] of the whole batch.
        """
        return ALL

    def ahead(self, layer: int, hidden: Array, batch: Any) -> PageSet:
        """A guess at what `select` will say in `layer`, from the hidden state one layer earlier."""
        return ALL


class Residency:
    """Where do blobs live, and when are they moved? Default: everything is on the device already."""

    def put(self, pages: Array) -> None:
        """The completed `pages` [n] may be moved away from the device."""

    def fetch(self, layer: int, pages: PageSet, batch: Any, wait: bool) -> None:
        """Bring `pages` to the device: before this returns, or (a guess, `wait` false) by the time it can."""

    def drop(self, pages: Array) -> None:
        """`pages` [n] (int64) will hold something else; what is stored of them elsewhere is void."""


class Format(Protocol):
    """How is a weight stored and multiplied? Default: `layers.linear.Dense`."""

    def linear(self, weights: Sequence[Any], bias: Sequence[Any]) -> Callable[[Array], Array]:
        """x [rows, in] -> [rows, out] for stored weights [out_i, in] stacked by rows, with biases or none."""
        ...


class Experts:
    """Where does each expert run? Default: on the device."""

    def place(self, layer: int, counts: Sequence[int]) -> Sequence[str]:
        """For the number of rows routed to each expert, the tier that computes it."""
        return ["device"] * len(counts)


class Variant:
    """Score and mask expression of attention. Default: causal.

    Written with operators and the functions of `dovetail.ops.template`, so that one definition can be evaluated
    on tensors and printed as a kernel. `head` is the query head. Positions and heads are whole numbers; as
    tensors (int64) they broadcast to the scores. Attributes may be numbers, variants, and sequences of numbers,
    which `self.numbers[head]` reads; methods are called on a copy whose attributes stand for these, so an
    attribute keeps its value.
    No mask can make a query read a later key: attention adds causality to whatever this says.
    """

    def score(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        """The logit, from the scaled product of query and key."""
        return score

    def mask(self, q_pos: Array, k_pos: Array, head: Array) -> Array:
        """Whether the query at `q_pos` may read the key at `k_pos`."""
        return k_pos <= q_pos


@dataclass(frozen=True)
class SlidingWindow(Variant):
    """Only the last `window` keys, the query's own included (Mistral 7B, section 2), of those `inner` allows.

    Raises ConfigError for a window below 1: no window at all is no SlidingWindow.
    """

    window: int
    inner: Variant = field(default_factory=Variant)

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(
                f"SlidingWindow needs a window of at least 1 key, got {self.window!r}; leave it out to read all"
            )

    def score(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.inner.score(score, q_pos, k_pos, head)

    def mask(self, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.inner.mask(q_pos, k_pos, head) & (k_pos > q_pos - self.window)


class Executor(Protocol):
    """Who runs a plan? Default: `runtime.executor.ModelExecutor`. `num_stages` is the program's length."""

    num_stages: int

    def run(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True)
class Geometry:
    """What a technique may know of the model before it sees a token."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    sliding_layers: tuple[int, ...] = ()  # layers with a window of their own

    def choosing(self, name: str, first: int = 0) -> int:
        """The first layer from `first` on where technique `name` can choose pages. ConfigError without one."""
        found = next((i for i in range(first, self.num_layers) if i not in self.sliding_layers), None)
        if found is None:
            raise ConfigError(
                f"{name}: every layer from {first} on has a sliding window of its own, which leaves nothing to "
                f"choose; {'lower skip_layers' if first else f'leave {name} out'}"
            )
        return found


@dataclass(frozen=True)
class Calibration:
    """What a model can be measured on before the first request, and what the result depends on.

    text: tokens of the UTF-8 file of that name, or of some text in the case of "". ConfigError for a bad file.
    key: differs where the numbers that the model computes may differ.
    """

    text: Callable[[str], Sequence[int]]
    key: Callable[[], str]


@dataclass
class Site:
    """Where a technique is built.

    `model` and `kv` are the device side's. They are set once everything is built, so a filler that needs them
    keeps the site and looks when it is asked; a host-only run has none. `ready` are called when both are set,
    before the first request. `calibration` is what they may measure the model on.
    """

    geometry: Geometry
    page_size: int
    pool: Any
    model: Any = None
    kv: Any = None
    device: Any = "cpu"
    calibration: Calibration | None = None
    ready: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Seams:
    """Every seam, filled. `format` and `executor` are given by the device side where no technique has them."""

    policy: Policy = field(default_factory=Policy)
    drafter: Drafter = field(default_factory=Drafter)
    rows: RowFilter = field(default_factory=RowFilter)
    codec: Codec = field(default_factory=Codec)
    selector: Selector = field(default_factory=Selector)
    residency: Residency = field(default_factory=Residency)
    experts: Experts = field(default_factory=Experts)
    variant: Variant = field(default_factory=Variant)
    reuse: Reuse | None = None
    format: Format | None = None
    executor: Executor | None = None


SEAMS = tuple(Seams.__dataclass_fields__)
