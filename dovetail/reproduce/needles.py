"""Whether a technique finds what reading everything finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.evals.corpus import DEFAULT
from dovetail.evals.needle import Needle
from dovetail.llm import LLM
from dovetail.reproduce.claim import Bar
from dovetail.units import parse_size

NEEDED = 0.95  # of what the plain engine finds


@dataclass(frozen=True)
class Needles:
    """A grid of `lengths` by `depths` (as in `dovetail eval --suite needle`) with `trials` trials in each cell."""

    model: str
    lengths: str
    depths: str
    trials: int
    corpus: str = DEFAULT

    def __str__(self) -> str:
        return (
            f"{self.model}, one needle in {self.corpus}, {self.lengths} tokens, depths "
            f"{self.depths} %, {self.trials} trials a cell; the question is read through the technique too"
        )

    def found(self, use: Sequence[str] = (), slow_tier: bool = False) -> Found:
        """RuntimeError for a technique that did nothing."""
        options: dict[str, Any] = {}
        longest = max(map(int, self.lengths.split(","))) + ROOM
        if slow_tier:
            options = {
                "kv_offloading_size": parse_size("1GiB"), "kv_offloading_backend": "host",
                "kv_memory": parse_size("1100MiB"), "max_num_seqs": 8,
            }  # fmt: skip
        llm = LLM(self.model, use=use, max_model_len=longest, kv_cache_dtype="bf16", **options)
        suite = Needle(corpus=self.corpus, lengths=self.lengths, depths=self.depths, trials=self.trials)
        result = suite.measure(llm, None)
        for name, did in llm.activity().items():
            if not did:
                raise RuntimeError(f"{name} did nothing: what it finds would mean nothing")
        grid = result["grid"]
        return Found(sum(c["correct"] for c in grid), sum(c["trials"] for c in grid))


ROOM = 64  # tokens of an answer, at least


@dataclass(frozen=True)
class Found:
    """Needles found in so many trials."""

    correct: int
    trials: int

    def __str__(self) -> str:
        return f"{self.correct} of {self.trials}"

    def bar(self, dense: Found) -> Bar | None:
        """Nothing can be said where `dense`, which reads everything, found nothing."""
        if not dense.correct:
            return None
        needs = f"at least {NEEDED:.0%} of what reading everything finds"
        return Bar(needs, self.correct >= NEEDED * dense.correct)


def sink_window(budget: int) -> str:
    """The baseline that reads the first and the last tokens, as many as `budget` in all."""
    return f"sink-window:sink=16,window={budget - 16}"
