"""Calibration rows: samples of a text as they pass through a model, one block at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint import Checkpoint
from dovetail.core.errors import ConfigError
from dovetail.core.pages import PagePool, PageTable, pages_for
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import UNLIMITED, Request, Span
from dovetail.host.lazy_torch import torch
from dovetail.layers.embedding import Embedding
from dovetail.layers.linear import Linear
from dovetail.models import geometry
from dovetail.models.decoder import Block
from dovetail.runtime.batch import BatchBuilder
from dovetail.runtime.kv import KV, KVConfig
from dovetail.text.corpus import Corpus
from dovetail.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 16
# Linear layers of a block that share their input, by its name.
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

See = Mapping[str, Callable[["Tensor"], "Tensor"]]  # by site: takes rows [n, K], gives those that are multiplied


def sample(tokenizer: Tokenizer, text: Corpus, sizes: tuple[int, int], seed: int) -> NDArray[np.int64]:
    """`sizes` = (samples, length): that many windows of the text that do not overlap, chosen by the seed.

    What the tokenizer puts before every text is before each of them. ConfigError if the text is too short.
    """
    count, length = sizes
    start = tokenizer.encode("")
    tokens = np.array(tokenizer.encode(text.text, add_special_tokens=False), np.int64)
    own = length - len(start)
    windows = len(tokens) // own
    if windows < count:
        raise ConfigError(
            f"calibration text {text.name} has {len(tokens)} tokens, which are {windows} samples of {length}, and "
            f"{count} were asked for; give a longer text, fewer --samples or a smaller --length"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(windows)[:count])
    rows = tokens[: windows * own].reshape(windows, own)[chosen]
    return np.concatenate([np.tile(np.array(start, np.int64), (count, 1)), rows], 1)


class Stream:
    """The hidden rows of all samples [samples, length, width] in float32, as they enter a block."""

    def __init__(self, checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> None:
        c = checkpoint.config
        embed = Embedding(checkpoint.tensor("model.embed_tokens.weight"), "float32", c.embedding_scale)
        self.hidden = torch.stack([embed(torch.from_numpy(row)) for row in tokens])
        length = tokens.shape[1]
        pages = pages_for(length, PAGE)
        table = PageTable(PagePool(pages, PAGE))
        table.grow(0, length)
        request = Request("calibration", tokens[0].tolist(), SamplingParams(), table, length, 0)
        one = replace(geometry(c), num_layers=1, sliding_layers=())
        self._kv = KV(one, KVConfig(pages, PAGE, "float32"), "cpu")
        self._batch = BatchBuilder(PAGE, UNLIMITED, self._kv.stage_pages, "cpu").build([Span(request, 0, length)])

    def run(self, block: Block, see: See, *, go_on: bool) -> None:
        """Pass all samples through a block, one by one. go_on: rows become what it gives."""
        batch = replace(self._batch, memo={})
        with torch.inference_mode(), watched(block, see):
            for i, rows in enumerate(self.hidden):
                made = block(rows, 0, batch, self._kv)
                if go_on:
                    self.hidden[i] = made


class _Watched:
    """A linear layer whose rows somebody sees first."""

    def __init__(self, linear: Linear, see: Callable[[Tensor], Tensor]) -> None:
        self.linear, self.see = linear, see

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(self.see(x))

    def record(self, *args: Any) -> None:
        raise NotImplementedError("calibration runs operation by operation")


@contextlib.contextmanager
def watched(block: Block, see: See) -> Iterator[None]:
    """Let `see` have the rows that enter the linear layers of a block."""
    places = {
        "qkv": (block.attention, "qkv"), "o": (block.attention, "o"), "gate_up": (block.mlp, "gate_up"),
        "down": (block.mlp, "down"),
    }  # fmt: skip
    kept = {site: getattr(*places[site]) for site in see}
    try:
        for site, linear in kept.items():
            setattr(*places[site], _Watched(linear, see[site]))
        yield
    finally:
        for site, linear in kept.items():
            setattr(*places[site], linear)
