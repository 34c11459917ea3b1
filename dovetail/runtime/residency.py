"""KV on a device that is too small for all of it. Cells of device memory hold the pages that are in use. A slow
tier holds the complete pages: memory of the host, or a file that is read past the page cache.

Pages move as blobs: K and V of one page and KV head of a layer. The native `Tiers` (csrc/tiers.h) know in which
cell a blob lies. Native programs ask them before each layer's attention, and stores ask them when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.errors import CapacityError
from dovetail.core.pages import IntArray
from dovetail.core.seams import Geometry, Residency
from dovetail.host.lazy_torch import torch
from dovetail.ops import cpu
from dovetail.runtime.store import CodedTiles, TiledStore, tiles_type

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Offload:
    """The slow tier, for pages that the device has no room for.

    cells: how many pages of one layer the device holds, for each KV head. folder: where the slow tier's file is;
    empty for memory of the host. link: an emulated limit in GB/s on transfers; 0 for none.
    """

    cells: int
    folder: str
    link: float


@dataclass(frozen=True)
class TierShape:
    """`pages` pages of every layer and stage; with `aliases`, as many aliases of them (`core.seams.Codec`)."""

    geometry: Geometry
    num_stages: int
    pages: int
    page_size: int
    aliases: bool = False


class Tiers(Residency):
    """Which cell holds which page. `cells` is the device's memory."""

    def __init__(self, cells: NDArray[Any], shape: TierShape, offload: Offload) -> None:
        g = shape.geometry
        blob = cells[0, 0].nbytes
        try:
            self.native = cpu.native().Tiers(
                (g.num_kv_heads, len(cells), g.num_layers, shape.num_stages, shape.pages, shape.aliases, blob),
                cells.ctypes.data, offload.folder, offload.link * 1e9,
            )  # fmt: skip
        except RuntimeError as error:
            raise CapacityError(f"{error}; see --kv-offloading-size and --kv-offloading-path") from None
        self.cells, self.pages, self.page_size = cells, shape.pages, shape.page_size
        self.stages = [s * g.num_layers * shape.pages for s in range(shape.num_stages)]  # offsets of page numbers

    def put(self, pages: IntArray) -> None:
        self.native.put(pages.tolist())

    def drop(self, pages: IntArray) -> None:
        self.native.drop(pages.tolist())

    def stored(self, pages: IntArray) -> bool:
        """Whether the slow tier holds all of `pages` [n]. A page that could not be written is missing."""
        return bool(self.native.stored(pages.tolist()))

    def cells_of(self, layer: int, pages: IntArray) -> IntArray:
        """The cells [n, KV heads] that hold `pages` [n] of a layer, until this or `slots` is called again."""
        self.native.bring(layer, np.unique(pages).tolist(), False)
        cells: IntArray = self.native.places()[pages + layer * self.pages].astype(np.int64)
        return cells

    def slots(self, layer: int, slots: Tensor, *, written: bool = False) -> Tensor:
        """Slots [n] of pages as slots of cells [n, KV heads]. The cells hold them until this is called again."""
        pages = slots // self.page_size
        self.native.bring(layer, pages.unique().tolist(), written)
        cells = self._places[pages + layer * self.pages].long()
        return cells * self.page_size + (slots % self.page_size)[:, None]

    @cached_property
    def _places(self) -> Tensor:
        """[pages of all layers, KV heads], which the native side keeps up to date."""
        return torch.from_numpy(self.native.places())

    def stats(self) -> Mapping[str, float]:
        """Totals: hits, misses, evictions and failures of blobs, bytes_in, bytes_out, stall_seconds."""
        found: dict[str, float] = self.native.stats()
        return found


class TieredStore:
    """K or V in cells. A store like the others, but its pages come to the device when they are read or written."""

    layout = "tiled"

    def __init__(self, store: TiledStore | CodedTiles, tiers: Tiers) -> None:
        self.store = store
        self.array = store.array  # memory of the cells
        self.element = store.element
        self.tiers = tiers
        self.kind = store.kind

    @classmethod
    def pair(cls, shape: TierShape, kind: str, offload: Offload) -> tuple[TieredStore, TieredStore]:
        """K and V, which share their blobs."""
        g, size = shape.geometry, shape.page_size
        k, v = tiles_type(kind).pair((1, offload.cells * size, g.num_kv_heads, g.head_dim), kind, size)
        tiers = Tiers(k.blobs, shape, offload)
        return cls(k, tiers), cls(v, tiers)

    def memory(self) -> tuple[int, int]:
        return self.store.memory()

    def write(self, layer: int, slots: Tensor, values: Tensor) -> None:
        """Write values [rows, KV heads, head_dim] to slots [rows]."""
        self.store.write_heads(self.tiers.slots(layer, slots, written=True), values)

    def rounded(self, values: Tensor) -> Tensor:
        """values [..., head_dim] as they would be read."""
        return self.store.rounded(values)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """slots [...] -> [..., KV heads, head_dim]."""
        at = self.tiers.slots(layer, slots.flatten())
        return self.store.read_heads(0, at[..., None])[:, :, 0].unflatten(0, slots.shape)

    def read_heads(self, layer: int, slots: Tensor) -> Tensor:
        """slots [rows, KV heads, n] -> [rows, KV heads, n, head_dim]."""
        heads = slots.shape[1]
        at = self.tiers.slots(layer, slots.flatten()).unflatten(0, slots.shape)
        own = torch.arange(heads)[None, :, None, None].expand(*slots.shape, 1)
        return self.store.read_heads(0, at.gather(3, own)[..., 0])

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy whole pages, given as their slots. V is copied with K, in whose blobs it lies."""
        if self.store.keys:
            size = self.tiers.page_size
            pages = [s[::size] // size for s in (source, target)]
            for first in self.tiers.stages:
                self.tiers.native.copy(*((p + first).tolist() for p in pages))


def tiers_of(store: Any) -> Tiers | None:
    """The tiers of a store; None if its pages do not move."""
    return store.tiers if isinstance(store, TieredStore) else None
