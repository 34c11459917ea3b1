"""A deterministic simulator for drafters: recorded step times, drawn acceptances, and a clock that only they move.

The drafter under test is the one that serves: `SmartSpec` is asked and told as the engine does it, and reads the
simulated clock. Which tokens of an answer are guessed right is drawn once, by position. So every policy meets the
same text, whatever lengths it chooses. What the controller itself computes takes no simulated time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dovetail.core.cost import Load
from dovetail.core.pages import PagePool, PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Drafter, Guess, Outcome, Room
from dovetail.core.types import Request, Span, StepPlan

LIMIT = 16  # tokens of a guess
CHUNK = 64  # tokens of a prompt in a step
BUDGET = 512  # tokens of a step
SURE = 0.6  # drafters are surer than they are right: their odds are this power of the probability
SEATS = 32  # requests at a time


@dataclass(frozen=True)
class Machine:
    """Times of steps on one machine. rows: (rows, seconds) as measured, with straight lines between. key: seconds
    for a key that is read. host: seconds between two steps. noise: of the logarithm of a step's time."""

    name: str
    rows: tuple[tuple[int, float], ...]
    key: float
    host: float
    noise: float = 0.05

    def seconds(self, rows: float, keys: float) -> float:
        at, levels = zip(*self.rows, strict=True)
        if rows > at[-1]:
            return float(levels[-1] * rows / at[-1] + self.key * keys)
        return float(np.interp(rows, at, levels)) + self.key * keys


@dataclass(frozen=True)
class Model:
    """What guesses cost. call: seconds for a call; depth: for each token of the longest guess; behind: for each
    token of text that is caught up with. writes: whether it has KV."""

    call: float
    depth: float = 0.0
    behind: float = 0.0
    writes: bool = False


@dataclass(eq=False)
class Job:
    """A request to come. right: for each token of its answer the probability that a guess is right; has: that
    there is a guess which begins there."""

    arrival: float
    prompt: int
    right: np.ndarray
    has: np.ndarray
    seed: int
    hits: list[bool] = field(init=False)
    starts: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        self.hits = (draw.random(len(self.right)) < self.right).tolist()
        self.starts = (draw.random(len(self.right)) < self.has).tolist()


class Clock:
    """Time that only the simulation moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class Drawn(Drafter):
    """Guesses as drawn for each job. A right token is 1 and a wrong one 0."""

    def __init__(self, jobs: Sequence[Job], model: Model, clock: Clock) -> None:
        self.jobs = {str(i): job for i, job in enumerate(jobs)}
        self.model, self.clock = model, clock
        self.writes = model.writes
        self._computed: dict[str, int] = {}

    def behind(self, request: Request) -> int:
        return len(request.tokens) - self._computed.get(request.id, 0) if self.writes else 0

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> list[Guess]:
        found, behind, depth = [], 0, 0
        for request, limit in zip(requests, limits, strict=True):
            job, at = self.jobs[request.id], request.num_output
            n = min(limit, LIMIT, len(job.hits) - at) if job.starts[at] else 0
            odds = job.right[at : at + n] ** SURE
            found.append(Guess([int(hit) for hit in job.hits[at : at + n]], odds.tolist()))
            if limit:
                behind += max(0, self.behind(request) - 1)
                depth = max(depth, n)
                self._computed[request.id] = len(request.tokens)
        self.clock.time += self.model.call + self.model.depth * depth + self.model.behind * behind
        return found

    def forget(self, request: Request) -> None:
        self._computed.pop(request.id, None)


@dataclass(frozen=True)
class Outcomes:
    """latencies: from arrival to the last token of each job, in seconds, in their order. seconds: of all."""

    latencies: list[float]
    seconds: float
    steps: int
    drafted: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.latencies))

    @property
    def median(self) -> float:
        return float(np.median(self.latencies))


class Replay:
    """Runs jobs with one drafter. `step` is what the engine does."""

    def __init__(self, jobs: Sequence[Job], machine: Machine, drafter: Drafter, clock: Clock) -> None:
        self.machine, self.drafter, self.clock = machine, drafter, clock
        self.draw = np.random.default_rng(7)
        table = PageTable(PagePool(1, 1))
        self.ends: dict[str, float] = {}
        self.jobs = jobs
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].arrival)
        self.waiting = deque(
            Request(str(i), [1] * jobs[i].prompt, SamplingParams(), table, jobs[i].prompt + len(jobs[i].hits), 0)
            for i in order
        )
        self.running: list[Request] = []
        self.steps = self.drafted = 0

    def run(self) -> Outcomes:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < SEATS and self._arrival(self.waiting[0]) <= self.clock.time:
                self.running.append(self.waiting.popleft())
            if self.running:
                self._step()
            else:
                self.clock.time = self._arrival(self.waiting[0])
        latencies = [self.ends[str(i)] - job.arrival for i, job in enumerate(self.jobs)]
        return Outcomes(latencies, self.clock.time, self.steps, self.drafted)

    def _arrival(self, request: Request) -> float:
        return self.jobs[int(request.id)].arrival

    def _step(self) -> None:
        ready = [r for r in self.running if r.computed == len(r.tokens) - 1]
        left, spans = BUDGET - len(ready), []
        for r in self.running:
            if r.computed < len(r.tokens) - 1 and left > 0:
                n = min(CHUNK if len(self.running) > 1 else left, len(r.tokens) - r.computed, left)
                spans.append(Span(r, r.computed, r.computed + n, 0, int(r.computed + n == len(r.tokens))))
                left -= n
        others = BUDGET - len(ready) - left
        limits = [min(32, max(0, r.max_total - len(r.tokens) - 1)) for r in ready]
        guesses = self.drafter.propose(ready, limits, Room(left, others)) if ready else []
        for r, guess in zip(ready, guesses, strict=True):
            r.drafts = list(guess.tokens)
            spans.append(Span(r, r.computed, len(r.tokens) + len(r.drafts), 0, len(r.drafts) + 1))
        plan = StepPlan(tuple(spans))
        load = Load.of(plan)
        seconds = self.machine.seconds(load.rows, load.read()) * self.draw.lognormal(0, self.machine.noise)
        self.clock.time += seconds
        self.steps += 1
        outcomes = [self._commit(span) for span in spans]
        self.drafter.observe([o for o in outcomes if o is not None], plan, seconds)
        self.clock.time += self.machine.host

    def _commit(self, span: Span) -> Outcome | None:
        r, drafts = span.request, tuple(span.request.drafts)
        if not span.sample:
            r.computed = span.stop
            return None
        n = next((i for i, token in enumerate(drafts) if not token), len(drafts))
        r.tokens += [1] * (n + 1)
        r.computed, r.drafts = len(r.tokens) - 1, []
        self.drafted += len(drafts)
        if len(r.tokens) >= r.max_total:
            self.ends[r.id] = self.clock.time
            self.running.remove(r)
            self.drafter.forget(r)
        return Outcome(r, drafts, n)
