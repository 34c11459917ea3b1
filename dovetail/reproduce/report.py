"""A reproduction as text, as JSON and as a plot."""

from __future__ import annotations

import textwrap
from typing import Any

from dovetail.bench.verdict import Verdict
from dovetail.host.units import format_duration
from dovetail.reproduce import SYSTEMS, System
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.runner import Reproduction
from dovetail.show.plot import figure
from dovetail.show.table import table

WIDTH = 110
COLORS = {None: "tab:blue", Verdict.MET: "tab:blue", Verdict.MISSED: "tab:red", Verdict.UNDECIDED: "tab:gray"}


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
    counted = [f"{len(done.judged(Verdict.MET))} of {len(bars)} bars met"]
    counted += [
        f"{len(found)} {verdict}"
        for verdict in (Verdict.MISSED, Verdict.UNDECIDED)
        if (found := done.judged(verdict))
    ]
    parts.append(", ".join(counted))
    return "\n\n".join(parts)


def _claim(claim: Claim) -> str:
    lines = [f"{claim.name} [{claim.kind}]"]
    fields = {"setting": claim.setting, "paper": claim.paper, "ours": claim.ours, "why": claim.why}
    if claim.bar is not None:
        fields["bar"] = f"{claim.bar.needs}: {claim.bar}"
    for name, value in fields.items():
        lines.append(textwrap.fill(value, WIDTH, initial_indent=f"  {name:<8} ", subsequent_indent=" " * 11))
    return "\n".join(lines)


def _ratios(done: Reproduction) -> str:
    rows = []
    for c in done.claims:
        if c.ratio is None and c.bar is None:
            continue
        theirs = "-" if c.paper_ratio is None else "-".join(dict.fromkeys(f"{x:.2f}" for x in c.paper_ratio))
        interval = c.bar.interval if c.bar is not None and c.ratio is not None else None
        rows.append(
            (
                *(c.name, theirs, "-" if c.ratio is None else str(c.ratio)),
                *("-" if interval is None else str(interval), "-" if c.bar is None else c.bar.word),
            )
        )
    headers = ("times as fast as its own baseline", "paper", "ours (lowest-highest)", "interval", "bar")
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
        color = COLORS[c.verdict]
        axes.plot([c.ratio.low, c.ratio.high], [y, y], color=color, linewidth=1.5)
        axes.plot([c.ratio.median], [y], "o", color=color, markersize=5)
    axes.plot([], [], "s-", color="tab:orange", linewidth=7, markersize=7, label="paper")
    axes.plot([], [], "o-", color="tab:blue", label="ours, median and range")
    for verdict in (Verdict.MISSED, Verdict.UNDECIDED):
        if done.judged(verdict):
            axes.plot([], [], "o-", color=COLORS[verdict], label=f"ours, bar {verdict}")
    axes.set_yticks(range(len(claims)), [c.name for c in claims])
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as its own baseline")
    axes.set_title(done.system.title)
    axes.legend(loc="best")
    return drawn
