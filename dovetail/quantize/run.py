"""Quantizes a model: block by block from the checkpoint to a new one, with rows of text in between.

In memory are one block, what is measured of it, and the hidden rows of the text. Every finished block is kept on
disk. A run that is interrupted goes on behind the last of them: their rows are computed again from these files.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.checkpoint import Checkpoint
from dovetail.checkpoint.export import config_json, write_beside
from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.layout import NORM_SUFFIX
from dovetail.checkpoint.own_format import HEAD
from dovetail.checkpoint.quantized import quantized_weights
from dovetail.checkpoint.quantized_writer import entries, quantization_config
from dovetail.checkpoint.safetensors_writer import Entry, write_json, write_weights
from dovetail.core.errors import ConfigError
from dovetail.core.model import PLAIN_FORMATS
from dovetail.host.files import explaining, require_space, tree_bytes
from dovetail.host.lazy_torch import INSTALL, installed
from dovetail.ops.memory import ELEMENTS, rounded
from dovetail.ops.schemes import SCHEMES
from dovetail.ops.stored import StoredTensor
from dovetail.quantize.atom import Atom
from dovetail.quantize.calibration import Stream, sample
from dovetail.quantize.layer import Layer, Method
from dovetail.quantize.recipe import Recipe
from dovetail.quantize.state import RECIPE, State
from dovetail.quantize.tender import Tender
from dovetail.quantize.uniform import Uniform
from dovetail.show.progress import counter, note

_REST = "rest"
_EMBEDDING = "model.embed_tokens.weight"
_PLAIN = {kind: name for name, kind in PLAIN_FORMATS.items()}


@dataclass(frozen=True)
class Report:
    """layers: of each linear layer, its name and the relative error of its output (of its weight, if no text was
    used). resumed: blocks that an earlier run had finished."""

    recipe: dict[str, Any]
    layers: list[dict[str, Any]]
    measured: bool
    resumed: int
    bytes: int


def method_of(recipe: Recipe) -> Method:
    if recipe.format == "atom":
        return Atom(recipe.options)
    return Tender(recipe.options) if recipe.format == "tender" else Uniform(recipe.format, recipe.options)


def quantize(checkpoint: Checkpoint, out: Path, recipe: Recipe, *, progress: bool = True) -> Report:
    """Write `checkpoint` to the folder `out` in the recipe's format.

    ConfigError if `out` holds something, the checkpoint is quantized by such a run already, or text is too short.
    ModelError if calibration meets values that are not finite, or the disk is full.
    """
    if not installed():
        raise ConfigError(f"quantize needs torch, which is not installed: {INSTALL}")
    if getattr(checkpoint, "quantization", None) is not None:
        raise ConfigError(
            f"{checkpoint.path}: its weights are quantized (quantization_config); start from the unquantized model"
        )
    state = State(out)
    needed = sum(math.prod(checkpoint.shape(n)) for n in checkpoint.names()) * 2
    with explaining(out.parent, needed, "the model", "choose another folder"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is not an empty folder; choose another one, or delete it")
        require_space(out.parent, needed, "the model", "choose another folder")
        found = recipe.object(checkpoint)
        with state.opened(found):
            run = _Run(checkpoint, recipe, state)
            resumed = run.blocks(progress)
            run.rest()
            size = run.publish(found)
    return Report(found, run.layers, run.measured, resumed, size)


class _Run:
    """One run: `blocks`, `rest`, `publish`."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, state: State) -> None:
        self.checkpoint, self.recipe, self.state = checkpoint, recipe, state
        self.method = method_of(recipe)
        self.head = SCHEMES["w8a8-int8"] if recipe.options["head"] == "int8" else None
        self.config = quantization_config(self.method.scheme, self.head)
        self.layers: list[dict[str, Any]] = []
        self.measured = False

    def blocks(self, progress: bool) -> int:
        """Quantize all blocks that are not finished. Returns how many were."""
        count = self.checkpoint.config.num_layers
        finished = next((i for i in range(count) if not self.state.has(_part(i))), count)
        streams = self._streams() if finished < count else {}
        if finished:
            note(f"{finished} of {count} blocks are an interrupted run's")
        with counter("Quantizing", count, progress) as advance:
            for index in range(count):
                layer = Layer(self.checkpoint, index)
                if index >= finished:
                    self._quantize(layer, streams)
                elif "original" in streams:
                    streams["original"].run(layer.block(), {}, go_on=True)
                report = self.state.report(_part(index))
                self.layers += report["layers"]
                self.measured = bool(report["measured"])
                if "quantized" in streams and index + 1 < count:
                    tensors = self._read(layer)
                    see = self.method.rounding(tensors, layer)
                    streams["quantized"].run(layer.block(tensors), see, go_on=True)
                for name in layer.tensors():
                    self.checkpoint.release(name)
                advance(1)
        return finished

    def _streams(self) -> dict[str, Stream]:
        text, options = self.recipe.text, self.recipe.options
        if text is None or not self.method.needs:
            return {}
        length = min(options["length"], self.checkpoint.config.max_position_embeddings)
        tokens = sample(self.checkpoint.tokenizer(), text, (options["samples"], length), self.recipe.seed)
        return {name: Stream(self.checkpoint, tokens) for name in sorted(self.method.needs)}

    def _quantize(self, layer: Layer, streams: Mapping[str, Stream]) -> None:
        work, block = self.method.open(layer), layer.block()
        if "original" in streams:
            streams["original"].run(block, work.original(), go_on=True)
        if "quantized" in streams:
            streams["quantized"].run(block, work.quantized(), go_on=False)
        made = work.finish()
        errors = [{"name": name, "error": round(error, 6)} for name, error in made.errors.items()]
        written = [e for stored in (layer.tensors() | made.tensors).values() for e in self._entries(stored)]
        self.state.put(_part(layer.index), written, {"measured": made.measured, "layers": errors})

    def _entries(self, stored: StoredTensor) -> Iterator[Entry]:
        """A tensor as the new checkpoint has it."""
        if stored.activation:
            yield from entries(stored)
            return
        kind, values = self.recipe.options["dtype"], stored.values()
        if stored.name.endswith(NORM_SUFFIX):
            values = values - np.float32(self.checkpoint.architecture.norm_offset)
        size = math.prod(stored.shape) * ELEMENTS[kind].itemsize
        yield Entry(stored.name, _PLAIN[kind], stored.shape, size, lambda: rounded(values, kind))

    def _read(self, layer: Layer) -> dict[str, StoredTensor]:
        """The tensors of a finished block, from its file, so that an interruption changes nothing.

        They do not say how rows are rounded; the method does.
        """
        folder = self.state.folder(_part(layer.index))
        weights = quantized_weights(Fields(self.config, str(folder.path)), folder)
        found = {name: replace(weight.read(), activation="") for name, weight in weights.items()}
        offset = np.float32(self.checkpoint.architecture.norm_offset)
        for name in set(folder.names()) & set(layer.tensors()) - set(found):
            values = folder.array(name, *_PLAIN.values())
            found[name] = StoredTensor.of(name, values + offset if name.endswith(NORM_SUFFIX) else values)
        return found

    def rest(self) -> None:
        """Embedding, last norm and head."""
        if self.state.has(_REST):
            return
        c, read = self.checkpoint.config, self.checkpoint.tensor
        names = [n for n, _ in self.checkpoint.architecture.tensors(c) if not n.startswith("model.layers.")]
        tensors = {name: read(name) for name in names}
        if self.head is not None:
            made = self.head.nearest(read(_EMBEDDING if c.tie_word_embeddings else f"{HEAD}.weight"))
            tensors[f"{HEAD}.weight"] = replace(made, name=f"{HEAD}.weight")
        self.state.put(_REST, [e for stored in tensors.values() for e in self._entries(stored)], {})

    def publish(self, recipe: Mapping[str, Any]) -> int:
        """Put the parts together as a Hugging Face folder. Returns its bytes."""
        made = self.state.path / "model"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        parts = [_REST, *(_part(i) for i in range(self.checkpoint.config.num_layers))]
        write_weights(made, (entry for part in parts for entry in self.state.entries(part)))
        write_beside(self.checkpoint, self.checkpoint.tokenizer(), made)
        errors = {"measured_on": "outputs" if self.measured else "weights", "layers": self.layers}
        write_json(made / RECIPE, {**recipe, "errors": errors})
        config = config_json(self.checkpoint, self.recipe.options["dtype"])
        if self.head is not None:
            config["tie_word_embeddings"] = False
        write_json(made / "config.json", {**config, "quantization_config": self.config})
        self.state.publish(made)
        return tree_bytes(self.state.out)


def _part(index: int) -> str:
    return f"block-{index:05d}"
