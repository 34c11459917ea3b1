"""A StepPlan as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import pages_for
from dovetail.core.seams import EVERY_ROW
from dovetail.core.types import UNLIMITED, Span
from dovetail.host.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The rows of one stage of the program. A row is one token of one span.

    The arrays are tensors for the reference operations, and numpy's where a native program runs.
    tokens, positions, slots, span_of_row: [rows] int64; a slot is page * page_size + offset.
    tables: [spans, pages] int64 page numbers, 0 beyond a span's own. kv_lens: [spans] (host).
    eligible: [rows] int64, the number of leading pages that the row may leave unread.
    """

    spans: tuple[Span, ...]
    page_size: int
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    span_of_row: Tensor
    tables: Tensor
    eligible: Tensor
    row_spans: NDArray[np.int64]  # span_of_row on the host
    kv_lens: NDArray[np.int64]
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.row_spans)

    @cached_property
    def sparse_rows(self) -> Tensor:
        """The rows that may leave pages unread: [n] int64, in order."""
        return self.eligible.nonzero().flatten()

    @cached_property
    def dense_rows(self) -> Tensor:
        return (self.eligible == 0).nonzero().flatten()

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor, int]]:
        """Spans with equally many rows: (span indices [n], rows [n, c], longest KV)."""
        return _groups(self, np.arange(self.num_rows))

    @cached_property
    def dense_groups(self) -> list[tuple[Tensor, Tensor, int]]:
        """`groups` of only the rows that must read everything."""
        return _groups(self, self.dense_rows.cpu().numpy())

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returned for this key. It is called once per batch (for rotations, say)."""
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found

    def take(self, rows: Any) -> Batch:
        """The batch with only these rows [n] (int64, ascending), given as its own arrays are."""
        host = rows if isinstance(rows, np.ndarray) else rows.cpu().numpy()
        return replace(
            self,
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            span_of_row=self.span_of_row[rows],
            eligible=self.eligible[rows],
            row_spans=self.row_spans[host],
            memo={},
        )


def _groups(batch: Batch, rows: NDArray[np.int64]) -> list[tuple[Tensor, Tensor, int]]:
    spans, first, counts = np.unique(batch.row_spans[rows], return_index=True, return_counts=True)
    out = []
    for count in np.unique(counts):
        same = counts == count
        members = rows[first[same][:, None] + np.arange(count)]
        device = batch.tokens.device
        longest = int(batch.kv_lens[spans[same]].max())
        out.append((torch.as_tensor(spans[same]).to(device), torch.as_tensor(members).to(device), longest))
    return out


@dataclass(frozen=True)
class BatchBuilder:
    """Lays spans out as arrays.

    window: recent tokens that every row reads. stage_pages: distance between the page numbers of two stages. With
    it rows at different depths of a tied program share one call and keep their own KV. device: of the tensors;
    None makes numpy arrays.
    """

    page_size: int
    window: int
    stage_pages: int
    device: str | None

    def build(self, spans: Sequence[Span]) -> Batch:
        n, size = len(spans), self.page_size
        stops = np.fromiter((s.stop for s in spans), np.int64, n)
        counts = np.fromiter((s.num_rows for s in spans), np.int64, n)
        row_spans = np.repeat(np.arange(n), counts)
        positions = np.concatenate([np.asarray(s.positions, np.int64) for s in spans])
        tokens = np.fromiter((t for s in spans for t in _tokens(s)), np.int64, len(positions))
        tables = self._tables(spans)
        slots = tables[row_spans, positions // size] * size + positions % size
        move = self._move
        return Batch(
            spans=tuple(spans), page_size=size, tokens=move(tokens), positions=move(positions),
            slots=move(slots), span_of_row=move(row_spans), tables=move(tables),
            eligible=move(self._eligible(spans, positions, row_spans)), row_spans=row_spans, kv_lens=stops,
        )  # fmt: skip

    def _tables(self, spans: Sequence[Span]) -> NDArray[np.int64]:
        used = [pages_for(s.stop, self.page_size) for s in spans]
        tables = np.zeros((len(spans), max(used)), np.int64)
        for row, span, n in zip(tables, spans, used, strict=True):
            row[:n] = span.request.table.pages[:n]
            row[:n] += span.stage * self.stage_pages
        return tables

    def _eligible(
        self, spans: Sequence[Span], positions: NDArray[np.int64], row_spans: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        if self.window >= UNLIMITED:
            return np.zeros_like(positions)
        dense = np.fromiter((s.request.dense_until for s in spans), np.int64, len(spans))[row_spans]
        droppable = np.maximum(0, positions + 1 - self.window) // self.page_size
        return np.where(positions >= dense, droppable, 0)

    def _move(self, a: NDArray[np.int64]) -> Any:
        return a if self.device is None else torch.from_numpy(a).to(self.device)


def _tokens(span: Span) -> Sequence[int]:
    r = span.request
    n = len(r.tokens)
    if span.rows is not None:
        return [r.tokens[p] if p < n else r.drafts[p - n] for p in span.rows]
    if span.stop <= n:
        return r.tokens[span.start : span.stop]
    return r.tokens[span.start : n] + r.drafts[max(0, span.start - n) : span.stop - n]


def kept_rows(chosen: Any, count: int) -> NDArray[np.int64] | None:
    """What a row filter chose of `count` rows, checked: int64 [n], ascending; None for every row.

    ValueError for anything else than that or EVERY_ROW: executors would differ in what they make of it.
    """
    if isinstance(chosen, slice):
        if chosen == EVERY_ROW:
            return None
        raise ValueError(f"a row filter gives EVERY_ROW or the rows that go on, not {chosen}")
    rows = np.asarray(chosen.cpu() if hasattr(chosen, "cpu") else chosen)
    right = rows.dtype == np.int64 and rows.ndim == 1
    if right and len(rows):
        right = bool((np.diff(rows) > 0).all()) and int(rows[0]) >= 0 and int(rows[-1]) < count
    if not right:
        raise ValueError(f"a row filter's rows must be int64, ascend and lie below {count}, got {rows}")
    return rows
