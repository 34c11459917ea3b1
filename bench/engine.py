"""How fast the engine runs through its public API: start-up, decode at 1, 8 and 32 streams, host time per step.

    .venv/bin/python bench/engine.py [MODEL] [--dtype D] [--activations A] [--kernels K] [--kv-cache-dtype KV]
        [--tokens N] [--rounds R] [--json]

Host time is what a step spends outside the executor: planning, committing, detokenizing. The last line is JSON
with --json. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from dovetail import LLM, SamplingParams

ARITHMETIC = ("dtype", "activations", "kernels", "kv_cache_dtype")  # options, and what came of them


class Stopwatch:
    """Adds up the seconds spent in wrapped calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure(llm: LLM, streams: int, tokens: int, model_time: Stopwatch) -> dict[str, float]:
    """Decode rate and host time of `streams` different chats, the first step (the prompts) left out."""
    chats = [
        llm.chat_tokens([{"role": "user", "content": f"Tell me a long story about number {i}."}])
        for i in range(streams)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    session = llm.session
    for chat in chats:
        session.submit(session.prepare(chat, params))
    while llm.engine.scheduler.waiting or any(not r.num_output for r in llm.engine.scheduler.running):
        session.step()
    steps, model_time.seconds, start = llm.engine.steps, 0.0, time.perf_counter()
    done = sum(r.num_output for r in llm.engine.scheduler.running)
    while session.busy:
        session.step()
    seconds, steps = time.perf_counter() - start, llm.engine.steps - steps
    return {
        "tokens_per_s": (streams * tokens - done) / seconds,
        "step_ms": seconds / steps * 1e3,
        "host_ms": (seconds - model_time.seconds) / steps * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    for name in ARITHMETIC:
        parser.add_argument(f"--{name.replace('_', '-')}", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    llm = LLM(args.model, **{name: getattr(args, name) for name in ARITHMETIC})
    load = time.perf_counter() - start
    llm.keep_packed()
    model_time = Stopwatch()
    executor: Any = llm.engine.executor
    executor.run = model_time.around(executor.run)
    measure(llm, 1, 8, model_time)  # first calls allocate
    print(f"{args.model}, {llm.config.arithmetic}, {llm.config.threads} threads, loaded in {load:.2f} s")
    print(f"medians of {args.rounds} rounds (lowest-highest)")
    print(f"{'streams':>8} {'tokens/s':>22} {'step ms':>9} {'host ms':>9}")
    facts = {name: getattr(llm.config, name) for name in ARITHMETIC}
    out: dict[str, Any] = {"model": args.model, **facts, "load_s": load, "streams": {}}
    rounds = [{n: measure(llm, n, args.tokens, model_time) for n in (1, 8, 32)} for _ in range(args.rounds)]
    for n in (1, 8, 32):
        rates = sorted(r[n]["tokens_per_s"] for r in rounds)
        step, host = (statistics.median(r[n][k] for r in rounds) for k in ("step_ms", "host_ms"))
        rate = statistics.median(rates)
        print(f"{n:>8} {rate:>10.1f} ({rates[0]:.0f}-{rates[-1]:.0f})".ljust(31) + f" {step:>9.2f} {host:>9.2f}")
        out["streams"][n] = {"tokens_per_s": rate, "step_ms": step, "host_ms": host}
    llm.engine.check()
    if args.json:
        print(json.dumps(out))


if __name__ == "__main__":
    main()
