"""Plots that several suites share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dovetail.show.plot import figure

Result = dict[str, Any]


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
