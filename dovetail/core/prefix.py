"""Automatic prefix caching: a radix tree over whole pages, the default Reuse."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from dovetail.core.pages import PagePool
from dovetail.core.types import Request, Stored


class Node:
    """An edge of whole pages: `tokens` (a multiple of the page size) and the `pages` that hold their KV."""

    __slots__ = ("children", "key", "pages", "parent", "queued", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], pages: list[int], parent: Node | None) -> None:
        self.tokens = tokens
        self.pages = pages
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}  # by the tokens of the child's first page
        self.key: tuple[int, ...] = ()  # its key in the parent's `children`
        self.used = 0
        self.queued = False  # whether the eviction queue has an entry for it


class RadixPrefix:
    """Stored prefixes; holds one reference to each of its pages. Least recently used leaves go first.

    Exact by construction: tokens are compared, never hashes, and each salt has its own tree.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._queue: list[tuple[int, int, Node]] = []  # leaves by `used` when queued, which may be out of date

    def match(self, request: Request, limit: int) -> Stored:
        """The longest stored prefix of the request's tokens within `limit` tokens."""
        size = self.pool.page_size
        pages: list[int] = []
        node = self.roots.get(request.salt)
        tokens, at = request.tokens, 0
        while node is not None:
            node.used = next(self._clock)
            node = node.children.get(tuple(tokens[at : at + size])) if at + size <= limit else None
            if node is not None:
                n = self._common(node, tokens, at, limit)
                pages += node.pages[:n]
                at += n * size
                if n < len(node.pages):
                    node.used = next(self._clock)
                    break
        self.pool.retain(pages)
        return Stored(pages, at)

    def store(self, request: Request, limit: int) -> None:
        """Keep the whole pages of the request's first `limit` tokens; all of them must be committed."""
        size = self.pool.page_size
        count = limit // size
        if count == 0:
            return
        node = self.roots.setdefault(request.salt, Node((), [], None))
        tokens, at = request.tokens, 0
        while at < count * size:
            node.used = next(self._clock)
            key = tuple(tokens[at : at + size])
            child = node.children.get(key)
            if child is None:
                pages = request.table.ids[at // size : count]
                self.pool.retain(pages)
                child = Node(tuple(tokens[at : count * size]), pages, node)
                child.key, child.used = key, next(self._clock)
                node.children[key] = child
                self._enqueue(child)
            n = self._common(child, tokens, at, count * size)
            if n < len(child.pages):
                child = self._split(child, n)
            at += n * size
            node = child
        node.used = next(self._clock)

    def evict(self, what: int | Request) -> int:
        """For a number: free up to so many pages that only the tree holds, least recently used leaves first. For a
        request: drop everything that begins with its first page. Returns how many pages were freed."""
        return self._forget(what) if isinstance(what, Request) else self._evict(what)

    def _forget(self, request: Request) -> int:
        root = self.roots.get(request.salt)
        first = root and root.children.pop(tuple(request.tokens[: self.pool.page_size]), None)
        if root is None or first is None:
            return 0
        freed = 0
        for node in list(self._nodes(first)):
            freed += self.pool.release(node.pages)
            node.pages, node.children = [], {}
        if not root.children:
            del self.roots[request.salt]
        return freed

    def _evict(self, n: int) -> int:
        freed, busy = 0, []
        while self._queue and freed < n:
            used, _, leaf = heapq.heappop(self._queue)
            leaf.queued = False
            if leaf.children or not leaf.pages:
                continue  # it has children and is queued again when it becomes a leaf, or it was dropped
            if leaf.used > used:
                self._enqueue(leaf)
                continue
            while leaf.pages and freed < n and self.pool.refs[leaf.pages[-1]] == 1:
                freed += self.pool.release([leaf.pages.pop()])
            leaf.tokens = leaf.tokens[: len(leaf.pages) * self.pool.page_size]
            if leaf.pages:
                busy.append(leaf)
            else:
                self._remove(leaf)
        for leaf in busy:
            self._enqueue(leaf)
        return freed

    def _enqueue(self, leaf: Node) -> None:
        if not leaf.queued:
            leaf.queued = True
            heapq.heappush(self._queue, (leaf.used, next(self._clock), leaf))

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        if parent is None:
            return
        del parent.children[leaf.key]
        if parent.children:
            return
        if parent.parent is not None:
            self._enqueue(parent)
        else:
            self.roots = {salt: root for salt, root in self.roots.items() if root is not parent}

    def clear(self) -> None:
        for node in self._nodes():
            self.pool.release(node.pages)
        self.roots.clear()
        self._queue.clear()

    @property
    def held(self) -> Iterator[list[int]]:
        """The pages that the tree holds, for `PagePool.check`."""
        return (node.pages for node in self._nodes())

    def _common(self, node: Node, tokens: list[int], at: int, limit: int) -> int:
        size, n = self.pool.page_size, 0
        while n < len(node.pages) and at + (n + 1) * size <= limit:
            if node.tokens[n * size : (n + 1) * size] != tuple(tokens[at + n * size : at + (n + 1) * size]):
                break
            n += 1
        return n

    def _split(self, node: Node, n: int) -> Node:
        """Cut an edge after n pages; returns the upper part."""
        size = self.pool.page_size
        assert node.parent is not None  # only edges below a root have pages
        upper = Node(node.tokens[: n * size], node.pages[:n], node.parent)
        upper.used, upper.key = node.used, node.key
        node.parent.children[upper.key] = upper
        node.tokens, node.pages, node.parent = node.tokens[n * size :], node.pages[n:], upper
        node.key = node.tokens[:size]
        upper.children[node.key] = node
        return upper

    def _nodes(self, *first: Node) -> Iterator[Node]:
        stack = list(first or self.roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node
