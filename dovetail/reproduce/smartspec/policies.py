"""The policies that are compared: no guesses, fixed lengths, smartspec, and an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dovetail.core.cost import Load
from dovetail.core.seams import Drafter, Guess, Room
from dovetail.core.types import Request
from dovetail.reproduce.smartspec.replay import Clock, Drawn, Job, Machine, Model, Outcomes, Replay
from dovetail.techniques.smartspec.acceptance import Acceptance
from dovetail.techniques.smartspec.controller import SmartSpec
from dovetail.techniques.smartspec.draft_time import DraftTime
from dovetail.techniques.smartspec.side import Side
from dovetail.techniques.smartspec.step_time import StepTime

FIXED = (1, 3, 5, 8)


class KnownOdds(Acceptance):
    """The probabilities from which acceptances were drawn. blind: also whether there is a guess."""

    def __init__(self, drafter: Drawn, blind: bool) -> None:
        super().__init__()
        self.drafter, self.blind, self.at = drafter, blind, dict[str, int]()

    def curve(self, request: str, source: str, odds: Sequence[float], n: int) -> list[float]:
        job, at = self.drafter.jobs[request], self.at.get(request, 0)
        curve = list(accumulate(job.right[at : at + n].tolist(), lambda a, b: a * b))
        return [float(job.has[at]) * p for p in curve] if self.blind else curve


class KnownTime(StepTime):
    """The machine's own times, without their noise."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.read = machine.key
        self._rows = [machine.seconds(n, 0) for n in range(1200)]

    def rows(self, n: int) -> float:
        return self._rows[n]

    def unseen(self, rows: int) -> bool:
        return False

    def observe(self, load: Load, seconds: float) -> float:
        return self(load)


class Oracle(SmartSpec):
    """Knows all probabilities and mean times, but not what was drawn. It never needs a probe."""

    def __init__(self, drafter: Drawn, machine: Machine, clock: Clock) -> None:
        side = Side("oracle", drafter)
        side.right, side.blind = KnownOdds(drafter, False), KnownOdds(drafter, True)
        model = drafter.model
        side.time = DraftTime((0.0, 0.0, model.depth, model.behind))
        side.time.parts[0] = model.call
        super().__init__([side], -1, clock.now)
        self.time = KnownTime(machine)

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> Sequence[Guess]:
        [side] = self.sides
        for known in (side.right, side.blind):
            assert isinstance(known, KnownOdds)
            known.at = {r.id: r.num_output for r in requests}
        self._budget = -1.0  # no probes
        self.learn = 0
        return super().propose(requests, limits, room)


def run(policy: str, jobs: Sequence[Job], machine: Machine, model: Model) -> Outcomes:
    """`policy` is "none", "smartspec", "oracle" or a fixed length."""
    clock = Clock()
    drawn = Drawn(jobs, model, clock)
    drafter: Drafter
    if policy == "none":
        drafter = Drafter()
    elif policy == "oracle":
        drafter = Oracle(drawn, machine, clock)
    else:
        drafter = SmartSpec([Side("drawn", drawn)], -1 if policy == "smartspec" else int(policy), clock.now)
    return Replay(jobs, machine, drafter, clock).run()
