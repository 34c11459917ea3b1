"""Channels grouped for each chunk of rows, as in the paper, and once for a layer, as the kernels need it.

Both by rounding float rows and weights, block by block; only the grouping differs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dovetail import hub
from dovetail.checkpoint import Checkpoint
from dovetail.host.lazy_torch import torch
from dovetail.layers.linear import Dense
from dovetail.layers.loader import Loader
from dovetail.models import open_checkpoint
from dovetail.ops import tender
from dovetail.ops.stored import StoredTensor
from dovetail.ops.tender import Floats, Grouping, Shared
from dovetail.quantize.calibration import SITES, Stream, sample
from dovetail.quantize.layer import Layer
from dovetail.quantize.tender import BIASED, Extremes
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.quantized import Models
from dovetail.reproduce.tender.effort import Effort
from dovetail.text.corpus import Corpus

if TYPE_CHECKING:
    from torch import Tensor

NAME = "groups of each chunk"
HOW = Grouping()


def experiment(effort: Effort) -> Experiment:
    return Experiment("groups", (NAME,), partial(measure, effort))


def measure(effort: Effort) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        made = Models(effort.model, effort.text, Path(folder))
        checkpoint = open_checkpoint(hub.resolve(effort.model))
        plain, layer, chunk = _perplexities(checkpoint, made)
        yield Claim(
            NAME,
            f"{effort.model}, INT8, {HOW.groups} groups, {made}; rows and weights rounded in float32",
            "channels are grouped for each chunk of 256 rows",
            f"{plain:.2f} -> {chunk:.2f}; with one grouping for a layer {layer:.2f}",
            "A grouping of each chunk sees fewer rows, and what was not seen is clipped. A layer's grouping takes "
            "the largest of all chunks, and lets a batch mix chunks.",
        )


def _perplexities(checkpoint: Checkpoint, made: Models) -> tuple[float, float, float]:
    """Of the original, of groups of a layer, and of groups of a chunk."""
    text, tokenizer = made.text, checkpoint.tokenizer()
    calibration = Stream(checkpoint, sample(tokenizer, made.calibration, (text.samples, text.length), 0))
    measured = Corpus("measured", made.file.read_text(encoding="utf-8"))
    tokens = sample(tokenizer, measured, (text.windows, text.window), 0)
    streams = [Stream(checkpoint, tokens) for _ in range(3)]
    for index in range(checkpoint.config.num_layers):
        layer = Layer(checkpoint, index)
        block, seen = layer.block(), {site: Extremes(layer.linears(site)[0], HOW.chunk) for site in SITES}
        calibration.run(block, seen, go_on=True)
        streams[0].run(block, {}, go_on=True)
        rounded = layer.block({f"{n}.weight": _rounded(layer, n) for site in SITES for n in layer.linears(site)})
        for stream, grouped in zip(streams[1:], (_of_layer, _of_chunks), strict=True):
            stream.run(rounded, {site: _Rows(grouped(seen[site], site in BIASED)) for site in SITES}, go_on=True)
    found = [_perplexity(checkpoint, stream.hidden, torch.from_numpy(tokens)) for stream in streams]
    return found[0], found[1], found[2]


def _rounded(layer: Layer, name: str) -> StoredTensor:
    """A weight to nearest, with one scale for each row."""
    weight = layer.weight(name).numpy()
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(HOW.largest)
    scale = np.where(scale > 0, scale, np.float32(1))
    return StoredTensor.of(f"{name}.weight", np.rint(weight / scale) * scale)


def _of_layer(seen: Extremes, bias: bool) -> list[Shared]:
    return [tender.describe(seen.statistics, HOW, bias)]


def _of_chunks(seen: Extremes, bias: bool) -> list[Shared]:
    return [tender.describe(one, HOW, bias) for one in seen.statistics.by_chunk()]


class _Rows:
    """Rows of one sequence from position 0 on, rounded. shared: of all rows, or of each chunk."""

    def __init__(self, shared: Sequence[Shared]) -> None:
        self.shared = shared

    def __call__(self, x: Tensor) -> Tensor:
        positions, parts = np.arange(len(x)), []
        for i, shared in enumerate(self.shared):
            start, last = i * HOW.chunk, i + 1 == len(self.shared)
            part = slice(start, None if last else start + HOW.chunk)
            parts.append(_values(x[part].numpy(), positions[part], shared))
        return torch.from_numpy(np.concatenate(parts))


def _values(x: Floats, positions: np.ndarray[tuple[int], np.dtype[np.int64]], shared: Shared) -> Floats:
    chunk = tender.chunks(positions, shared)
    codes = tender.activate(x, positions, shared, HOW.bits)
    out = np.empty_like(x)
    steps = np.ldexp(shared["scales"][chunk][:, None], tender.shifts(shared).astype(np.int32))
    out[:, shared["order"]] = codes * steps
    return out + shared["means"][chunk] if "means" in shared else out


def _perplexity(checkpoint: Checkpoint, hidden: Tensor, tokens: Tensor) -> float:
    """Of windows whose hidden rows behind the last block are known."""
    load = Loader(checkpoint, Dense("float32"), "float32")
    norm: Callable[[Tensor], Tensor] = load.norm("model.norm")
    head = load.linear("model.embed_tokens" if checkpoint.config.tie_word_embeddings else "lm_head")
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(head(norm(rows))[:-1], window[1:]).item()
            for rows, window in zip(hidden, tokens, strict=True)
        ]
    return math.exp(sum(losses) / len(losses))
