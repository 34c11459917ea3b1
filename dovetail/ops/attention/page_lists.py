"""Checks the page lists of a step, because native code follows them without checks of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dovetail.core.errors import ConfigError
from dovetail.ops.template.expression import POSITIONS

Numbers = Sequence[int] | Any
"""Whole numbers: a list, a numpy array or a torch tensor."""
_INT32 = 2**31


class PageLists(NamedTuple):
    """Request i has rows qo_indptr[i]:qo_indptr[i + 1], which begin at position starts[i]. It reads lengths[i]
    keys of pages indptr[i]:indptr[i + 1] of each list. positions: that of the first token of each page of each
    list; empty if the lists leave nothing out.
    """

    qo_indptr: list[int]
    indptr: list[int]
    lengths: list[int]
    starts: list[int]
    pages: list[list[int]]
    positions: list[list[int]]


def page_lists(pointers: tuple[Numbers, Numbers, Numbers], indices: Any, size: int, kv_heads: int) -> PageLists:
    """Lists that leave nothing out. pointers: qo_indptr, indptr and last_page_len; size: tokens of a page.

    The rows of a request are the last of its keys. If it has fewer keys than rows, its start is below 0 (see
    `placed`).
    """
    names = ("qo_indptr", "indptr", "last_page_len")
    qo_indptr, indptr, last = (whole_numbers(n, p) for n, p in zip(names, pointers, strict=True))
    pages = nested("indices", indices, _INT32)
    if len(pages) not in (1, kv_heads):
        raise ConfigError(f"{len(pages)} lists of pages were given; give 1 or {kv_heads}, one per KV head")
    if not len(qo_indptr) == len(indptr) == len(last) + 1:
        raise ConfigError(
            f"qo_indptr ({len(qo_indptr)}) and indptr ({len(indptr)}) need one entry more than last_page_len "
            f"({len(last)}), which has one per request"
        )
    for name, values in (("qo_indptr", qo_indptr), ("indptr", indptr)):
        if values[0] != 0 or any(b < a for a, b in itertools.pairwise(values)):
            raise ConfigError(f"{name} must begin with 0 and not decrease, got {values}")
    for i, page_list in enumerate(pages):
        if len(page_list) != indptr[-1]:
            raise ConfigError(
                f"every list needs indptr[-1] = {indptr[-1]} page numbers; list {i} has {len(page_list)}"
            )
    lengths = [_length(i, indptr[i + 1] - indptr[i], n, size) for i, n in enumerate(last)]
    starts = [n - (qo_indptr[i + 1] - qo_indptr[i]) for i, n in enumerate(lengths)]
    return PageLists(qo_indptr, indptr, lengths, starts, pages, [])


def placed(lists: PageLists, starts: Numbers | None, positions: Any, size: int) -> PageLists:
    """The lists with given positions of rows, and of pages where the lists leave some out."""
    rows = [b - a for a, b in itertools.pairwise(lists.qo_indptr)]
    if starts is None:
        if positions is not None:
            raise ConfigError("lists with positions leave pages out: give `starts`, the rows' own positions")
        if min(lists.starts, default=0) < 0:
            raise ConfigError("a request has more rows than keys; give `starts`, or pages for its own tokens")
    else:
        lists = lists._replace(starts=whole_numbers("starts", starts, POSITIONS))
        if len(lists.starts) != len(rows):
            raise ConfigError(f"{len(lists.starts)} starts were given for {len(rows)} requests; give one for each")
    if any(start + n > POSITIONS for start, n in zip(lists.starts, rows, strict=True)):
        raise ConfigError(f"rows reach beyond position {POSITIONS - 1}, the last that kernels count to")
    if positions is None:
        return lists
    where = nested("positions", positions, POSITIONS - size + 1)
    given, listed = ([len(x) for x in each] for each in (where, lists.pages))
    if given != listed:
        raise ConfigError(f"positions of {given} pages were given for lists of {listed}; give one for each page")
    return lists._replace(positions=where)


def _length(i: int, pages: int, last: int, size: int) -> int:
    """Keys of request i, whose last page holds `last` tokens."""
    if not (0 < last <= size if pages else last == 0):
        raise ConfigError(
            f"last_page_len[{i}] is {last}; with {pages} pages it must be in 1..{size}, or 0 with none"
        )
    length = max(0, pages - 1) * size + last
    if length > POSITIONS:
        raise ConfigError(f"request {i} has {length} keys; at most {POSITIONS} can be counted")
    return length


def nested(name: str, values: Any, below: int) -> list[list[int]]:
    """One list or several as a list of lists. Several may be given as the rows of an array."""
    many = np.ndim(values) > 1 if hasattr(values, "ndim") else len(values) > 0 and np.ndim(values[0]) > 0
    return [whole_numbers(name, x, below) for x in (values if many else [values])]


def whole_numbers(name: str, values: Numbers, below: int = _INT32) -> list[int]:
    """A flat list, array or CPU tensor of whole numbers >= 0 as a list. ConfigError for anything else."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be a flat list or array of whole numbers: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ConfigError(
            f"{name} must be a flat list or array of whole numbers, got {list(array.shape)} of {array.dtype}"
        )
    if array.size and not 0 <= (least := int(array.min())) <= (most := int(array.max())) < below:
        wrong = least if least < 0 else most
        raise ConfigError(f"{name} must be at least 0 and below {below}, got {wrong}")
    return array.astype(np.int64).tolist()
