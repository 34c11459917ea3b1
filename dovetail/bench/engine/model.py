"""A model's speed at fixed points, compared with what the machine can read. One setting, or two in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.bench.engine import roofline
from dovetail.bench.engine.points import DECODE, PREFILL, Point, Prompts, Timing, measure, obstacle, points
from dovetail.bench.engine.side import Side, result
from dovetail.bench.engine.startup import start
from dovetail.bench.interleave import read_bandwidth
from dovetail.bench.rounds import PERCENTILES, in_turns, percentile
from dovetail.setting import Setting
from dovetail.show.progress import Advance, counter

LATENCY_CONTEXT = 16
_TABLES = (
    *("prefill_tokens_per_s", "decode_tokens_per_s", "streams_tokens_per_s", "latency_ms"),
    *("bytes_per_token", "roofline_fraction"),
)


@dataclass(frozen=True)
class Asked:
    """What to measure: `model` at one setting, or at two in turns. Start-up is measured with `starts` processes
    for each setting."""

    model: str
    settings: Sequence[Setting]
    rounds: int
    starts: int
    quick: bool = False


class Timed(Side):
    """An engine that is timed at points. `skipped` has the figures that could not be measured, with the reason."""

    def __init__(self, setting: Setting, asked: Asked) -> None:
        super().__init__(setting, asked.model)
        self.skipped: list[dict[str, str]] = []
        self.waits: list[float] = []  # seconds of every token in all rounds at LATENCY_CONTEXT
        self.facts = {"skipped": self.skipped, **{name: {} for name in _TABLES}, "read_bandwidth": None}
        self.points = points(asked.quick)
        for at in self.points:
            if why := obstacle(at, self.llm.config):
                self.skip(at, why)
        why = roofline.uncounted(self.llm)
        self.counted = why is None
        if why is None:
            self.facts["weight_bytes"] = roofline.weight_bytes(self.llm)
            self.facts["weights"] = roofline.weights_kept(self.llm)
        else:
            self.skipped += [{"figure": name, "why": why} for name in ("bytes_per_token", "roofline_fraction")]

    def skip(self, at: Point, why: str) -> None:
        """Mark the point as not measured, and drop its readings."""
        self.points = [p for p in self.points if p != at]
        self.skipped.append({"figure": " ".join(at.path), "why": why})
        self.samples.pop(at.path, None)

    def time(self, at: Point, prompts: Sequence[Sequence[int]]) -> Timing | None:
        """One run of a point, or None if the engine cannot do it."""
        if at not in self.points:
            return None
        with self.running():
            timing = measure(self.llm, prompts, at.tokens)
        if at.figure != PREFILL and not timing.step:
            self.skip(at, "a request ended before the last one had its first token; raise max_num_batched_tokens")
            return None
        return timing

    def take(self, at: Point, prompts: Sequence[Sequence[int]]) -> None:
        """Run a point once and add its readings."""
        with self.watched() if at.figure != PREFILL else contextlib.nullcontext():
            timing = self.time(at, prompts)
        if timing is not None:
            self._read_off(at, timing)

    def figures(self) -> dict[str, Any]:
        """Medians of the rounds. Latencies are over the tokens of all rounds, because one round has too few for a
        p99."""
        pooled = {"latency_ms": _latency(self.waits)} if self.waits else {}
        return super().figures() | pooled

    def _read_off(self, at: Point, timing: Timing) -> None:
        self.read(at.path, at.prompt / timing.first if at.figure == PREFILL else timing.rate)
        if at.figure != DECODE:
            return
        if at.size == LATENCY_CONTEXT:
            self.waits += timing.waits
            for name, value in _latency(timing.waits).items():
                self.read(("latency_ms", name), value)
        if self.llm.config.device != "cpu":
            return
        bandwidth = read_bandwidth(self.llm.config.threads)
        self.read(("read_bandwidth",), bandwidth)
        if self.counted:
            context = at.prompt + at.tokens // 2  # it grows by the answer
            size, least = (
                roofline.step_bytes(self.llm, context),
                roofline.step_seconds(self.llm, context, bandwidth * 1e9),
            )
            self.read(("bytes_per_token", str(at.size)), size / timing.tokens_per_step)
            self.read(("roofline_fraction", str(at.size)), least / timing.step)


def _latency(waits: Sequence[float]) -> dict[str, float]:
    """Percentiles of seconds (at least one), in milliseconds."""
    return {f"p{q}": percentile(waits, q) * 1e3 for q in PERCENTILES}


def run(asked: Asked) -> dict[str, Any]:
    """The result as plain data. Figures that could not be measured are in `skipped`, with the reason.

    Raises ModelError, ConfigError or CapacityError if an engine cannot be built, RequestError if it fails.
    """
    wanted = points(asked.quick)
    # With `quick`, only the smallest point of each figure runs before the rounds.
    warming = [at for i, at in enumerate(wanted) if not asked.quick or at.figure != wanted[i - 1].figure]
    each = asked.starts + len(warming) + asked.rounds * len(wanted)
    with counter("measurements", each * len(asked.settings)) as advance:
        starts = _starts(asked, advance)  # before anything is loaded here, so that they have the memory alone
        sides = [Timed(setting, asked) for setting in asked.settings]
        prompts = Prompts(sides[0].llm.session.vocab_size)
        for number, at in [(-1, at) for at in warming] + [(n, at) for n in range(asked.rounds) for at in wanted]:
            given = prompts.take(at.prompt, at.streams)  # the same for all sides
            for side in in_turns(sides, number):
                if number < 0:
                    side.time(at, given)
                else:
                    side.take(at, given)
                advance(1)
    for side, found in zip(sides, starts, strict=True):
        side.samples |= {(name,): readings for name, readings in found.items()}
    return {**result(asked.model, sides), "rounds": asked.rounds, "quick": asked.quick}


def _starts(asked: Asked, advance: Advance) -> list[dict[str, list[float]]]:
    """Readings of start-up and memory, for each setting."""
    found: list[dict[str, list[float]]] = [{} for _ in asked.settings]
    for number in range(asked.starts):
        for setting, readings in in_turns(list(zip(asked.settings, found, strict=True)), number):
            for name, value in start(asked.model, setting).items():
                readings.setdefault(name, []).append(value)
            advance(1)
    return found
