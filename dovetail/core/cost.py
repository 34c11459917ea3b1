"""What a step costs: floating-point operations and bytes of each recorded operation, and the time that they
predict.

Every operation of a program states its `Cost` for a `Load`, which is all that a step's plan says about its size.
The sum over a program is a step's cost; on a machine whose `Speeds` were measured it is a step's time. Benchmarks,
the simulator and the policies that weigh one choice against another ask this one predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dovetail.core.errors import ConfigError
from dovetail.core.types import StepPlan


def _sum(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}}


@dataclass(frozen=True, slots=True)
class Cost:
    """What is needed: floating-point (or integer) operations by the arithmetic that does them ("int8", "bf16",
    "float32"), and bytes moved by the tier that they come from ("device")."""

    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return Cost(_sum(self.flops, other.flops), _sum(self.bytes, other.bytes))

    @property
    def all_bytes(self) -> float:
        """Bytes of every tier."""
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Load:
    """A step as its costs see it.

    spans: of each sequence, the rows that are computed and the keys that the last of them may read. Rows follow
    each other, so that row i of n reads context - n + 1 + i keys. sampled: rows whose logits are computed.
    """

    spans: tuple[tuple[int, int], ...]
    sampled: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> Load:
        """The load of a plan."""
        return cls(tuple((s.num_rows, s.stop) for s in plan.spans), sum(s.sample for s in plan.spans))

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.spans)

    def read(self, window: int = 0) -> int:
        """Keys that are read, each once for a sequence. window: a row reads so many at most; 0 is all."""
        return sum(min(context, window + rows - 1) if window else context for rows, context in self.spans)

    def pairs(self, window: int = 0) -> int:
        """Keys that each row reads, summed over rows."""
        return sum(_pairs(rows, context, window) for rows, context in self.spans)


def _pairs(rows: int, context: int, window: int) -> int:
    first = context - rows + 1  # keys of the first row
    if not window or context <= window:
        return rows * (first + context) // 2
    growing = max(0, window - first)  # rows that read fewer than the window
    return growing * (first + first + growing - 1) // 2 + (rows - growing) * window


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a program. layer: -1 for those before and behind all layers. native: whether the native
    kernels
    run it as it is."""

    name: str
    layer: int
    cost: Callable[[Load], Cost]
    native: bool = True


def total(operations: Iterable[Operation], load: Load) -> Cost:
    """The cost of a step."""
    found = Cost()
    for operation in operations:
        found += operation.cost(load)
    return found


@dataclass(frozen=True)
class Speeds:
    """What a machine does per second: operations by arithmetic, bytes by tier. start: seconds that every operation
    takes
    however small it is. All are measured, never a data sheet's."""

    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    start: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The time of one operation: that of its arithmetic or of its bytes, whichever is longer (the roofline).

        ConfigError names an arithmetic or a tier whose speed is not known.
        """
        compute = sum(n / _known(self.flops, kind, "arithmetic") for kind, n in cost.flops.items() if n)
        memory = sum(n / _known(self.bytes, tier, "tier") for tier, n in cost.bytes.items() if n)
        return self.start + max(compute, memory)


def _known(speeds: Mapping[str, float], name: str, what: str) -> float:
    speed = speeds.get(name, 0.0)
    if not speed > 0:
        raise ConfigError(
            f"no speed above 0 is known for the {what} '{name}'; known: {', '.join(speeds) or 'none'}"
        )
    return speed


@dataclass(frozen=True)
class StepTime:
    """Predicts the time of a step: the sum over its operations of what each takes on a machine."""

    operations: Sequence[Operation]
    speeds: Speeds

    def __call__(self, load: Load) -> float:
        """Seconds. More rows, keys or samples never take less."""
        return sum(self.speeds.seconds(operation.cost(load)) for operation in self.operations)
