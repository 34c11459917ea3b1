from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Geometry


@given(st.integers(1, 6), st.sets(st.integers(0, 5)), st.integers(0, 7))
def test_the_layer_that_chooses_has_no_window_and_none_before_it_is_full(
    layers: int, sliding: set[int], first: int
) -> None:
    shape = Geometry(layers, 2, 1, 8, 100, tuple(sliding))
    full = [i for i in range(first, layers) if i not in sliding]
    if full:
        assert shape.choosing("x", first) == full[0]
        return
    with pytest.raises(ConfigError, match=f"x: every layer from {first} on has a sliding window"):
        shape.choosing("x", first)
