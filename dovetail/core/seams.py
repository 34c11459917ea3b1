"""The questions that techniques answer. Each has a contract and a default that does nothing.

A default is a real answer, so no caller asks whether a technique is present. A seam is asked for a whole batch at
a time. `Array` is a tensor on the device for reference operations, and a numpy array where a native program runs;
`batch` is `runtime.batch.Batch`; `kv` is `runtime.kv.KV`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from dovetail.core.errors import ConfigError
from dovetail.core.pages import IntArray, PagePool
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


class Backlog(NamedTuple):
    """A request that has more to compute than its next token: a prompt, or what was preempted. tokens: how many,
    as far as is known. What is stored of a waiting request may grow until it begins."""

    request: Request
    tokens: int


class Policy:
    """Who runs first, and how many tokens each request gets.

    Default: first come, first served, but a long prompt does not stop others. A prompt with less to compute than
    the oldest overtakes it; the oldest keeps half of the tokens. While there is such a prompt, or others generate,
    a step has at most `crowded` tokens for each prompt that is there, so that it is short if they are few.
    """

    crowded = 64

    def order(self, waiting: Sequence[Request]) -> Sequence[Request]:
        """The waiting requests in the order of admission: a permutation."""
        return waiting

    def shares(self, backlogs: Sequence[Backlog], left: int, others: int) -> Sequence[int]:
        """How many of the step's `left` tokens each backlog takes.

        Backlogs of running requests come first, the oldest before all; then those that may be admitted, in
        `order`. 0: it takes none in this step, and is not admitted. The first takes at least 1 if it runs, or if
        nothing else does. Amounts are cut to what is left, and to what the request has. others: running requests
        that take their next token in this step, for which room is reserved.
        """
        shorter = sorted((b.tokens, i) for i, b in enumerate(backlogs) if b.tokens < backlogs[0].tokens)
        if shorter or others:
            left = min(left, self.crowded * len(backlogs))
        amounts, half = [0] * len(backlogs), left // 2
        for tokens, i in shorter:
            amounts[i] = min(tokens, half)
            half -= amounts[i]
        left -= sum(amounts)
        for i, backlog in enumerate(backlogs):
            more = min(backlog.tokens - amounts[i], left)
            amounts[i] += more
            left -= more
        return amounts


class Guess(NamedTuple):
    """What may follow a request's tokens.

    odds: for each token the probability that it is right if those before it are, or () where nothing is known of
    it. source: who guessed, where a drafter has several ways to; guesses of one source are right equally often.
    """

    tokens: Sequence[int] = ()
    odds: Sequence[float] = ()
    source: str = ""


NO_GUESS = Guess()


class Room(NamedTuple):
    """What the next step has room for. tokens: of all guesses together. others: tokens that it computes besides
    the guesses and the next token of each request that has caught up, as far as is known: parts of prompts."""

    tokens: int
    others: int = 0


class Outcome(NamedTuple):
    """What became of a guess: the first `accepted` of `drafts` were right. drafts: those that were computed; ()
    where there were none, or where they were not the drafter's."""

    request: Request
    drafts: Sequence[int]
    accepted: int


class Drafter:
    """What the next tokens might be. Default: no guess. Guesses never change the text, only the number of
    steps.

    writes: whether `propose` writes KV of its own under the numbers of a request's pages. Such a drafter may write
    at the positions from `request.computed` to before `len(request.tokens) + limit`, because the request has pages
    of its own for them.
    """

    writes: bool = False

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> Sequence[Guess]:
        """For each request a guess of at most as many tokens as its limit, and as `room` has in all.

        A guess is cut off at either limit, and at the first token that is outside the vocabulary or that the form
        of the answer forbids. Where the form leaves no choice, its tokens are drafted and not the guess. If this
        raises, nothing is guessed in this step.
        """
        return [NO_GUESS] * len(requests)

    def observe(self, outcomes: Sequence[Outcome], plan: StepPlan, seconds: float) -> None:
        """A step has run, and it took so long by the engine's clock. There is an outcome for each span that
        sampled."""

    def forget(self, request: Request) -> None:
        """The request has ended or was preempted. Forget everything about it."""


