"""The figures of one load: rates, latencies, goodput, and what went wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dovetail.bench.rounds import PERCENTILES, percentile
from dovetail.bench.serving.load import Run
from dovetail.bench.serving.request import Record
from dovetail.bench.serving.slo import SLO

FIGURES = ("ttft", "tpot", "itl", "e2e")
SATURATED = 0.9  # a server that completes less than this share of what is offered does not keep up
LATE_MS = 50.0  # with a 99th percentile of lateness above this, the load was not the one that was asked for


def latencies(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles, in milliseconds, of the values that are not None. None if there are no such values."""
    values = [value * 1e3 for value in seconds if value is not None]
    if not values:
        return None
    return {"mean": sum(values) / len(values)} | {f"p{q}": percentile(values, q) for q in PERCENTILES}


def summarize(run: Run, slo: SLO | None, unloaded: float = math.inf) -> dict[str, Any]:
    """The figures of a run, as in the JSON result: rates per second, latencies in milliseconds.

    Latencies and token rates are those of whole answers. duration_s: from the start to the end of the last answer.
    offered_rate: requests over the time until the last one was due; None if all were due at once. unloaded:
    seconds that a request took before the load.
    """
    whole = [record for record in run.records if record.ok]
    duration = max((record.ended or 0.0 for record in whole), default=0.0)
    span = run.records[-1].arrival
    lateness = [late * 1e3 for r in run.records if (late := r.lateness) is not None]
    point: dict[str, Any] = {
        "requests": len(run.records),
        "completed": len(whole),
        "errors": _errors(run.records),
        "duration_s": duration,
        "offered_rate": len(run.records) / span if span else None,
        "achieved_rate": _per(len(whole), duration),
        "saturated": saturated(run.records, unloaded),
        "peak_concurrency": run.peak_concurrency,
        **_tokens(whole, duration),
        "ttft_ms": latencies(record.ttft for record in whole),
        "tpot_ms": latencies(record.tpot for record in whole),
        "itl_ms": latencies(gap for record in whole for gap in record.itl),
        "e2e_ms": latencies(record.e2e for record in whole),
        "lateness_ms": {"p99": percentile(lateness, 99), "max": max(lateness)} if lateness else None,
    }
    if slo is not None:
        good = sum(map(slo.met, run.records))
        point |= {"goodput": _per(good, duration), "slo_attainment": good / len(run.records)}
    return point


def saturated(records: Sequence[Record], unloaded: float = math.inf) -> bool:
    """Whether answers per second were fewer than 90 % of requests per second.

    The time of one answer without load does not count: the shorter of `unloaded` seconds and the fastest answer.
    An answer that is missing counts against the server.
    """
    whole = [record for record in records if record.ok]
    alone = min((record.e2e or 0.0 for record in whole), default=0.0)
    end = max((record.ended or 0.0 for record in whole), default=0.0)
    kept = records[-1].arrival / max(end - min(alone, unloaded), 1e-9)
    return min(1.0, kept) * len(whole) / len(records) < SATURATED


def _tokens(whole: Sequence[Record], duration: float) -> dict[str, Any]:
    counted = [record for record in whole if record.completion_tokens is not None]
    prompts = [r.input_tokens if r.prompt_tokens is None else r.prompt_tokens for r in whole]
    cached = [record.cached_tokens for record in whole if record.cached_tokens is not None]
    output = sum(record.output_tokens for record in whole)
    return {
        "input_tokens": sum(prompts),
        "output_tokens": output,
        "max_tokens": sum(record.max_tokens for record in whole),
        "cached_tokens": sum(cached) if cached else None,
        "input_tokens_per_s": _per(sum(prompts), duration),
        "output_tokens_per_s": _per(output, duration),
        "tokens_counted_by": "usage" if len(counted) == len(whole) else "chunks" if not counted else "both",
    }


def _errors(records: Sequence[Record]) -> dict[str, Any]:
    """For each kind of error its count and its first message."""
    counts = Counter(record.error for record in records if record.error)
    messages = {record.error: record.message for record in reversed(records) if record.error}
    return {kind: {"count": count, "message": messages[kind]} for kind, count in counts.items()}


def _per(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0
