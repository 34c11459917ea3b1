"""Measures candidates in turns, each in a process of its own, and draws the advice from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dovetail.advise.advice import Advice, Loss, Timing, advise, check
from dovetail.advise.candidates import Candidate
from dovetail.advise.worker import Failed, Worker
from dovetail.advise.workload import Workload
from dovetail.bench.rounds import in_turns
from dovetail.core.errors import ConfigError
from dovetail.evals.journal import Journal
from dovetail.host import machine
from dovetail.show.progress import Advance, counter, note

STEPS = 8  # of decoding in a round
SPARE = 8  # tokens that are generated before the first of them is timed
RUNS = 2  # of the whole workload, to check what was predicted


@dataclass(frozen=True)
class Asked:
    """What to compare: `candidates`, the least rounded first, on `workloads`. The loss is that of the first
    `windows` windows of a corpus. check: whether workloads are also run as a whole."""

    candidates: Sequence[Candidate]
    workloads: Sequence[Workload]
    corpus: str
    data: Path | None
    windows: int
    rounds: int
    most: float
    check: bool = False

    @property
    def steps(self) -> int:
        """Of progress."""
        each = 2 + len(self.workloads) * (2 + 2 * self.rounds + (RUNS if self.check else 0))
        return each * len(self.candidates)


@dataclass
class Tried:
    """What is known about a candidate. why: why it is not compared, or not with a workload (by name)."""

    candidate: Candidate
    why: str | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    loss: Loss | None = None
    memory: int = 0
    activity: dict[str, int] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.name


@dataclass(frozen=True)
class Advised:
    """The advice for one workload: the settings that were compared, by name, with their losses; and what `check`
    found."""

    workload: Workload
    timings: Mapping[str, Timing]
    losses: Mapping[str, float]
    advice: Advice
    checked: dict[str, Any] | None


def run(asked: Asked, journal: Journal) -> tuple[list[Tried], list[Advised]]:
    """Measure, and advise on each workload. Losses in the journal are not measured again.

    ConfigError if no candidate is left for a workload.
    """
    tried = [Tried(candidate) for candidate in asked.candidates]
    with counter("measurements", asked.steps) as advance:
        measurement = _Measurement(asked, journal, advance)
        with contextlib.ExitStack() as stack:
            first = measurement.start(tried[:1], stack)
            if _all_fit(tried):
                measurement.measure([*first, *measurement.start(tried[1:], stack)])
                return tried, _advised(asked, tried)
            note("memory does not hold all settings at once: they are measured one after the other")
            measurement.measure(first)
        for one in tried[1:]:
            with contextlib.ExitStack() as stack:
                measurement.measure(measurement.start([one], stack))
    return tried, _advised(asked, tried)


Running = tuple[Tried, Worker]
Act = Callable[[Tried, Worker], None]


def _all_fit(tried: Sequence[Tried]) -> bool:
    """Whether memory holds the others beside the first one, which is the largest."""
    return machine.memory().available > tried[0].memory * (len(tried) - 1)


@dataclass
class _Measurement:
    asked: Asked
    journal: Journal
    advance: Advance
    vocabulary: int | None = None

    def start(self, tried: Sequence[Tried], stack: contextlib.ExitStack) -> list[Running]:
        """Load candidates and take their losses. Those that cannot run are left out, and say why."""
        found = []
        for one in tried:
            try:
                worker = Worker(one.candidate)
                stack.callback(worker.close)
                one.loaded = worker.loaded
                one.loss = self._loss(one, worker)
                one.memory = worker.drain()["memory"]
                found.append((one, worker))
            except Failed as error:
                one.why = str(error)
                note(f"{one.name} is left out: {error}")
            self.advance(2)
        return found

    def measure(self, running: Sequence[Running]) -> None:
        """Time every workload, settings in turns."""
        for workload in self.asked.workloads:
            left = self._each(running, workload, partial(self._fits, workload), 0)
            for act, rounds in self._acts(workload):
                for number in range(rounds):
                    left = self._each(in_turns(left, number), workload, act)
        for one, worker in running:
            with contextlib.suppress(Failed):  # what it was to measure has said so
                found = worker.drain()
                one.memory, one.activity = found["memory"], found["activity"]

    def _acts(self, workload: Workload) -> list[tuple[Act, int]]:
        """What is measured, and how often."""
        name, rounds = workload.name, self.asked.rounds

        def prompt(one: Tried, worker: Worker) -> None:
            one.timings.setdefault(name, Timing()).prompt.append(worker.prompt(workload.prompt_tokens))

        def fill(one: Tried, worker: Worker) -> None:
            worker.fill(workload.context, workload.at_once)

        def decode(one: Tried, worker: Worker) -> None:
            one.timings[name].steps.append(worker.decode(STEPS))

        def drain(one: Tried, worker: Worker) -> None:
            worker.drain()

        def whole(one: Tried, worker: Worker) -> None:
            one.timings[name].runs.append(worker.run(workload.requests, workload.concurrency))

        runs = RUNS if self.asked.check else 0
        return [(prompt, rounds), (fill, 1), (decode, rounds), (drain, 1), (whole, runs)]

    def _each(self, running: Sequence[Running], workload: Workload, act: Act, count: int = 1) -> list[Running]:
        """Let each act. Those that fail are left out of this workload."""
        left = []
        for one, worker in running:
            try:
                act(one, worker)
                left.append((one, worker))
            except Failed as error:
                one.refused[workload.name] = str(error)
                one.timings.pop(workload.name, None)
                note(f"{one.name} is left out of {workload.name}: {error}")
            self.advance(count)
        return left

    def _fits(self, workload: Workload, one: Tried, worker: Worker) -> None:
        needs = max(workload.longest, workload.context + self.asked.rounds * STEPS + SPARE)
        if needs > one.loaded["context"]:
            raise Failed(f"it needs {needs} tokens of context, and {one.loaded['context']} are there")

    def _loss(self, one: Tried, worker: Worker) -> Loss:
        self.vocabulary = self.vocabulary or one.loaded["vocabulary"]
        if one.loaded["vocabulary"] != self.vocabulary:
            raise Failed(
                f"its vocabulary has {one.loaded['vocabulary']} tokens and the first one's {self.vocabulary}, so "
                "their losses cannot be compared"
            )
        found = self.journal.found.get(one.name)
        if found is None:
            found = worker.loss(self.asked.corpus, self.asked.data, self.asked.windows)
            self.journal.add(one.name, found)
        return Loss(found["perplexity"], found["window_perplexity"])


def _advised(asked: Asked, tried: Sequence[Tried]) -> list[Advised]:
    return [_advice(asked, tried, workload) for workload in asked.workloads]


def _advice(asked: Asked, tried: Sequence[Tried], workload: Workload) -> Advised:
    left = [one for one in tried if workload.name in one.timings]
    if not left:
        why = next((w for one in tried if (w := one.refused.get(workload.name) or one.why)), "")
        raise ConfigError(f"no setting can run {workload.name}; {tried[0].name}: {why}")
    reference = next(one.loss for one in tried if one.loss is not None)
    losses = {one.name: one.loss.beyond(reference) for one in left if one.loss is not None}
    timings = {one.name: one.timings[workload.name] for one in left}
    advice = advise(workload, timings, losses, asked.most)
    checked = check(advice, timings, losses, asked.most) if asked.check else None
    return Advised(workload, timings, losses, advice, checked)
