"""A reproduction as text, as JSON and as a plot."""

from __future__ import annotations

import textwrap
from typing import Any

from dovetail.host.units import format_duration
from dovetail.reproduce import SYSTEMS, System
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.runner import Reproduction
from dovetail.show.plot import figure
from dovetail.show.table import table

WIDTH = 110


def listing() -> str:
    """All systems with their state."""
    return table(
        ("name", "state", "system", "paper"), [(s.name, s.state, s.title, s.paper) for s in SYSTEMS.values()]
    )


def listed(system: System) -> dict[str, str]:
    """An entry of the list, for JSON."""
    return {"name": system.name, "title": system.title, "paper": system.paper, "state": system.state}


def text(done: Reproduction) -> str:
    """Each claim in full, and all ratios side by side."""
    s = done.system
    head = f"{s.title} ({s.paper}); effort: {done.effort}, {format_duration(done.seconds)}"
    parts = [head, *map(_claim, done.claims), _ratios(done)]
    bars = [claim for claim in done.claims if claim.bar is not None]
    parts.append(f"{len(bars) - len(done.missed)} of {len(bars)} bars met")
    return "\n\n".join(parts)


def _claim(claim: Claim) -> str:
    lines = [f"{claim.name} [{claim.kind}]"]
    fields = {"setting": claim.setting, "paper": claim.paper, "ours": claim.ours, "why": claim.why}
    if claim.bar is not None:
        fields["bar"] = f"{claim.bar.needs}: {'met' if claim.bar.meets else 'MISSED'}"
    for name, value in fields.items():
        lines.append(textwrap.fill(value, WIDTH, initial_indent=f"  {name:<8} ", subsequent_indent=" " * 11))
    return "\n".join(lines)


def _ratios(done: Reproduction) -> str:
    rows = []
    for c in done.claims:
        if c.ratio is None and c.bar is None:
            continue
        theirs = "-" if c.paper_ratio is None else "-".join(dict.fromkeys(f"{x:.2f}" for x in c.paper_ratio))
        verdict = {None: "-", True: "met", False: "MISSED"}[c.meets]
        rows.append((c.name, theirs, "-" if c.ratio is None else str(c.ratio), verdict))
    headers = ("times as fast as its own baseline", "paper", "ours (lowest-highest)", "bar")
    return table(headers, rows)


def result(done: Reproduction) -> dict[str, Any]:
    """For JSON, without provenance."""
    return {
        "system": done.system.name,
        "paper": done.system.paper,
        "effort": done.effort,
        "claims": [claim.to_dict() for claim in done.claims],
        "seconds": done.seconds,
    }


def draw(done: Reproduction) -> Any:
    """A Figure of the ratios: ours with their spread, the paper's as bars."""
    claims = [c for c in done.claims if c.ratio is not None][::-1]
    drawn = figure(9.0, 1.4 + 0.28 * len(claims))
    axes = drawn.subplots()
    axes.axvline(1, color="0.6", linewidth=1)
    for y, c in enumerate(claims):
        if c.paper_ratio is not None:
            low, high = c.paper_ratio
            axes.plot([low, high], [y, y], "s-", color="tab:orange", linewidth=7, markersize=7)
        assert c.ratio is not None
        color = "tab:red" if c.meets is False else "tab:blue"
        axes.plot([c.ratio.low, c.ratio.high], [y, y], color=color, linewidth=1.5)
        axes.plot([c.ratio.median], [y], "o", color=color, markersize=5)
    axes.plot([], [], "s-", color="tab:orange", linewidth=7, markersize=7, label="paper")
    axes.plot([], [], "o-", color="tab:blue", label="ours, median and range")
    if done.missed:
        axes.plot([], [], "o-", color="tab:red", label="ours, bar missed")
    axes.set_yticks(range(len(claims)), [c.name for c in claims])
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as its own baseline")
    axes.set_title(done.system.title)
    axes.legend(loc="best")
    return drawn
