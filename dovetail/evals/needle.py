"""Needles in a haystack: whether the model finds a number that stands somewhere in a long context.

The result is a grid of context length by depth. A context is text of `corpus` with needles such as "The special
magic number is 524879." put in as paragraphs. The model completes the same sentence behind it. Everything is built
from tokens, so context and question together have exactly `length` tokens. Rows from the end of the context on are
read as generated text is. So the question and the answer both run through the techniques in use: if the question
read everything, the test would prove nothing.

Trial t of every cell has the same needles, and its text begins at the same place. So cells differ in length and
depth only, and the prefix cache holds most of what they share. A text shorter than the context is repeated, and
the result says so (`repeated`).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError
from dovetail.evals.haystack import haystack
from dovetail.evals.plots import draw_front, heat_maps
from dovetail.evals.retrieval import KEYS, VARIANTS, recall
from dovetail.evals.suite import Result, Suite
from dovetail.evals.trial import Trial, trial
from dovetail.setting import expanded
from dovetail.show.progress import counter
from dovetail.show.table import table
from dovetail.text.corpus import DEFAULT, corpus

if TYPE_CHECKING:
    from dovetail.llm import LLM

SHORTEST, STEP = 1024, 512  # the shortest default length, and what the longest one is a multiple of
NEEDLES = 4  # the default where a variant has several


@dataclass(frozen=True)
class Needle(Suite):
    """Options:

    lengths: tokens, as in 1024,2048 or 1024..8192 (doubling). Default: doubling from 1024 on, and the longest
    multiple of 512 that fits the context. depths: percent. trials: for each cell. variant, needles: as in
    `dovetail.evals.retrieval`; by default 4 needles where a variant has several. The first needle is at the cell's
    depth, the others are at random depths. corpus: the haystack.

    A cell's `correct` counts the trials in which every number was found; `recall` is the mean share found.
    `tokens` counts what was computed: generated tokens, and prompt tokens that were not in the prefix cache.
    """

    corpus: str = DEFAULT
    data: Path | None = None
    lengths: str | None = None
    depths: str = "0,25,50,75,100"
    trials: int = 5
    needles: int | None = None
    variant: str = "single"

    name = "needle"
    quality = "accuracy"
    columns = ("accuracy", "recall", "decode_tokens_per_s")
    wide = True

    def __post_init__(self) -> None:
        """ConfigError for options that are wrong for any model."""
        if self.variant not in VARIANTS:
            raise ConfigError(f"--variant '{self.variant}' is unknown; the known ones are {', '.join(VARIANTS)}")
        if self.trials < 1:
            raise ConfigError(f"--trials must be at least 1, got {self.trials}")
        least, most = (1, 1) if self.variant == "single" else (2, len(KEYS))
        if not least <= self.count <= most:
            allowed = "1" if least == most else f"{least} to {most}"
            raise ConfigError(f"--variant {self.variant} takes {allowed} needles, and --needles is {self.count}")
        if max(self.percents) > 100:
            raise ConfigError(f"--depths are percent, 0 to 100, got {max(self.percents)}")
        if self.lengths is not None:
            _numbers("--lengths", self.lengths)

    @property
    def count(self) -> int:
        return self.needles if self.needles is not None else 1 if self.variant == "single" else NEEDLES

    @property
    def percents(self) -> list[int]:
        return _numbers("--depths", self.depths)

    def measure(self, llm: LLM, reference: Any) -> Result:
        text = corpus(self.corpus, self.data)
        hay = haystack(text.text, text.name, llm.tokenizer)
        trials = [trial((self.variant, self.count), llm, hay, number) for number in range(self.trials)]
        lengths = self._fitting(llm, trials)
        scores: dict[tuple[int, int], list[float]] = {(n, d): [] for n in lengths for d in self.percents}
        tokens = 0
        start = time.perf_counter()
        with counter("trials", len(scores) * len(trials)) as advance:
            for each in trials:
                # The longest and deepest comes first; the others take what they share from the prefix cache.
                for length in reversed(lengths):
                    for depth, output in each.run(llm, length, self.percents[::-1]):
                        answer = output.outputs[0]
                        scores[length, depth].append(recall(each.task.values, answer.text))
                        tokens += length - output.num_cached_tokens + len(answer.token_ids)
                    advance(len(self.percents))
        seconds = time.perf_counter() - start
        return {
            "corpus": text.name,
            "corpus_sha256": text.digest,
            "repeated": lengths[-1] > len(hay.tokens),
            "variant": self.variant,
            "needles": self.count,
            **_summary(scores),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }

    def context(self, result: Result) -> int:
        return int(max(row["length"] for row in result["grid"]))

    def share(self, result: Result, key: str) -> tuple[float, int] | None:
        trials = sum(row["trials"] for row in result["grid"])
        return (result[key] * trials, trials) if key in ("accuracy", "recall") else None

    def text(self, result: Result) -> str:
        r = result
        cells = {(row["length"], row["depth"]): f"{row['correct']}/{row['trials']}" for row in r["grid"]}
        lengths, depths = (sorted({row[key] for row in r["grid"]}) for key in ("length", "depth"))
        rows = [(n, *(cells[n, d] for d in depths)) for n in lengths]
        correct, trials = (sum(row[key] for row in r["grid"]) for key in ("correct", "trials"))
        several = f", {r['recall']:.1%} of the numbers" if r["needles"] > 1 else ""
        return (
            f"{table(('tokens', *(f'{d}%' for d in depths)), rows)}\n"
            f"accuracy {r['accuracy']:.1%} ({correct} of {trials}){several}: {_task(r)}, "
            f"{r['seconds']:.1f} s, {r['tokens_per_s']:.0f} tokens/s"
        )

    def draw(self, results: list[Result]) -> Any:
        """A heat map for each result; with several results also quality against speed."""
        measured = [r for r in results if "grid" in r]
        maps = [(f"{r['model']}, {r['setting']}: {_task(r)}", r["grid"]) for r in measured]
        return heat_maps(maps, (lambda axes: draw_front(axes, self, results)) if len(results) > 1 else None)

    def _fitting(self, llm: LLM, trials: list[Trial]) -> list[int]:
        """The lengths in order. ConfigError for one that does not fit the context, or leaves no room for text."""
        limit, room = llm.config.max_model_len, max(t.room for t in trials)
        if self.lengths is None:
            lengths = _default_lengths(limit - room)
        else:
            lengths = _numbers("--lengths", self.lengths)
        least = max(t.fixed for t in trials) + 1
        if lengths[-1] > limit - room:
            raise ConfigError(
                f"--lengths: {lengths[-1]} tokens and {room} of answer are more than the context of {limit}; "
                f"the longest that fits is {limit - room}"
            )
        if lengths[0] < least:
            raise ConfigError(
                f"--lengths: {lengths[0]} tokens are too few for {self.count} needles and the question, "
                f"which take {least} with a token of text"
            )
        return lengths


def _numbers(flag: str, text: str) -> list[int]:
    """`512,1024..4096` -> 512 1024 2048 4096, in order, each once. ConfigError for anything else."""
    found = [n for part in text.split(",") for n in expanded(part.strip(), text)]
    for n in found:
        if not n.isdecimal():
            raise ConfigError(f"{flag} '{text}': '{n}' is not a whole number; write them as in 0,50 or 1024..8192")
    return sorted({int(n) for n in found})


def _default_lengths(most: int) -> list[int]:
    longest = most // STEP * STEP
    if not longest:
        raise ConfigError(f"the context has no room for {STEP} tokens and an answer; give shorter --lengths")
    doubled = []
    length = SHORTEST
    while length <= most:
        doubled.append(length)
        length *= 2
    return sorted({*doubled, longest})


def _summary(scores: dict[tuple[int, int], list[float]]) -> Result:
    grid = [
        {
            "length": length,
            "depth": depth,
            "trials": len(cell),
            "correct": cell.count(1.0),
            "recall": statistics.fmean(cell),
            "recalls": cell,
        }
        for (length, depth), cell in scores.items()
    ]
    every = [score for cell in scores.values() for score in cell]
    return {"grid": grid, "accuracy": every.count(1.0) / len(every), "recall": statistics.fmean(every)}


def _task(result: Result) -> str:
    needles = f"{result['needles']} needle{'s' if result['needles'] > 1 else ''}"
    return f"{result['variant']}, {needles} in {result['corpus']}{' (repeated)' if result['repeated'] else ''}"
