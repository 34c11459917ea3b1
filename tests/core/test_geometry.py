from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.seams import Geometry


@given(st.integers(1, 6), st.sets(st.integers(0, 5)), st.integers(0, 7))
def test_the_first_full_layer_has_no_window_and_none_before_it_is_full(
    layers: int, sliding: set[int], start: int
) -> None:
    found = Geometry(layers, 2, 1, 8, 100, tuple(sliding)).first_full_layer(start)
    full = [i for i in range(start, layers) if i not in sliding]
    assert found == (full[0] if full else None)
