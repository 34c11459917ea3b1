"""The serving benchmark: the same loads on one or two servers, one rate after the other."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.bench.rounds import in_turns
from dovetail.bench.serving import sweep
from dovetail.bench.serving.arrivals import Arrivals
from dovetail.bench.serving.figures import LATE_MS, summarize
from dovetail.bench.serving.load import Load, Run, Stop
from dovetail.bench.serving.merge import merged, ratios
from dovetail.bench.serving.slo import SLO
from dovetail.bench.serving.target import Target
from dovetail.bench.serving.workload import LoadRequest, Workload
from dovetail.core.errors import ConfigError, RequestError
from dovetail.show.progress import counter, note

CACHED = 0.25  # above this share of prompt tokens in a prefix cache, prompts were not new to the server

# Takes the label of the target, the rate as in the JSON result, the number of the round, and the run.
Keep = Callable[[str, Any, int, Run], None]


@dataclass(frozen=True)
class Plan:
    """Which loads are run. `rates` is None for a search up to saturation; `speed` is not None for a replay."""

    arrivals: Arrivals = field(default_factory=Arrivals)
    rates: Sequence[float] | None = (1.0,)
    speed: float | None = None
    warmup: int = 1
    max_concurrency: int | None = None
    slo: SLO | None = None
    rounds: int = 1


class _Ended(Exception):
    """The run was interrupted, or a server is gone."""


class ServingBench:
    """Runs a plan. `loads` has the figures of each load as soon as it is over; `stop` ends everything early.

    `activity` says for each target, by its label, how often techniques acted under load; None if the server was
    gone before it could say.
    """

    def __init__(self, targets: Sequence[Target], workload: Workload, plan: Plan) -> None:
        self.targets = targets
        self.workload = workload
        self.plan = plan
        self.stop = Stop()
        self.loads: list[dict[str, Any]] = []
        self.activity: dict[str, dict[str, int] | None] = {}
        self._unloaded: dict[str, float] = {}  # seconds of a request alone, for each target
        self._number = 0  # loads so far, each of which was put on all targets
        self._taken = 0  # rows of the workload that loads have used

    @property
    def points(self) -> list[dict[str, Any]]:
        """The figures of each target at each rate: those of its load, or the medians of several."""
        return merged(self.loads)

    @property
    def ratios(self) -> list[dict[str, Any]]:
        """The first target compared with the second, rate by rate. Empty with a single target."""
        return ratios(self.loads, [target.label for target in self.targets]) if len(self.targets) == 2 else []

    async def run(self, keep: Keep) -> None:
        """Warm up, then run every load. RequestError if a warm-up request is not answered, or nothing arrives."""
        try:
            for target in self.targets:
                self._unloaded[target.label] = await self._warm_up(target)
            before = [await target.activity() for target in self.targets]
        except _Ended:
            return
        with contextlib.suppress(_Ended):
            await self._run(keep)
        for target, earlier in zip(self.targets, before, strict=True):
            self.activity[target.label] = await _acted(target, earlier)
        if not self.loads and not self.stop.ended:
            raise RequestError("no request arrives within --duration at any rate; make it longer")

    async def _run(self, keep: Keep) -> None:
        if self.plan.speed is not None:
            await self._rounds("trace", lambda number: self.workload.replay(self.plan.speed or 1.0, number), keep)
        elif self.plan.rates is not None:
            for rate in self.plan.rates:
                await self._at_rate(rate, keep)
        else:
            start = sweep.first_rate(max(self._unloaded.values()))
            await sweep.to_saturation(start, lambda rate: self._at_rate(rate, keep))

    async def _warm_up(self, target: Target) -> float:
        """Send requests one after the other; seconds of the last one, infinite if there was none."""
        seconds = math.inf
        load = Load(target.client, target.served.model, self.stop)
        requests = self.workload.warm_up(self.plan.warmup)
        self._taken = len(requests)
        for request in requests:
            (record,) = (await load.run([request])).records
            if self.stop.interrupted:
                raise _Ended
            if not record.ok:
                raise RequestError(f"{target.label}: a warm-up request failed: {record.error}: {record.message}")
            seconds = record.e2e or math.inf
        return seconds

    async def _at_rate(self, rate: float, keep: Keep) -> list[bool]:
        """Run the loads at `rate` on every target. Returns for each whether it was saturated in most rounds."""

        def requests(number: int) -> list[LoadRequest]:
            return self.workload.at(self.plan.arrivals, rate, number, self._taken)

        return await self._rounds("max" if math.isinf(rate) else rate, requests, keep)

    async def _rounds(self, rate: Any, make: Callable[[int], list[LoadRequest]], keep: Keep) -> list[bool]:
        """The loads of every round. Each target is first in every other round. Empty if no request arrives."""
        for number in range(self.plan.rounds):
            requests = make(self._number + 1)
            if not requests:
                note(f"rate {rate} is left out: no request arrives within --duration")
                return [False] * len(self.targets)
            self._take(len(requests))
            for target in in_turns(self.targets, self._number):
                run = await self._load(target, rate, requests)
                keep(target.label, rate, number, run)
                self._judge(target, rate, run)
            self._number += 1
        found = {point["target"]: bool(point["saturated"]) for point in self.points if point["rate"] == rate}
        return [found[target.label] for target in self.targets]

    def _take(self, count: int) -> None:
        before, self._taken = self._taken, self._taken + count
        if self.workload.repeats(self._taken) and not self.workload.repeats(before):
            note("the trace has fewer prompts than the loads take: they repeat from here on, and may be cached")

    async def _load(self, target: Target, rate: Any, requests: list[LoadRequest]) -> Run:
        load = Load(target.client, target.served.model, self.stop, self.plan.max_concurrency)
        # A full garbage collection takes long enough to make requests late.
        gc.collect()
        gc.freeze()
        with counter(f"{target.label}, rate {rate}", len(requests)) as done:
            run = await load.run(requests, done)
        gc.unfreeze()
        return run

    def _judge(self, target: Target, rate: Any, run: Run) -> None:
        """The figures of a load that is over. Raises _Ended if no more loads shall run."""
        if self.stop.interrupted:
            run = run.ended()
        if run.records:
            figures = summarize(run, self.plan.slo, self._unloaded[target.label])
            point = {"target": target.label, "rate": rate} | figures
            self.loads.append(point)
            _tell(point)
            self._tell_cached(point)
        if self.stop.ended:
            raise _Ended

    def _tell_cached(self, point: dict[str, Any]) -> None:
        cached = point["cached_tokens"] or 0
        if not self.workload.shares and cached > CACHED * point["input_tokens"]:
            note(
                f"{point['target']}: {cached} of {point['input_tokens']} prompt tokens were in its prefix cache; "
                "so its TTFT is better than it would be with prompts that are new"
            )


async def _acted(target: Target, before: dict[str, int]) -> dict[str, int] | None:
    """How often techniques acted since `before`, None if the server does not say any more."""
    try:
        after = await target.activity()
    except ConfigError:
        return None
    return {name: count - before[name] for name, count in after.items()}


def _tell(point: dict[str, Any]) -> None:
    """Say in a line how a load went, and what makes its figures doubtful."""
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
