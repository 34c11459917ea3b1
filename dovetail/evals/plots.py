"""Plots of results: quality against speed, and grids of shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dovetail.show.plot import figure

Result = dict[str, Any]
Grid = Sequence[dict[str, Any]]
COLUMNS = 3


class Measurement(Protocol):
    """What a plot needs from a suite: see `evals.suite.Suite`."""

    @property
    def name(self) -> str: ...

    @property
    def quality(self) -> str: ...

    @property
    def higher(self) -> bool: ...


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (speed, quality) that no other point beats, in order of speed. More of both is better.
    A point beats another if it is at least as good in both and better in one. Of equal points all are kept."""
    front = []
    for i, (speed, quality) in enumerate(points):
        beaten = any(s >= speed and q >= quality and (s, q) != (speed, quality) for s, q in points)
        if not beaten:
            front.append(i)
    return sorted(front, key=lambda i: points[i])


def quality_against_speed(suite: Measurement, results: Sequence[Result]) -> Any:
    """A Figure: a point for each result, the Pareto front joined by a line. Refused settings are left out."""
    drawn = figure()
    draw_front(drawn.subplots(), suite, results)
    return drawn


def draw_front(axes: Any, suite: Measurement, results: Sequence[Result]) -> None:
    measured = [r for r in results if r["state"] == "measured" and "decode_tokens_per_s" in r]
    speeds = [r["decode_tokens_per_s"] for r in measured]
    values = [r[suite.quality] for r in measured]
    sign = 1 if suite.higher else -1
    front = pareto([(s, sign * v) for s, v in zip(speeds, values, strict=True)])
    line = {"color": "tab:orange", "marker": "o", "markersize": 11, "label": "Pareto front"}
    axes.plot([speeds[i] for i in front], [values[i] for i in front], **line)
    errors = [[abs(r["decode_spread"][i] - x) for r, x in zip(measured, speeds, strict=True)] for i in (0, 1)]
    axes.errorbar(speeds, values, xerr=errors, fmt="o", color="tab:blue", elinewidth=0.8, zorder=3)
    middle = (min(speeds, default=0) + max(speeds, default=0)) / 2
    for result, x, y in zip(measured, speeds, values, strict=True):
        left = x > middle  # names grow towards the middle, so that none is cut off
        place = {"xytext": (-8 if left else 8, 5), "ha": "right" if left else "left"}
        name = result["setting"] + (" (earlier run)" if result.get("earlier") else "")
        axes.annotate(name, (x, y), textcoords="offset points", fontsize=8, **place)
    axes.margins(0.1)
    if not suite.higher:
        axes.invert_yaxis()
    contexts = sorted({r["decode_context"] for r in measured})
    axes.set_xlabel(f"decoding behind {', '.join(map(str, contexts))} tokens (tokens/s; bars: lowest to highest)")
    axes.set_ylabel(suite.quality.replace("_", " ") + ("" if suite.higher else " (lower is better)"))
    axes.set_title(f"{suite.name}, {results[0]['model']}" if results else suite.name)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


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
        _draw_grid(drawn, place, title, grid)
    if last is not None:
        last(axes[count - 1])
    for place in axes[count:]:
        place.remove()
    return drawn


def _draw_grid(drawn: Any, axes: Any, title: str, grid: Grid) -> None:
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
