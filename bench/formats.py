"""Low-precision formats of one model side by side: quality, size and speed, all through the engine that serves.

    .venv/bin/python bench/formats.py MODEL --work DIR [--only bf16,w4a16] [--corpus wikitext2 --data DIR]
        [--windows 20] [--suites perplexity,divergence,similarity,needle] [--json FILE]

MODEL is a checkpoint in bf16, float16 or float32. Checkpoints are made by `dovetail quantize` in DIR, once. Naive
formats, which nobody should use, are made at load. Every figure comes from the kernels that serve.
Perplexities have a paired interval: of the differences of each window's mean loss to bf16's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.technique import Technique
from dovetail.evals.divergence import Divergence
from dovetail.evals.needle import Needle
from dovetail.evals.perplexity import Perplexity
from dovetail.evals.similarity import Similarity
from dovetail.layers.loader import Recoding
from dovetail.llm import LLM
from dovetail.ops.grids import to_nibbles
from dovetail.ops.schemes import SCHEMES, bfloat16
from dovetail.ops.stored import StoredTensor
from dovetail.provenance import provenance
from dovetail.reproduce.atom.quality import KV, steps
from dovetail.show.table import table


@dataclass(frozen=True)
class Format:
    """quantize: options of `dovetail quantize`, or none for MODEL itself. naive: how weights are made at load.
    options: of the engine."""

    name: str
    quantize: tuple[str, ...] = ()
    naive: Callable[[StoredTensor], StoredTensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    also: str = ""  # the name of the format whose checkpoint this is, too

    @property
    def folder(self) -> str:
        return self.also or self.name


# -- naive formats ----------------------------------------------------------------------------------------


def int8_per_tensor(weight: StoredTensor) -> StoredTensor:
    """int8 with one scale for the whole weight; rows of activations with a scale each."""
    values = weight.values()
    scale = np.full((len(values), 1), np.abs(values).max() / np.float32(127.5), np.float32)
    scheme = SCHEMES["w8a8-int8"]
    return scheme.stored(weight.name, scheme.codes(values, bfloat16(scale)), bfloat16(scale))


def int4_both(weight: StoredTensor) -> StoredTensor:
    """4-bit weights with a scale for each output channel, 4-bit activations with a scale for each token."""
    values = weight.values()
    scale = bfloat16(np.abs(values).max(1, keepdims=True) / np.float32(7))
    scale = np.where(scale > 0, scale, np.float32(1))
    codes = np.clip(np.rint(values / scale), -8, 7).astype(np.int8)
    parts: dict[str, Any] = {"scale": scale, "outlier_scale": np.ones(len(values), np.float32)}
    shared: dict[str, Any] = {"order": np.arange(values.shape[1]), "clip": np.ones(1, np.float32)}
    return StoredTensor(weight.name, "ATOM", values.shape, to_nibbles(codes), parts, shared, "atom")


# -- the table --------------------------------------------------------------------------------------------


def formats(group: int) -> list[Format]:
    """group: of columns that share a scale, which must divide the model's widths."""
    g = ("--group", str(group))
    smaller = ("--group", "32")
    smooth = ("--format", "w8a8-int8", "--method", "rtn", "--smoothquant", "0.5")
    return [
        Format("bf16"),
        Format("w8a8-fp8", ("--format", "w8a8-fp8")),
        Format("w8a8-int8", ("--format", "w8a8-int8")),
        Format("w8a8-int8 RTN", ("--format", "w8a8-int8", "--method", "rtn")),
        Format("w8a8-int8 SmoothQuant", smooth),
        Format(f"w4a16 g{group}", ("--format", "w4a16", *g)),
        Format("w4a16 g32", ("--format", "w4a16", *smaller)),
        Format(f"w4a16 g{group} RTN", ("--format", "w4a16", *g, "--method", "rtn", "--observer", "minmax")),
        Format(f"w4a8 g{group}", ("--format", "w4a8", *g)),
        Format("atom, KV4", ("--format", "atom", *g), options={"kv_cache_dtype": "int4"}),
        Format("atom, KV16", ("--format", "atom", *g), also="atom, KV4"),
        Format("tender INT8", ("--format", "tender", "--bits", "8")),
        Format("tender INT4", ("--format", "tender", "--bits", "4")),
        Format("INT8 per tensor, naive", naive=int8_per_tensor),
        Format("W4A4 RTN, naive", naive=int4_both),
        Format("W4A4 SmoothQuant, naive", smooth, naive=int4_both, also="w8a8-int8 SmoothQuant"),
        Format("W4A4 RTN in groups", ("--format", "atom", *g, "--method", "rtn", "--outliers", "0",
               "--activation-clip", "1", "--weight-clip", "1")),
        *ablation(group),
    ]  # fmt: skip


