"""Measures a paper's claims, and checks that each of them was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from dovetail.bench.kernels.attention import Kernels
from dovetail.bench.verdict import Verdict
from dovetail.core.errors import ConfigError
from dovetail.core.technique import idle
from dovetail.host import machine
from dovetail.host.units import format_duration
from dovetail.llm import LLM
from dovetail.ops import cpu
from dovetail.reproduce import System
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.show.progress import counter, note

EFFORTS = ("quick", "default", "full")


@dataclass(frozen=True)
class Reproduction:
    """The claims of one system as measured with an effort, and how many seconds that took."""

    system: System
    effort: str
    claims: tuple[Claim, ...]
    seconds: float

    def judged(self, verdict: Verdict) -> list[Claim]:
        """Claims with this verdict on their bar."""
        return [claim for claim in self.claims if claim.verdict is verdict]

    @property
    def missed(self) -> list[Claim]:
        """Claims whose bar is not met."""
        return self.judged(Verdict.MISSED)


def reproduce(system: System, effort: str) -> Reproduction:
    """Measure all claims of a system that is available. `effort` is one of EFFORTS."""
    module = import_module(str(system.module))
    start = time.monotonic()
    claims = measure(module.experiments(module.EFFORTS[effort]))
    return Reproduction(system, effort, tuple(claims), time.monotonic() - start)


def measure(experiments: Sequence[Experiment]) -> list[Claim]:
    """The claims of all experiments, each shown as soon as it is known.

    RuntimeError if an announced claim was not measured, or if a measured one was not announced.
    """
    announced = [name for e in experiments for name in e.claims]
    if len(set(announced)) != len(announced):
        raise RuntimeError(f"claims of the same name: {', '.join(announced)}")
    found: list[Claim] = []
    with counter("claims", len(announced)) as advance:
        for e in experiments:
            note(f"{e.what} ...")
            before, start = len(found), time.monotonic()
            _take(e, found, advance)
            note(f"  ({len(found) - before} claims in {format_duration(time.monotonic() - start)})")
    return found


def native_kernels(system: str) -> Kernels:
    """The kernels that `system` is measured with. ConfigError if they were not built."""
    if not cpu.isas():
        raise ConfigError(f"reproducing {system} needs the native kernels, which were not built: `pip install .`")
    return Kernels(cpu.isas()[0], machine.cpu_budget())


def must_have_acted(llm: LLM) -> None:
    """RuntimeError if a technique in use never acted."""
    if names := idle(llm.activity()):
        raise RuntimeError(f"{', '.join(names)} did nothing: what was measured is the plain engine's")


def _take(experiment: Experiment, found: list[Claim], advance: Callable[[int], None]) -> None:
    left = list(experiment.claims)
    for claim in experiment.measure():
        if claim.name not in left:
            raise RuntimeError(f"'{claim.name}' was measured, but not announced or measured before")
        left.remove(claim.name)
        found.append(claim)
        note(f"  {claim.name}: {claim.ours}{_verdict(claim)}")
        advance(1)
    if left:
        raise RuntimeError(f"claims were not measured: {', '.join(left)}")


def _verdict(claim: Claim) -> str:
    return "" if claim.bar is None else f" [{claim.bar.needs}: {claim.bar}]"
