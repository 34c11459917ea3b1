from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.pages import PagePool, PageTable, pages_for


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
    pool = PagePool(4, 4)
    held = pool.allocate(3)
    assert held is not None
    asked = []

    def evict(n: int) -> int:
        asked.append(n)
        return pool.release([held.pop() for _ in range(n)])

    pool.evict = evict
    assert len(pool.allocate(3) or ()) == 3
    assert asked == [2]


@given(st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=50)
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


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool = PagePool(2, 4)
    one, two = PageTable(pool), PageTable(pool)
    one.grow(0, 5)
    two.share(one, 5)
    assert two.grow(5, 6) is None
    assert list(two.pages) == list(one.pages)
    pool.check([list(map(int, t.pages)) for t in (one, two)])
