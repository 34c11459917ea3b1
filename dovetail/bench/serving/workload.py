"""What a load consists of: how many requests, when they come, how long they are, and their prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any

from dovetail.bench.serving.arrivals import Arrivals
from dovetail.bench.serving.trace import BLOCK, Trace, TraceRequest
from dovetail.bench.serving.vocabulary import Prompt, Vocabulary
from dovetail.core.errors import ConfigError

LEAST = 100  # the fewest requests of a load if the user does not say how many
SECONDS = 30.0  # of arrivals, likewise; long compared with answers that are open when the last request is sent
_LENGTHS = re.compile(r"(\d{1,8})(?::(\d{1,8}))?", re.ASCII)


@dataclass(frozen=True)
class Lengths:
    """Tokens, uniform from `low` to `high`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """`128` or `64:256`. ConfigError names `option`."""
        match = _LENGTHS.fullmatch(text.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(f"{option} {text}: write tokens as 128, or a range as 64:256")
        return cls(low, high)

    def draw(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class LoadRequest:
    """A request to send `arrival` seconds after the start. `input_tokens` is what `prompt` was made to have."""

    arrival: float
    prompt: Prompt
    input_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Limits:
    """Limits of a load: requests, seconds of arrivals, tokens of a prompt, tokens of prompt and answer together;
    and how many rows of a trace are read for all loads together.
    """

    requests: int | None = None
    duration: float | None = None
    input_tokens: int | None = None
    context: int | None = None
    rows: int | None = None

    def of(self, rate: float) -> int | None:
        """Requests at a rate. If neither a number nor a time was given, enough to tell saturation from the load's
        end."""
        return default_requests(rate) if self.requests is None and self.duration is None else self.requests

    def admits(self, row: TraceRequest) -> bool:
        """Whether a server with this context can answer it."""
        return row.input_tokens <= (self.input_tokens or math.inf) and (
            row.input_tokens + row.output_tokens <= (self.context or math.inf)
        )


def default_requests(rate: float) -> int:
    """As many as arrive in SECONDS, but not fewer than LEAST; LEAST where all arrive at once."""
    return LEAST if math.isinf(rate) else max(LEAST, math.ceil(SECONDS * rate))


class Rows:
    """The requests of a trace that the limits admit, with lengths scaled by `scale`. Counts the `skipped` ones.

    Blocks are scaled to a whole number of tokens, and lengths with them. So what was shared stays shared.
    """

    def __init__(self, trace: Trace, limits: Limits, scale: float) -> None:
        self.trace = trace
        self.block = max(1, round(BLOCK * scale))
        self.skipped = 0
        self._scale = scale
        self.found = sorted(islice(self._read(limits), limits.rows), key=lambda row: row.arrival)

    def _read(self, limits: Limits) -> Iterator[TraceRequest]:
        for row in self.trace:
            small = self._scaled(row)
            if limits.admits(small):
                yield small
            else:
                self.skipped += 1

    def _scaled(self, row: TraceRequest) -> TraceRequest:
        if row.prompt is not None:
            return row
        whole, part = divmod(row.input_tokens, BLOCK)
        size = whole * self.block + round(part * self.block / BLOCK)
        return replace(
            row, input_tokens=max(1, size), output_tokens=max(1, round(row.output_tokens * self._scale))
        )


@dataclass(frozen=True)
class Synthetic:
    """Requests of random lengths, without end, the same ones for the same seed."""

    input_tokens: Lengths
    output_tokens: Lengths
    seed: int

    def __iter__(self) -> Iterator[TraceRequest]:
        rng = Random(f"{self.seed}:lengths")
        while True:
            yield TraceRequest(self.input_tokens.draw(rng), self.output_tokens.draw(rng))


@dataclass(frozen=True)
class Workload:
    """A load that can be asked for at any rate.

    Every load of a workload has the same lengths and new prompts. `point` numbers the loads, and tokens depend on
    it, so that what one load left in a prefix cache does not help the next. They also depend on `salt`, for a
    server that outlives this run. Texts of a trace cannot be made new. There each load takes the rows after those
    that are `taken`, and begins again after the last row.
    """

    rows: Sequence[TraceRequest] | Synthetic
    vocabulary: Vocabulary
    limits: Limits
    seed: int
    block: int = BLOCK
    salt: str = ""

    @property
    def shares(self) -> bool:
        """Whether the prompts share prefixes on purpose."""
        return not isinstance(self.rows, Synthetic) and any(row.blocks for row in self.rows)

    def repeats(self, taken: int) -> bool:
        """Whether loads that have taken so many rows used a text twice."""
        return not isinstance(self.rows, Synthetic) and self._texts and taken > len(self.rows)

    def at(self, arrivals: Arrivals, rate: float, point: int, taken: int = 0) -> list[LoadRequest]:
        """Requests at times drawn from `arrivals`, `rate` per second."""
        times = arrivals.times(rate, Random(f"{self.seed}:arrivals"))
        return self._load(islice(times, self.limits.of(rate)), point, taken)

    def replay(self, speed: float, point: int) -> list[LoadRequest]:
        """Requests at the trace's own times, `speed` times as fast."""
        assert not isinstance(self.rows, Synthetic)
        first = self.rows[0].arrival
        times = ((row.arrival - first) / speed for row in self.rows)
        return self._load(islice(times, self.limits.requests), point, 0)

    def warm_up(self, count: int) -> list[LoadRequest]:
        """`count` requests like the first ones. No other load has their prompts, unless prompts are texts."""
        prompts = _Prompts(self.vocabulary, self.block, f"{self.seed}{self.salt}:warm-up")
        rows = islice(self.rows, count)
        return [_request(prompts, i, 0.0, row) for i, row in enumerate(rows)]

    @property
    def _texts(self) -> bool:
        return not isinstance(self.rows, Synthetic) and any(row.prompt is not None for row in self.rows)

    def _after(self, taken: int) -> Iterable[TraceRequest]:
        """The rows that a load goes through."""
        if isinstance(self.rows, Synthetic) or not self._texts:
            return self.rows
        first = taken % len(self.rows)
        return [*self.rows[first:], *self.rows[:first]]

    def _load(self, times: Iterable[float], point: int, taken: int) -> list[LoadRequest]:
        prompts = _Prompts(self.vocabulary, self.block, f"{self.seed}{self.salt}:{point}")
        found: list[LoadRequest] = []
        for at, row in zip(times, self._after(taken), strict=False):
            if at > (self.limits.duration or math.inf):
                break
            found.append(_request(prompts, len(found), at, row))
        return found


def _request(prompts: _Prompts, index: int, arrival: float, row: TraceRequest) -> LoadRequest:
    return LoadRequest(arrival, prompts.of(row, index), row.input_tokens, row.output_tokens)


class _Prompts:
    """Prompts of one load: a trace's text, or random items that are the same wherever a block's id is the same."""

    def __init__(self, vocabulary: Vocabulary, block: int, seed: str) -> None:
        self.vocabulary = vocabulary
        self.block = block
        self.seed = seed
        self._blocks: dict[int, list[Any]] = {}

    def of(self, row: TraceRequest, index: int) -> Prompt:
        if row.prompt is not None:
            return self.vocabulary.given(row.prompt)
        items = [item for block in row.blocks for item in self._of_block(block)][: row.input_tokens]
        rng = Random(f"{self.seed}:request {index}")
        return self.vocabulary.join(items + self.vocabulary.draw(rng, row.input_tokens - len(items)))

    def _of_block(self, block: int) -> list[Any]:
        if block not in self._blocks:
            self._blocks[block] = self.vocabulary.draw(Random(f"{self.seed}:block {block}"), self.block)
        return self._blocks[block]


def check_synthetic(rows: Synthetic, limits: Limits) -> None:
    """ConfigError if the longest request cannot fit the context, because each such request would be refused."""
    need = rows.input_tokens.high + rows.output_tokens.high
    if limits.context is not None and need > limits.context:
        raise ConfigError(
            f"{rows.input_tokens.high} input and {rows.output_tokens.high} output tokens are {need}, but the "
            f"server's context holds {limits.context}; give smaller --input-tokens or --output-tokens"
        )