class Reuse(Protocol):
    """What is already computed. Default: `core.prefix.RadixPrefix`.

    `match`: what is stored of the request's first `limit` tokens. If `computed` is below what the pages hold, the
    tokens between are computed again. It may be asked before the request begins, to know how much is to compute.
    `store`: keep the committed whole pages of the request's first `limit` tokens.
    `evict`: free up to n pages, or drop everything that begins as a request does. Returns how many were freed.
    `held`: the lists of pages that this store holds a reference to, for `PagePool.check`.
    """

    @property
    def held(self) -> Iterable[Sequence[int]]: ...

    def match(self, request: Request, limit: int) -> Stored: ...
    def store(self, request: Request, limit: int) -> None: ...
    def evict(self, what: int | Request) -> int: ...


class RowFilter:
    """Which rows continue past a cut. Default: all, and there is no cut.

    cuts: the layers after which `keep` is asked. They are known before the model is loaded, because programs can
    stop only there. A cut behind the last layer would save nothing and is not asked.

    A dropped row keeps its hidden state of that layer, and writes no K and V in later layers. Later rows read what
    its slots hold. So whoever drops a row must see that they hold something, stored KV for example.
    """

    cuts: Sequence[int] = ()

    def keep(self, layer: int, hidden: Array, batch: Any) -> Any:
        """EVERY_ROW, or the int64 indices of the rows of `hidden` [rows, width] that go on after `layer`."""
        return EVERY_ROW


class Codec:
    """How pages are stored for rows that may leave some unread. Default: as written. Rows that read everything
    always read what was written. The numeric type of KV is configuration, not a codec's.

    The dense parts of all running requests have at most `capacity` whole pages, counted for each request. Other
    requests wait.
    """

    capacity: int = UNLIMITED

    def seal(self, requests: Sequence[Request], kv: Any) -> Mapping[str, IntArray]:
        """The dense parts of these requests, `tokens[:dense_until]`, are committed. From now on their rows may
        leave pages unread.

        Returns for each request id the aliases of its first n pages, int64 [n], each at least `kv.num_pages`. If
        such a row chooses its page j < n, it reads the page under the number alias[j]. A request that is absent
        has no aliases. `kv.keys(layer, pages)` reads what was written. In stage s of a program, page numbers are
        higher by s * `kv.stage_pages`.
        """
        return {}

    def open(self, layer: int, pages: Array, kv: tuple[Array, Array]) -> tuple[Array, Array]:
        """K and V that attention reads for `pages` [rows, KV heads, n], some of which are aliases.

        kv: K and V as written to the pages that they stand for, each [rows, KV heads, n, page_size, head_dim].
        """
        return kv

    def drop(self, ids: Sequence[str]) -> None:
        """These requests have ended or start over. Most of them were never given to `seal`."""


class Selector:
    """Which pages a row reads. Default: all.

    The core decides by a row's position which pages it may leave unread. Every row reads the `window` most recent
    tokens. Rows before `dense_until` read everything. So the text never depends on chunks or drafts.
    """

    window: int = UNLIMITED

    def seal(self, pages: IntArray, kv: Any) -> None:
        """Summarise the completed physical `pages` [n] (int64). A page is sealed again after it was reused."""

    def select(self, layer: int, q: Array, batch: Any) -> PageSet:
        """Which of the pages that they may leave unread the rows `batch.sparse_rows` read. There is at least one
        such row.

        q: queries [rows, heads, head_dim] of the whole batch.
        """
        return ALL

    def ahead(self, layer: int, hidden: Array, batch: Any) -> PageSet:
        """A guess of what `select` will return in `layer`, from the hidden state one layer earlier."""
        return ALL


class Residency:
    """Where pages of KV live, and when they are moved. Default: everything is always on the device."""

    def put(self, pages: IntArray) -> None:
        """The completed `pages` [n] may be moved away from the device."""

    def fetch(self, layer: int, pages: PageSet, batch: Any, wait: bool) -> None:
        """Bring `pages` to the device. If `wait`, before this returns; else they are a guess and may come
        later."""

    def drop(self, pages: IntArray) -> None:
        """`pages` [n] (int64) will hold something else. Copies of them elsewhere are no longer valid."""


class Format(Protocol):
    """How a weight is stored and multiplied. Default: `layers.linear.Dense`."""

    def linear(self, weights: Sequence[Any], bias: Sequence[Any]) -> Callable[[Array], Array]:
        """x [rows, in] -> [rows, out] for stored weights [out_i, in] stacked by rows, with biases or none."""
        ...


