"""N-gram drafting (prompt lookup): text repeats itself, so guess what followed the last occurrence.

If the last n tokens of a request occurred before, the tokens that followed them then are proposed now. The longest
n between `min_n` and `max_n` that has an occurrence is taken, and of several occurrences the latest. Lossless: a
draft is kept only where it equals the token that the model chooses. Prompt lookup decoding is by A. Saxena (2023);
comparing drafts with the model's own choice is speculative decoding (arXiv 2211.17192).

Prefer `suffix` where text is copied at length: it matches more tokens, counts what followed them, and guesses
further the longer the match. `ngram` needs no native kernels, guesses the same few tokens after every match, and
says nothing of how likely they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Drafter, Guess, Outcome, Room, Seams, Site
from dovetail.core.technique import Technique
from dovetail.core.types import Request, StepPlan


class History:
    """Where each n-gram of one request ended, the latest two times; grows with its tokens."""

    def __init__(self, sizes: range) -> None:
        self.sizes = sizes
        self.ends: dict[tuple[int, ...], tuple[int, int]] = {}  # gram -> (latest end, the one before or -1)
        self.seen = 0

    def update(self, tokens: Sequence[int]) -> None:
        for end in range(self.seen + 1, len(tokens) + 1):
            for n in self.sizes:
                if n <= end:
                    gram = tuple(tokens[end - n : end])
                    self.ends[gram] = (end, self.ends.get(gram, (-1, -1))[0])
        self.seen = len(tokens)

    def follow(self, tokens: Sequence[int], limit: int) -> list[int]:
        """What followed the previous occurrence of the longest known tail."""
        for n in reversed(self.sizes):
            earlier = self.ends.get(tuple(tokens[-n:]), (-1, -1))[1] if n < len(tokens) else -1
            if earlier > 0:
                return list(tokens[earlier : earlier + limit])
        return []


class NgramDrafter(Drafter):
    def __init__(self, tokens: int, sizes: range) -> None:
        self.tokens = tokens
        self.sizes = sizes
        self.proposed = self.accepted = 0
        self._histories: dict[str, History] = {}

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> list[Guess]:
        out, left = [], room.tokens
        for request, limit in zip(requests, limits, strict=True):
            history = self._histories.setdefault(request.id, History(self.sizes))
            history.update(request.tokens)
            out.append(Guess(history.follow(request.tokens, min(limit, self.tokens, left))))
            left -= len(out[-1].tokens)
        return out

    def observe(self, outcomes: Sequence[Outcome], plan: StepPlan, seconds: float) -> None:
        self.proposed += sum(len(o.drafts) for o in outcomes)
        self.accepted += sum(o.accepted for o in outcomes if o.drafts)

    def forget(self, request: Request) -> None:
        self._histories.pop(request.id, None)


def ngram(tokens: int = 4, min_n: int = 2, max_n: int = 4) -> Technique:
    """Propose up to `tokens` tokens after a repeated n-gram of `min_n` to `max_n` tokens."""
    if tokens < 1 or not 1 <= min_n <= max_n:
        raise ConfigError(f"ngram needs tokens >= 1 and 1 <= min_n <= max_n, got {tokens}, {min_n}, {max_n}")

    def build(site: Site) -> dict[str, object]:
        return {"drafter": NgramDrafter(tokens, range(min_n, max_n + 1))}

    return Technique(
        name="ngram",
        fills=("drafter",),
        build=build,
        options={"tokens": tokens, "min_n": min_n, "max_n": max_n},
        lossless=True,
        activity=_activity,
    )


def _activity(seams: Seams) -> int:
    return seams.drafter.proposed if isinstance(seams.drafter, NgramDrafter) else 0
