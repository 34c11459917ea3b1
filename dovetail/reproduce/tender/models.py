"""Perplexity of a model whose linear layers are Tender's, on the kernels that serve it (table 2)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dovetail import hub
from dovetail.evals.perplexity import Perplexity
from dovetail.llm import LLM
from dovetail.models import open_checkpoint
from dovetail.ops import tender
from dovetail.quantize.recipe import Recipe, resolved
from dovetail.quantize.run import quantize
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.tender.effort import Effort
from dovetail.text.corpus import DEFAULT, Corpus, corpus

INT8, INT4, DOWN, SUMS = "INT8", "INT4", "scales rounded down", "sums of a model"

_TABLE = "table 2, WikiText-2: "


def experiment(effort: Effort) -> Experiment:
    names = (INT8, INT4, SUMS, *((DOWN,) if effort.down else ()))
    return Experiment("perplexity", names, partial(measure, effort))


def measure(effort: Effort) -> Iterator[Claim]:
    halves = _halves()
    with tempfile.TemporaryDirectory() as folder:
        made = _Models(effort, Path(folder), *halves)
        before, eight = made.perplexity(effort.model), made.perplexity(made.quantized(8, "up"))
        yield Claim(
            INT8,
            made.setting,
            _TABLE + "Llama-2-7B 5.47 -> 5.77, LLaMA-7B 5.68 -> 5.87, OPT-6.7B 10.86 -> 10.93",
            f"{before:.2f} -> {eight:.2f}",
            "Scales are fixed before the text is seen. This model's channels have rare peaks before down_proj. "
            "Those beyond the calibration text's are clipped, so more text helps.",
        )
        yield Claim(
            INT4,
            made.setting,
            _TABLE + "Llama-2-7B 5.47 -> 36.47, LLaMA-7B 5.68 -> 23.85, OPT-6.7B 10.86 -> 13.56",
            f"{before:.2f} -> {made.perplexity(made.quantized(4, 'up')):.4g}",
            "As in the paper, 4 bits with static scales are not enough for models of Llama's kind.",
        )
        yield _sums(made)
        if effort.down:
            down = made.perplexity(made.quantized(8, "down"))
            yield Claim(
                DOWN,
                made.setting,
                "the scheme, up or down, is chosen once for a model, by its loss on a sample; no figures",
                f"INT8: {down:.2f} with scales rounded down, {eight:.2f} up",
                "Rounding down halves the steps and clips the largest values.",
            )


def _halves() -> tuple[Corpus, Corpus]:
    """To calibrate on and to measure on."""
    text = corpus(DEFAULT).text
    cut = text.find("\n", len(text) // 2)
    return Corpus(f"{DEFAULT}, second half", text[cut:]), Corpus(f"{DEFAULT}, first half", text[:cut])


@dataclass
class _Models:
    effort: Effort
    folder: Path
    calibration: Corpus
    measured: Corpus

    def __post_init__(self) -> None:
        self.file = self.folder / "measured.txt"
        self.file.write_text(self.measured.text, encoding="utf-8")

    @property
    def setting(self) -> str:
        e = self.effort
        return (
            f"{e.model}, linear layers of the blocks, {tender.Grouping().groups} groups, calibrated on "
            f"{e.samples} x {e.length} tokens of {self.calibration.name}; {e.windows} windows of {e.window} "
            f"tokens of {self.measured.name}"
        )

    def quantized(self, bits: int, rounding: str) -> Path:
        out = self.folder / f"{bits}-{rounding}"
        if not out.exists():
            checkpoint = open_checkpoint(hub.resolve(self.effort.model))
            given = {
                "bits": bits, "rounding": rounding, "samples": self.effort.samples, "length": self.effort.length,
            }  # fmt: skip
            options = resolved("tender", given, checkpoint.config)
            quantize(checkpoint, out, Recipe("tender", options, self.calibration, 0), progress=False)
        return out

    def perplexity(self, model: str | Path) -> float:
        llm = LLM(str(model), max_model_len=self.effort.window)
        suite = Perplexity(corpus=str(self.file), window=self.effort.window, windows=self.effort.windows)
        return float(suite.measure(llm, None)["perplexity"])


def _sums(made: _Models) -> Claim:
    """How large sums may become, by the codes of a model's weights."""
    found = []
    for bits in (8, 4):
        checkpoint = open_checkpoint(made.quantized(bits, "up"))
        weights = [n for n in checkpoint.names() if checkpoint.format(n).startswith("TENDER")]
        bounds = [tender.highest_sum(checkpoint.tensor(name)) for name in weights]
        wide = sum(bound >= 1 << 31 for bound in bounds)
        found.append(
            f"INT{bits}: {wide} of {len(bounds)} weights, the largest sum below {max(bounds) / 2**31:.2f} x 2^31"
        )
    return Claim(
        SUMS,
        made.setting,
        "a shifted 32-bit accumulator; whether it can overflow is not said",
        "weights that are summed in 64 bits: " + "; ".join(found),
        "The bound takes every activation at its extreme. Groups of large scales are small, so it is far off.",
    )
