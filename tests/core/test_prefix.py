from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.pages import PagePool, PageTable
from dovetail.core.prefix import RadixPrefix
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request
from tests.helpers.examples import examples

SIZE = 2


def request(pool: PagePool, tokens: list[int], salt: str = "") -> Request:
    return Request("r", tokens, SamplingParams(), PageTable(pool), max_total=99, seed=0, salt=salt)


def pages(tree: RadixPrefix) -> list[list[int]]:
    return list(tree.held)


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(st.lists(st.tuples(tokens, st.sampled_from(["", "other"])), max_size=12), tokens)
def test_match_is_the_longest_stored_prefix_of_whole_pages(
    stored: list[tuple[list[int], str]], query: list[int]
) -> None:
    pool = PagePool(128, SIZE)
    tree = RadixPrefix(pool)
    content: dict[int, tuple[int, ...]] = {}  # page -> the tokens from the start to its end
    for text, salt in stored:
        r = request(pool, text, salt)
        r.table.grow(0, len(text))
        for i, p in enumerate(r.table.pages):
            content[int(p)] = tuple(text[: (i + 1) * SIZE])
        tree.store(r, len(text))
        r.table.clear()
        pool.check(pages(tree))
    for salt in ("", "other"):
        found, computed = tree.match(request(pool, query, salt), len(query))
        assert computed == len(found) * SIZE
        shared = [
            sum(1 for a, b in zip(s[: i * SIZE], query, strict=False) if a == b) == i * SIZE and i
            for s, at in stored
            if at == salt
            for i in range(min(len(s), len(query)) // SIZE + 1)
        ]
        assert len(found) == max(shared, default=0)
        for i, p in enumerate(found):
            assert content[p] == tuple(query[: (i + 1) * SIZE])
        pool.release(found)
    pool.check(pages(tree))


def tree_of(stored: list[list[int]]) -> tuple[PagePool, RadixPrefix]:
    pool = PagePool(128, SIZE)
    tree = RadixPrefix(pool)
    for text in stored:
        r = request(pool, text)
        r.table.grow(0, len(text))
        tree.store(r, len(text))
        r.table.clear()
    return pool, tree


@given(st.lists(tokens, min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 11))
@examples(200)
def test_evict_frees_what_is_asked_and_never_what_is_read(stored: list[list[int]], n: int, reader: int) -> None:
    pool, tree = tree_of(stored)
    text = stored[reader % len(stored)]
    held = tree.match(request(pool, text), len(text)).pages
    total = sum(map(len, tree.held))
    freed = tree.evict(n)
    assert freed == min(n, total - len(held))
    assert total - freed == sum(map(len, tree.held))
    pool.check([*pages(tree), held])
    again = tree.match(request(pool, text), len(text)).pages
    assert again[: len(held)] == held
    pool.release(again + held)
    tree.clear()
    pool.check([])


@given(st.lists(tokens, min_size=1, max_size=12), st.integers(0, 11), st.integers(0, 40))
def test_what_begins_as_a_request_does_is_given_up(stored: list[list[int]], which: int, n: int) -> None:
    pool, tree = tree_of(stored)
    text = stored[which % len(stored)]
    held = tree.match(request(pool, text), len(text)).pages
    total = sum(map(len, tree.held))
    freed = tree.evict(request(pool, text))
    pool.check([*pages(tree), held])
    assert total - sum(map(len, tree.held)) == freed + len(held)
    for other in stored:
        left = tree.match(request(pool, other), len(other)).pages
        begins = other[:SIZE] == text[:SIZE] and len(text) >= SIZE
        assert len(left) == (0 if begins else len(other) // SIZE)
        pool.release(left)
    pool.release(held)
    left = sum(map(len, tree.held))
    assert tree.evict(n) == min(n, left)
    tree.clear()
    pool.check([])


def test_least_recently_used_goes_first() -> None:
    pool = PagePool(16, SIZE)
    tree = RadixPrefix(pool)
    for text in ([1, 1, 2, 2], [1, 1, 3, 3]):
        r = request(pool, text)
        r.table.grow(0, 4)
        tree.store(r, 4)
        r.table.clear()
    pool.release(tree.match(request(pool, [1, 1, 2, 2]), 4).pages)
    assert tree.evict(1) == 1
    assert len(tree.match(request(pool, [1, 1, 2, 2]), 4).pages) == 2
    assert len(tree.match(request(pool, [1, 1, 3, 3]), 4).pages) == 1


def test_the_limit_cuts_a_match() -> None:
    pool = PagePool(16, SIZE)
    tree = RadixPrefix(pool)
    r = request(pool, [1, 2, 3, 4, 5, 6])
    r.table.grow(0, 6)
    tree.store(r, 6)
    for limit in range(7):
        found = tree.match(r, limit).pages
        assert len(found) == limit // SIZE
        pool.release(found)


class Counting(list[int]):
    """A list that counts how often it is looked at."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_evicting_one_page_does_not_walk_the_tree() -> None:
    pool = PagePool(4000, SIZE)
    tree = RadixPrefix(pool)
    for i in range(2000):
        r = request(pool, [i, i, i, i])
        r.table.grow(0, 4)
        tree.store(r, 4)
        r.table.clear()
    pool.refs = looked_at = Counting(pool.refs)
    for oldest in range(5):
        looked_at.reads = 0
        assert tree.evict(2) == 2
        assert looked_at.reads < 10
        assert not tree.match(request(pool, [oldest] * 4), 4).pages
