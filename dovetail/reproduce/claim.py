"""One claim of a paper, and what was found here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from dovetail.bench.rounds import Ratio

Kind = Literal["run", "simulated", "emulated"]


@dataclass(frozen=True)
class Bar:
    """What must hold here, in words, and whether it does: a run with a missed bar has failed."""

    needs: str
    meets: bool

    @classmethod
    def at_least(cls, needed: float, found: float) -> Self:
        """Met by `needed` or more."""
        return cls(f"at least {needed:g}", found >= needed)


@dataclass(frozen=True)
class Claim:
    """A claim beside its reproduction.

    paper: what it says, with its numbers, their source and setting, or that it gives none. ours: what was found.
    kind: "run" is the real thing on this machine; "simulated" is computed from step times or counts; "emulated"
    has real results and the timing of other hardware. why: the reason for the difference.
    ratio: how many times as fast as its own baseline ours is; paper_ratio: theirs, lowest and highest.
    """

    name: str
    setting: str
    paper: str
    ours: str
    why: str
    kind: Kind = "run"
    ratio: Ratio | None = None
    paper_ratio: tuple[float, float] | None = None
    bar: Bar | None = None

    @property
    def meets(self) -> bool | None:
        """None where there is no bar."""
        return None if self.bar is None else self.bar.meets

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON of `dovetail reproduce`."""
        found = asdict(self)
        found["paper_ratio"] = None if self.paper_ratio is None else list(self.paper_ratio)
        found["bar"] = self.bar is not None
        found["needs"] = None if self.bar is None else self.bar.needs
        found["meets"] = self.meets
        return found


@dataclass(frozen=True)
class Experiment:
    """What measures some claims: `measure` yields each of `claims`, by name, as soon as it is known."""

    what: str
    claims: tuple[str, ...]
    measure: Callable[[], Iterable[Claim]]
