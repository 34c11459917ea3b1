"""Perplexity of a model whose linear layers are Tender's, on the kernels that serve it (table 2)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dovetail import hub
from dovetail.models import open_checkpoint
from dovetail.ops import tender
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.quantized import Models
from dovetail.reproduce.tender.effort import Effort

INT8, INT4, DOWN, SUMS = "INT8", "INT4", "scales rounded down", "sums of a model"

_TABLE = "table 2, WikiText-2: "


def experiment(effort: Effort) -> Experiment:
    names = (INT8, INT4, SUMS, *((DOWN,) if effort.down else ()))
    return Experiment("perplexity", names, partial(measure, effort))


def measure(effort: Effort) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        made = Models(effort.model, effort.text, Path(folder))
        setting = _setting(effort, made)
        before, eight = made.perplexity(effort.model), made.perplexity(_quantized(made, 8, "up"))
        yield Claim(
            INT8,
            setting,
            _TABLE + "Llama-2-7B 5.47 -> 5.77, LLaMA-7B 5.68 -> 5.87, OPT-6.7B 10.86 -> 10.93",
            f"{before:.2f} -> {eight:.2f}",
            "Scales are fixed before the text is seen. This model's channels have rare peaks before down_proj. "
            "Those beyond the calibration text's are clipped, so more text helps.",
        )
        yield Claim(
            INT4,
            setting,
            _TABLE + "Llama-2-7B 5.47 -> 36.47, LLaMA-7B 5.68 -> 23.85, OPT-6.7B 10.86 -> 13.56",
            f"{before:.2f} -> {made.perplexity(_quantized(made, 4, 'up')):.4g}",
            "As in the paper, 4 bits with static scales are not enough for models of Llama's kind.",
        )
        yield _sums(made, setting)
        if effort.down:
            down = made.perplexity(_quantized(made, 8, "down"))
            yield Claim(
                DOWN,
                setting,
                "the scheme, up or down, is chosen once for a model, by its loss on a sample; no figures",
                f"INT8: {down:.2f} with scales rounded down, {eight:.2f} up",
                "Rounding down halves the steps and clips the largest values.",
            )


def _setting(effort: Effort, made: Models) -> str:
    return f"{effort.model}, linear layers of the blocks, {tender.Grouping().groups} groups, {made}"


def _quantized(made: Models, bits: int, rounding: str) -> str:
    return made.quantized(f"{bits}-{rounding}", "tender", {"bits": bits, "rounding": rounding})


def _sums(made: Models, setting: str) -> Claim:
    """How large sums may become, by the codes of a model's weights."""
    found = []
    for bits in (8, 4):
        checkpoint = open_checkpoint(hub.resolve(_quantized(made, bits, "up")))
        weights = [n for n in checkpoint.names() if checkpoint.format(n).startswith("TENDER")]
        bounds = [tender.highest_sum(checkpoint.tensor(name)) for name in weights]
        wide = sum(bound >= 1 << 31 for bound in bounds)
        found.append(
            f"INT{bits}: {wide} of {len(bounds)} weights, the largest sum below {max(bounds) / 2**31:.2f} x 2^31"
        )
    return Claim(
        SUMS,
        setting,
        "a shifted 32-bit accumulator; whether it can overflow is not said",
        "weights that are summed in 64 bits: " + "; ".join(found),
        "The bound takes every activation at its extreme. Groups of large scales are small, so it is far off.",
    )
