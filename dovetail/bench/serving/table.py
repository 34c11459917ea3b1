"""The figures of a serving benchmark as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.bench.rounds import PERCENTILES, Ratio, at
from dovetail.bench.serving.figures import FIGURES
from dovetail.bench.serving.merge import LATENCIES, RATES
from dovetail.bench.serving.slo import ATTAINED
from dovetail.show.table import table

Point = dict[str, Any]


def report(points: Sequence[Point], ratios: Sequence[dict[str, Any]] = ()) -> str:
    """Tables of rates and latencies, the ratios of two targets, errors, and the highest rates."""
    targets = list(dict.fromkeys(point["target"] for point in points))
    points = sorted(points, key=_order)
    parts = [_rates(points), _latencies(points)]
    if ratios:
        title = f"{targets[0]} against {targets[1]}: above 1, {targets[0]} does better"
        parts.append(f"{title}\n{_ratios(ratios)}")
    parts += [_errors(points), _highest_lines(points, targets)]
    return "\n\n".join(filter(None, parts))


def highest(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each target the highest rate that did not saturate it and that met the SLO, if there is one. None if no
    rate did.
    """
    found = []
    for target in dict.fromkeys(point["target"] for point in points):
        own = [p for p in points if p["target"] == target and isinstance(p["rate"], float)]
        row = {"target": target, "unsaturated": max((p["rate"] for p in own if not p["saturated"]), default=None)}
        if any("goodput" in p for p in own):
            met = [p["rate"] for p in own if p["slo_attainment"] >= ATTAINED]
            row["slo_met"] = max(met, default=None)
        found.append(row)
    return found


def _rates(points: Sequence[Point]) -> str:
    with_slo = any("goodput" in point for point in points)
    headers = ["target", "rate", "requests", "failed", "offered/s", "achieved/s", "input tok/s", "output tok/s"]
    headers += ["cached tok", *(["goodput/s", "SLO met"] if with_slo else []), "most open", "keeps up"]
    rows = []
    for p in points:
        slo = [p["goodput"], f"{p['slo_attainment']:.0%}"] if with_slo else []
        rows.append(
            [
                *(p["target"], _rate(p), p["requests"], p["requests"] - p["completed"], p["offered_rate"]),
                *(p["achieved_rate"], p["input_tokens_per_s"], p["output_tokens_per_s"], p["cached_tokens"]),
                *(*slo, p["peak_concurrency"], "no" if p["saturated"] else "yes"),
            ]
        )
    return table(headers, rows)


def _latencies(points: Sequence[Point]) -> str:
    names = "/".join(f"p{q}" for q in PERCENTILES)
    headers = ["target", "rate", *(figure.upper() for figure in FIGURES)]
    rows = [[p["target"], _rate(p), *(_percentiles(p[f"{figure}_ms"]) for figure in FIGURES)] for p in points]
    return f"Milliseconds, {names} (mean)\n{table(headers, rows)}"


def _ratios(ratios: Sequence[dict[str, Any]]) -> str:
    paths = [path for path in (*RATES, *LATENCIES) if any(at(row, path) for row in ratios)]
    words = [(name[:-3].upper(), *more) if name.endswith("_ms") else (name,) for name, *more in paths]
    headers = ["rate", *(" ".join(word).replace("_", " ") for word in words)]
    ordered = sorted(ratios, key=_order)
    return table(headers, [[_rate(row), *(_ratio(at(row, path)) for path in paths)] for row in ordered])


def _ratio(found: dict[str, float] | None) -> str | float | None:
    """The median; with several rounds also the lowest and the highest."""
    if found is None:
        return None
    ratio = Ratio(**found)
    return ratio.median if ratio.low == ratio.high else str(ratio)


def _errors(points: Sequence[Point]) -> str:
    lines = []
    for p in points:
        for kind, found in p["errors"].items():
            words = f": {found['message']}" if found["message"] else ""
            lines.append(f"{p['target']}, rate {_rate(p)}: {found['count']} {kind}{words}")
    return "\n".join(lines)


def _highest_lines(points: Sequence[Point], targets: Sequence[str]) -> str:
    if len(points) == len(targets):
        return ""
    lines = []
    for row in highest(points):
        lines.append(f"{row['target']}: highest rate that it keeps up with: {_number(row['unsaturated'])}")
        if "slo_met" in row:
            share = f"{ATTAINED:.0%} of the requests"
            lines.append(f"{row['target']}: highest rate at which {share} meet the SLO: {_number(row['slo_met'])}")
    return "\n".join(lines)


def _order(point: Point) -> tuple[bool, Any]:
    """Sorts by rising rate; rates that are words come last."""
    return isinstance(point["rate"], str), point["rate"]


def _rate(point: Point) -> str:
    return _number(point["rate"])


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _percentiles(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return "/".join(_short(found[f"p{q}"]) for q in PERCENTILES) + f" ({_short(found['mean'])})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
