"""A wrapped drafter: what is known of it, what it offers, and when it is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.core.seams import NO_GUESS, Drafter, Guess
from dovetail.core.types import Request
from dovetail.techniques.smartspec.acceptance import Acceptance
from dovetail.techniques.smartspec.draft_time import Ask, DraftTime

CHEAP = 0.03  # of a step's time: what a drafter may take to be asked in every step
PATIENCE = 8, 512  # steps before the first probe, and at most between two


class Probe:
    """When to try again what does not seem to pay."""

    def __init__(self) -> None:
        self.wait = self.left = PATIENCE[0]

    def due(self, affordable: bool) -> bool:
        """Asked in each step in which nothing was chosen."""
        self.left -= 1
        if self.left > 0 or not affordable:
            return False
        self.wait = self.left = min(2 * self.wait, PATIENCE[1])
        return True

    def reset(self) -> None:
        self.wait = self.left = PATIENCE[0]


class Side:
    """One wrapped drafter, and what is known of it."""

    def __init__(self, name: str, drafter: Drafter) -> None:
        self.name = name
        self.drafter = drafter
        self.time: DraftTime | None = None
        self.right = Acceptance()  # of a token that was guessed
        self.blind = Acceptance(0.7)  # that a token that was asked for is guessed, and right
        self.probe = Probe()

    def behind(self, request: Request) -> int:
        """Tokens of the request that the drafter must compute before it guesses, as far as it says so."""
        count = getattr(self.drafter, "behind", None)
        return int(count(request)) if count is not None else 0

    def cost(self, plain: float, row: float) -> DraftTime:
        """Its time. Before it was asked, one with KV of its own is taken for a model of a third of the target.

        plain: seconds of a step without guesses; row: seconds of another row.
        """
        if self.time is None:
            self.time = DraftTime((0.0, 0.0, plain / 3, row / 3) if self.drafter.writes else (0.0,) * 4)
        return self.time

    def cheap(self, requests: int, plain: float) -> bool:
        assert self.time is not None
        return not self.drafter.writes and self.time(Ask(requests, 8 * requests, 8, 0)) <= CHEAP * plain


@dataclass(slots=True)
class Offer:
    """A guess for a request. asked: tokens that the drafter was asked for if it was asked for a length, else 0."""

    request: Request
    at: int  # the request's tokens when it was made
    side: Side | None = None
    guess: Guess = NO_GUESS
    curve: Sequence[float] = ()
    worth: float = 0.0
    asked: int = 0
