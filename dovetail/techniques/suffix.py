"""Suffix drafting: guess what followed most often after the longest end of the text that occurred before.

The text of a request, prompt and output, is kept in a suffix automaton that counts how often each token followed
each substring. So the longest match is found at once, the continuation that occurred most often is taken rather
than the last one, and long repetitions are guessed whole. How far a guess goes depends on how much matched, and on
how likely it is. With `others`, answers that have ended are looked up too, apart for each cache salt. Lossless: a
draft is kept only where it equals the token that the model chooses.

After SuffixDecoding (arXiv 2411.04975), which has suffix trees where this has an automaton. From there are the
limit of a guess by the length of its match, and odds from counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Drafter, Guess, Outcome, Room, Seams, Site
from dovetail.core.technique import Technique
from dovetail.core.types import Request, StepPlan
from dovetail.ops.cpu import native

if TYPE_CHECKING:
    from dovetail._native import SuffixDrafter as Native

LONGEST = 32  # tokens of a match; the native code has the same limit
LEAST_HISTORY = 2 * LONGEST  # tokens
MOST_HISTORY = 10**8  # tokens, about 10 GB
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)  # matches of each and up to the next are right about equally often


def _label(kind: str, matched: int) -> str:
    least = max(n for n in LENGTHS if n <= matched)
    return f"{kind}:{least}{'+' if least == LENGTHS[-1] else ''}"


SOURCES = {
    (shared, n): _label("others" if shared else "suffix", n) for shared in (False, True) for n in range(1, 33)
}


class SuffixDrafter(Drafter):
    """A guess's `source` is "suffix" or, from another request's answer, "others", and how many tokens matched."""

    def __init__(self, index: Native, others: bool) -> None:
        self.index = index
        self.others = others
        self.proposed = 0

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> list[Guess]:
        found = self.index.propose(
            [r.id for r in requests],
            [r.salt for r in requests],
            [r.tokens for r in requests],
            list(limits),
            room.tokens,
        )  # fmt: skip
        return [Guess(t, odds, SOURCES[shared, n]) if t else Guess() for t, odds, n, shared in found]

    def observe(self, outcomes: Sequence[Outcome], plan: StepPlan, seconds: float) -> None:
        self.proposed += sum(len(o.drafts) for o in outcomes)

    def forget(self, request: Request) -> None:
        self.index.forget(request.id)
        if self.others and request.finish_reason in ("stop", "length"):
            self.index.keep(request.salt, request.output)


def suffix(
    tokens: int = 16,
    min_match: int = 1,
    factor: float = 2.0,
    min_odds: float = 0.3,
    others: bool = False,
    history: int = 65536,
    shared: int = 131072,
) -> Technique:
    """Propose up to `tokens` tokens after a match of `min_match` or more: at most `factor` for each token that
    matched, and as long as the whole guess is right with odds of `min_odds`.

    others: look up other requests' answers too. history: tokens of a request that are remembered; beyond it the
    older half is forgotten. shared: tokens of all answers that have ended; beyond it the older half of them is
    forgotten. A remembered token takes about 90 bytes, and 250 at most.
    """
    _check(tokens, min_match, factor, min_odds)
    if not LEAST_HISTORY <= history <= MOST_HISTORY or not 2 <= shared <= MOST_HISTORY:
        raise ConfigError(
            f"suffix needs {LEAST_HISTORY} <= history <= {MOST_HISTORY} and 2 <= shared <= {MOST_HISTORY} tokens, "
            f"got {history} and {shared}"
        )

    def build(site: Site) -> dict[str, object]:
        module = native()
        if module is None:
            raise ConfigError("suffix needs the native kernels, which were not built; use ngram")
        rule = (tokens, min_match, factor, min_odds)
        return {"drafter": SuffixDrafter(module.SuffixDrafter(rule, history, shared if others else 0), others)}

    return Technique(
        name="suffix",
        fills=("drafter",),
        build=build,
        options={
            "tokens": tokens, "min_match": min_match, "factor": factor, "min_odds": min_odds, "others": others,
            "history": history, "shared": shared,
        },
        lossless=True,
        activity=_activity,
    )  # fmt: skip


def _check(tokens: int, min_match: int, factor: float, min_odds: float) -> None:
    if tokens < 1 or not 1 <= min_match <= LONGEST:
        raise ConfigError(
            f"suffix needs tokens >= 1 and 1 <= min_match <= {LONGEST}, got {tokens} and {min_match}"
        )
    if not (factor > 0 and math.isfinite(factor)) or not 0 <= min_odds <= 1:
        raise ConfigError(f"suffix needs factor > 0 and 0 <= min_odds <= 1, got {factor} and {min_odds}")


def _activity(seams: Seams) -> int:
    return seams.drafter.proposed if isinstance(seams.drafter, SuffixDrafter) else 0
