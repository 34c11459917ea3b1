"""Decoding in a fixed memory for weights and KV: the largest batch that fits, and its throughput (section 5)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dovetail.bench.engine.limited import Batch, Decoded
from dovetail.bench.engine.points import Prompts
from dovetail.bench.engine.roofline import weight_bytes
from dovetail.bench.rounds import Ratio, Turns, by_round
from dovetail.core.pages import pages_for
from dovetail.llm import LLM
from dovetail.models import geometry
from dovetail.reproduce.atom.effort import Effort
from dovetail.reproduce.atom.quality import KV, steps
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.quantized import Models
from dovetail.runtime.kv import bytes_per_token

NAMES = ("fixed memory, against bf16", "fixed memory, against int8")
BLOCK = 16  # tokens of a page
MEMORY = 24 / 13.5  # times the bytes of bf16 weights: a 7B model on the paper's RTX 4090
PAPER = (7.73, 2.53)

_WHY = (
    "The batch grows as in the paper, because weights and KV shrink. But on a GPU a larger batch is nearly free, "
    "and 4-bit units do twice the work of 8-bit ones. A CPU has no 4-bit units, and at these batches arithmetic "
    "and attention take its time already. The output head stays in bf16: a fifth of this model, a fiftieth of a "
    "7B one."
)


@dataclass(frozen=True)
class Side:
    """A model, the type of its KV, and the bytes of its weights and of a page of KV."""

    model: str
    kv: str
    weights: int
    page: int

    @classmethod
    def of(cls, model: str, kv: str) -> Side:
        llm = LLM(model, max_model_len=64, kv_memory=8 << 20)
        page = BLOCK * bytes_per_token(geometry(llm.checkpoint.config), kv, BLOCK)
        return cls(model, kv, weight_bytes(llm), page)


@dataclass(frozen=True)
class Running:
    """An engine whose requests decode in `memory` bytes; as many as fit."""

    side: Side
    batch: Batch
    requests: int

    @classmethod
    def start(cls, side: Side, memory: int, effort: Effort) -> Running:
        """Compute as many prompts as fit."""
        left = memory - side.weights
        pages = pages_for(effort.context + effort.answer, BLOCK)
        # The last request is admitted only if one more page is free for each of the others.
        requests = (left // side.page + 1) // (pages + 1)
        llm = LLM(
            side.model, kv_cache_dtype=side.kv, kv_memory=left, block_size=BLOCK, max_num_seqs=max(1, requests),
            max_model_len=effort.context + effort.answer, enable_prefix_caching=False,
        )  # fmt: skip
        prompts = Prompts(llm.session.vocab_size).take(effort.context, requests)
        batch = Batch(llm, prompts, effort.answer)
        batch.settle()
        return cls(side, batch, requests)


def experiment(effort: Effort) -> Experiment:
    return Experiment("decoding in a fixed memory", NAMES, partial(measure, effort))


def measure(effort: Effort) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        few = replace(effort.text, samples=2, length=64)  # speed does not depend on how codes were chosen
        made = Models(effort.model, few, Path(folder), rescaled=True)
        int8 = made.quantized("int8", "w8a8-int8", {"method": "rtn"})
        atom = made.quantized("atom", "atom", steps(effort.group)["clipping"])
        plain = Side.of(made.source, "bf16")
        sides = [plain, Side.of(int8, "int8"), Side.of(atom, KV)]
        memory = int(plain.weights * MEMORY)
        running = [Running.start(side, memory, effort) for side in sides]
        turns = Turns([partial(one.batch.decode, effort.steps) for one in running])
        readings = turns.until(effort.rounds)
        for one in running:
            one.batch.close()
    yield from _claims(effort, running, readings, memory)


def _claims(
    effort: Effort, running: Sequence[Running], readings: Sequence[Sequence[Decoded]], memory: int
) -> Iterator[Claim]:
    rates = [[reading.rate for reading in found] for found in readings]
    middle = [sorted(found)[len(found) // 2] for found in rates]
    setting = (
        f"{effort.model}, {effort.context} tokens of context, {memory / 1e6:.0f} MB for weights and KV, which are "
        f"{MEMORY:.2f} times the bf16 weights; a request of each side is as long"
    )
    for name, at, paper in zip(NAMES, (0, 1), PAPER, strict=True):
        ratio = Ratio.of_rounds(by_round(rates[2], rates[at]))
        a, b = (f"{_of(running[i], middle[i])}" for i in (at, 2))
        yield Claim(
            name,
            setting,
            f"{paper} times the throughput at a fixed memory (RTX 4090, Llama-7B, ShareGPT)",
            f"{ratio} times the tokens per second: {b}, instead of {a}",
            _WHY,
            ratio=ratio,
            paper_ratio=(paper, paper),
        )


def _of(one: Running, rate: float) -> str:
    return (
        f"{rate:.0f}/s of {one.requests} requests ({one.side.weights / 1e6:.0f} MB of weights, {one.side.kv} KV, "
        f"{1e3 * one.requests / rate:.0f} ms a token)"
    )
