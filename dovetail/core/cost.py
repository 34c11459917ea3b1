"""What a step costs: the operations and bytes of each recorded operation, and the time that they predict.

Every operation of a program states its `Cost` for a `Load`. A load is all that a plan says about the size of a
step. The sum over a program is the cost of the step. With the measured `Speeds` of a machine it becomes a time.
Benchmarks, the simulator and policies that weigh choices all ask this one predictor.
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
    """flops: floating-point or integer operations, by arithmetic ("int8", "bf16", "float32"). bytes: bytes that
    are moved, by the tier from which they come ("device")."""

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
    """The size of a step.

    spans: for each sequence, how many rows are computed, and how many keys the last of them may read. Rows are
    taken to follow each other: row i of n reads context - n + 1 + i keys. sampled: rows whose logits are computed.
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
        """Keys that are read, each once for a sequence. window: the most keys that a row reads; 0 is all."""
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
    """An operation of a program. layer: -1 before and behind all layers. native: whether the native kernels can
    run it."""

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
    """What a machine does in a second: operations by arithmetic, bytes by tier. start: seconds that even the
    smallest operation takes. All are measured, never taken from a data sheet. flops None: arithmetic takes no
    time, which leaves the time that memory sets."""

    flops: Mapping[str, float] | None
    bytes: Mapping[str, float]
    start: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The time of one operation: the longer one of its arithmetic's and its bytes' (the roofline).

        ConfigError names an arithmetic or a tier whose speed is unknown.
        """
        compute = 0.0
        if self.flops is not None:
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
    """Predicts the time of a step: the sum of the times of its operations."""

    operations: Sequence[Operation]
    speeds: Speeds

    def __call__(self, load: Load) -> float:
        """Seconds. They never fall when rows, keys or samples are added."""
        return sum(self.speeds.seconds(operation.cost(load)) for operation in self.operations)
