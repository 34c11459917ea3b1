"""The figures of a serving benchmark for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.bench.samples import PERCENTILES
from dovetail.bench.serving_report import FIGURES
from dovetail.bench.slo import ATTAINED
from dovetail.table import table

Point = dict[str, Any]

# Ratios between two targets: a rate as it is, a latency the other way round, so that above 1 is always better.
_RATES = ("achieved_rate", "output_tokens_per_s", "goodput")
_LATENCIES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("e2e_ms", "p50"))


def report(points: Sequence[Point]) -> str:
    """Tables of rates and latencies, the ratios of two targets, errors, and the highest rates."""
    targets = list(dict.fromkeys(point["target"] for point in points))
    points = sorted(points, key=_order)
    parts = [_rates(points), _latencies(points)]
    if len(targets) == 2:
        parts.append(_ratios(points, targets))
    parts += [_errors(points), _highest_lines(points, targets)]
    return "\n\n".join(filter(None, parts))


def highest(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each target the highest rate that did not saturate it and, where there is an SLO, that meets it; None
    where no rate did.
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


def _ratios(points: Sequence[Point], targets: Sequence[str]) -> str:
    ours, theirs = ({p["rate"]: p for p in points if p["target"] == target} for target in targets)
    title = f"{targets[0]} against {targets[1]}: above 1, {targets[0]} does better"
    slo = any("goodput" in point for point in points)
    rates = [name for name in _RATES if slo or name != "goodput"]
    headers = ["rate", *(n.replace("_", " ") for n in rates), *(f"{n[:-3].upper()} {q}" for n, q in _LATENCIES)]
    rows = []
    for rate in (rate for rate in ours if rate in theirs):
        a, b = ours[rate], theirs[rate]
        latencies = [_ratio((b[n] or {}).get(q), (a[n] or {}).get(q)) for n, q in _LATENCIES]
        rows.append([_number(rate), *(_ratio(a[name], b[name]) for name in rates), *latencies])
    return f"{title}\n{table(headers, rows)}" if rows else ""


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


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
    """Rising rates, those that are words last."""
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
