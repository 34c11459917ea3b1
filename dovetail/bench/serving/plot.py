"""Draws latency and throughput against the offered rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dovetail.show import plot


def draw(points: Sequence[dict[str, Any]], destination: Path) -> None:
    """Two panels over the same rates, a colour for each target. ConfigError if the file cannot be written."""
    figure = plot.figure(7.0, 7.0)
    latency, rate = figure.subplots(2, 1, sharex=True)
    slo = any("goodput" in point for point in points)
    for number, target in enumerate(dict.fromkeys(point["target"] for point in points)):
        own = [p for p in points if p["target"] == target and p["offered_rate"] and p["completed"]]
        own.sort(key=lambda p: p["offered_rate"])
        colour, x = f"C{number}", [p["offered_rate"] for p in own]
        for name, q, line in (("ttft", "p50", "-"), ("ttft", "p99", "--"), ("tpot", "p50", ":")):
            y = [(p[f"{name}_ms"] or {}).get(q) for p in own]
            latency.plot(x, y, line, color=colour, marker=".", label=f"{target}: {name.upper()} {q}")
        rate.plot(x, [p["achieved_rate"] for p in own], "-", color=colour, marker=".", label=f"{target}: achieved")
        if slo:
            y = [p["goodput"] for p in own]
            rate.plot(x, y, "--", color=colour, marker=".", label=f"{target}: goodput")
    offered = sorted({p["offered_rate"] for p in points if p["offered_rate"]})
    rate.plot(offered, offered, color="0.7", linewidth=1, zorder=0, label="offered")
    latency.set_ylabel("ms")
    latency.set_yscale("log")
    rate.set_ylabel("requests per second")
    rate.set_xlabel("offered requests per second")
    if len(offered) > 2:
        rate.set_xscale("log", base=2)
        rate.xaxis.set_major_formatter("{x:g}")
    latency.yaxis.set_major_formatter("{x:g}")
    for axes in (latency, rate):
        axes.grid(True, which="major", color="0.9")
        axes.legend(fontsize="small")
    plot.save(figure, destination)
