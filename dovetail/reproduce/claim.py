"""One claim of a paper, and what was found here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import Decision, Verdict

Kind = Literal["run", "simulated", "emulated"]
_DECIDED = ("needs", "meets", "verdict", "interval", "verdict_why")


@dataclass(frozen=True)
class Claim:
    """A claim beside its reproduction.

    paper: what the paper says, with numbers, source and setting, or that it has no number. ours: what was found.
    kind: "run" is measured on this machine; "simulated" is computed from step times or counts; "emulated" has real
    results with the timing of other hardware. why: the reason for the difference. ratio: how many times as fast as
    its baseline ours is; paper_ratio: the same in the paper, lowest and highest. bar: the verdict on what must
    hold here. A missed bar makes the run fail; an undecided one does not.
    """

    name: str
    setting: str
    paper: str
    ours: str
    why: str
    kind: Kind = "run"
    ratio: Ratio | None = None
    paper_ratio: tuple[float, float] | None = None
    bar: Decision | None = None

    @property
    def meets(self) -> bool | None:
        """Whether the bar is met. None if there is none, or if it is undecided."""
        return None if self.bar is None else self.bar.meets

    @property
    def verdict(self) -> Verdict | None:
        """None where there is no bar."""
        return None if self.bar is None else self.bar.verdict

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON of `dovetail reproduce`."""
        found = asdict(self)
        found["paper_ratio"] = None if self.paper_ratio is None else list(self.paper_ratio)
        decided = dict.fromkeys(_DECIDED) if self.bar is None else self.bar.to_dict()
        return {**found, "bar": self.bar is not None, **decided}


@dataclass(frozen=True)
class Experiment:
    """Measures some claims. `measure` yields each of `claims` by name, as soon as it is known."""

    what: str
    claims: tuple[str, ...]
    measure: Callable[[], Iterable[Claim]]
