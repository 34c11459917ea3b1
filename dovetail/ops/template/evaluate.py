"""Runs programs on torch tensors, with the operations that the definition itself performs on tensors; or on numpy
arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.host.lazy_torch import torch
from dovetail.ops.template.expression import OPERATORS, Table
from dovetail.ops.template.program import Program, Step

if TYPE_CHECKING:
    from torch import Tensor


def evaluate(program: Program, inputs: Mapping[str, Tensor]) -> list[Any]:
    """The results of a program: tensors that broadcast, or numbers where nothing depends on an input."""
    done = program.fold(Torch(program, inputs))
    return [done[i] for i in program.results]


class Torch:
    """The language. Parameters stay Python's numbers, so that types promote as in the definition."""

    def __init__(self, program: Program, inputs: Mapping[str, Any]) -> None:
        self.program = program
        self.inputs = inputs

    def step(self, step: Step, args: Sequence[Any]) -> Any:
        if step.op == "input":
            return self.inputs[step.value]
        if step.op == "const":
            return step.value
        if step.op == "param":
            return self.program.parameters[step.value]
        if step.op == "load":
            return self.load(self.program.tables[step.value], args[0])
        return args[0] if step.op == "float" else TORCH[step.op](*args)

    def load(self, table: Table, index: Tensor) -> Any:
        return table[index]


class Clamped(Torch):
    """As kernels do it: beyond a table, its last number is read."""

    def load(self, table: Table, index: Tensor) -> Any:
        return table[index.clip(max=len(table) - 1)]


def _with_numbers(name: str) -> Callable[[Any, Any], Any]:
    """A function of two tensors, for a tensor and a number too; types promote as in arithmetic."""

    def call(a: Any, b: Any) -> Any:
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return getattr(np, name)(a, b)
        dtype = torch.result_type(a, b)
        device = a.device if isinstance(a, torch.Tensor) else b.device
        x, y = (torch.as_tensor(v, dtype=dtype, device=device) for v in (a, b))
        return getattr(torch, name)(x, y)

    return call


def _of_one(name: str) -> Callable[[Any], Any]:
    return lambda x: getattr(np if isinstance(x, np.ndarray) else torch, name)(x)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool):
        return a if condition else b
    return (np if isinstance(condition, np.ndarray) else torch).where(condition, a, b)


TORCH: dict[str, Callable[..., Any]] = {
    **OPERATORS,
    **{name: _of_one(name) for name in ("tanh", "exp", "log", "sqrt", "floor")},
    "abs": abs,
    "minimum": _with_numbers("minimum"),
    "maximum": _with_numbers("maximum"),
    "where": _where,
}
