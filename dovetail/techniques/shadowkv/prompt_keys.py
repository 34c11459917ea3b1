"""Keys of prompts as a product of low rank, except for outlier pages, which keep their exact keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray
from dovetail.core.seams import Site
from dovetail.core.types import Request
from dovetail.host.lazy_torch import torch
from dovetail.ops.low_rank import LowRank, factorise, rebuild
from dovetail.ops.pages import outliers
from dovetail.ops.rope import Rope, unrotate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyFormat:
    """How the keys of a prompt are kept.

    rank, energy: as `ops.low_rank.factorise` takes them. outliers: pages per KV head that keep exact keys, found
    with landmarks of `chunk` tokens. longer_than: prompts of at most so many pages keep all keys as they are.
    """

    rank: int
    energy: float
    chunk: int
    outliers: int
    longer_than: int


@dataclass
class Prompt:
    """What is kept of the prompt on these pages, for all requests that share them. Layers are those of all stages.

    outliers: bool [layers, KV heads, pages]. keys (by layer) and aliases [pages]: empty for a short prompt.
    """

    pages: tuple[int, ...]
    outliers: NDArray[np.bool_]
    aliases: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: dict[int, LowRank] = field(default_factory=dict)
    users: int = 0
    whole: bool = True  # False: a read or a write failed, and the pages stay as they are


class PromptKeys:
    """The prompts of all requests whose rows may leave pages unread.

    There are as many aliases as pages; here they are counted from 0. `_places` [2, aliases] has for each alias the
    first alias of its prompt, and which page of the prompt it stands for.
    """

    def __init__(self, site: Site, how: KeyFormat) -> None:
        self.site = site
        self.how = how
        self.capacity: int = site.pool.num_pages
        self.rebuilt = 0  # pages of one KV head
        self._of: dict[str, Prompt] = {}
        self._by_pages: dict[tuple[int, ...], Prompt] = {}
        self._by_alias: dict[int, Prompt] = {}  # by the first alias of each prompt
        self._native: Any = None  # rebuilds keys in native programs
        self._free = list(range(self.capacity - 1, -1, -1))
        self._places = np.zeros((2, self.capacity), np.int64)

    def add(self, request: Request) -> IntArray:
        """Keep the dense part of `request`, which must be committed. Returns the aliases of its pages, or none."""
        if request.id in self._of:
            return self._of[request.id].aliases
        pages = tuple(request.table.ids[: request.dense_until // self.site.page_size])
        prompt = self._by_pages.get(pages) or self._make(pages)
        if prompt.whole:
            self._by_pages[pages] = prompt
        self._of[request.id] = prompt
        prompt.users += 1
        return prompt.aliases

    def of(self, request_id: str) -> Prompt | None:
        """What is kept of a request's dense part, if anything is."""
        return self._of.get(request_id)

    @property
    def num_free(self) -> int:
        """Aliases that no prompt has."""
        return len(self._free)

    @property
    def prompts(self) -> list[Prompt]:
        """What is kept, each once, however many requests share it."""
        return list({id(p): p for p in self._of.values()}.values())

    def check(self) -> None:
        """Raise RuntimeError if an alias leaked, or users are counted wrongly."""
        kept = self.prompts
        named = [a - self.site.kv.num_pages for p in kept for a in p.aliases.tolist()]
        if sorted([*self._free, *named]) != list(range(self.capacity)):
            raise RuntimeError(
                f"{self.num_free} free and {len(named)} aliases in use of {self.capacity}: some leaked"
            )
        if any(p.users != sum(o is p for o in self._of.values()) for p in kept):
            raise RuntimeError("a prompt has another number of users than it says")
        if {id(p) for p in self._by_pages.values()} != {id(p) for p in kept if p.whole}:
            raise RuntimeError("prompts can be found that no request has, or the other way round")
        if {id(p) for p in self._by_alias.values()} != {id(p) for p in kept if len(p.aliases)}:
            raise RuntimeError("aliases can be found whose prompt no request has, or the other way round")

    def remove(self, request_id: str) -> None:
        prompt = self._of.pop(request_id, None)
        if prompt is None:
            return
        prompt.users -= 1
        if prompt.users == 0:
            if prompt.whole:
                del self._by_pages[prompt.pages]
            if len(prompt.aliases):
                names = (prompt.aliases - self.site.kv.num_pages).tolist()
                del self._by_alias[names[0]]
                self._free += names
                if self._native is not None:
                    self._native.remove(names)

    def outliers(self, layer: int, batch: Any, pages: int) -> Tensor:
        """Which of the spans' first `pages` pages keep exact keys: bool [spans, KV heads, pages]."""
        shape = self.site.geometry
        out = torch.zeros(
            len(batch.spans), shape.num_kv_heads, pages, dtype=torch.bool, device=batch.tables.device
        )
        for mine, span in zip(out, batch.spans, strict=True):
            prompt = self._of.get(span.request.id)
            if prompt is not None:  # else none of its rows may leave pages unread yet
                known = torch.from_numpy(prompt.outliers[span.stage * shape.num_layers + layer, :, :pages])
                mine[:, : known.shape[1]] = known
        return out

    def open(self, layer: int, pages: Tensor, keys: Tensor) -> Tensor:
        """keys [rows, KV heads, n, page_size, head_dim] of `pages`. Those of aliases are rebuilt, except
        outliers."""
        kv, keys = self.site.kv, keys.clone()
        for stage in range(kv.num_stages):
            alias = pages - kv.num_pages - stage * kv.stage_pages
            inside = (alias >= 0) & (alias < self.capacity)
            first, page = torch.from_numpy(self._places).to(pages.device)[:, alias.where(inside, 0)]
            for name in first[inside].unique().tolist():
                index = stage * kv.geometry.num_layers + layer
                wanted = inside & (first == name)
                self._rebuild(index, self._by_alias[name], page.where(wanted, -1), keys)
        return keys

    def _rebuild(self, index: int, prompt: Prompt, pages: Tensor, keys: Tensor) -> None:
        """Fill `keys` where `pages` [rows, KV heads, n] names pages of `prompt`; -1 means another prompt's."""
        size, dim = keys.shape[-2:]
        wide = torch.promote_types(keys.dtype, torch.float32)
        for head, mine in enumerate(pages.unbind(1)):
            apart = torch.from_numpy(prompt.outliers[index, head]).to(mine.device)
            wanted = (mine >= 0) & ~apart[mine.clamp_min(0)]
            found, back = mine[wanted].unique(return_inverse=True)
            tokens = (found[:, None] * size + torch.arange(size, device=found.device)).flatten()
            columns, angles = slice(head * dim, (head + 1) * dim), self._rope(index).angles(tokens, wide)
            rebuilt = rebuild(prompt.keys[index], tokens, columns, angles).unflatten(0, (-1, size))
            keys[:, head][wanted] = self.site.kv.k.rounded(rebuilt).to(keys.dtype)[back]
            self.rebuilt += len(back)

    def _make(self, pages: Sequence[int]) -> Prompt:
        kv, layers, how = self.site.kv, self.site.geometry.num_layers, self.how
        shape = (layers * kv.num_stages, kv.num_kv_heads, len(pages))
        prompt = Prompt(tuple(pages), np.zeros(shape, np.bool_))
        numbers = np.array(pages, np.int64)
        if len(pages) <= how.longer_than:
            return prompt
        if not kv.stored(numbers):
            return replace(prompt, whole=False)
        for i in range(shape[0]):
            if i % layers in kv.own_window:
                continue
            keys = kv.key_array(i % layers, numbers + i // layers * kv.stage_pages)
            if not np.isfinite(keys).all():
                return replace(prompt, outliers=np.zeros_like(prompt.outliers), keys={}, whole=False)
            prompt.outliers[i] = outliers(keys, how.chunk, how.outliers)
            prompt.keys[i] = self._factorise(i, keys.reshape(-1, *keys.shape[2:]))
        self._name(prompt)
        self._tell(prompt)
        return prompt

    def record(self, to: Any) -> None:
        """Have a native program rebuild the keys."""
        self._native = to.rebuild([block.attention.rope for block in self.site.model.blocks()])

    def _tell(self, prompt: Prompt) -> None:
        """Tell the native program of a prompt's aliases."""
        if self._native is None:
            return
        kv, names = self.site.kv, (prompt.aliases - self.site.kv.num_pages).tolist()
        absent = LowRank(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32))
        kept = [prompt.keys.get(i, absent) for i in range(len(prompt.outliers))]
        self._native.add(names, [(k.coefficients.ctypes.data, k.basis.ctypes.data, k.rank) for k in kept])
        kv.seams.residency.native.alias(names, list(prompt.pages), prompt.outliers.ctypes.data)

    def _factorise(self, index: int, keys: NDArray[Any]) -> LowRank:
        """The low-rank form of keys [tokens, KV heads, head_dim] of a layer; the first token is at position 0."""
        angles = self._rope(index).angles(np.arange(len(keys)), keys.dtype)
        found = factorise(unrotate(keys, angles).reshape(len(keys), -1), self.how.rank, self.how.energy)
        return _even(found).to(self.site.kv.k.element)

    def _name(self, prompt: Prompt) -> None:
        n = len(prompt.pages)
        if len(self._free) < n:
            raise RuntimeError("more prompts run at a time than there are aliases of pages for")
        names, self._free = self._free[-n:], self._free[:-n]
        self._by_alias[names[0]] = prompt
        self._places[0, names] = names[0]
        self._places[1, names] = np.arange(n)
        prompt.aliases = self.site.kv.num_pages + np.array(names)

    def _rope(self, index: int) -> Rope:
        found: Rope = self.site.model.blocks()[index].attention.rope
        return found


def _even(factors: LowRank) -> LowRank:
    """The same with an even rank: native products take pairs of bfloat16."""
    odd = factors.rank % 2
    return LowRank(
        np.pad(factors.coefficients, ((0, 0), (0, odd))), np.pad(factors.basis, ((0, odd), (0, 0))), factors.kind
    )
