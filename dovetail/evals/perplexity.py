"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, through the path that serves.

The whole corpus is tokenized and cut into windows that do not overlap. Every token of a window but the first is
scored, and the result is the mean of the windows' means. Rows from `dense` on are read as generated text is, so a
technique that leaves out part of the context does so there.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError
from dovetail.evals.scoring import score
from dovetail.evals.suite import Result, Suite, at_least
from dovetail.text.corpus import DEFAULT, corpus

if TYPE_CHECKING:
    from dovetail.llm import LLM

WINDOW = 2048
WINDOWS = 12
DENSE = 512


@dataclass(frozen=True)
class Perplexity(Suite):
    """Options: `window` tokens, `windows` from the start of `corpus` (default: 12, or all if there are fewer);
    the first `dense` tokens of a window read everything (default: 512, or a quarter of a shorter window)."""

    corpus: str = DEFAULT
    data: Path | None = None
    window: int | None = None
    windows: int | None = None
    dense: int | None = None

    def __post_init__(self) -> None:
        at_least(1, windows=self.windows)
        at_least(2, window=self.window)

    name = "perplexity"
    quality = "perplexity"
    higher = False
    columns = ("perplexity", "decode_tokens_per_s")

    def measure(self, llm: LLM, reference: Any) -> Result:
        text = corpus(self.corpus, self.data)
        cut = windows(llm.tokenizer.encode(text.text), self._size(llm), self.windows, text.name)
        size = len(cut[0])
        dense = self.dense if self.dense is not None else min(DENSE, size // 4)
        if not 0 <= dense < size - 1:
            raise ConfigError(
                f"--dense must leave a token of the window's {size} to read through techniques, got {dense}"
            )
        start = time.perf_counter()
        scores = score(llm, cut, [1] * len(cut), [dense] * len(cut))
        seconds = time.perf_counter() - start
        means = [-statistics.fmean(s) for s in scores]
        later = [-statistics.fmean(s[dense:]) for s in scores]  # s[i] comes from row i
        tokens = sum(map(len, scores))
        return {
            "corpus": text.name,
            "corpus_sha256": text.digest,
            "window": size,
            "windows": len(cut),
            "dense": dense,
            "tokens": tokens,
            "perplexity": math.exp(statistics.fmean(means)),
            "perplexity_after_dense": math.exp(statistics.fmean(later)),
            "window_perplexity": [math.exp(m) for m in means],
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }

    def context(self, result: Result) -> int:
        return int(result["window"])

    def text(self, result: Result) -> str:
        r = result
        return (
            f"perplexity {r['perplexity']:.4f}: {r['windows']} windows of {r['window']} tokens of {r['corpus']}, "
            f"{r['seconds']:.1f} s, {r['tokens_per_s']:.0f} tokens/s"
        )

    def _size(self, llm: LLM) -> int:
        """The size of a window. A given size is kept or refused; the default is lowered to the model's context."""
        limit = llm.config.max_model_len
        size = min(WINDOW, limit) if self.window is None else self.window
        if not 2 <= size <= limit:
            raise ConfigError(f"--window must be between 2 and the context of {limit} tokens, got {size}")
        return size


def windows(ids: list[int], size: int, count: int | None, name: str) -> list[list[int]]:
    """The first `count` windows of `size` tokens. ConfigError if there are not that many."""
    whole = len(ids) // size
    if whole < 1:
        raise ConfigError(f"corpus {name} has {len(ids)} tokens, less than one window of {size}; lower --window")
    if count is not None and not 1 <= count <= whole:
        raise ConfigError(f"corpus {name} has {whole} windows of {size} tokens, and --windows asks for {count}")
    return [ids[i * size : (i + 1) * size] for i in range(count or min(WINDOWS, whole))]
