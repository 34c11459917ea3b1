"""Attention sinks and a recent window (StreamingLLM, arXiv 2309.17453): generated tokens read only the first
tokens, which attract attention whatever they say, and the most recent ones.

A row at position p reads page j if j < ceil(sink / page) or the page holds a token after p - window. Unlike
StreamingLLM nothing is evicted and positions stay what they are, so prompts are still read in full. Exact when
the window covers the context. A baseline for techniques that choose pages by content.
"""

from __future__ import annotations

from typing import Any

from dovetail.core.errors import ConfigError
from dovetail.core.pages import pages_for
from dovetail.core.seams import Geometry, Seams, Site
from dovetail.core.technique import Technique
from dovetail.core.types import PageSet
from dovetail.host.lazy_torch import torch
from dovetail.runtime.target import PageChoice, PageProgram, RecordedSelector, Target


class SinkWindowSelector(RecordedSelector):
    """Chooses the sink's pages; the core adds the window."""

    def __init__(self, sink_pages: int, window: int, shape: Geometry) -> None:
        self.window = window
        self.sink_pages = sink_pages
        self.num_kv_heads = shape.num_kv_heads
        self._counting = shape.choosing("sink-window")
        self._dropped = 0
        self._program: PageProgram | None = None

    @property
    def dropped(self) -> int:
        """Pages that rows left unread, counted in one layer."""
        return self._dropped if self._program is None else int(self._program.unread())

    def choice(self, layer: int, to: Target) -> PageChoice:
        self._program = to.program
        return PageChoice(self.window, leading=self.sink_pages)

    def select(self, layer: int, q: Any, batch: Any) -> PageSet:
        rows = batch.sparse_rows
        if layer == self._counting:
            self._dropped += int((batch.eligible[rows] - self.sink_pages).clamp_min(0).sum())
        pages = torch.arange(self.sink_pages, device=q.device)
        return PageSet(pages.expand(len(rows), self.num_kv_heads, -1))


def sink_window(sink: int = 4, window: int = 1024) -> Technique:
    """Read the first `sink` and the last `window` tokens, rounded outwards to whole pages."""
    if sink < 0 or window < 1:
        raise ConfigError(f"sink-window needs sink >= 0 and window >= 1, got {sink} and {window}")

    def build(site: Site) -> dict[str, object]:
        pages = pages_for(sink, site.page_size)
        return {"selector": SinkWindowSelector(pages, window, site.geometry)}

    return Technique(
        name="sink-window",
        fills=("selector",),
        build=build,
        options={"sink": sink, "window": window},
        exact_at={"window": 2**30},
        activity=_activity,
    )


def _activity(seams: Seams) -> int:
    return seams.selector.dropped if isinstance(seams.selector, SinkWindowSelector) else 0
