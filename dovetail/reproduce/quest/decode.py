"""Decoding as a whole, and needles at its setting (Quest, sections 4.3 and 4.2)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from dovetail.bench.engine.points import Prompts, measure
from dovetail.bench.kernels.attention import Kernels
from dovetail.bench.rounds import Ratio, Turns, by_round
from dovetail.bench.verdict import Looks, at_least, decide
from dovetail.llm import LLM
from dovetail.reproduce import needles
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.needles import Subject
from dovetail.reproduce.quest.effort import Effort
from dovetail.reproduce.runner import must_have_acted

NEEDED = 1.8  # times as fast

_PAPER = (
    "section 4.3 (Llama-2-7B, 32K tokens, budget 2048, RTX 6000 Ada): a token 1.74 times as fast with fp16 "
    "weights, 2.23 with 4-bit weights"
)


NEEDLES = (
    "section 4.2 (passkeys at 10K, LongChat-7B): 65, 99, 99, 99 and 100 % at 32, 64, 128, 256 and 512 tokens, "
    "other methods at most 8 %"
)
_BOUND = (
    "The bound takes the best of each dimension from different tokens, and is far above what any token has; "
    "codes tell tokens apart."
)


def experiment(effort: Effort, kernels: Kernels) -> Experiment:
    return Experiment("decoding", (_name(effort),), partial(claims, effort, kernels))


def _name(effort: Effort) -> str:
    return f"decoding behind {effort.decode_context} tokens"


def claims(effort: Effort, kernels: Kernels) -> Iterator[Claim]:
    """The same prompt answered with and without quest, in turns. RuntimeError if nothing was left unread."""
    context, budget = effort.decode_context, effort.decode_budget
    uses: list[list[str]] = [[], [effort.use]]
    length = context + effort.new_tokens
    sides = [LLM(effort.model, use=use, kv_cache_dtype="bf16", max_model_len=length) for use in uses]
    prompt = Prompts(sides[0].session.vocab_size).take(context)
    for side in sides:
        measure(side, prompt, 2)  # the prompt is computed once; later it comes from the prefix cache
    turns = Turns([partial(_step, side, prompt, effort.new_tokens) for side in sides])
    decision = decide(at_least(NEEDED), Looks(effort.decode_rounds), lambda n: by_round(*turns.until(n)))
    must_have_acted(sides[1])
    ratio = Ratio.of(*turns.readings)
    dense, sparse = (statistics.median(some) * 1e3 for some in turns.readings)
    yield Claim(
        _name(effort),
        f"{effort.model}, random tokens, budget {budget}, chosen by {effort.score}, bf16 KV, one request, "
        f"{kernels.threads} threads; baseline: the same engine without quest",
        _PAPER,
        f"{ratio} times as fast: {sparse:.2f} ms instead of {dense:.2f}, {1e3 / sparse:.0f} tokens/s instead "
        f"of {1e3 / dense:.0f}",
        "Weights and the first two layers' KV are read as before, and summaries besides. The context is shorter "
        "than theirs, and the model's weights are few beside its KV.",
        ratio=ratio,
        paper_ratio=(1.74, 2.23),
        bar=decision,
    )


def _step(llm: LLM, prompt: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds of the median step of an answer."""
    return statistics.median(measure(llm, prompt, tokens).waits)


def needles_experiment(effort: Effort) -> Experiment:
    beside = {"the paper's bound": replace(effort, score="bound").use}
    return needles.experiment(effort.needles, Subject(effort.use, NEEDLES, _BOUND, beside=beside))
