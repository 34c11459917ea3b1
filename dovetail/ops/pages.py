"""Summaries of pages of keys, their scores against queries, and the choice of the best pages.

The torch functions define what the native operations `summarise` and `pick` (csrc/select.h) do:

    summary(chunk) = (max_t k_t, min_t k_t)                    "bound"
                   = (mean_t k_t, 4 / sqrt(head_dim) std_t k_t)        "mean_std"
    score(q, page) = max over its chunks of
                     sum_i max(q_i, 0) first_i + min(q_i, 0) second_i      "bound": no key of the page has a
                                                                           larger product with q
                     sum_i q_i first_i + |q_i| second_i                    "mean_std"

For "codes", the keys of a page are rounded to `LEVELS` values between the page's extremes in each dimension. The
page's score is that of its best rounded key:

    low = min_t k_t,  r = (max_t k_t - low) / 3,  S = max_i r_i,  b = round(255 r / S),  step = b S / 255
    code_t = round((k_t - low) / step) in 0..3
    x = round(16320 q / A),  A = max_i |q_i|
    score(q, page) = max_t q . low + (A S 2^15 / (255 16320)) sum_i floor(x_i b_i / 2^15 + 1/2) code_ti
                   ~ max_t q . (low + step code_t)                         "codes"

If dimensions vary independently, |q| . std is at most sqrt(head_dim) times the standard deviation of q . k_t. So
mean_std stays within `DEVIATIONS` standard deviations above the mean. The bound does not: it adds up maxima of
different tokens, and it says less the more tokens a chunk has. Codes tell tokens apart, at 2 bits a value. Their
products with queries are products of bytes, whose sums are exact.

Landmarks (ShadowKV, arXiv 2410.21465, section 4) are the means of the chunks of a page's keys. A page's score is
the largest softmax weight of its landmarks, among the landmarks of all competing pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray
from dovetail.core.seams import Geometry
from dovetail.host.lazy_torch import torch
from dovetail.ops.cpu import padded
from dovetail.ops.memory import ELEMENTS, Memory

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("bound", "mean_std", "codes")
LEVELS = 4
SCALE = 16320  # of rounded queries: 255 * SCALE = 127 * 2^15
TILE = 16  # tokens whose codes lie together
DEVIATIONS = 4.0
TINY = 1e-16  # a product of lengths below it counts as this


class Summaries:
    """Summaries of every page of every layer.

    data: [layers x pages, KV heads, vectors, head_dim padded to 16, or to 32 for landmarks], in the type of the
    keys. kind: one of `KINDS`, or "landmarks". chunk: tokens of a chunk; 0 is the whole page. Codes are of whole
    pages and lie in `data` as `packed` returns them.
    """

    def __init__(self, kv: Any, kind: str, chunk: int = 0, program: Any = None) -> None:
        self.kv = kv
        self.kind = kind
        self.chunk = chunk
        self.program = program  # a native program, which then summarises pages in its own layout
        element = kv.k.element
        self.vectors = num_vectors(kind, kv.page_size, chunk, ELEMENTS[element].itemsize)
        width = -(-kv.head_dim // 32) * 32 if kind == "landmarks" else padded(kv.head_dim)
        shape = (kv.stage_pages * kv.num_stages, kv.num_kv_heads, self.vectors, width)
        self.memory = Memory(shape, element, kv.device)

    @property
    def data(self) -> Tensor:
        return self.memory.tensor

    def seal(self, pages: IntArray) -> None:
        """Summarise the completed `pages` [n] of all layers."""
        layers = self.kv.geometry.num_layers
        if self._native:
            self.program.summarise(self.kind, layers, pages.tolist(), self.memory.address, self.vectors)
            return
        at = torch.from_numpy(pages).to(self.kv.device)
        for layer in range(layers):
            keys = self.kv.keys(layer, at).to(self.data.dtype)  # codes are read as float32
            self.data[self._at(layer, at)] = self._stored(keys)

    def _at(self, layer: int, pages: Tensor) -> Tensor:
        """Where the summaries of physical pages are in `data`."""
        return layer * self.kv.pages_per_layer + pages

    def _stored(self, keys: Tensor) -> Tensor:
        """keys [n, tokens, KV heads, head_dim] of pages -> their summaries as `data` has them."""
        if self.kind == "codes":
            return packed(codes(keys), self.data)
        chunk = self.chunk or keys.shape[1]
        found = landmarks(keys, chunk) if self.kind == "landmarks" else summary(keys, self.kind, chunk)
        return torch.nn.functional.pad(found.to(self.data.dtype), (0, self.data.shape[-1] - found.shape[-1]))

    @property
    def _native(self) -> bool:
        return self.program is not None and self.kv.page_size % TILE == 0

    def scores(self, layer: int, q: Tensor, pages: Tensor) -> Tensor:
        """q [rows, heads, head_dim], physical pages [rows, n] -> scores [rows, KV heads, n]."""
        return page_scores(q, self.of(layer, pages), self.kind)

    def of(self, layer: int, pages: Tensor) -> Tensor:
        """Physical pages [rows, n] -> their summaries [rows, n, KV heads, vectors, head_dim], or `codes`."""
        found = self.data[self._at(layer, pages)]
        if self.kind == "codes":
            flat = unpacked(found.flatten(0, 1), self.kv.head_dim, self.kv.page_size)
            return flat.unflatten(0, pages.shape)
        return found[..., : self.kv.head_dim]


def summary_bytes(shape: Geometry, value: int, vectors: int, pad: int = 16) -> int:
    """Bytes that `vectors` per KV head take for a page over all layers, with values of `value` bytes."""
    width = -(-shape.head_dim // pad) * pad
    return shape.num_layers * shape.num_kv_heads * vectors * width * value


def num_vectors(kind: str, page_size: int, chunk: int, value: int) -> int:
    """How many vectors of the keys' type, whose values take `value` bytes, native programs keep for a page."""
    if kind == "codes":
        return 2 + -(-(-(-page_size // TILE) * TILE * 2) // (8 * value))
    return page_size // (chunk or page_size) * (1 if kind == "landmarks" else 2)


def codes(keys: Tensor) -> Tensor:
    """keys [pages, tokens, KV heads, head_dim] -> [pages, KV heads, 3 + tokens, head_dim] in float32 or float64:
    low, b, S (repeated in every dimension), and then the codes of each token."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    thirds = (high - low) / (LEVELS - 1)
    largest = thirds.amax(-1, keepdim=True).float().to(wide.dtype)  # rounded as it will be stored
    parts = torch.where(largest > 0, (thirds / largest * 255).round(), 0.0)
    step = parts * (largest / 255)
    found = torch.where(step > 0, ((wide - low) / step).round().clamp(0, LEVELS - 1), 0.0)
    return torch.cat([low, parts, largest.expand_as(low), found], 1).transpose(1, 2)


def decoded(found: Tensor) -> Tensor:
    """The rounded keys that `codes` stand for: [pages, KV heads, tokens, head_dim]."""
    low, parts, largest = (found[..., i : i + 1, :] for i in range(3))
    return low + parts * (largest / 255) * found[..., 3:, :]


def packed(found: Tensor, like: Tensor) -> Tensor:
    """`codes` [pages, KV heads, 3 + tokens, head_dim] in the layout of native programs (csrc/kernels.h), with the
    type and page shape of `like` [.., KV heads, vectors, width]. The last token is repeated to fill the last
    tile."""
    n, heads, rows, dim = found.shape
    vectors, width = like.shape[-2:]
    tiles = -(-(rows - 3) // TILE)
    rest = found[:, :, -1:].expand(-1, -1, tiles * TILE - (rows - 3), -1)
    wide = torch.nn.functional.pad(torch.cat([found, rest], 2), (0, width - dim))
    low = wide[:, :, 0].to(like.dtype).contiguous().view(torch.uint8)
    parts = wide[:, :, 1].to(torch.uint8)
    largest = wide[:, :, 2, :1].float().contiguous().view(torch.uint8)
    fours = wide[:, :, 3:].long().view(n, heads, tiles, TILE, width // 16, 4, 4)  # vector, bits, byte
    at = 8 * torch.arange(4, device=found.device) + 2 * torch.arange(4, device=found.device)[:, None]
    lanes = (fours << at).sum((-2, -1)).transpose(3, 4)
    lanes = torch.where(lanes >= 2**31, lanes - 2**32, lanes).to(torch.int32)
    second = torch.nn.functional.pad(torch.cat([parts, largest], -1), (0, low.shape[-1] - width - 4))
    data = torch.cat([low, second, lanes.flatten(2).contiguous().view(torch.uint8)], -1)
    data = torch.nn.functional.pad(data, (0, vectors * low.shape[-1] - data.shape[-1]))
    return data.view(like.dtype).view(n, heads, vectors, width)


def unpacked(data: Tensor, dim: int, tokens: int) -> Tensor:
    """The `codes` of which `packed` made `data`, in float32 or float64."""
    n, heads, _, width = data.shape
    wide = torch.promote_types(data.dtype, torch.float32)
    second = data[:, :, 1].contiguous().view(torch.uint8)
    largest = second[..., width : width + 4].contiguous().view(torch.float32).to(wide).expand(n, heads, dim)
    head = torch.stack([data[:, :, 0, :dim].to(wide), second[..., :dim].to(wide), largest], 2)
    tiles = -(-tokens // TILE)
    lanes = data[:, :, 2:].flatten(2).contiguous().view(torch.int32)[..., : tiles * width]
    lanes = lanes.view(n, heads, tiles, width // 16, TILE).transpose(3, 4).long()
    at = 8 * torch.arange(4, device=data.device) + 2 * torch.arange(4, device=data.device)[:, None]
    found = (lanes[..., None, None] >> at & LEVELS - 1).flatten(4).flatten(2, 3)
    return torch.cat([head, found[:, :, :tokens, :dim].to(wide)], 2)


def _code_scores(q: Tensor, found: Tensor) -> Tensor:
    """q [rows, KV heads, group, head_dim], codes [rows, pages, KV heads, 3 + tokens, head_dim] -> scores of each
    token [rows, KV heads, group, pages, tokens]."""
    low, parts, largest = (found[..., i, :] for i in range(3))
    most = q.abs().amax(-1, keepdim=True)
    x = (q * torch.where(most > 0, SCALE / most, 0.0)).round()
    whole = (x[:, :, :, None] * parts.transpose(1, 2)[:, :, None] / 2**15 + 0.5).floor()
    sums = torch.einsum("rhgpd,rphtd->rhgpt", whole, found[..., 3:, :])
    unit = largest[..., 0].transpose(1, 2)[:, :, None] * (most * (2**15 / (255 * SCALE)))
    return torch.einsum("rhgd,rphd->rhgp", q, low)[..., None] + unit[..., None] * sums


def summary(keys: Tensor, kind: str, chunk: int) -> Tensor:
    """keys [pages, tokens, KV heads, head_dim] -> [pages, KV heads, tokens / chunk * 2, head_dim], or `codes`."""
    if kind == "codes":
        return codes(keys)
    chunks = keys.unflatten(1, (-1, chunk)).transpose(
        1, 3
    )  # [pages, KV heads, tokens of a chunk, chunks, head_dim]
    if kind == "bound":
        return torch.stack([chunks.amax(2), chunks.amin(2)], 3).flatten(2, 3)
    chunks = chunks.to(torch.promote_types(keys.dtype, torch.float32))
    spread = chunks.std(2, correction=0) * (DEVIATIONS / keys.shape[-1] ** 0.5)
    return torch.stack([chunks.mean(2), spread], 3).flatten(2, 3)


def page_scores(q: Tensor, summaries: Tensor, kind: str) -> Tensor:
    """q [rows, heads, head_dim], summaries [rows, pages, KV heads, vectors, head_dim] -> [rows, KV heads, pages]:
    the highest score over a page's chunks and the query heads of each KV head's group. NaN is -infinity."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(1, (summaries.shape[2], -1)).to(wide)
    if kind == "codes":
        scores = _code_scores(q, summaries.to(wide))
        return torch.where(scores.isnan(), float("-inf"), scores).amax((2, 4))
    pair = (q.clamp_min(0), q.clamp_max(0)) if kind == "bound" else (q, q.abs())
    halves = summaries.to(wide).unflatten(3, (-1, 2)).unbind(4)
    products = [torch.einsum("rhgd,rphcd->rhgpc", a, x) for a, x in zip(pair, halves, strict=True)]
    scores = products[0] + products[1]
    return torch.where(scores.isnan(), float("-inf"), scores).amax((2, 4))


def landmarks(keys: Tensor, chunk: int) -> Tensor:
    """Means of the chunks of keys [pages, tokens, KV heads, head_dim] -> [pages, KV heads, chunks, head_dim]."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    return keys.to(wide).unflatten(1, (-1, chunk)).mean(2).transpose(1, 2)


def landmark_scores(q: Tensor, found: Tensor, competing: Tensor) -> Tensor:
    """Scores [rows, KV heads, pages]: the log of softmax(q . landmark / sqrt(head_dim)) among the landmarks of all
    competing pages, the highest over a page's chunks and the query heads of a group. Pages that do not compete,
    and NaN, are -infinity.

    q [rows, heads, head_dim], found [rows, pages, KV heads, chunks, head_dim], competing [rows, KV heads, pages].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(1, (found.shape[2], -1)).to(wide) * q.shape[-1] ** -0.5
    logits = torch.einsum("rhgd,rphcd->rhgpc", q, found.to(wide))
    logits = torch.where(logits.isnan() | ~competing[:, :, None, :, None], float("-inf"), logits)
    norm = logits.flatten(3).logsumexp(3)
    scores = logits.amax(4) - norm[..., None]
    return torch.where(scores.isnan(), float("-inf"), scores).amax(2)


def outliers(keys: NDArray[Any], chunk: int, count: int) -> NDArray[np.bool_]:
    """Which `count` pages of keys [pages, tokens, KV heads, head_dim] landmarks describe worst: bool [KV heads,
    pages]. A page is as bad as its worst token, which has the least cosine with its chunk's landmark. Of pages
    that differ by rounding only, the first ones are taken."""
    chunks = keys.reshape(len(keys), -1, chunk, *keys.shape[2:])
    means = chunks.mean(2, keepdims=True)
    lengths = np.sqrt(np.square(chunks).sum(-1) * np.square(means).sum(-1))
    with np.errstate(invalid="ignore"):
        alike = ((chunks * means).sum(-1) / lengths.clip(TINY)).min((1, 2)).T
    alike = np.where(np.isnan(alike), -np.inf, np.round(alike * 2**20))
    worst = alike.argsort(axis=-1, kind="stable")[:, :count]
    found = np.zeros(alike.shape, np.bool_)
    np.put_along_axis(found, worst, True, axis=1)
    return found


def pick(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The numbers of the best pages, ascending: [rows, KV heads, n], -1 where there are fewer than n.

    scores [rows, KV heads, pages]; only the first `eligible` [rows] pages count, and the `count` [rows] highest
    are taken. Of equal scores the first pages are taken.
    """
    pages = torch.arange(scores.shape[-1], device=scores.device)
    absent = pages >= eligible[:, None, None]
    order = scores.masked_fill(absent, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    most = min(int(count.max()), scores.shape[-1])
    order = order[..., :most]
    wanted = (pages[:most] < count[:, None, None]) & (order < eligible[:, None, None])
    chosen = torch.where(wanted, order, scores.shape[-1]).sort(-1).values
    return torch.where(chosen == scores.shape[-1], -1, chosen)
