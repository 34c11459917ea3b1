"""Pages of KV: one pool with reference counts, and the page table of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


class PagePool:
    """`num_pages` pages of `page_size` tokens. A page is free exactly when nobody holds a reference.

    `evict(n)` is called when there are too few free pages; it returns how many it freed. `reopened` collects the
    pages that are handed out. Whoever remembers something about the earlier content of a page must forget it.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.refs = [0] * num_pages
        self.lives: IntArray = np.zeros(num_pages, np.int64)  # how often each page was handed out
        self.evict: Callable[[int], int] = lambda n: 0
        self.reopened: list[int] = []
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """n pages with one reference each. None if there are too few; then only evictions have happened."""
        if len(self._free) < n:
            self.evict(n - len(self._free))
        if len(self._free) < n:
            return None
        pages = [self._free.pop() for _ in range(n)]
        for p in pages:
            self.refs[p] = 1
        if pages:
            self.lives[pages] += 1
        self.reopened += pages
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        for p in pages:
            if self.refs[p] == 0:
                raise RuntimeError(f"page {p} is free and cannot be shared")
            self.refs[p] += 1

    def release(self, pages: Iterable[int]) -> int:
        """Drop one reference of each page; returns how many became free."""
        freed = 0
        for p in pages:
            if self.refs[p] == 0:
                raise RuntimeError(f"page {p} is released twice")
            self.refs[p] -= 1
            if self.refs[p] == 0:
                self._free.append(p)
                freed += 1
        return freed

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless every page has as many references as owners, and is either held or free."""
        held = Counter(int(p) for pages in owners for p in pages)
        wrong = [(p, self.refs[p], held[p]) for p in range(self.num_pages) if self.refs[p] != held[p]]
        if wrong:
            raise RuntimeError(f"pages with (page, references, owners) that differ: {wrong[:8]}")
        free = set(self._free)
        if len(free) != len(self._free) or any(self.refs[p] for p in free):
            raise RuntimeError("the free list holds a page twice, or one that is in use")
        if len(free) + len(held) != self.num_pages:
            raise RuntimeError(f"{len(free)} free and {len(held)} held of {self.num_pages} pages: some leaked")


class PageTable:
    """The pages of one request, in order. They are kept twice: as the list `ids`, and as an array that a batch
    copies at once.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.ids: list[int] = []
        self._data: IntArray = np.zeros(8, dtype=np.int64)

    @property
    def pages(self) -> IntArray:
        return self._data[: len(self.ids)]

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, pages: Sequence[int]) -> None:
        """Add pages, and take over the caller's reference to each."""
        held, n = len(self.ids), len(self.ids) + len(pages)
        if n > len(self._data):
            self._data = np.concatenate([self._data, np.zeros(max(n, len(self._data)), dtype=np.int64)])
        self._data[held:n] = pages
        self.ids += pages

    def grow(self, start: int, stop: int) -> list[tuple[int, int]] | None:
        """Make tokens [start, stop) writable: new pages at the end, copies of shared ones.

        Returns the copies to do, as (source, target), or None when the pool has too few pages.
        """
        pool, ids = self.pool, self.ids
        size, refs = pool.page_size, pool.refs
        first = start // size
        if stop <= (first + 1) * size and first < len(ids) and refs[ids[first]] == 1:
            return []  # the usual case: the last page is the request's own and has room
        last = pages_for(stop, size)
        shared = [i for i in range(first, min(last, len(ids))) if refs[ids[i]] > 1]
        fresh = pool.allocate(len(shared) + max(0, last - len(ids)))
        if fresh is None:
            return None
        copies = []
        for i, target in zip(shared, fresh, strict=False):
            source = ids[i]
            copies.append((source, target))
            ids[i] = self._data[i] = target
            pool.release([source])
        self.append(fresh[len(shared) :])
        return copies

    def share(self, other: PageTable, tokens: int) -> None:
        """Begin with the pages that hold the first `tokens` tokens of `other`, shared."""
        pages = other.ids[: pages_for(tokens, self.pool.page_size)]
        self.pool.retain(pages)
        self.append(pages)

    def trim(self, pages: int) -> None:
        """Keep only the first so many pages."""
        self.pool.release(self.ids[pages:])
        del self.ids[pages:]

    def clear(self) -> None:
        self.pool.release(self.ids)
        self.ids = []
