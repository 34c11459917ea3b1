"""The time of a step by operation, in milliseconds: where a prompt, a decode step and a batch spend it.

    .venv/bin/python bench/step.py [MODEL] [--points ROWS,CONTEXT,STREAMS ...] [--repeats N] [--threads N]
        [--dtype D] [--activations A] [--kernels K] [--kv-cache-dtype KV] [--json]

A point is a step of STREAMS requests with ROWS tokens each behind CONTEXT tokens; the defaults are a prompt of
512, one stream at 16, 1024 and 4096, and 8 and 32 streams at 105. Operations are timed one by one, on all threads;
shown is each one's fastest repeat. `run` is the fastest run of the same step without timing in between, `median`
its median. MB are the weights, as they are packed, and the KV that the step reads; `roofline` is the time that
they take at the machine's raw read (the best of three passes over 256 MB, beside every run) by the run's own: the
median of the repeats. It says something where memory is the limit, that is with few rows.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import time
from typing import Any, NamedTuple

from dovetail import LLM
from dovetail.bench.engine.roofline import operations
from dovetail.bench.interleave import read_bandwidth
from dovetail.core.cost import Load, total
from dovetail.runtime.native import NativeExecutor

ARITHMETIC = ("dtype", "activations", "kernels", "kv_cache_dtype")


class Point(NamedTuple):
    rows: int
    context: int
    streams: int


POINTS = [Point(512, 0, 1), *(Point(1, c, 1) for c in (16, 1024, 4096)), Point(1, 105, 8), Point(1, 105, 32)]


def point(text: str) -> Point:
    try:
        found = Point(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not ROWS,CONTEXT,STREAMS") from None
    if found.rows < 1 or found.context < 0 or found.streams < 1:
        raise argparse.ArgumentTypeError(f"'{text}': at least 1 row and 1 stream, and a context of at least 0")
    return found


def plan(llm: LLM, program: Any, at: Point) -> None:
    """Every stream has pages of its own, whose context is computed first: memory never written is in no bank."""
    chance, stop = random.Random(0), at.context + at.rows
    pages = -(-stop // llm.config.block_size)
    if pages * at.streams > llm.config.num_kv_pages:
        raise SystemExit(f"{at} needs {pages * at.streams} pages of KV, there are {llm.config.num_kv_pages}")
    tokens = [chance.randrange(llm.checkpoint.config.vocab_size) for _ in range(stop)]
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(at.streams)]
    chunk = llm.config.max_num_batched_tokens
    for table in tables:
        for start in range(0, at.context, chunk):
            program.clear()
            program.add(start, min(start + chunk, at.context), tokens, [], table, 0, 1)
            program.plan()
            program.run(0, program.mark())
    program.clear()
    for table in tables:
        program.add(at.context, stop, tokens, [], table, 0, 1)
    program.plan()


def step_bytes(llm: LLM, at: Point) -> int:
    """Of the program: nearly all are weights, and KV of all that the rows' contexts hold."""
    load = Load(((at.rows, at.context + at.rows),) * at.streams, at.streams)
    return int(total(operations(llm), load).all_bytes)


def measure(program: Any, repeats: int, size: int, threads: int) -> dict[str, float]:
    """Milliseconds by operation, the last of which is the head, and of whole runs; `size`: bytes of a step."""
    best: dict[str, float] = {}
    runs, reads = [], []
    for _ in range(repeats):
        steps = program.profile(0, program.mark())
        found: collections.Counter[str] = collections.Counter()
        for i, (name, seconds) in enumerate(steps):
            found["head" if i == len(steps) - 1 else name] += seconds * 1e3
        best = {name: min(ms, best.get(name, ms)) for name, ms in found.items()}
        reads.append(read_bandwidth(threads) * 1e9)
        program.run(0, program.mark())  # the first run after memory was unmapped is slower
        start = time.perf_counter()
        program.run(0, program.mark())
        runs.append(time.perf_counter() - start)
    roofline = statistics.median(size / read / run for read, run in zip(reads, runs, strict=True))
    times = {**best, "all": sum(best.values()), "run": min(runs) * 1e3, "median": statistics.median(runs) * 1e3}
    return {**times, "MB": size / 1e6, "GB/s": statistics.median(reads) / 1e9, "roofline": roofline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--points", type=point, nargs="+", default=POINTS, metavar="ROWS,CONTEXT,STREAMS")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    for name in ARITHMETIC:
        parser.add_argument(f"--{name.replace('_', '-')}", default="auto")
    parser.add_argument("--json", action="store_true", help="also print a line of JSON")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    llm = LLM(args.model, threads=args.threads, **{name: getattr(args, name) for name in ARITHMETIC})
    executor = llm.engine.executor
    if not isinstance(executor, NativeExecutor):
        parser.exit(1, "this model runs on the torch reference; only recorded programs can be profiled\n")
    print(f"{args.model}, {llm.config.arithmetic}, {llm.config.threads} threads, best of {args.repeats}, ms")
    found: list[dict[str, float]] = []
    for at in args.points:
        plan(llm, executor.program, at)
        size = step_bytes(llm, at)
        found.append(measure(executor.program, args.repeats, size, llm.config.threads))
        if len(found) == 1:
            print(f"{'rows':>5} {'context':>7} {'streams':>7}" + "".join(f"{name:>12}" for name in found[0]))
        print(
            f"{at.rows:>5} {at.context:>7} {at.streams:>7}" + "".join(f"{ms:>12.3f}" for ms in found[-1].values())
        )
    if args.json:
        facts = {name: getattr(llm.config, name) for name in (*ARITHMETIC, "threads")}
        steps = [{**at._asdict(), "figures": figures} for at, figures in zip(args.points, found, strict=True)]
        print(json.dumps({"model": args.model, **facts, "repeats": args.repeats, "points": steps}))


if __name__ == "__main__":
    main()
