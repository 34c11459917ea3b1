"""A grid of shares as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.plot import figure


def heat_map(grid: Sequence[dict[str, Any]], share: str, title: str) -> Any:
    """A Figure of rows with `length`, `depth` and a `share` of 0 to 1: lengths to the right, depths downwards.

    Colours have the same meaning in every picture: red is 0, green is 1.
    """
    lengths, depths = (sorted({row[key] for row in grid}) for key in ("length", "depth"))
    shares = {(row["depth"], row["length"]): row[share] for row in grid}
    drawn = figure(max(4.0, 2.2 + len(lengths)), max(3.0, 1.4 + 0.5 * len(depths)))
    axes = drawn.subplots()
    cells = [[shares[depth, length] for length in lengths] for depth in depths]
    image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set_xlabel("context and question (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=10)
    drawn.colorbar(image, label="share of the numbers found")
    return drawn
