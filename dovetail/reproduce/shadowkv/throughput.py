"""A batch under one limit of device memory: tokens per second, and needles at that setting (section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.bench.verdict import at_least
from dovetail.reproduce import needles
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.limited import WAITING, Effort, Side, compare
from dovetail.reproduce.needles import Subject

NEEDED = 3.0  # times as fast
EMULATED, DISK = "decoding under a memory limit", "decoding under a memory limit, from disk"
NEEDLES = "section 5 (RULER at 128K, Llama-3-8B-1M): 86.88 where everything read gives 86.68"
_NEEDLES_WHY = (
    "Rank 32 is a sixth of this model's 3 KV heads of 64, as 160 is of 8 heads of 128 in the paper. Pages are "
    "chosen by codes, because landmarks lose needles here, and one page of a head has exact keys."
)


def experiment(effort: Effort) -> Experiment:
    return Experiment("decoding under a memory limit", (EMULATED, DISK), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    for name, backend in ((EMULATED, "host"), (DISK, "disk")):
        emulated = backend == "host"
        sides = (Side(()), Side((effort.use,), backend))
        found = compare(effort.limit, *sides, at_least(NEEDED) if emulated else None)
        yield Claim(
            name,
            f"{effort.limit}, {effort.use}, {effort.limit.tier(backend)}; baseline: {WAITING}",
            "section 5 (Llama-3.1-8B, 122K tokens, A100): 3.04 times as fast, 24 requests instead of 4",
            str(found),
            "The batch grows by what each request keeps on the device. The more requests the plain engine can "
            "run, the less there is to gain on a small model: choosing pages costs a third of a step.",
            kind="emulated" if emulated else "run",
            ratio=found.ratio,
            paper_ratio=(3.04, 3.04),
            bar=found.decision,
        )


def needles_experiment(effort: Effort) -> Experiment:
    return needles.experiment(effort.needles, Subject(effort.use, NEEDLES, _NEEDLES_WHY, slow_tier=True))
