"""Tokens per second of a batch under one limit of device memory (ShadowKV, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.reproduce.claim import Bar, Claim, Experiment
from dovetail.reproduce.limited import WAITING, Side, compare
from dovetail.reproduce.offloading import Effort

NEEDED = 3.0  # times as fast
EMULATED, DISK = "decoding under a memory limit", "decoding under a memory limit, from disk"


def experiment(effort: Effort) -> Experiment:
    return Experiment("decoding under a memory limit", (EMULATED, DISK), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    for name, backend in ((EMULATED, "host"), (DISK, "disk")):
        found = compare(effort.limit, Side(()), Side((effort.use,), backend))
        emulated = backend == "host"
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
            bar=Bar.at_least(NEEDED, found.ratio.median) if emulated else None,
        )
