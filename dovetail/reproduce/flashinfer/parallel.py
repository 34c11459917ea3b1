"""Parallel generation: n answers to one prompt through the whole engine (FlashInfer, section 4.4)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from dovetail.bench.engine.parallel import ParallelGeneration, Steps
from dovetail.bench.kernels.attention import Kernels
from dovetail.bench.rounds import Ratio, Turns
from dovetail.bench.verdict import decide_exact
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.flashinfer.effort import Effort

PEAK = 4  # the n of the paper's largest gain
KV_READ = "parallel generation, KV read"

_FIGURE_10 = "section 4.4, figure 10 (Llama 3.1 8B / 70B, H100, MLC-Engine, ShareGPT, 16 requests a second): "
_STEP = (
    "A step of this model is mostly products with its weights, and a layer's prompt stays in the CPU's caches "
    "from one answer to the next, so that reading it again costs little."
)


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    each = [_each(n) for n in effort.streams]
    first = [_first(n) for n in effort.streams if n == PEAK]
    return Experiment("parallel generation", (*each, *first, KV_READ), partial(measure, effort, kernels))


def _each(n: int) -> str:
    return f"parallel generation, n={n}, each token"


def _first(n: int) -> str:
    return f"parallel generation, n={n}, first token"


def measure(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """For every n, the prompt's KV read once for all, and once for each answer."""
    generation = ParallelGeneration(effort.model, effort.prompt_tokens)
    setting = (
        f"{effort.model}, a prompt of {effort.prompt_tokens} tokens, {effort.new_tokens} new ones of each answer, "
        f"{kernels.threads} threads; baseline: the same engine without the cascade"
    )
    runs = {}
    for n in effort.streams:
        runs[n] = once, each = _in_turns(generation, n, effort)
        yield _each_token(n, setting, once, each)
        if n == PEAK:
            yield _first_token(n, setting, once, each)
    yield _kv_read(setting, runs)


def _in_turns(generation: ParallelGeneration, n: int, effort: Effort) -> tuple[list[Steps], list[Steps]]:
    """With and without the cascade, `effort.generations` times each, after a run to warm up."""
    generation.run(n, 2, cascade=True)
    sides = [partial(generation.run, n, effort.new_tokens, cascade=cascade) for cascade in (True, False)]
    once, each = Turns(sides).until(effort.generations)
    return once, each


def _each_token(n: int, setting: str, once: list[Steps], each: list[Steps]) -> Claim:
    fast, slow = ([statistics.median(steps.each) for steps in runs] for runs in (once, each))
    ratio = Ratio.of(slow, fast)
    theirs: tuple[float, float] | None = None
    if n == PEAK:
        paper, theirs = "time per token 13.73 / 17.42 % shorter, the largest gain", (1 / 0.8627, 1 / 0.8258)
    elif n < PEAK:
        paper = "no gain below n = 4"
    else:
        paper = "a gain up to n = 32, smaller than at n = 4 (a plot without numbers)"
    return Claim(
        _each(n),
        setting,
        _FIGURE_10 + paper,
        f"{ratio} times as fast; a step takes {statistics.median(fast) * 1e3:.2f} ms instead of "
        f"{statistics.median(slow) * 1e3:.2f}",
        _STEP if n > 1 else "One answer shares nothing: both ways do the same.",
        ratio=ratio,
        paper_ratio=theirs,
    )


def _first_token(n: int, setting: str, once: list[Steps], each: list[Steps]) -> Claim:
    ratio = Ratio.of([steps.first for steps in each], [steps.first for steps in once])
    return Claim(
        _first(n),
        setting,
        _FIGURE_10 + "time to the first token 16.41 / 22.86 % shorter",
        f"{ratio} times as fast, until every answer has its first token",
        "One request on an idle engine: its prompt is computed once either way, and the cascade is in one step of "
        "this time. The paper's requests arrive at a fixed rate and wait less where steps are shorter.",
        ratio=ratio,
        paper_ratio=(1 / 0.8359, 1 / 0.7714),
    )


def _kv_read(setting: str, runs: dict[int, tuple[list[Steps], list[Steps]]]) -> Claim:
    fewer = ", ".join(f"{once[0].unshared / once[0].read:.2f} (n={n})" for n, (once, _) in runs.items())
    exact = all(steps.read == steps.expected for pair in runs.values() for some in pair for steps in some)
    return Claim(
        KV_READ,
        setting,
        "section 3.1.2: requests with a shared prefix read it once (no figures)",
        f"{fewer} times fewer tokens of KV read by the steps after the first token",
        "The plan shares whole chunks of 128 tokens; the prompt's end and what is generated is each answer's own.",
        bar=decide_exact("every step reads what sharing whole chunks leaves, to the token", exact),
    )
