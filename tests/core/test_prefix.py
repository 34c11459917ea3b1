from __future__ import annotations

from collections.abc import Callable

import pytest
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


def touch(pool: PagePool, tree: RadixPrefix, text: list[int], limit: int = 99) -> int:
    """Look a text up; how many pages of it are stored."""
    found = tree.match(request(pool, text), min(limit, len(text))).pages
    pool.release(found)
    return len(found)


def keep(pool: PagePool, tree: RadixPrefix, text: list[int]) -> None:
    r = request(pool, text)
    r.table.grow(0, len(text))
    tree.store(r, len(text))
    r.table.clear()


A, B, C = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("use", "order"),
    [
        (lambda pool, tree: None, "ABC"),
        (lambda pool, tree: touch(pool, tree, A), "BCA"),
        (lambda pool, tree: touch(pool, tree, A, 2), "BCA"),  # in part
        (lambda pool, tree: touch(pool, tree, [1, 1, 9, 9]), "BCA"),  # as far as it goes
        (lambda pool, tree: touch(pool, tree, [1, 9, 9, 9]), "ABC"),  # not at all
        (lambda pool, tree: touch(pool, tree, A, 1), "ABC"),
        (lambda pool, tree: keep(pool, tree, A), "BCA"),
        (lambda pool, tree: (touch(pool, tree, B), touch(pool, tree, A)), "CBA"),
        (lambda pool, tree: (touch(pool, tree, A), tree.evict(0), touch(pool, tree, B)), "CAB"),
    ],
)
def test_what_was_used_last_stays_longest(use: Callable[[PagePool, RadixPrefix], object], order: str) -> None:
    pool, tree = tree_of([A, B, C])
    use(pool, tree)
    names, gone = {"A": A, "B": B, "C": C}, ""
    while len(gone) < 3:
        assert tree.evict(2) == 2
        gone += "".join(n for n, text in names.items() if n not in gone and not stored(tree, text))
    assert gone == order
    assert tree.evict(1) == 0 and tree.roots == {}


def stored(tree: RadixPrefix, text: list[int]) -> int:
    """How many pages of a text are stored, without using them."""
    node, at = tree.roots.get(""), 0
    while node is not None and at < len(text):
        node = node.children.get(tuple(text[at : at + SIZE]))
        at += len(node.tokens) if node is not None else 0
    return min(at, len(text)) // SIZE


def test_a_prefix_goes_after_what_hangs_on_it_and_in_its_own_time() -> None:
    pool, tree = tree_of([[1, 1], [1, 1, 2, 2], [5, 5], [1, 1, 3, 3]])
    touch(pool, tree, [5, 5])
    texts = [[1, 1, 2, 2], [1, 1, 3, 3], [1, 1], [5, 5]]
    for n, text in enumerate(texts):  # the stem was used for its last branch, before [5, 5] was looked up
        assert [stored(tree, t) == len(t) // SIZE for t in texts] == [i >= n for i in range(4)], text
        assert tree.evict(1) == 1
    assert tree.roots == {}


def test_what_leads_to_a_stored_text_was_used_with_it() -> None:
    pool, tree = tree_of([[1, 1]])
    reader = request(pool, [5, 5])
    reader.table.grow(0, 2)
    tree.store(reader, 2)  # and it goes on reading
    keep(pool, tree, [1, 1, 3, 3])
    assert tree.evict(1) == 1 and stored(tree, [1, 1, 3, 3]) == 1
    reader.table.clear()
    assert tree.evict(1) == 1
    assert [stored(tree, [1, 1]), stored(tree, [5, 5])] == [1, 0]


def test_a_text_is_one_run_of_pages_until_another_branches_off() -> None:
    pool, tree = tree_of([[1, 2, 3, 4, 5, 6, 7, 8]])
    assert sorted(map(len, tree.held)) == [0, 4]  # the root, and the text
    assert [touch(pool, tree, t) for t in ([1, 2, 3, 4, 9, 9], [1, 2, 5, 6, 7, 8])] == [2, 1]
    keep(pool, tree, [1, 2, 3, 4, 9, 9])
    assert sorted(map(len, tree.held)) == [0, 1, 2, 2]  # the common part, and two ways on
    keep(pool, tree, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0])
    assert sorted(map(len, tree.held)) == [0, 1, 1, 2, 2]
    assert touch(pool, tree, [1, 2, 3, 4, 0, 0]) == 2  # 0, 0 hangs on 7, 8 only


def test_a_match_ends_where_the_text_leaves_an_edge() -> None:
    pool, tree = tree_of([[1, 1, 2, 2], [1, 1, 2, 2, 3, 3]])
    assert touch(pool, tree, [1, 1, 3, 3]) == 1


def test_a_tree_that_was_cleared_holds_nothing() -> None:
    pool, tree = tree_of([A, B])
    tree.clear()
    assert pages(tree) == [] and touch(pool, tree, A) == 0 and tree.evict(4) == 0
    pool.check([])
    keep(pool, tree, C)
    assert tree.evict(1) == 1 and touch(pool, tree, C) == 1
    pool.check(pages(tree))
    assert tree.evict(4) == 1


def test_each_salt_has_its_own_tree_for_as_long_as_it_holds_anything() -> None:
    pool = PagePool(16, SIZE)
    tree = RadixPrefix(pool)
    for salt in ("a", "b"):
        r = request(pool, A, salt)
        r.table.grow(0, 4)
        tree.store(r, 1)  # not a page
        assert salt not in tree.roots
        tree.store(r, 4)
        r.table.clear()
    assert set(tree.roots) == {"a", "b"}
    assert tree.evict(request(pool, A, "c")) == 0 == tree.evict(request(pool, B, "a"))
    assert tree.evict(2) == 2 and set(tree.roots) == {"b"}
    assert tree.evict(request(pool, A, "b")) == 2 and tree.roots == {}
    pool.check([])


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
