"""The serving benchmark: the same loads on one or two servers, one rate after the other."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.bench import sweep
from dovetail.bench.arrivals import Arrivals
from dovetail.bench.load import Load, Run, Stop
from dovetail.bench.serving_report import LATE_MS, summarize
from dovetail.bench.slo import SLO
from dovetail.bench.target import Target
from dovetail.bench.workload import LoadRequest, Workload
from dovetail.core.errors import RequestError
from dovetail.progress import counter, note

CACHED = 0.25  # share of prompt tokens in a prefix cache, above which prompts were not new to the server

# Takes the label of the target, the rate as in the JSON result, and the run.
Keep = Callable[[str, Any, Run], None]


@dataclass(frozen=True)
class Plan:
    """Which loads are run. `rates` is None for a search up to saturation; `speed` is not None for a replay."""

    arrivals: Arrivals = field(default_factory=Arrivals)
    rates: Sequence[float] | None = (1.0,)
    speed: float | None = None
    warmup: int = 1
    max_concurrency: int | None = None
    slo: SLO | None = None


class _Ended(Exception):
    """The run was interrupted, or a server is gone."""


class ServingBench:
    """Runs a plan. `points` has the figures of each load as soon as it is over; `stop` ends everything early."""

    def __init__(self, targets: Sequence[Target], workload: Workload, plan: Plan) -> None:
        self.targets = targets
        self.workload = workload
        self.plan = plan
        self.stop = Stop()
        self.points: list[dict[str, Any]] = []
        self._unloaded: list[float] = []  # seconds of a request alone, for each target
        self._loads = 0

    async def run(self, keep: Keep) -> None:
        """Warm up, then run every load. RequestError if a warm-up request is not answered."""
        try:
            self._unloaded = [await self._warm_up(target) for target in self.targets]
            if self.plan.speed is not None:
                await self._point("trace", self.workload.replay(self.plan.speed, 0), keep)
            elif self.plan.rates is not None:
                for rate in self.plan.rates:
                    await self._at(rate, keep)
            else:
                start = sweep.first_rate(max(self._unloaded))
                await sweep.to_saturation(start, lambda rate: self._at(rate, keep))
        except _Ended:
            return

    async def _warm_up(self, target: Target) -> float:
        """Send requests one after the other; seconds of the last one, infinite if there was none."""
        seconds = math.inf
        load = Load(target.client, target.served.model, self.stop)
        for request in self.workload.warm_up(self.plan.warmup):
            (record,) = (await load.run([request])).records
            if self.stop.interrupted:
                raise _Ended
            if not record.ok:
                raise RequestError(f"{target.label}: a warm-up request failed: {record.error}: {record.message}")
            seconds = record.e2e or math.inf
        return seconds

    async def _at(self, rate: float, keep: Keep) -> list[bool]:
        """The load at `rate` on every target; whether each was saturated."""
        self._loads += 1
        requests = self.workload.at(self.plan.arrivals, rate, self._loads)
        return await self._point("max" if math.isinf(rate) else rate, requests, keep)

    async def _point(self, rate: Any, requests: list[LoadRequest], keep: Keep) -> list[bool]:
        if not requests:
            raise RequestError(f"no request arrives within --duration at rate {rate}; make it longer")
        saturated = []
        for target, unloaded in zip(self.targets, self._unloaded, strict=True):
            load = Load(target.client, target.served.model, self.stop, self.plan.max_concurrency)
            # A collection of everything that is in memory takes long enough to make requests late.
            gc.collect()
            gc.freeze()
            with counter(f"{target.label}, rate {rate}", len(requests)) as done:
                run = await load.run(requests, done)
            gc.unfreeze()
            point = {"target": target.label, "rate": rate} | summarize(run, self.plan.slo, unloaded)
            self.points.append(point)
            keep(target.label, rate, run)
            _tell(point)
            self._tell_cached(point)
            if self.stop.ended:
                raise _Ended
            saturated.append(bool(point["saturated"]))
        return saturated

    def _tell_cached(self, point: dict[str, Any]) -> None:
        cached = point["cached_tokens"] or 0
        if not self.workload.shares and cached > CACHED * point["input_tokens"]:
            note(
                f"{point['target']}: {cached} of {point['input_tokens']} prompt tokens were in its prefix cache, "
                "though every prompt is new; so its TTFT is better than it would be without"
            )


def _tell(point: dict[str, Any]) -> None:
    """How a load went, in a line, and what makes its figures doubtful."""
    what = f"{point['target']}, rate {point['rate']}"
    ttft = point["ttft_ms"]
    first = f", TTFT p50 {ttft['p50']:.0f} ms" if ttft else ""
    note(
        f"{what}: {point['completed']} of {point['requests']} answered, {point['achieved_rate']:.3g} per second"
        f"{first}{', saturated' if point['saturated'] else ''}"
    )
    late = point["lateness_ms"]
    if late and late["p99"] > LATE_MS:
        note(
            f"{what}: requests were sent up to {late['max']:.0f} ms late (p99 {late['p99']:.0f} ms): this machine "
            "did not keep the schedule, or --max-concurrency held them back; the load was not open loop"
        )
    if point["completed"] and point["output_tokens"] < 0.95 * point["max_tokens"]:
        note(f"{what}: answers had {point['output_tokens']} of the {point['max_tokens']} tokens asked for")
