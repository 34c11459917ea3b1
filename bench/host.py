"""What a decode step costs on the host: planning, committing and text, with an executor that computes nothing.

    .venv/bin/python bench/host.py [--streams 1 8 32] [--model M] [--use SPEC] [--read MIB] [--profile] [--json]

Greedy requests go through `LLM.generate`. `plan` is from the beginning of an engine step to the executor's call,
`commit` from its return to the end of the engine step, `text` all between two engine steps: sessions, text, the
caller's loop. Only steps that advance every stream count. Numbers are microseconds. Rounds repeat the same steps,
and a step's lowest time of all rounds is what it takes when nothing else runs; shown is the mean of that over all
steps, and in brackets that of the medians.

A real model's weights push everything else out of the CPU's caches in each step, which costs the host more than
its own work: `--read 64` does the same. The tokenizer is that of `--model`, if it has been pulled, else the byte
tokenizer.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
from time import perf_counter
from typing import Any

import numpy as np

from dovetail import LLM, SamplingParams
from dovetail.config import Config
from dovetail.core.engine import Engine
from dovetail.core.pages import PagePool
from dovetail.core.scheduler import Limits
from dovetail.core.seams import WALL_CLOCK, Clock, Geometry, Site
from dovetail.core.technique import compose
from dovetail.core.types import SpanResult, StepPlan, StepResult
from dovetail.hub import aliases, models_home
from dovetail.models import open_checkpoint
from dovetail.session import Session
from dovetail.techniques import technique
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.tokenizer import Tokenizer

TEXT = "Once upon a time there was a naïve fox — it said “hello” 🎉, wrote 3.14 lines of code:\n\tx = [1, 2]\n" * 8
PARTS = ("plan", "commit", "text")


class NullExecutor:
    """Answers every sampled row with the next token of a text, and notes when it was called."""

    num_stages = 1
    clock: Clock = WALL_CLOCK

    def __init__(self, text: list[int], read: int) -> None:
        self.text = text
        self.weights = np.ones(read << 20, np.uint8)
        self.marks: list[tuple[float, float]] = []

    def run(self, plan: StepPlan) -> StepResult:
        called, text = perf_counter(), self.text
        results = [
            SpanResult(tuple([text[(s.stop + i) % len(text)] for i in range(s.sample)])) for s in plan.spans
        ]
        self.weights.max(initial=0)
        self.marks.append((called, perf_counter()))
        return StepResult(results)


class Host:
    """Everything but the model, with a stopwatch around the engine's steps."""

    def __init__(self, tokenizer: Tokenizer, use: list[str], tokens: int, read: int) -> None:
        vocabulary = max(tokenizer.vocab_size, 260)
        self.tokens = tokens
        self.executor = NullExecutor(tokenizer.encode(TEXT, add_special_tokens=False), read)
        config = Config(
            model="", architecture="llama", use=tuple(use), dtype="float32", device="cpu", threads=1,
            kernels="torch", activations="exact", kv_cache_dtype="float32", kv_memory=0,
            block_size=16, num_kv_pages=8192, max_model_len=8192,
            max_num_batched_tokens=512, max_num_seqs=64, enable_prefix_caching=True, seed=0,
        )  # fmt: skip
        pool = PagePool(config.num_kv_pages, config.block_size)
        site = Site(Geometry(30, 9, 3, 64, vocabulary), config.block_size, pool)
        seams = compose(*map(technique, use)).build(site)
        limits = Limits(config.max_model_len, 512, 64, config.enable_prefix_caching, vocabulary)
        engine = Engine(self.executor, pool, seams, limits)
        self.llm = object.__new__(LLM)  # its loops need nothing but the session
        self.llm.session = Session(engine, tokenizer, config, vocabulary)
        self.steps: list[tuple[float, float, int]] = []
        self._step, engine.step = engine.step, self._timed  # type: ignore[method-assign]

    def _timed(self) -> Any:
        start = perf_counter()
        progress = self._step()
        self.steps.append((start, perf_counter(), len(progress)))
        return progress

    def measure(self, streams: int) -> np.ndarray:
        """Microseconds of each step of one round: [steps, parts]."""
        self.executor.marks, self.steps = [], []
        params = SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True)
        prompts = [f"Tell me a long story about the number {i}, please." for i in range(streams)]
        self.llm.generate(prompts, params, progress=False)
        rows = []
        for (start, stop, count), (called, returned), after in zip(
            self.steps[2:], self.executor.marks[2:], self.steps[3:], strict=False
        ):
            if count == streams:
                rows.append((called - start, stop - returned, after[0] - stop))
        return np.array(rows) * 1e6


def find_tokenizer(model: str) -> tuple[str, Tokenizer]:
    alias = aliases.ALIASES.get(model)
    path = aliases.cached(alias, models_home()) if alias else model
    return (model, open_checkpoint(path).tokenizer()) if path else ("bytes", ByteTokenizer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer to use")
    parser.add_argument("--use", action="append", default=[], help="a technique; only drafters make sense here")
    parser.add_argument("--tokens", type=int, default=256, help="per stream")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--read", type=int, default=0, help="MiB that the executor reads in each step")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes, by function")
    parser.add_argument("--json", action="store_true", help="also print a line of JSON")
    args = parser.parse_args()
    name, tokenizer = find_tokenizer(args.model)
    host = Host(tokenizer, args.use, args.tokens, args.read)
    print(f"microseconds per step, lowest (median) of {args.rounds} rounds; tokenizer: {name}")
    print(f"{'streams':>8}" + "".join(f"{part:>16}" for part in (*PARTS, "all")))
    out: dict[int, dict[str, float]] = {}
    for streams in args.streams:
        host.measure(streams)  # first calls fill caches
        rounds = np.stack([host.measure(streams) for _ in range(args.rounds)])
        low, middle = rounds.min(0).mean(0), np.median(rounds, 0).mean(0)
        out[streams] = dict(zip((*PARTS, "all"), map(float, [*low, low.sum()]), strict=True))
        shown = zip([*low, low.sum()], [*middle, middle.sum()], strict=True)
        print(f"{streams:>8}" + "".join(f"{a:.1f} ({b:.1f})".rjust(16) for a, b in shown))
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(host.measure, args.streams[-1])
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    host.llm.session.engine.check()
    if args.json:
        print(json.dumps({"tokenizer": name, "read_mib": args.read, "streams": out}))


if __name__ == "__main__":
    main()