class Variant:
    """Score and mask expression of attention. Default: causal.

    It is written with operators and the functions of `dovetail.ops.template`, so that one definition can be
    evaluated on tensors and printed as a kernel. `head` is the query head. Positions and heads are whole numbers;
    as tensors (int64) they broadcast to the scores. Attributes may be numbers, variants, and sequences of numbers,
    which are read as `self.numbers[head]`. Methods are called on a copy, so they cannot change an attribute. No
    mask can make a query read a later key: attention adds causality to every mask.
    """

    def score(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        """The logit, from the scaled product of query and key."""
        return score

    def mask(self, q_pos: Array, k_pos: Array, head: Array) -> Array:
        """Whether the query at `q_pos` may read the key at `k_pos`."""
        return k_pos <= q_pos


@dataclass(frozen=True)
class SlidingWindow(Variant):
    """Of the keys that `inner` allows, only the last `window`, the query's own included (Mistral 7B, section 2).

    Raises ConfigError for a window below 1. For no window, use no SlidingWindow.
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


class Clock(Protocol):
    """The time by which requests are timed: seconds since a fixed point. It never goes back.

    There is no sleep, because nothing in the engine waits for a moment to come. Who lets virtual time pass moves
    its own clock: an executor in `run`, or a program that submits requests at given times.
    """

    def now(self) -> float: ...


class WallClock:
    """The host's time."""

    def now(self) -> float:
        return time.monotonic()


WALL_CLOCK = WallClock()


class Executor(Protocol):
    """Who runs a plan. Default: `runtime.executor.ModelExecutor`. `num_stages` is the program's length.

    `clock` is the time in which plans run. All times of requests are read from it. An executor of a technique may
    have `asks`, the seams of the model's side (`build.DEVICE_SIDE`) that it asks too; others are then refused.
    """

    num_stages: int
    clock: Clock

    def run(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True)
class Geometry:
    """The shape of the model, as far as techniques may know it."""

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
    """Text to measure a model on before the first request.

    text: tokens of the UTF-8 file of that name, or of a default text for "". ConfigError for a bad file.
    key: two engines have the same key only if their models compute the same numbers.
    """

    text: Callable[[str], Sequence[int]]
    key: Callable[[], str]


class Companion(Protocol):
    """A second program beside the model's, for guesses. `length` is its context in tokens, and it can read the
    tokens below `vocab_size`.

    `run` runs a plan on it: the result, and for each sampled row the probability of its token, or () where that is
    not known.
    """

    length: int
    vocab_size: int

    def run(self, plan: StepPlan) -> tuple[StepResult, Sequence[float]]: ...


class Companions(Protocol):
    """Who loads companions. `model`: another checkpoint with the same vocabulary, with KV of its own under the
    pool's page numbers; with `head`, int64 [n], it has logits of these tokens only, in this order. `first`: the
    model's first layers and its head, on the model's own KV. ConfigError or CapacityError where that cannot be."""

    def model(self, checkpoint: Any, head: IntArray | None) -> Companion: ...
    def first(self, layers: int) -> Companion: ...


@dataclass
class Site:
    """What a technique is built from.

    `model`, `kv` and `companions` are of the device side, set after the techniques are built. A technique
    that needs them keeps the site and reads them when it is asked; a host-only run has none. The functions in
    `ready` are called when they are set, before the first request. They may measure the model on `calibration`.
    """

    geometry: Geometry
    page_size: int
    pool: PagePool
    model: Any = None
    kv: Any = None
    device: str = "cpu"
    calibration: Calibration | None = None
    clock: Clock = WALL_CLOCK  # by which techniques time what they do themselves
    companions: Companions | None = None
    ready: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Seams:
    """Every seam, filled. The device side gives `format` and `executor` if no technique does."""

    policy: Policy = field(default_factory=Policy)
    drafter: Drafter = field(default_factory=Drafter)
    rows: RowFilter = field(default_factory=RowFilter)
    codec: Codec = field(default_factory=Codec)
    selector: Selector = field(default_factory=Selector)
    residency: Residency = field(default_factory=Residency)
    variant: Variant = field(default_factory=Variant)
    reuse: Reuse | None = None
    format: Format | None = None
    executor: Executor | None = None


SEAMS = tuple(Seams.__dataclass_fields__)
