"""Runs a model on some text before the first request, and keeps what was measured in the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import ModelError
from dovetail.core.pages import PagePool, PageTable, pages_for
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Site
from dovetail.core.types import UNLIMITED, Request, Span
from dovetail.host.files import explaining, home, replacing
from dovetail.host.lazy_torch import torch
from dovetail.layers.linear import Packed, PackedLinear
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import kernel_variant
from dovetail.ops.template import TemplateError
from dovetail.runtime.batch import BatchBuilder
from dovetail.runtime.kv import KV, KVConfig
from dovetail.runtime.recorder import Recorder
from dovetail.show.progress import note

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 16

Shapes = Mapping[str, Sequence[int]]
Arrays = dict[str, NDArray[np.float32]]


def layer_inputs(site: Site, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Any]]:
    """For each layer, its number and the hidden rows of all texts [tokens, width] that enter it.

    They are arrays if the layers are packed, else tensors. Every row reads all of its text before it.
    """
    requests = [_request(i, text) for i, text in enumerate(texts)]
    pages = sum(pages_for(len(text), PAGE) for text in texts)
    pool = PagePool(pages, PAGE)
    for request in requests:
        request.table = PageTable(pool)
        request.table.grow(0, len(request.tokens))
    spans = [Span(request, 0, len(request.tokens)) for request in requests]
    qkv = site.model.blocks()[0].attention.qkv
    if isinstance(qkv, PackedLinear) and _recordable(site.model):
        kv = KV(site.geometry, KVConfig(pages, PAGE, "float32", tiled=True), site.device)
        yield from _recorded_inputs(site.model, kv, qkv.format, spans)
    else:
        yield from _inputs(site, KV(site.geometry, KVConfig(pages, PAGE, "float32"), site.device), spans)


def _recordable(model: Any) -> bool:
    """Whether native attention can run the variants of all layers."""
    try:
        for block in model.blocks():
            kernel_variant(block.attention.variant, model.geometry.num_heads)
    except TemplateError:
        return False
    return True


def _request(number: int, text: Sequence[int]) -> Request:
    tokens = list(text)
    return Request(f"calibration {number}", tokens, SamplingParams(), PageTable(PagePool(1, PAGE)), len(tokens), 0)


def _recorded_inputs(model: Any, kv: KV, form: Packed, spans: Sequence[Span]) -> Iterator[tuple[int, Any]]:
    """By a native program of the layers, which is run layer by layer."""
    program = cpu.native().Program(form.isa, form.threads, False, True)
    to = Recorder(program, kv, model.config.hidden_size)
    model.record_start(to)
    marks = [program.mark()]
    for layer, block in enumerate(model.blocks()[: kv.geometry.num_layers]):
        to.layer = layer
        block.record(to, layer)
        marks.append(program.mark())
    program.tune()
    program.clear()
    for s in spans:
        program.add(s.start, s.stop, s.request.tokens, [], s.request.table.ids, 0, 0, s.stop, (0, 0), rows=[])
    program.plan()
    program.run(0, marks[0])
    for layer, part in enumerate(pairwise(marks)):
        yield layer, program.view(to.x, program.num_rows())[:, : model.config.hidden_size].copy()
        program.run(*part)


def _inputs(site: Site, kv: KV, spans: Sequence[Span]) -> Iterator[tuple[int, Tensor]]:
    """By the reference operations."""
    with torch.inference_mode():
        batch = BatchBuilder(PAGE, UNLIMITED, kv.stage_pages, site.device).build(spans)
        hidden = site.model.embed(batch.tokens)
        for layer, block in enumerate(site.model.blocks()[: site.geometry.num_layers]):
            yield layer, hidden
            hidden = block(hidden, layer, batch, kv)


def as_array(x: Any) -> NDArray[Any]:
    """An array as it is; a tensor as an array in float32, or float64 if it is that."""
    return x if isinstance(x, np.ndarray) else x.to(torch.promote_types(x.dtype, torch.float32)).cpu().numpy()


def kept(key: Sequence[str], shapes: Shapes, measure: Callable[[], Arrays]) -> Arrays:
    """float32 arrays of `shapes`: what an earlier run kept under `key`, else what `measure` returns, kept from
    now on.

    If the file holds anything else, the measurement is repeated. If the folder cannot be written, a note says so.
    """
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()
    path = home() / "calibration" / f"{name}.safetensors"
    found = _read(path, shapes)
    if found is None:
        found = {k: np.ascontiguousarray(a, np.float32) for k, a in measure().items()}
        try:
            _write(path, found)
        except ModelError as error:
            note(f"the calibration will be repeated at the next start: {error}")
    return found


def _read(path: Path, shapes: Shapes) -> Arrays | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        note(f"{path} cannot be read ({error}): calibrating again")
        return None
    fits = found.keys() == shapes.keys() and all(
        a.dtype == np.float32 and a.shape == tuple(shapes[k]) and bool(np.isfinite(a).all())
        for k, a in found.items()
    )
    if not fits:
        note(f"{path} does not hold what it should: calibrating again")
    return found if fits else None


def _write(path: Path, tensors: Arrays) -> None:
    from safetensors.numpy import save

    data = save(tensors)
    with explaining(path.parent, len(data), "a calibration"), replacing(path) as file:
        file.write(data)
