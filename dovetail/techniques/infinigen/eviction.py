"""Which pages of a request are given up when a pool of limited size is full.

Policies (Lee et al., OSDI 2024, arXiv 2406.19707, section 4.4). `counter` gives up the page that was chosen least
often; when a count is full, all counts are halved. `lru` gives up the page that was not chosen for the longest
time. `fifo` gives up the first page. Of equal pages the first goes. A page that was given up never comes back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dovetail.core.pages import IntArray

POLICIES = ("counter", "lru", "fifo")
FULL = 255  # the largest count
ALIVE = 2**62


class Evictions:
    """Pages of one request in one layer that each of `heads` KV heads has given up.

    The result depends only on what rows chose, page by page. After the rows of page j, each head gives up pages
    until `limit` of the pages 0 to j are left. Rows see that from the end of page j + 1 on. So a row depends on
    choices that lie at least a page before it. Those are committed before the row is computed, whatever the chunks
    and the drafts. Page j itself is not given up at that moment. Pages whose rows read everything are only added;
    giving up begins after the first page whose rows all chose.
    """

    def __init__(self, heads: int, page_size: int, limit: int, policy: str) -> None:
        self.page_size, self.limit, self.policy = page_size, limit, policy
        self.settled = 0  # pages whose rows are counted
        self._rows: dict[int, IntArray] = {}  # what rows of later pages chose, by position
        self._died = np.full((heads, 8), ALIVE)  # the page after which each one was given up
        self._key = np.zeros((heads, 8), np.int64)  # how often chosen, or when last

    def chose(self, position: int, pages: IntArray) -> None:
        """The row at `position` reads `pages` [heads, n]; -1 means none. The last call for a row counts, as long
        as the row's page is not settled."""
        if position >= self.settled * self.page_size:
            self._rows[position] = pages

    def given_up(self, pages: int) -> NDArray[np.bool_]:
        """Which of the first `pages` pages are given up for a row that may leave just these unread: bool [heads,
        pages]. Pages that are not settled yet are settled now, so their rows must be committed."""
        while self.settled < pages:
            self._settle(self.settled)
        return self._died[:, :pages] < pages

    @property
    def evicted(self) -> int:
        """Pages given up so far, over all heads."""
        return int((self._died < ALIVE).sum())

    def _settle(self, page: int) -> None:
        self._grow(page + 1)
        first = page * self.page_size
        rows = [p for p in range(first, first + self.page_size) if p in self._rows]
        for position in rows:
            self._count(self._rows.pop(position), position)
        if self.policy == "lru":
            self._key[:, page] = first + self.page_size - 1
        self.settled = page + 1
        if len(rows) == self.page_size:
            for head in range(len(self._died)):
                self._evict(head, page)

    def _count(self, chosen: IntArray, position: int) -> None:
        for key, pages in zip(self._key, chosen, strict=True):
            some = pages[pages >= 0]
            if self.policy == "lru":
                key[some] = position
            elif self.policy == "counter":
                key[some] += 1
                if len(some) and key[some].max() >= FULL:
                    key //= 2

    def _evict(self, head: int, page: int) -> None:
        """Give up pages before `page` until `limit` are left. For fifo all keys are 0, so the first page goes."""
        alive = np.flatnonzero(self._died[head, :page] == ALIVE)
        order = alive[np.argsort(self._key[head, alive], kind="stable")]
        self._died[head, order[: max(0, len(alive) + 1 - self.limit)]] = page

    def _grow(self, pages: int) -> None:
        if pages > self._died.shape[1]:
            wide = (0, 0), (0, max(pages, self._died.shape[1]))
            self._died = np.pad(self._died, wide, constant_values=ALIVE)
            self._key = np.pad(self._key, wide)
