"""How close the native kernels come to what the machine can do: its raw read bandwidth, and its arithmetic peak.

    .venv/bin/python bench/ops.py [--only NAME ...] [--threads N] [--rounds R] [--isa NAME] [--json]
                                  [--megabytes MB] [--peak-gops KIND=N ...]

Kernels, by the names that --only picks from (any part of "kernel shape" will do: gemv, Q4_0, decode, 1536x576):
  gemv.FORMAT.ACTIVATIONS  rows 1 to 8 times weights [out x in]
  gemm.FORMAT.ACTIVATIONS  rows 32 and 512
  bars                     the ratios of kernels of low precision that docs/quantization.md names, in one run
  decode.KV                one row of attention behind C tokens; shape: query heads / KV heads, head dimension, C
  prefill.KV               512 rows of attention from position 0 on
  balance.KV               a request of 64K tokens beside 31 of 100: long ones cut over the threads, against a
                           thread for each request and KV head, and for each request
  cascade.KV               32 requests of 2048 shared and 64 own tokens: shared KV read once, against read by each,
                           and against a copy for each
  sample.OPTIONS           tokens from 1 and 32 rows of logits, in the cache; shape: vocabulary. "even" rows are
                           normal with deviation 1, as no model's are: top-p leaves thousands of tokens

Weights and KV are cold: a run replays one kernel over different weights or layers, --megabytes of them in all (an
eighth for gemm and prefill), as one program, so that a kernel's start and end count as in a step; `us` is a run
divided by its kernels. GB/s are packed bytes of weights or KV, as the kernels read them, per second (a checkpoint
may store them in fewer). GOP/s count two operations for each multiply-add, of attention only up to the diagonal. K
formats take rows of a multiple of 256: 512 for 576.

In each round every kernel of a group runs once, in turns, beside one raw read with as many threads (the best of
three passes over 256 MB). Columns are medians of the rounds, `us` with the lowest and highest; `read %` is the
median of each round's GB/s by the raw read of the same round. balance and cascade are per layer, and a speed-up
is the median of the rounds'. KV bytes of the cascade are what the plan reads; requests that read the same pages
one by one take most of that from caches, so there is no `read %` for them.

`peak %` needs --peak-gops, GOP/s of all threads: clock under load in GHz (`perf stat -e cycles,task-clock`) x
threads x instructions per cycle (from the vendor's tables: 1 on Zen 4, 2 on server cores with two 512-bit units) x
operations of one: int8 (vpdpbusd) 128, bf16 (vdpbf16ps) 64, float32 (vfmadd) 32 with 512 bits, half of each with
256. Two Zen 4 cores at 3.5 GHz: --peak-gops int8=896 bf16=448 float32=224. Float32 KV and activations "exact" are
float32 kernels.

Run it on an otherwise idle machine. The last line is JSON with --json.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dovetail.bench.interleave import Interleaved
from dovetail.bench.kernels.attention import (
    GROUPED,
    KV_DTYPES,
    MULTI_HEAD,
    PAGE,
    Attention,
    Heads,
    Kernels,
    KVPool,
    Request,
    check_finite,
)
from dovetail.bench.kernels.grids import GRIDS, random_grid
from dovetail.bench.rounds import Ratio
from dovetail.host import machine
from dovetail.ops import cpu
from dovetail.ops.dequant import BLOCKS

FORMATS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    *GRIDS, "BF16", "F32",
)  # fmt: skip
ALL = ("int8", "int16", "exact")
ACTIVATIONS = {
    "BF16": ("bf16",), "F32": ("exact",), "Q8_0": ALL, "Q4_K": ALL,
    "I8": ("int8-token",), "I4": ("int8-token", *ALL), "F8": ("fp8-token",), "ATOM": ("atom",),
}  # fmt: skip
GEMV_SHAPES, GEMM_SHAPES = ((1536, 576), (49152, 576), (4096, 4096)), ((1536, 576), (4096, 4096))
GEMV_ROWS, GEMM_ROWS = (1, 2, 4, 8), (32, 512)
PEAKS = {  # of activations
    "int8": "int8", "int16": "int8", "bf16": "bf16", "exact": "float32", "int8-token": "int8", "fp8-token": "bf16",
    "atom": "int8",
}  # fmt: skip
Kernel = tuple[str, str, int]  # format, activations, rows
BARS: list[tuple[str, Kernel, Kernel, float]] = [  # how many times as fast as the second one the first one must be
    ("int8 and bf16, 512 rows", ("I8", "int8-token", 512), ("BF16", "bf16", 512), 1.6),
    ("4 bits and bf16, a row", ("I4", "int8", 1), ("BF16", "bf16", 1), 3.0),
    ("4 bits and bf16, a row, int16", ("I4", "int16", 1), ("BF16", "bf16", 1), 0),
    ("4 bits and bf16, a row, int8 by token", ("I4", "int8-token", 1), ("BF16", "bf16", 1), 3.0),
    ("fp8 and bf16, 512 rows", ("F8", "fp8-token", 512), ("BF16", "bf16", 512), 0),
    ("fp8 and bf16, a row", ("F8", "fp8-token", 1), ("BF16", "bf16", 1), 0),
    ("4 bits and int8, 512 rows", ("I4", "int8-token", 512), ("I8", "int8-token", 512), 0),
    ("Atom and int8, 32 rows", ("ATOM", "atom", 32), ("I8", "int8-token", 32), 1 / 1.15),
    ("Atom and int8, 512 rows", ("ATOM", "atom", 512), ("I8", "int8-token", 512), 0),
    ("Atom and int8, a row", ("ATOM", "atom", 1), ("I8", "int8-token", 1), 0),
]
PEAK_BAR = 0.85  # of int8 dot products, which int8 must reach with 512 rows
LONG, SHORT = 65536, (31, 100)
SHARED, OWN, SHARERS = 2048, 64, 32
SCALES = {  # bytes; others (0,)
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82),
    "Q3_K": (108,),
}  # fmt: skip


SAMPLE_ROWS = (1, 32)
SAMPLE = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k+top_p": (0.8, 50, 0.95, 0.0),
    "top_p": (0.8, 0, 0.95, 0.0),
    "even top_p": (0.8, 0, 0.95, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
}


@dataclass(frozen=True)
class Case:
    """One kernel: `run` does `count` of them, each of which reads `bytes` and does `operations`."""

    kernel: str
    shape: str
    rows: int
    run: Callable[[], None]
    count: int
    bytes: float = 0
    operations: float = 0
    kind: str = ""  # of its peak
    cached: bool = False  # not comparable with the raw read


@dataclass
class Bench:
    kernels: Kernels
    rounds: int
    only: Sequence[str]
    cold: int  # bytes
    peaks: dict[str, float]
    results: list[dict[str, Any]] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)

    def wants(self, kernel: str, shape: str) -> bool:
        return not self.only or any(name in f"{kernel} {shape}" for name in self.only)

    def measure(self, cases: Sequence[Case]) -> list[list[float]]:
        """Time the cases in turns, print and keep a line of each; seconds of one kernel: [cases][rounds]."""
        timed = Interleaved([case.run for case in cases], self.kernels.threads)
        runs, reads = timed.until(self.rounds), timed.reads
        samples = [[s / case.count for s in seconds] for case, seconds in zip(cases, runs, strict=True)]
        self.reads += reads
        for case, seconds in zip(cases, samples, strict=True):
            self.results.append(summary(case, seconds, reads, self.peaks.get(case.kind)))
            show(self.results[-1])
        return samples


def summary(case: Case, seconds: list[float], reads: list[float], peak: float | None) -> dict[str, Any]:
    middle = statistics.median(seconds)
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "rows": case.rows}
    row |= {"us": middle * 1e6, "us_low": min(seconds) * 1e6, "us_high": max(seconds) * 1e6}
    if case.bytes:
        row["gb_per_s"] = case.bytes / middle / 1e9
    if case.bytes and not case.cached:
        ratios = [case.bytes / s / 1e9 / read for s, read in zip(seconds, reads, strict=True)]
        row["of_read"] = statistics.median(ratios)
    if case.operations:
        row["gop_per_s"] = case.operations / middle / 1e9
        if peak:
            row["of_peak"] = row["gop_per_s"] / peak
    return row


def header() -> str:
    return (
        f"{'kernel':<18} {'shape':<16} {'rows':>4} {'us':>10} {'(lowest-highest)':>20}"
        f" {'GB/s':>7} {'read %':>6} {'GOP/s':>7} {'peak %':>6}"
    )


def show(row: dict[str, Any]) -> None:
    def cell(key: str, width: int, by: float = 1) -> str:
        return (f"{row[key] * by:.1f}" if key in row else "-").rjust(width)

    spread = f"({row['us_low']:.1f}-{row['us_high']:.1f})"
    print(
        f"{row['kernel']:<18} {row['shape']:<16} {row['rows']:>4} {row['us']:>10.1f} {spread:>20}"
        f" {cell('gb_per_s', 7)} {cell('of_read', 6, 100)} {cell('gop_per_s', 7)} {cell('of_peak', 6, 100)}",
        flush=True,
    )


# -- linear ------------------------------------------------------------------------------------------


def stored(name: str, n: int, k: int) -> torch.Tensor:
    """Random weights as a checkpoint stores them, uint8 [n, row bytes]: 256 rows, again and again."""
    random, block = np.random.default_rng(0), BLOCKS[name]
    rows = min(n, 256)
    if block.values == 1:
        values = torch.from_numpy(random.standard_normal((rows, k), np.float32) * 0.02)
        data = values.to(torch.bfloat16 if name == "BF16" else torch.float32).view(torch.uint8)
    else:
        codes = random.integers(0, 256, (rows, k // block.values, block.bytes), dtype=np.uint8)
        codes[:, :, 0] &= 127 if name == "MXFP4" else 255  # no power of two above 1
        for at in () if name == "MXFP4" else SCALES.get(name, (0,)):
            scale = random.uniform(-0.02, 0.02, codes.shape[:2]).astype(np.float16)
            codes[:, :, at : at + 2] = scale[..., None].view(np.uint8)
        data = torch.from_numpy(codes.reshape(rows, -1))
    return data.repeat(-(-n // rows), 1)[:n].contiguous()


def maker(name: str, n: int, k: int, threads: int) -> Callable[[], Any]:
    """What packs random weights of a format."""
    if name in GRIDS:
        weight = random_grid(name, n, k)
        return lambda: cpu.pack(weight, "float32", threads)
    data = stored(name, n, k)
    return lambda: cpu.native().Packed(name, data.data_ptr(), data.stride(0), n, k, threads)


class Linears:
    """Copies of one weight, and a program with an operation for each."""

    def __init__(self, copies: Sequence[Any], activation: str, most: int, bench: Bench) -> None:
        self.copies = copies
        n, k = copies[0].n, copies[0].k
        self.program = program = cpu.native().Program(bench.kernels.isa, bench.kernels.threads, True, True)
        self.source, self.target = program.slot(k), program.slot(n)
        for copy in copies:
            program.linear(
                self.source, self.target, [copy], activation, norm=[], eps=0.0, bias=[], add=False, gate="",
                sampled=False,
            )  # fmt: skip
        program.tune()
        program.set_rows(most)
        program.run(0, 0)
        rows = np.random.default_rng(1).standard_normal((most, k), np.float32)
        program.view(self.source, most)[:, :k] = rows
        program.run(0, 1)
        check_finite(program, self.target, most, f"{copies[0].format} {activation}")

    def run(self, rows: int, count: int) -> None:
        self.program.set_rows(rows)
        self.program.run(0, count)


def linears(bench: Bench) -> None:
    for n, k in GEMV_SHAPES:
        for name in FORMATS:
            linear_group(bench, name, n, k)


def linear_group(bench: Bench, name: str, n: int, width: int) -> None:
    """All row counts and activations of one format and shape."""
    values = 64 if name in GRIDS else BLOCKS[name].values
    k = width // values * values
    shape, wanted = f"{n}x{k}", {}
    for activation in ACTIVATIONS.get(name, ("int8",)):
        gemv, gemm = (f"{kind}.{name}.{activation}" for kind in ("gemv", "gemm"))
        rows = [(gemv, m) for m in GEMV_ROWS if bench.wants(gemv, shape)]
        if (n, width) in GEMM_SHAPES and name != "F32" and activation != "exact":
            rows += [(gemm, m) for m in GEMM_ROWS if bench.wants(gemm, shape)]
        if rows:
            wanted[activation] = rows
    if not wanted:
        return
    copies: list[Any] = []
    make = maker(name, n, k, bench.kernels.threads)
    cold = bench.cold if any(m <= GEMV_ROWS[-1] for rows in wanted.values() for _, m in rows) else bench.cold // 8
    while sum(c.bytes for c in copies) <= cold:
        copies.append(make())
    size = copies[0].bytes
    cases = []
    for activation, rows in wanted.items():
        linear = Linears(copies, activation, max(m for _, m in rows), bench)
        for kernel, m in rows:
            few = m <= GEMV_ROWS[-1]
            count = len(copies) if few else min(len(copies), bench.cold // 8 // size + 1)
            run = functools.partial(linear.run, m, count)
            operations = 2.0 * m * n * k
            cases.append(Case(kernel, shape, m, run, count, size if few else 0, operations, PEAKS[activation]))
    bench.measure(cases)


def bars(bench: Bench, n: int = 4096, k: int = 4096) -> dict[str, Any]:
    """Ratios of kernels, all in the same rounds, and the share of the peak of int8 dot products."""
    wanted = sorted({kernel for _, *pair, _ in BARS for kernel in pair})
    copies: dict[str, list[Any]] = {}
    for name in {name for name, _, _ in wanted}:
        make = maker(name, n, k, bench.kernels.threads)
        few = all(rows > GEMV_ROWS[-1] for of, _, rows in wanted if of == name)
        first = make()
        count = max(2, (bench.cold // (8 if few else 1)) // first.bytes)
        copies[name] = [first, *(make() for _ in range(count - 1))]
    cases = []
    for name, activation, rows in wanted:
        linear = Linears(copies[name], activation, rows, bench)
        few = rows <= GEMV_ROWS[-1]
        count = len(copies[name]) if few else 2
        run, size = functools.partial(linear.run, rows, count), copies[name][0].bytes
        kernel = f"bars.{name}.{activation}"
        cases.append(Case(kernel, f"{n}x{k}", rows, run, count, size if few else 0, 2.0 * rows * n * k, "int8"))
    dots = functools.partial(cpu.native().run_dots, bench.kernels.isa, bench.kernels.threads)
    operations = dots()
    *seconds, peak = bench.measure([*cases, Case("bars.dots", "", 0, dots, 1, 0, operations)])
    found, times = {}, dict(zip(wanted, seconds, strict=True))
    for name, fast, slow, least in BARS:
        ratio = found[name] = Ratio.of(times[slow], times[fast])
        print(f"  {name}: {ratio} times as fast" + (f" (bar {least:.2f})" if least else ""))
    work = 2.0 * 512 * n * k
    share = [work / s * p / operations for s, p in zip(times["I8", "int8-token", 512], peak, strict=True)]
    found["int8 of the peak"] = Ratio.of_rounds(share)
    print(f"  int8, 512 rows: {found['int8 of the peak']} of the peak (bar {PEAK_BAR})")
    return figures(found)


# -- attention ---------------------------------------------------------------------------------------


def _peak(kind: str) -> str:
    """The arithmetic of attention over KV of a kind."""
    return "float32" if kind == "float32" else "bf16"


def decodes(bench: Bench, contexts: Sequence[int] = (1024, 4096, 16384)) -> None:
    for heads in GROUPED:
        for kind in KV_DTYPES:
            kernel = f"decode.{kind}"
            wanted = [c for c in contexts if bench.wants(kernel, f"{heads} {c}")]
            if not wanted:
                continue
            pool = KVPool(heads, kind, max(wanted), bench.cold)
            cases = []
            for c in wanted:
                steps = Attention(pool, [Request(c - 1, c, range(c // PAGE))], c, bench.kernels)
                size = c * pool.token_bytes
                cases.append(
                    Case(kernel, f"{heads} {c}", 1, steps.run, steps.layers, size, steps.operations, _peak(kind))
                )
            bench.measure(cases)


def prefills(bench: Bench, rows: int = 512, layers: int = 8) -> None:
    for heads in GROUPED:
        wanted = [kind for kind in KV_DTYPES if bench.wants(f"prefill.{kind}", str(heads))]
        cases = []
        for kind in wanted:
            pool = KVPool(heads, kind, rows, bench.cold // 8)
            steps = Attention(pool, [Request(0, rows, range(rows // PAGE))], rows, bench.kernels, layers=layers)
            name = f"prefill.{kind}"
            cases.append(Case(name, str(heads), rows, steps.run, steps.layers, 0, steps.operations, _peak(kind)))
        if cases:
            bench.measure(cases)


def versus(
    bench: Bench, kernel: str, rows: int, ways: dict[str, Attention], sizes: Sequence[int]
) -> dict[str, Ratio]:
    """The same attention in several ways, in turns; how much faster the first is than each other one."""
    first, least = next(iter(ways.values())), min(sizes)
    cases = [
        Case(kernel, f"{first.pool.heads} {name}", rows, a.run, a.layers, size, a.operations, "bf16", size > least)
        for (name, a), size in zip(ways.items(), sizes, strict=True)
    ]
    fast, *others = bench.measure(cases)
    found = {}
    for name, slow in zip(list(ways)[1:], others, strict=True):
        found[name] = Ratio.of(slow, fast)
    return found


def figures(found: dict[str, Ratio]) -> dict[str, dict[str, float]]:
    return {name: {"speed_up": r.median, "low": r.low, "high": r.high} for name, r in found.items()}


def balance(bench: Bench, heads: Heads) -> dict[str, Any]:
    """One long request beside short ones, cut; a piece for each request and KV head; one thread for each request.

    The last is the long request alone on one thread, which takes at least that long with the others beside it.
    """
    count, tokens = SHORT
    each, total = -(-tokens // PAGE), LONG // PAGE
    requests = [Request(LONG - 1, LONG, range(total))]
    for _ in range(count):
        requests.append(Request(tokens - 1, tokens, range(total, total + each)))
        total += each
    pool = KVPool(heads, "bf16", total * PAGE, bench.cold)
    size = total * PAGE
    ways = {
        "split": Attention(pool, requests, size, bench.kernels),
        "per KV head": Attention(pool, requests, size, bench.kernels, split=False),
        "per request": Attention(pool, requests[:1], size, Kernels(bench.kernels.isa, 1)),
    }
    read = (LONG + count * tokens) * pool.token_bytes
    found = versus(bench, "balance.bf16", len(requests), ways, [read, read, LONG * pool.token_bytes])
    for name, ratio in found.items():
        print(f"  split is {ratio} times as fast as one thread {name}")
    return {**figures(found), "items": {name: a.stats["items"] for name, a in ways.items()}}


def cascade(bench: Bench, heads: Heads) -> dict[str, Any]:
    """Requests that share most of their pages: read once; read by each; and without sharing, a copy for each."""
    shared, own, length = SHARED // PAGE, OWN // PAGE, SHARED + OWN
    sharing = [
        Request(length - 1, length, [*range(shared), *range(shared + i * own, shared + (i + 1) * own)])
        for i in range(SHARERS)
    ]
    alone = [
        Request(length - 1, length, range(i * length // PAGE, (i + 1) * length // PAGE)) for i in range(SHARERS)
    ]
    tokens = SHARED + SHARERS * OWN
    pool, copies = (KVPool(heads, "bf16", n, bench.cold) for n in (tokens, SHARERS * length))
    ways = {
        "shared": Attention(pool, sharing, tokens, bench.kernels),
        "apart": Attention(pool, sharing, tokens, bench.kernels, cascade=False),
        "copies": Attention(copies, alone, SHARERS * length, bench.kernels),
    }
    read = [a.stats["tokens_read"] * pool.token_bytes for a in ways.values()]
    assert read[1] == ways["shared"].stats["tokens_without_sharing"] * pool.token_bytes
    # "apart" finds most of what it reads in the caches, so its bytes over its time are no bandwidth of memory.
    found = versus(bench, "cascade.bf16", SHARERS, ways, read)
    print(
        f"  shared reads {read[0] / 1e6:.2f} MB of KV a layer, the others {read[1] / 1e6:.2f} MB,"
        f" {read[1] / read[0]:.1f} times as much; it is {found['apart']} times as fast as apart,"
        f" {found['copies']} times as fast as copies"
    )
    return {**figures(found), "bytes": dict(zip(ways, read, strict=True))}


# -- sampling ----------------------------------------------------------------------------------------


def samples(bench: Bench, vocabulary: int = 49152, count: int = 100) -> None:
    even = np.random.default_rng(3).standard_normal((max(SAMPLE_ROWS), vocabulary), np.float32)
    peaked = 2.5 * even
    peaked[:, ::800] += np.random.default_rng(4).exponential(5, peaked[:, ::800].shape) + 6
    cases = []
    for name, options in SAMPLE.items():
        for rows in SAMPLE_ROWS:
            if bench.wants(f"sample.{name}", str(vocabulary)):
                run = sampling(bench, (even if "even" in name else peaked)[:rows], options, count)
                cases.append(Case(f"sample.{name}", str(vocabulary), rows, run, count))
    if cases:
        bench.measure(cases)


def sampling(bench: Bench, logits: np.ndarray, options: tuple[float, int, float, float], count: int) -> Any:
    """A function that chooses from the rows, `count` times."""
    rows, vocabulary = logits.shape
    program = cpu.native().Program(bench.kernels.isa, bench.kernels.threads, True, True)
    slot = program.slot(vocabulary, sampled=True)
    program.set_rows(rows)
    program.sample(list(range(rows)))
    program.run(0, 0)
    program.view(slot, rows)[:, :vocabulary] = logits
    choices = [(*options, (i + 0.5) / rows) for i in range(rows)]

    def run() -> None:
        for _ in range(count):
            program.choose(slot, choices)

    return run


# -- command -----------------------------------------------------------------------------------------


def peak(text: str) -> tuple[str, float]:
    kind, _, number = text.partition("=")
    if kind not in PEAKS.values():
        raise argparse.ArgumentTypeError(f"'{text}' is not KIND=N with KIND one of {', '.join(PEAKS.values())}")
    try:
        return kind, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{number}' is not a number") from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help='parts of "kernel shape"')
    parser.add_argument("--threads", type=int, default=machine.cores().budget, help="default: all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default="", choices=("", *cpu.isas()), metavar="NAME",
                        help=f"instruction set: {', '.join(cpu.isas())} (default the first)")  # fmt: skip
    parser.add_argument("--megabytes", type=int, default=512, help="that a run goes through (default 512)")
    parser.add_argument("--peak-gops", type=peak, nargs="+", default=[], metavar="KIND=N", help="see above")
    parser.add_argument("--json", action="store_true", help="also print a line of JSON")
    args = parser.parse_args()
    if min(args.rounds, args.threads, args.megabytes) < 1:
        parser.error("--rounds, --threads and --megabytes must be at least 1")
    if not cpu.isas():
        parser.exit(1, "the native kernels were not built\n")
    return args


def main() -> None:
    args = arguments()
    isa = args.isa or cpu.isas()[0]
    bench = Bench(Kernels(isa, args.threads), args.rounds, args.only, args.megabytes << 20, dict(args.peak_gops))
    torch.manual_seed(0)
    print(f"{machine.cpu_model()}, {isa}, {args.threads} threads, medians of {args.rounds} rounds")
    print(header())
    out: dict[str, Any] = {}
    linears(bench)
    if bench.wants("bars", ""):
        out["bars"] = bars(bench)
    decodes(bench)
    prefills(bench)
    samples(bench)
    for name, run, shapes in (("balance", balance, GROUPED[:1]), ("cascade", cascade, (*GROUPED, MULTI_HEAD))):
        out[name] = {str(h): run(bench, h) for h in shapes if bench.wants(f"{name}.bf16", str(h))}
    if not bench.results:
        sys.exit(f"no kernel matches {' '.join(args.only)}")
    low, middle, high = min(bench.reads), statistics.median(bench.reads), max(bench.reads)
    print(f"raw read: {middle:.1f} GB/s ({low:.1f}-{high:.1f})")
    if args.json:
        facts = {"cpu": machine.cpu_model(), "cores": machine.cores().budget}
        out = {
            "machine": facts, "isa": isa, "threads": args.threads, "rounds": args.rounds,
            "megabytes": args.megabytes, "peak_gops": bench.peaks,
            "read_gb_per_s": {"median": middle, "low": low, "high": high}, "kernels": bench.results, **out,
        }  # fmt: skip
        print(json.dumps(out))


if __name__ == "__main__":
    main()
