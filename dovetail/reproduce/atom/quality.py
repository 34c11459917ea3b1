"""Perplexity of a model in Atom's format, and of each step towards it, on the kernels that serve it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dovetail.reproduce.atom.effort import Effort
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.quantized import Models

LOSS, ABLATION = "perplexity", "ablation"
KV = "int4"


def steps(group: int) -> dict[str, Mapping[str, Any]]:
    """Atom's steps in the order of the paper's ablation, each with those before it, as options of `quantize`.

    Outliers are as many as a group has columns. KV in 4 bits, which is the last step, is an option of the engine.
    """
    nearest, unclipped = {"method": "rtn"}, {"activation_clip": 1.0, "weight_clip": 1.0}
    return {
        "RTN": {**nearest, "group": 0, "outliers": 0, **unclipped},
        "INT8 outliers": {**nearest, "group": 0, "outliers": group, **unclipped},
        "groups": {**nearest, "group": group, "outliers": group, **unclipped},
        "clipping": {**nearest, "group": group, "outliers": group},
        "GPTQ": {"group": group, "outliers": group},
    }


def experiment(effort: Effort) -> Experiment:
    return Experiment("perplexity", (LOSS, ABLATION), partial(measure, effort))


def measure(effort: Effort) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        made = Models(effort.model, effort.text, Path(folder), rescaled=True)
        setting = (
            f"{effort.model} rescaled off its grid, groups of {effort.group}, {effort.group} outliers, {made}"
        )
        before = made.perplexity(made.source)
        found = {
            name: made.perplexity(made.quantized(name, "atom", given))
            for name, given in steps(effort.group).items()
        }
        found["KV4"] = made.perplexity(
            made.quantized("GPTQ", "atom", steps(effort.group)["GPTQ"]), kv_cache_dtype=KV
        )
        yield Claim(
            LOSS,
            setting,
            "WikiText-2, FP16 -> W4A4 with KV4: LLaMA-7B 5.68 -> 6.16, 65B 3.53 -> 3.89, Llama-2-7B 5.47 -> 6.03; "
            "SmoothQuant W4A4 on LLaMA-7B 22.62",
            f"{before:.2f} -> {found['KV4']:.2f}; without groups, outliers and GPTQ {found['RTN']:.4g}",
            "A model of 135 million weights has little to spare: it loses more with every format than one of "
            "billions. Its heads have 64 channels, so a scale of KV is for half as many values.",
        )
        yield Claim(
            ABLATION,
            setting,
            "LLaMA-7B, WikiText-2: RTN 2315.52, outliers in FP16 11.34, in INT8 11.39, groups of 128 6.22, "
            "clipping 6.13, GPTQ 6.04, KV4 6.16",
            ", ".join(f"{name} {value:.4g}" for name, value in found.items()),
            "Each step is added to those before it, in the paper's order. The model is far smaller, and it was "
            "rescaled off its own 4-bit grid, which leaves its channels a random factor apart.",
        )
