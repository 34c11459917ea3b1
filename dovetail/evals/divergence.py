"""How far an engine's next-token distributions are from a reference's, along the reference's own greedy text.

The reference continues each prompt greedily. Then both engines read prompt and continuation (teacher forcing).
Rows from the end of the prompt on, or from `dense` on, are read as generated text is. For each generated token the
result is KL(reference || engine) in nats over the whole vocabulary, and whether both would choose the same token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.core.errors import ConfigError, RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Probe
from dovetail.evals.perplexity import windows
from dovetail.evals.suite import Result, Suite, at_least
from dovetail.text.corpus import DEFAULT, corpus

if TYPE_CHECKING:
    from dovetail.llm import LLM

WINDOW, WINDOWS, TOKENS = 1024, 8, 128
ROWS = 32  # rows of logits in float64 at a time


@dataclass(frozen=True)
class Reference:
    """Texts of one length, whose first `prompt` tokens are given, and their logits, float32 [texts x generated
    tokens, vocabulary]. The logits are in a temporary file that is deleted with this object."""

    texts: list[list[int]]
    prompt: int
    logits: Any


@dataclass(frozen=True)
class Divergence(Suite):
    """Options: prompts are the first `windows` windows of `window` tokens of `corpus`; `tokens` are generated and
    compared after each; the first `dense` tokens of a prompt read everything (default: all of them)."""

    corpus: str = DEFAULT
    data: Path | None = None
    window: int = WINDOW
    windows: int | None = None
    tokens: int = TOKENS
    dense: int | None = None

    def __post_init__(self) -> None:
        at_least(1, window=self.window, windows=self.windows, tokens=self.tokens)

    name = "divergence"
    quality = "kl_mean"
    higher = False
    columns = ("kl_mean", "kl_p99", "top1_agreement", "decode_tokens_per_s")
    compares = True

    def refer(self, llm: LLM) -> Reference:
        if self.tokens < 1 or self.window < 1 or self.window + self.tokens >= llm.config.max_model_len:
            raise ConfigError(
                f"--window {self.window} and --tokens {self.tokens} must be at least 1, and together less than "
                f"the context of {llm.config.max_model_len} tokens"
            )
        if self.dense is not None and not 0 <= self.dense <= self.window:
            raise ConfigError(f"--dense must be from 0 to the prompt's {self.window} tokens, got {self.dense}")
        text = corpus(self.corpus, self.data)
        count = self.windows
        prompts = windows(llm.tokenizer.encode(text.text), self.window, count, text.name)[: count or WINDOWS]
        params = SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True)
        texts = [p + o.outputs[0].token_ids for p, o in zip(prompts, llm.generate(prompts, params), strict=True)]
        logits = _room(len(texts) * self.tokens, llm)

        def keep(first: int, rows: np.ndarray) -> None:
            logits[first : first + len(rows)] = rows

        _watch(llm, texts, (self.window, self.window), keep)
        return Reference(texts, self.window, logits)

    def measure(self, llm: LLM, reference: Reference) -> Result:
        vocabulary = reference.logits.shape[1]
        if llm.checkpoint.config.vocab_size != vocabulary:
            raise ConfigError(
                f"the reference knows {vocabulary} tokens, {llm.checkpoint.config.vocab_size} are here"
            )
        kl = np.full(len(reference.logits), np.nan)
        same = np.zeros(len(kl), bool)

        comparing = 0.0

        def compare(first: int, rows: np.ndarray) -> None:
            nonlocal comparing
            start = time.perf_counter()
            for i in range(0, len(rows), ROWS):
                at = slice(first + i, first + min(i + ROWS, len(rows)))
                kl[at], same[at] = divergence(reference.logits[at], rows[i : i + ROWS])
            comparing += time.perf_counter() - start

        dense = reference.prompt if self.dense is None else self.dense
        start = time.perf_counter()
        _watch(llm, reference.texts, (reference.prompt, dense), compare)
        seconds = time.perf_counter() - start - comparing
        return {
            "corpus": self.corpus,
            "window": reference.prompt,
            "dense": dense,
            "windows": len(reference.texts),
            "tokens": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top1_agreement": float(same.mean()),
            "seconds": seconds,
            "tokens_per_s": len(kl) / seconds,
        }

    def context(self, result: Result) -> int:
        return int(result["window"])

    def text(self, result: Result) -> str:
        r = result
        return (
            f"KL mean {r['kl_mean']:.3g}, median {r['kl_median']:.3g}, p99 {r['kl_p99']:.3g}, "
            f"max {r['kl_max']:.3g} nats; same top token {r['top1_agreement']:.2%}: {r['tokens']} tokens after "
            f"{r['windows']} prompts of {r['window']} tokens of {r['corpus']}"
        )


def divergence(reference: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For logits [rows, vocabulary]: KL(reference || logits) in nats, float64 [rows], and whether both have the
    same likeliest token [rows]."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    kl = (np.exp(p) * np.where(np.isneginf(p), 0, p - q)).sum(-1)
    return np.maximum(kl, 0), reference.argmax(-1) == logits.argmax(-1)  # rounding may leave it just below 0


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    found: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found


def _watch(
    llm: LLM, texts: Sequence[list[int]], parts: tuple[int, int], see: Callable[[int, np.ndarray], None]
) -> None:
    """Read the texts. `see` is called with rows of logits that predict generated tokens, and the number of the
    first of these rows, counted over all texts. parts: tokens of a prompt, and how many of them read
    everything."""
    prompt, dense = parts
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    seen = [0] * len(texts)

    def look(i: int, position: int, rows: Any) -> None:
        each = len(texts[i]) - prompt
        see(i * each + position - (prompt - 1), rows.astype(np.float32, copy=False))
        seen[i] += len(rows)

    probes = [Probe(dense, prompt, partial(look, i)) for i in range(len(texts))]
    outputs = llm.generate(list(texts), params, probes=probes)
    for text, output, rows in zip(texts, outputs, seen, strict=True):
        if output.error or rows != len(text) - prompt:
            raise RequestError(f"a text could not be scored: {output.error or f'{rows} rows came back'}")


def _room(rows: int, llm: LLM) -> Any:
    """Room for rows of logits in a file without a name."""
    from dovetail.host.files import require_space

    vocabulary = llm.checkpoint.config.vocab_size
    folder = Path(tempfile.gettempdir())
    require_space(folder, rows * vocabulary * 4, "the reference's logits", "set TMPDIR to a disk with room")
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=(rows, vocabulary))
