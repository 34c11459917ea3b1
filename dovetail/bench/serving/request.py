"""One request of a load: how it is sent, and what the client saw of its answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


class Endpoint(enum.StrEnum):
    """Which of the API's two ways to generate text is used."""

    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True)
class Asking:
    """How every request is sent. `timeout` is seconds for a whole answer."""

    endpoint: Endpoint = Endpoint.COMPLETIONS
    ignore_eos: bool = True
    timeout: float = 600.0
    api_key: str | None = None


@dataclass
class Record:
    """Times are seconds since the load's start on a monotonic clock.

    arrival: when the request was due. sent: when it was sent. chunks: when each chunk with text came. ended: when
    the answer's stream ended. Token counts are the server's `usage`, None if it sent none. error: the kind of
    failure, None for a whole answer; message: its text.
    """

    arrival: float
    input_tokens: int
    max_tokens: int
    sent: float | None = None
    chunks: list[float] = field(default_factory=list)
    ended: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finished: bool = False
    error: str | None = None
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None and self.ended is not None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer: the server's count, else chunks with text."""
        return len(self.chunks) if self.completion_tokens is None else self.completion_tokens

    @property
    def lateness(self) -> float | None:
        """Seconds from when it was due to when it was sent."""
        return None if self.sent is None else self.sent - self.arrival

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from sending to the first chunk with text."""
        return self.chunks[0] - self.sent if self.chunks and self.sent is not None else None

    @property
    def e2e(self) -> float | None:
        """Seconds from sending to the end of the answer."""
        return self.ended - self.sent if self.ended is not None and self.sent is not None else None

    @property
    def tpot(self) -> float | None:
        """Time per output token: seconds per token after the first; None for answers of one token."""
        if self.ttft is None or self.e2e is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: seconds between chunks with text."""
        return [b - a for a, b in pairwise(self.chunks)]

    def to_dict(self) -> dict[str, Any]:
        """The record as a line of a file: seconds and tokens."""
        return {
            "arrival_s": self.arrival,
            "lateness_s": self.lateness,
            "input_tokens": self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens,
            "max_tokens": self.max_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "ttft_s": self.ttft,
            "tpot_s": self.tpot,
            "e2e_s": self.e2e,
            "itl_s": [round(gap, 6) for gap in self.itl],
            "error": self.error,
            "message": self.message or None,
        }
