"""Needles at the setting of the throughput (ShadowKV, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.needles import sink_window
from dovetail.reproduce.shadowkv.effort import Effort

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
        "section 5 (RULER at 128K, Llama-3-8B-1M): 86.88 where everything read gives 86.68",
        f"{ours}, where reading everything finds {dense} and the window {window}",
        "Rank 32 is a sixth of this model's 3 KV heads of 64, as 160 is in the paper; landmarks are of 4 tokens, "
        "because those of 8 lose needles here.",
        bar=ours.bar(dense),
    )
