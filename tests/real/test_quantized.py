"""A known recipe gives a known perplexity: formats of real weights, by the kernels that serve.

The text is this repository's license, which never changes. Calibrated and measured on the same text, these
numbers say nothing about quality: they say that results can be repeated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM
from dovetail.checkpoint.rescaled import Rescaled
from dovetail.evals.scoring import score
from dovetail.models import open_checkpoint
from dovetail.quantize.recipe import Recipe, resolved
from dovetail.quantize.run import quantize
from dovetail.text.corpus import Corpus

TEXT = Corpus("license", (Path(__file__).parents[2] / "LICENSE").read_text())
SMALL = {"samples": 4, "length": 512}
KNOWN: dict[str, tuple[dict[str, Any], float]] = {
    "w8a8-fp8": ({}, 17.871),
    "w8a8-int8": (SMALL, 18.592),
    "w4a16": (SMALL | {"group": 64}, 19.208),
    "w4a8": ({"group": 64, "method": "rtn", "head": "int8"}, 54.311),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", KNOWN)
def test_perplexity_is_what_it_was(form: str, smollm2: Path, tmp_path: Path) -> None:
    given, known = KNOWN[form]
    checkpoint = Rescaled(open_checkpoint(smollm2), 0)
    recipe = Recipe(form, resolved(form, given, checkpoint.config), TEXT, 0)
    quantize(checkpoint, tmp_path / "out", recipe, progress=False)
    llm = LLM(tmp_path / "out", max_model_len=512, kv_memory=128 << 20, threads=1)
    tokens = llm.tokenizer.encode(TEXT.text)
    windows = [tokens[at : at + 512] for at in (0, 1024)]
    scores = score(llm, windows, [1, 1], [511, 511])
    found = math.exp(-sum(map(sum, scores)) / sum(map(len, scores)))
    assert found == pytest.approx(known, rel=0.005)
