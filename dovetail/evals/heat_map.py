"""Draws grids of shares as heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dovetail.show.plot import figure

Grid = Sequence[dict[str, Any]]
COLUMNS = 3


def heat_maps(maps: Sequence[tuple[str, Grid]], last: Callable[[Any], None] | None = None) -> Any:
    """A Figure with a titled grid for each of `maps`. `last`, if it is given, draws on axes of its own."""
    count = len(maps) + (last is not None)
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    lengths, depths = (max((len({r[key] for r in g}) for _, g in maps), default=4) for key in ("length", "depth"))
    size = (max(4.0, 2.4 + 0.7 * lengths) * columns, max(2.6, 1.2 + 0.4 * depths) * rows)
    drawn = figure(*size)
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for place, (title, grid) in zip(axes, maps, strict=False):
        _draw(drawn, place, title, grid)
    if last is not None:
        last(axes[count - 1])
    for place in axes[count:]:
        place.remove()
    return drawn


def _draw(drawn: Any, axes: Any, title: str, grid: Grid) -> None:
    """Rows with `length`, `depth` and `recall`: lengths to the right, depths downwards.

    Colours have the same meaning in every picture: red is 0, green is 1.
    """
    lengths, depths = (sorted({row[key] for row in grid}) for key in ("length", "depth"))
    shares = {(row["depth"], row["length"]): row["recall"] for row in grid}
    cells = [[shares[depth, length] for length in lengths] for depth in depths]
    image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            ink = "black" if 0.15 < value < 0.85 else "white"
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set_xlabel("context and question (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=9)
    drawn.colorbar(image, ax=axes, label="share of the numbers found")
