"""Merges several loads at one rate into one point, and compares two targets round by round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.bench.rounds import Path, Ratio, Samples, at, by_round, medians, spreads

Point = dict[str, Any]

# A rate is compared as it is, a latency is turned round, so that above 1 is always better.
RATES: tuple[Path, ...] = (("achieved_rate",), ("output_tokens_per_s",), ("goodput",))
LATENCIES: tuple[Path, ...] = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("e2e_ms", "p50"))


def merged(loads: Sequence[Point]) -> list[Point]:
    """A point for each target and rate, in the order of the first loads."""
    groups: dict[tuple[Any, str], list[Point]] = {}
    for load in loads:
        groups.setdefault((load["rate"], load["target"]), []).append(load)
    rates = list(dict.fromkeys(rate for rate, _ in groups))
    targets = list(dict.fromkeys(target for _, target in groups))
    return [_merge(groups[rate, target]) for rate in rates for target in targets if (rate, target) in groups]


def _merge(loads: Sequence[Point]) -> Point:
    """Medians of the loads, with `spread` at the same places. Saturated if most loads were. Errors are added."""
    if len(loads) == 1:
        return loads[0]
    samples: Samples = {}
    for load in loads:
        for path, reading in _readings(load):
            samples.setdefault(path, []).append(reading)
    words = {name: value for name, value in loads[0].items() if name not in {path[0] for path in samples}}
    return {
        **words,
        **medians(samples),
        "saturated": statistics.mean(load["saturated"] for load in loads) > 0.5,
        "errors": _errors(loads),
        "spread": spreads(samples),
    }


def _readings(load: Point) -> list[tuple[Path, float]]:
    found: list[tuple[Path, float]] = []
    for name, value in load.items():
        if name in ("target", "rate", "saturated", "errors"):
            continue
        if isinstance(value, Mapping):
            found += [((name, inner), reading) for inner, reading in value.items()]
        elif isinstance(value, (int, float)):
            found.append(((name,), value))
    return found


def _errors(loads: Sequence[Point]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for load in loads:
        for kind, error in load["errors"].items():
            count = found[kind]["count"] if kind in found else 0
            found[kind] = {**error, **found.get(kind, {}), "count": count + error["count"]}
    return found


def ratios(loads: Sequence[Point], targets: Sequence[str]) -> list[dict[str, Any]]:
    """Compares the first of two targets with the second. For each rate: `rate`, and at each figure's place the
    median, lowest and highest ratio of the rounds. Above 1 the first does better.
    """
    found = []
    for rate in dict.fromkeys(load["rate"] for load in loads):
        ours, theirs = ([p for p in loads if (p["rate"], p["target"]) == (rate, target)] for target in targets)
        rounds = min(len(ours), len(theirs))  # the last round may have been interrupted
        row: dict[str, Any] = {"rate": rate}
        for path in (*RATES, *LATENCIES):
            a, b = ([at(load, path) for load in side[:rounds]] for side in (ours, theirs))
            better, worse = (b, a) if path in LATENCIES else (a, b)
            if rounds and None not in a + b and all(worse):
                ratio = vars(Ratio.of_rounds(by_round(better, worse)))
                row |= {path[0]: {**row.get(path[0], {}), path[1]: ratio} if path[1:] else ratio}
        if len(row) > 1:
            found.append(row)
    return found
