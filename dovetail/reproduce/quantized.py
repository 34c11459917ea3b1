"""Checkpoints of one model in several formats, calibrated on one half of a text and measured on the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail import hub
from dovetail.checkpoint.export import export
from dovetail.checkpoint.rescaled import Rescaled
from dovetail.evals.perplexity import Perplexity
from dovetail.llm import LLM
from dovetail.models import open_checkpoint
from dovetail.quantize.recipe import Recipe, needs_text, resolved
from dovetail.quantize.run import quantize
from dovetail.text.corpus import DEFAULT, Corpus, corpus


@dataclass(frozen=True)
class Text:
    """Calibration on `samples` texts of `length` tokens; perplexity of `windows` windows of `window` tokens."""

    samples: int
    length: int
    windows: int
    window: int


@dataclass
class Models:
    """What is made of `model` in `folder`, each once. rescaled: start from other weights of the same function, in
    bfloat16, which lie on no grid (`checkpoint.rescaled`)."""

    model: str
    text: Text
    folder: Path
    rescaled: bool = False

    def __post_init__(self) -> None:
        text = corpus(DEFAULT).text
        cut = text.find("\n", len(text) // 2)
        self.calibration = Corpus(f"{DEFAULT}, second half", text[cut:])
        self.file = self.folder / "measured.txt"
        self.file.write_text(text[:cut], encoding="utf-8")

    def __str__(self) -> str:
        t = self.text
        return (
            f"calibrated on {t.samples} x {t.length} tokens of {self.calibration.name}; {t.windows} windows of "
            f"{t.window} tokens of {DEFAULT}, first half"
        )

    @property
    def source(self) -> str:
        """The model that is quantized."""
        out = self.folder / "bf16"
        if not self.rescaled:
            return self.model
        if not out.exists():
            export(Rescaled(open_checkpoint(hub.resolve(self.model)), 0), out)
        return str(out)

    def quantized(self, name: str, form: str, given: Mapping[str, Any]) -> str:
        """The model in a format, with options of `dovetail quantize`, in the folder called `name`."""
        out = self.folder / name
        if not out.exists():
            checkpoint = open_checkpoint(hub.resolve(self.source))
            sizes = {"samples": self.text.samples, "length": self.text.length}
            options = resolved(form, sizes | dict(given) if form != "w8a8-fp8" else given, checkpoint.config)
            text = self.calibration if needs_text(form, options) else None
            quantize(checkpoint, out, Recipe(form, options, text, 0), progress=False)
        return str(out)

    def perplexity(self, model: str, **options: Any) -> float:
        """On the kernels that serve. options: of the engine."""
        llm = LLM(model, max_model_len=self.text.window, **options)
        suite = Perplexity(corpus=str(self.file), window=self.text.window, windows=self.text.windows)
        return float(suite.measure(llm, None)["perplexity"])
