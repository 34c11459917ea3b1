"""Needles at the setting of the throughput (InfiniGen, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.infinigen.effort import Effort
from dovetail.reproduce.needles import sink_window

NAME = "needles"


def experiment(effort: Effort) -> Experiment:
    return Experiment("needles", (NAME,), partial(claims, effort))


def claims(effort: Effort) -> Iterator[Claim]:
    grid = effort.needles
    dense, ours = grid.found(), grid.found([effort.use], slow_tier=True)
    window = grid.found([sink_window(effort.budget)])
    yield Claim(
        NAME,
        f"{grid}, {effort.use}; baseline: everything; and the first 16 and last {effort.budget - 16} tokens",
        "section 5 (OPT and Llama-2, tasks of up to 2048 tokens): as good as everything at under 10 % of KV",
        f"{ours}, where reading everything finds {dense} and the window {window}",
        "The paper has no task that hangs on one place in a long context.",
        bar=ours.bar(dense),
    )
