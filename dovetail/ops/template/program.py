"""An expression as a list of steps, each computed once, in an order that can be printed.

A language is a class with one method, `step`. `fold` calls it for every step, with what it returned for the step's
arguments. Torch (evaluate.py) and C++ (cpp.py) are two languages; a third needs only the same method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from dovetail.ops.template.expression import Expr, Kind, Parameter, Range, Table

T = TypeVar("T")
_EXACT = 1 << 24  # whole numbers up to here are float32


class Step(NamedTuple):
    """One operation. `args` are the numbers of earlier steps.

    op, kind, args: value
    input: its name, of score (float), q_pos, k_pos, head (int). const: the number or bool.
    param: which of the program's parameters. load (int): which of its tables.
    float (int): the same as a float. neg abs floor sqrt tanh exp log (x). add sub mul div floordiv mod
    minimum maximum (a, b). lt le eq ne (a, b). and or xor (a, b), not (a). where (condition, a, b).
    Both numeric arguments have the same kind, which is also the result's; of floordiv and mod it is int.
    """

    op: str
    kind: Kind
    args: tuple[int, ...]
    value: Any
    range: Range | None
    inputs: frozenset[str]


class Language(Protocol[T]):
    """Says what a step becomes."""

    def step(self, step: Step, args: Sequence[T]) -> T: ...


@dataclass(frozen=True)
class Program:
    """Steps, and the numbers that they read: `parameters` with their names, and `tables`.

    In a kernel's array of float32 the parameters come first, then the tables one after the other.
    """

    steps: tuple[Step, ...]
    results: tuple[int, ...]  # the steps whose values are the program's results
    parameters: tuple[float, ...]
    names: tuple[str, ...]
    tables: tuple[Table, ...]

    def offset(self, table: int) -> int:
        """Where a table begins in the array."""
        return len(self.parameters) + sum(map(len, self.tables[:table]))

    def fold(self, language: Language[T]) -> list[T]:
        """What each step becomes."""
        done: list[T] = []
        for step in self.steps:
            done.append(language.step(step, [done[a] for a in step.args]))
        return done


def program(*results: Expr) -> Program:
    """The steps of expressions, equal ones merged."""
    builder = _Builder()
    for expr in _in_order(results):
        builder.add(expr)
    parameters = builder.parameters.values()
    return Program(
        tuple(builder.steps),
        tuple(builder.number[id(r)] for r in results),
        tuple(p.value for p in parameters),
        tuple(p.name for p in parameters),
        tuple(builder.tables.values()),
    )


def _in_order(results: Sequence[Expr]) -> Iterator[Expr]:
    """Every node once, after its arguments. Not recursive: a loop in a definition makes deep expressions."""
    seen: set[int] = set()
    stack = [(r, False) for r in reversed(results)]
    while stack:
        expr, ready = stack.pop()
        if ready:
            yield expr
        elif id(expr) not in seen:
            seen.add(id(expr))
            stack.append((expr, True))
            stack.extend((a, False) for a in reversed(expr.args))


class _Builder:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.number: dict[int, int] = {}  # by identity of the node
        self.known: dict[tuple[Any, ...], int] = {}
        self.parameters: dict[tuple[str, str], Parameter] = {}  # by name and value
        self.tables: dict[int, Table] = {}

    def add(self, expr: Expr) -> None:
        args = tuple(self.number[id(a)] for a in expr.args)
        if expr.op in ("and", "or") and args[0] == args[1]:
            self.number[id(expr)] = args[0]
            return
        op, value = expr.op, expr.value
        if op == "param" and expr.kind == "int" and abs(value) > _EXACT:
            op = "const"
        if op == "param" and isinstance(expr, Parameter):
            self.parameters.setdefault((expr.name, repr(value)), expr)
            value = list(self.parameters).index((expr.name, repr(value)))
        elif op == "load":
            self.tables.setdefault(id(value), value)
            value = list(self.tables).index(id(value))
        key = (op, expr.kind, args, repr(value))  # repr tells -0.0 from 0.0
        if key not in self.known:
            self.known[key] = len(self.steps)
            self.steps.append(Step(op, expr.kind, args, value, expr.range, expr.inputs))
        self.number[id(expr)] = self.known[key]
