"""What a machine is asked to do: how long prompts and answers are, and how many requests run at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dovetail.bench.serving.trace import Trace
from dovetail.bench.serving.workload import Limits, Rows
from dovetail.core.errors import ConfigError, RequestError

TRACED = 32  # requests of a trace that count
CONCURRENCY = 8  # of a trace, whose times say nothing about this machine


@dataclass(frozen=True)
class Workload:
    """`requests` are the tokens of each prompt and of its answer. As many run at once as `concurrency` says, and
    the next one begins when one ends."""

    name: str
    requests: tuple[tuple[int, int], ...]
    concurrency: int

    @property
    def at_once(self) -> int:
        """Requests that can really run at once."""
        return min(self.concurrency, len(self.requests))

    @property
    def prompt_tokens(self) -> int:
        """Of a prompt, on average."""
        return round(statistics.fmean(prompt for prompt, _ in self.requests))

    @property
    def output_tokens(self) -> int:
        """Of an answer, on average."""
        return round(statistics.fmean(output for _, output in self.requests))

    @property
    def context(self) -> int:
        """Tokens behind which an answer is generated, on average."""
        return self.prompt_tokens + self.output_tokens // 2

    @property
    def longest(self) -> int:
        """Tokens of context that the longest request takes."""
        return max(prompt + output for prompt, output in self.requests)

    def seconds(self, prompt_rate: float, decode_rate: float) -> float:
        """The time of all requests, from tokens of prompts and of answers per second. An answer's first token
        comes with its prompt."""
        prompts = sum(prompt for prompt, _ in self.requests)
        outputs = sum(output - 1 for _, output in self.requests)
        return prompts / prompt_rate + outputs / decode_rate

    def __str__(self) -> str:
        mean = "" if len(set(self.requests)) == 1 else " on average"
        return (
            f"{self.name}: {len(self.requests)} x ({self.prompt_tokens} + {self.output_tokens} tokens{mean}), "
            f"{self.at_once} at once"
        )


def synthetic(prompt_tokens: int, output_tokens: int, concurrency: int, name: str = "given") -> Workload:
    """As many equal requests as run at once. ConfigError for numbers below 1."""
    for flag, value in (
        ("--prompt-tokens", prompt_tokens),
        ("--output-tokens", output_tokens),
        ("--concurrency", concurrency),
    ):
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    return Workload(name, ((prompt_tokens, output_tokens),) * concurrency, concurrency)


BUILT_IN = {
    "chat": synthetic(256, 256, 1, "chat"),
    "summarise": synthetic(1024, 64, 4, "summarise"),
    "batch": synthetic(128, 128, 32, "batch"),
}


def traced(path: Path, concurrency: int, limits: Limits, count: Callable[[str], int]) -> tuple[Workload, Rows]:
    """The first requests of a trace that fit the limits, and its rows. `count` gives the tokens of a text.

    RequestError if it is no trace, or if no request fits.
    """
    rows = Rows(Trace(path, count), limits, 1.0)
    requests = tuple((row.input_tokens, row.output_tokens) for row in islice(rows.found, limits.rows))
    if not requests:
        raise RequestError(
            f"{path}: none of its requests can be used: {rows.skipped} are longer than the context of "
            f"{limits.context} tokens, {rows.trace.broken} are broken"
        )
    return Workload(path.name, requests, concurrency), rows
