"""Rows to sample from, without an engine."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dovetail.core.pages import PagePool, PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request
from dovetail.runtime.sampler import Row

POOL = PagePool(1, 4)


def row(
    output: list[int] = (),
    ahead: int = 0,
    prompt: list[int] = (1, 2),
    drafts: list[int] = (),
    mask: np.ndarray | None = None,
    **params,
) -> Row:
    p = SamplingParams(max_tokens=None, **params)
    r = Request(
        "r", list(prompt), p, PageTable(POOL), 99, seed=params.get("seed", 0), stop_ids=frozenset(p.stop_token_ids)
    )
    r.tokens += list(output)
    r.drafts = list(drafts)
    return Row(r, ahead, mask)


def mask_of(allowed: Iterable[int], width: int) -> np.ndarray:
    """Bits of the allowed tokens, as `Constraint.masks` gives them."""
    bits = np.zeros((width + 31) // 32 * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)
