"""Runs a model on some text before the first request, and keeps what was measured in the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dovetail.core.errors import ModelError
from dovetail.core.pages import PagePool, PageTable, pages_for
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Site
from dovetail.core.types import UNLIMITED, Request, Span
from dovetail.host.files import explaining, home, replacing
from dovetail.runtime.batch import BatchBuilder
from dovetail.runtime.kv import KV, KVConfig
from dovetail.show.progress import note

PAGE = 16

Shapes = Mapping[str, Sequence[int]]


@torch.inference_mode()
def layer_inputs(site: Site, tokens: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """For each layer, its number and the hidden rows [tokens, width] that enter it. The model reads `tokens` in
    one batch, and every row reads everything before it."""
    n = len(tokens)
    pages = pages_for(n, PAGE)
    kv = KV(site.geometry, KVConfig(pages, PAGE, "float32"), site.device)
    request = Request("calibration", list(tokens), SamplingParams(), PageTable(PagePool(pages, PAGE)), n, 0)
    request.table.grow(0, n)
    batch = BatchBuilder(PAGE, UNLIMITED, kv.stage_pages, site.device).build([Span(request, 0, n)])
    hidden = site.model.embed(batch.tokens)
    for layer, block in enumerate(site.model.blocks()[: site.geometry.num_layers]):
        yield layer, hidden
        hidden = block(hidden, layer, batch, kv)


def kept(key: Sequence[str], shapes: Shapes, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """float32 tensors of `shapes`: what an earlier run kept under `key`, else what `measure` returns, kept from
    now on.

    If the file holds anything else, the measurement is repeated. If the folder cannot be written, a note says so.
    """
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()
    path = home() / "calibration" / f"{name}.safetensors"
    found = _read(path, shapes)
    if found is None:
        found = {k: t.float().contiguous() for k, t in measure().items()}
        try:
            _write(path, found)
        except ModelError as error:
            note(f"the calibration will be repeated at the next start: {error}")
    return found


def _read(path: Path, shapes: Shapes) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        note(f"{path} cannot be read ({error}): calibrating again")
        return None
    fits = found.keys() == shapes.keys() and all(
        t.dtype is torch.float32 and t.shape == tuple(shapes[k]) and bool(t.isfinite().all())
        for k, t in found.items()
    )
    if not fits:
        note(f"{path} does not hold what it should: calibrating again")
    return found if fits else None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    data = save(tensors)
    with explaining(path.parent, len(data), "a calibration"), replacing(path) as file:
        file.write(data)
