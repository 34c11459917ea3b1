"""Hands the rows to sample from to the native sampler (csrc/sample.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.runtime.sampler import Row, uniform

FORBIDDEN = float("-inf")


def choose(program: Any, slot: int, rows: Sequence[Row]) -> list[int]:
    """A token from each sampled row of logits in a slot of the program; -1 if none can be chosen.

    They are exactly the tokens of `sampler.sample`. The logits do not change. Raises ValueError if the number of
    rows is not the step's, and for tokens outside the vocabulary.
    """
    options = []
    for i, row in enumerate(rows):
        request, p = row.request, row.request.params
        noise = 0.0 if p.greedy else uniform(request.seed, row.position)
        options.append((p.temperature, p.top_k, p.top_p, p.min_p, noise))
        if row.changed:
            _change(program, i, row)
    return program.choose(slot, options)


def _change(program: Any, at: int, row: Row) -> None:
    """Penalties, bias and what is forbidden of one row, in the order in which they are applied."""
    request, p = row.request, row.request.params
    if p.penalised:
        rates = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        tokens = request.tokens + request.drafts[: row.ahead] if row.ahead else request.tokens
        program.penalise(at, rates, tokens, len(request.prompt))
    if p.logit_bias:
        program.shift(at, list(p.logit_bias), list(p.logit_bias.values()))
    if row.mask is not None:
        program.allow(at, row.mask)
    if row.too_early:
        program.shift(at, list(request.stop_ids), [FORBIDDEN] * len(request.stop_ids))
