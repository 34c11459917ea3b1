"""Whether a technique finds the needles that reading everything finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dovetail.bench.verdict import Bar, Decision, decide_share
from dovetail.evals.needle import Needle
from dovetail.host.units import parse_size
from dovetail.llm import LLM
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.runner import must_have_acted
from dovetail.techniques import technique
from dovetail.text.corpus import DEFAULT

NAME = "needles"
KEPT = Bar(0.95, "at least 95% of what reading everything finds")
ROOM = 64  # tokens of an answer, at least
SINK = 16  # first tokens that the window's baseline reads


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
        """Ask for the needles with techniques `use`. RuntimeError if a technique did nothing."""
        options: dict[str, Any] = {}
        longest = max(map(int, self.lengths.split(","))) + ROOM
        if slow_tier:
            options = {
                "kv_offloading_size": parse_size("1GiB"), "kv_offloading_backend": "host",
                "kv_memory": parse_size("1100MiB"), "max_num_seqs": 8,
            }  # fmt: skip
        llm = LLM(self.model, use=use, max_model_len=longest, kv_cache_dtype="bf16", **options)
        suite = Needle(corpus=self.corpus, lengths=self.lengths, depths=self.depths, trials=self.trials)
        grid = suite.measure(llm, None)["grid"]
        must_have_acted(llm)
        return Found(tuple(recall == 1 for cell in grid for recall in cell["recalls"]))


@dataclass(frozen=True)
class Found:
    """Whether the needle of each trial was found. All subjects have the same trials in the same order."""

    hits: tuple[bool, ...]

    def __str__(self) -> str:
        return f"{sum(self.hits)} of {len(self.hits)}"

    def bar(self, dense: Found) -> Decision | None:
        """Judges the share of needles found here among those that `dense`, which reads everything, found. None if
        it found none. Cells of one trial share text and numbers, so the interval is somewhat too narrow."""
        kept = [hit for hit, there in zip(self.hits, dense.hits, strict=True) if there]
        return decide_share(KEPT, sum(kept), len(kept)) if kept else None


@dataclass(frozen=True)
class Subject:
    """Who looks for needles. use: a technique with a budget. paper, why: as in `Claim`. slow_tier: whether it
    needs one. beside: other techniques to compare with, by their names in the result."""

    use: str
    paper: str
    why: str
    slow_tier: bool = False
    beside: Mapping[str, str] = field(default_factory=dict)


def experiment(grid: Needles, subject: Subject) -> Experiment:
    return Experiment("needles", (NAME,), partial(claims, grid, subject))


def claims(grid: Needles, subject: Subject) -> Iterator[Claim]:
    """The subject compared with reading everything, and with a window of as many tokens as its budget."""
    recent = technique(subject.use).options["budget"] - SINK
    dense, ours = grid.found(), grid.found([subject.use], subject.slow_tier)
    beside = {**subject.beside, "the window": f"sink-window:sink={SINK},window={recent}"}
    found = [f"{name} {grid.found([use])}" for name, use in beside.items()]
    yield Claim(
        NAME,
        f"{grid}, {subject.use}; baseline: everything; and the first {SINK} and last {recent} tokens",
        subject.paper,
        f"{ours}, where {', '.join([f'reading everything finds {dense}', *found[:-1]])} and {found[-1]}",
        subject.why,
        bar=ours.bar(dense),
    )
