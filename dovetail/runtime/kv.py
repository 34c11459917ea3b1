"""Paged KV on the device. This is the one place where Selector, Codec and Residency meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray
from dovetail.core.seams import Geometry, Seams, Variant
from dovetail.core.types import ALL, Sealed, StepPlan
from dovetail.host.lazy_torch import torch
from dovetail.ops.attention import Keys, Rows, attend_dense, attend_pages
from dovetail.runtime.batch import Batch
from dovetail.runtime.residency import Offload, TieredStore, TierShape, tiers_of
from dovetail.runtime.store import CodedTiles, Store, TiledStore, fits_tiles, store_type, tiles_type

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KVConfig:
    """`kv_cache_dtype` is one of `store.KV_DTYPES`. Every stage of the program has its own KV.

    tiled: use the native kernels' layout if it can hold such pages. offload: the slow tier, or none. aliases:
    whether the codec gives pages aliases.
    """

    num_pages: int
    page_size: int
    kv_cache_dtype: str
    num_stages: int = 1
    tiled: bool = False
    offload: Offload | None = None
    aliases: bool = False


def bytes_per_token(geometry: Geometry, kv_cache_dtype: str, native_page: int = 0) -> int:
    """Bytes of K and V of one token over all layers. native_page: the page size with native kernels, else 0."""
    flat, dtype = store_type(kv_cache_dtype)
    tiled = native_page and fits_tiles(kv_cache_dtype, native_page)
    kind = tiles_type(dtype) if tiled else flat
    return 2 * geometry.num_layers * kind.token_bytes(geometry.num_kv_heads, geometry.head_dim, dtype)


class KV:
    """Pages of K and V of every layer. Writes are provisional until the plan seals their page."""

    def __init__(self, geometry: Geometry, config: KVConfig, device: str) -> None:
        kind, dtype = store_type(config.kv_cache_dtype)
        slots = config.num_pages * config.page_size
        shape = (geometry.num_layers * config.num_stages, slots, geometry.num_kv_heads, geometry.head_dim)
        self.k: Store | TieredStore
        self.v: Store | TieredStore
        if config.offload is not None:
            pages = TierShape(geometry, config.num_stages, config.num_pages, config.page_size, config.aliases)
            self.k, self.v = TieredStore.pair(pages, dtype, config.offload)
        elif config.tiled and fits_tiles(config.kv_cache_dtype, config.page_size):
            self.k, self.v = tiles_type(dtype).pair(shape, dtype, config.page_size)
        else:
            self.k, self.v = kind(shape, dtype, device), kind(shape, dtype, device)
        self.geometry = geometry
        self.num_kv_heads, self.head_dim = geometry.num_kv_heads, geometry.head_dim
        self.pages_per_layer = config.num_pages
        self.page_size = config.page_size
        self.num_stages = config.num_stages
        self.stage_pages = geometry.num_layers * config.num_pages
        self.num_pages = self.stage_pages * config.num_stages  # of all stages; page numbers are below it
        self._aliases: dict[str, IntArray] = {}  # by id, of requests whose rows may leave pages unread
        self.device = device
        tiled = config.page_size if config.tiled else 0
        self.token_bytes = bytes_per_token(geometry, config.kv_cache_dtype, tiled)
        self.own_window = frozenset(geometry.sliding_layers)
        self.seams = Seams()

    def begin(self, plan: StepPlan) -> None:
        """Carry out what a plan says about pages, before any of its rows is computed."""
        if plan.sealed:
            runs = [self._at_stage(run, s) for run in plan.sealed for s in range(self.num_stages)]
            pages = np.array([p for run in runs for p in run.pages], np.int64)
            self.seams.selector.seal(pages, self)
            self.seams.residency.put(pages)
        if plan.reopened:
            pages = np.array(plan.reopened, np.int64)
            self.seams.residency.drop(
                np.concatenate([pages + s * self.stage_pages for s in range(self.num_stages)])
            )
        if plan.copies:
            moves = np.array(plan.copies, np.int64)
            offsets = np.arange(self.page_size)
            source, target = ((moves[:, i, None] * self.page_size + offsets).ravel() for i in (0, 1))
            self.k.copy(source, target)
            self.v.copy(source, target)
        self._announce(plan)

    def _announce(self, plan: StepPlan) -> None:
        """Tell the codec which requests are gone, and whose rows may leave pages unread from now on."""
        if plan.released:
            self.seams.codec.drop(plan.released)
            for request_id in plan.released:
                self._aliases.pop(request_id, None)
        starting = [
            s.request for s in plan.spans if s.start >= s.request.dense_until and s.request.id not in self._aliases
        ]
        if starting:
            found = self.seams.codec.seal(starting, self)
            self._aliases |= {r.id: found.get(r.id, NO_ALIASES) for r in starting}

    def aliases(self, request_id: str) -> IntArray:
        """The numbers under which a request's rows see its first pages when they may leave some unread."""
        return self._aliases.get(request_id, NO_ALIASES)

    def _at_stage(self, run: Sealed, stage: int) -> Sealed:
        return run._replace(pages=tuple(p + stage * self.stage_pages for p in run.pages))

    def keys(self, layer: int, pages: Tensor) -> Tensor:
        """Keys [..., page_size, KV heads, head_dim] of physical pages [...], as written (rotated)."""
        return self.k.read(layer, self._slots(pages))

    def key_array(self, layer: int, pages: IntArray) -> NDArray[Any]:
        """`keys` of pages [n] as an array, in float32 (float64 for float64 KV)."""
        if isinstance(self.k, TieredStore):
            return self.k.store.pages(self.k.tiers.cells_of(layer, pages))
        if isinstance(self.k, TiledStore | CodedTiles):
            return self.k.pages(np.repeat((pages + layer * self.pages_per_layer)[:, None], self.num_kv_heads, 1))
        found = self.keys(layer, torch.from_numpy(pages).to(self.device))
        return found.to(torch.promote_types(found.dtype, torch.float32)).cpu().numpy()

    def values(self, layer: int, pages: Tensor) -> Tensor:
        return self.v.read(layer, self._slots(pages))

    def stored(self, pages: IntArray) -> bool:
        """Whether the completed `pages` [n] of every stage can be brought back to the device."""
        tiers = tiers_of(self.k)
        return tiers is None or all(tiers.stored(pages + s * self.stage_pages) for s in range(self.num_stages))

    def write(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Write k, v [rows, KV heads, head_dim] of the batch's rows."""
        self.k.write(layer, batch.slots, k)
        self.v.write(layer, batch.slots, v)

    def ahead(self, layer: int, hidden: Tensor, batch: Batch) -> None:
        """Let the selector guess the pages of `layer`, and begin to bring them."""
        if self._selects(layer, batch):
            pages = self.seams.selector.ahead(layer, hidden, batch)
            self.seams.residency.fetch(layer, pages, batch, wait=False)

    def _selects(self, layer: int, batch: Batch) -> bool:
        """Whether there are pages to choose. In layers with their own window there are none."""
        return len(batch.sparse_rows) > 0 and layer not in self.own_window

    def attend(self, layer: int, q: Tensor, batch: Batch, variant: Variant) -> Tensor:
        """Attention of q [rows, heads, head_dim] over each row's own sequence -> the same shape."""
        pages = self.seams.selector.select(layer, q, batch) if self._selects(layer, batch) else ALL
        self.seams.residency.fetch(layer, pages, batch, wait=True)
        if pages.pages is None:
            return attend_dense(q, KVReader(self, layer, batch), variant, Rows(batch.positions, batch.groups))
        out = torch.empty_like(q)
        if len(batch.dense_rows):
            layout = Rows(batch.positions, batch.dense_groups)
            dense = attend_dense(q, KVReader(self, layer, batch), variant, layout)
            out[batch.dense_rows] = dense[batch.dense_rows]
        rows = batch.sparse_rows
        logical = self.pages_read(pages.pages, batch)
        physical = self._numbers(batch.tables, logical, batch)
        both = self._read_heads(self.k, layer, physical), self._read_heads(self.v, layer, physical)
        seen, last = physical.clone(), pages.pages.shape[2]  # what every row reads is exact
        tables = batch.once(ALIASES, lambda: self._aliased(batch))
        seen[..., :last] = self._numbers(tables, logical[..., :last], batch)
        k, v = self.seams.codec.open(layer, seen, both)
        offsets = torch.arange(self.page_size, device=q.device)
        keys = Keys(k, v, (logical * self.page_size)[..., None] + offsets)
        out[rows] = attend_pages(q[rows], keys, variant, batch.positions[rows])
        return out

    def _slots(self, pages: Tensor) -> Tensor:
        return pages[..., None] * self.page_size + torch.arange(self.page_size, device=pages.device)

    def _read_heads(self, store: Store | TieredStore, layer: int, pages: Tensor) -> Tensor:
        """pages [rows, KV heads, n] -> [rows, KV heads, n, page_size, head_dim]."""
        slots = self._slots(pages)
        return store.read_heads(layer, slots.flatten(2)).unflatten(2, slots.shape[2:])

    def pages_read(self, chosen: Tensor, batch: Batch) -> Tensor:
        """The chosen pages and those that are always read, as page numbers of the sequence.

        chosen [rows, KV heads, k]; -1 where there is none. These become the number of a page that no query may
        read.
        """
        rows = batch.sparse_rows
        first, last = batch.eligible[rows], batch.positions[rows] // self.page_size
        recent = first[:, None] + torch.arange(int((last - first).max()) + 1, device=chosen.device)
        recent = torch.where(recent <= last[:, None], recent, NEVER)
        chosen = torch.where((chosen >= 0) & (chosen < first[:, None, None]), chosen, NEVER)
        return torch.cat([chosen, recent[:, None].expand(-1, chosen.shape[1], -1)], -1)

    def _numbers(self, tables: Tensor, logical: Tensor, batch: Batch) -> Tensor:
        """Physical pages of the sparse rows' sequence pages [rows, KV heads, n], by `tables` [spans, pages]; 0 for
        absent ones."""
        table = tables[batch.span_of_row[batch.sparse_rows]][:, None].expand(-1, logical.shape[1], -1)
        absent = logical == NEVER
        return torch.where(absent, 0, table.gather(2, logical.masked_fill(absent, 0)))

    def _aliased(self, batch: Batch) -> Tensor:
        """The batch's tables as rows that may leave pages unread see them."""
        tables = batch.tables.clone()
        for row, span in zip(tables, batch.spans, strict=True):
            aliases = self.aliases(span.request.id)[: len(row)]
            row[: len(aliases)] = torch.as_tensor(aliases, device=row.device) + span.stage * self.stage_pages
        return tables


NEVER = 2**40  # a page number beyond every position
ALIASES = object()  # a key in a batch's memo
NO_ALIASES: IntArray = np.zeros(0, np.int64)


@dataclass(frozen=True)
class KVReader:
    """K and V of whole sequences of one layer, as written."""

    kv: KV
    layer: int
    batch: Batch

    def __call__(self, spans: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """K and V [n, pages * page_size, KV heads, head_dim] of spans [n], to at least `length` tokens."""
        count = -(-length // self.kv.page_size)
        pages = self.batch.tables[spans, :count]
        return self.kv.keys(self.layer, pages).flatten(1, 2), self.kv.values(self.layer, pages).flatten(1, 2)