def ablation(group: int) -> list[Format]:
    """Atom's steps in the order of its paper (`reproduce.atom.quality.steps`), each with those before it."""
    found = []
    for number, (name, given) in enumerate(steps(group).items(), 1):
        flags = (text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value)))
        found.append(Format(f"atom {number}, {name}", ("--format", "atom", *flags)))
    last = found[-1]
    return [*found, replace(last, name="atom 6, KV4", options={"kv_cache_dtype": KV}, also=last.name)]


def made(entry: Format, model: str, work: Path, arguments: list[str]) -> str:
    """The checkpoint of a format: MODEL itself, or what `dovetail quantize` wrote."""
    if not entry.quantize:
        return model
    out = work / entry.folder.replace(" ", "-").replace(",", "")
    if not (out / "config.json").exists():
        command = [sys.executable, "-m", "dovetail", "quantize", model, str(out), *entry.quantize]
        needs = {"--smoothquant", "atom", "tender"} & {*entry.quantize}
        calibrated = bool(needs) or not {"rtn", "w8a8-fp8"} & {*entry.quantize}
        subprocess.run([*command, *(arguments if calibrated else [])], check=True, stdout=sys.stderr)
    return str(out)


def opened(entry: Format, path: str, options: dict[str, Any]) -> LLM:
    use = []
    if entry.naive is not None:
        naive = entry.naive
        use = [Technique("naive", ("format",), lambda site: {"format": Recoding(naive)})]
    return LLM(path, use=use, **(options | entry.options))


def measured(llm: LLM, suites: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    return {name: suite.measure(llm, references.get(name)) for name, suite in suites.items()}


def rows(results: dict[str, dict[str, Any]]) -> list[list[object]]:
    plain = results.get("bf16", {}).get("perplexity", {}).get("window_perplexity")
    found: list[list[object]] = []
    for name, r in results.items():
        p, d = r.get("perplexity", {}), r.get("divergence", {})
        s, n = r.get("similarity", {}), r.get("needle", {})
        change = ""
        if plain and p:
            losses = [math.log(a) - math.log(b) for a, b in zip(p["window_perplexity"], plain, strict=True)]
            error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
            change = f"{100 * math.expm1(statistics.fmean(losses)):+.2f} ({100 * 1.96 * error:.2f})"
        found.append([
            name, _figure(p.get("perplexity"), 3), change, _figure(d.get("kl_mean"), 4),
            _figure(d.get("top1_agreement"), 3), _figure(s.get("rougeL"), 3), _figure(n.get("accuracy"), 2),
            _figure(r.get("megabytes"), 1),
        ])  # fmt: skip
    return found


HEADERS = ["format", "perplexity", "change in % (95 %)", "KL", "same top token", "ROUGE-L", "needle", "MB on disk"]


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--only", default="", help="names of formats, joined by ;")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--corpus", default="pydoc")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--suites", default="perplexity,divergence,similarity,needle")
    parser.add_argument("--quantize", default="", help="more options of dovetail quantize, as one text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known: dict[str, Any] = {
        "perplexity": Perplexity(options.corpus, options.data, 2048, options.windows),
        "divergence": Divergence(options.corpus, options.data, 512, 8, 64),
        "similarity": Similarity(tokens=64),
        "needle": Needle(lengths="1024,2048", depths="0,50,100", trials=4),
    }
    suites = {name: known[name] for name in options.suites.split(",")}
    wanted = set(filter(None, options.only.split(";")))
    results: dict[str, dict[str, Any]] = {}
    options.work.mkdir(parents=True, exist_ok=True)
    exact = LLM(options.model, dtype="float32", activations="exact", kv_cache_dtype="float32")
    references = {name: suite.refer(exact) for name, suite in suites.items() if suite.compares}
    del exact
    for entry in formats(options.group):
        if wanted and entry.name not in wanted:
            continue
        gc.collect()
        path = made(entry, options.model, options.work, options.quantize.split())
        llm = opened(entry, path, {"max_model_len": 2560} if not entry.options.get("max_model_len") else {})
        found = measured(llm, suites, references)
        found["config"] = llm.config.to_dict()
        found["megabytes"] = llm.checkpoint.bytes / 1e6 if entry.naive is None else None
        results[entry.name] = found
        del llm
        print(table(HEADERS, rows(results)), file=sys.stderr, flush=True)
    print(table(HEADERS, rows(results)))
    if options.json:
        options.json.write_text(json.dumps({"results": results, **provenance()}, indent=1, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
