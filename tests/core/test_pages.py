from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.pages import PagePool, PageTable, pages_for
from tests.helpers.examples import examples


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9)), max_size=60))
def test_pool_against_a_list_of_owners(steps: list[tuple[str, int]]) -> None:
    pool = PagePool(12, 4)
    owners: list[list[int]] = []
    for action, n in steps:
        if action == "allocate":
            free = pool.num_free
            pages = pool.allocate(n)
            assert (pages is None) == (n > free)
            if pages is not None:
                assert len(set(pages)) == n
                owners.append(pages)
        elif owners and action == "share":
            pool.retain(owners[n % len(owners)])
            owners.append(list(owners[n % len(owners)]))
        elif owners:
            pool.release(owners.pop(n % len(owners)))
        pool.check(owners)
        assert pool.num_free == 12 - len({p for o in owners for p in o})


def test_check_sees_a_leak_a_double_owner_and_a_double_release() -> None:
    pool = PagePool(4, 4)
    pages = pool.allocate(2)
    assert pages is not None
    pool.check([pages])
    with pytest.raises(RuntimeError, match="differ"):
        pool.check([])
    with pytest.raises(RuntimeError, match="differ"):
        pool.check([pages, pages])
    pool.release(pages)
    with pytest.raises(RuntimeError, match="twice"):
        pool.release(pages)
    with pytest.raises(RuntimeError, match="free"):
        pool.retain(pages)


def test_evict_is_asked_for_what_is_missing() -> None:
    pool = PagePool(6, 4)
    held = pool.allocate(3)
    assert held is not None
    asked = []

    def evict(n: int) -> int:
        asked.append(n)
        return pool.release([held.pop() for _ in range(n)])

    pool.evict = evict
    enough = pool.allocate(3) or []
    assert len(enough) == 3 and asked == []
    pool.release(enough[:1])
    assert len(pool.allocate(3) or ()) == 3 and asked == [2]


def test_pages_that_are_handed_out_are_reopened_until_somebody_says_so() -> None:
    pool = PagePool(3, 4)
    assert pool.evict(2) == 0  # nobody stores anything
    first, second = pool.allocate(2) or [], pool.allocate(1) or []
    assert pool.allocate(1) is None
    pool.release(second)
    assert pool.reopened == [*first, *second]
    pool.reopened = []
    assert pool.allocate(1) == second == pool.reopened


def test_check_sees_what_only_a_wrong_count_can_bring_about() -> None:
    lost, twice, in_use = (PagePool(3, 4) for _ in range(3))
    (page,) = lost.allocate(1) or []
    lost.refs[page] = 0
    with pytest.raises(RuntimeError, match="2 free and 0 held of 3 pages: some leaked"):
        lost.check([])
    twice.refs[1] = 1
    twice.release([1])
    with pytest.raises(RuntimeError, match="holds a page twice"):
        twice.check([])
    in_use.refs[1] = 1
    with pytest.raises(RuntimeError, match="one that is in use"):
        in_use.check([[1]])


@given(st.integers(1, 40), st.integers(1, 8))
@examples(50)
def test_growing_to_a_length_holds_exactly_its_pages(tokens: int, size: int) -> None:
    pool = PagePool(64, size)
    table = PageTable(pool)
    for stop in range(1, tokens + 1):
        assert table.grow(stop - 1, stop) == []
        assert len(table) == pages_for(stop, size)
        assert table.pages.tolist() == table.ids
    table.clear()
    assert table.ids == table.pages.tolist() == []
    pool.check([])


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    pool = PagePool(8, 4)
    one, two = PageTable(pool), PageTable(pool)
    one.grow(0, 7)
    two.share(one, 6)
    assert list(two.pages) == list(one.pages)
    copies = two.grow(6, 10)
    assert copies == [(int(one.pages[1]), int(two.pages[1]))]
    assert two.pages[0] == one.pages[0]
    assert two.pages[1] != one.pages[1]
    assert two.pages.tolist() == two.ids
    pool.check([one.ids, two.ids])
    assert one.grow(6, 8) == []  # the writer that is left alone does not copy
    assert len(two.grow(0, 2) or ()) == 1 and len(two) == 3  # nor does a copy lengthen the table
    pool.check([one.ids, two.ids])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "share", "clear"]), st.integers(0, 3), st.integers(0, 3), st.integers(1, 11)
        ),
        max_size=25,
    )
)
def test_tables_that_share_and_write_against_plain_lists(steps: list[tuple[str, int, int, int]]) -> None:
    """`memory` is the device: it does the copies that a table asks for, and each token is written to its slot."""
    size = 4
    pool = PagePool(200, size)
    tables, texts = [PageTable(pool) for _ in range(4)], [[] for _ in range(4)]
    memory: dict[tuple[int, int], int] = {}
    for number, (action, one, two, n) in enumerate(steps):
        table, text = tables[one], texts[one]
        if action == "clear" or (action == "share" and text):
            table.clear()
            text.clear()
        elif action == "share" and one != two:
            text += texts[two][:n]
            table.share(tables[two], len(text))
        elif action == "write":
            start = max(0, len(text) - n // 3)  # sometimes over tokens that were there
            shared = {p for p in table.ids[start // size :] if pool.refs[p] > 1}
            free = pool.num_free
            copies = table.grow(start, start + n)
            assert copies is not None
            assert {source for source, _ in copies} == shared & {source for source, _ in copies}
            assert all(pool.refs[p] == 1 for p in table.ids[start // size : pages_for(start + n, size)])
            assert len(table) == max(pages_for(len(text), size), pages_for(start + n, size))
            assert free - pool.num_free == len(copies) + len(table) - pages_for(len(text), size)
            for source, target in copies:
                memory |= {(target, i): memory[source, i] for i in range(size) if (source, i) in memory}
            text[start : start + n] = range(number * 100, number * 100 + n)
            memory |= {(table.ids[i // size], i % size): text[i] for i in range(start, min(start + n, len(text)))}
        pool.check([t.ids for t in tables])
        for held, said in zip(tables, texts, strict=True):
            assert held.pages.tolist() == held.ids
            assert [memory[held.ids[i // size], i % size] for i in range(len(said))] == said


def test_a_table_takes_many_pages_at_once() -> None:
    pool = PagePool(100, 4)
    table = PageTable(pool)
    for start, stop in ((0, 8 * 4), (8 * 4, 9 * 4), (9 * 4, 100 * 4)):
        assert table.grow(start, stop) == []
        assert table.pages.tolist() == table.ids
    assert sorted(table.ids) == list(range(100))


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool = PagePool(2, 4)
    one, two = PageTable(pool), PageTable(pool)
    one.grow(0, 5)
    two.share(one, 5)
    assert two.grow(5, 6) is None
    assert list(two.pages) == list(one.pages)
    pool.check([list(map(int, t.pages)) for t in (one, two)])
