"""Makes a program of a variant by calling its methods with symbols instead of tensors."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.core.seams import Variant
from dovetail.host.lazy_torch import torch
from dovetail.ops.template.errors import TraceError
from dovetail.ops.template.evaluate import Clamped, evaluate
from dovetail.ops.template.expression import HEADS, POSITIONS, Expr, Parameter, Range, Table, as_expr
from dovetail.ops.template.program import Program, program

if TYPE_CHECKING:
    from torch import Tensor

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_WITH_TABLES: dict[int, Variant] = {}  # by identity: a variant need not be hashable
INSTEAD = "attention uses the torch reference for this variant instead, which is slower"


@dataclass(frozen=True)
class Traced:
    """A variant as a program with two results: the new score, and whether the key is readable.

    Readable is the variant's mask and k_pos <= q_pos.
    """

    program: Program

    def torch(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, head: Tensor) -> Tensor:
        """The new scores where keys are readable, -inf elsewhere, in the type and shape of `scores`.

        scores: float32 or float64; q_pos, k_pos, head: int64 that broadcast to its shape. The variant's own
        methods, called with the same tensors, give the same bits.
        """
        inputs = {"score": scores, "q_pos": q_pos, "k_pos": k_pos, "head": head}
        new, readable = evaluate(self.program, inputs)
        return torch.where(readable, new, -torch.inf).to(scores.dtype).expand_as(scores)

    @property
    def keeps_scores(self) -> bool:
        """Whether the variant is a mask only."""
        step = self.program.steps[self.program.results[0]]
        return (step.op, step.value) == ("input", "score")

    @property
    def is_causal(self) -> bool:
        """Whether the variant is the default one: scores as they are, every key up to the query's own."""
        step = self.program.steps[self.program.results[1]]
        inputs = [self.program.steps[a].value for a in step.args]
        return self.keeps_scores and step.op == "le" and inputs == ["k_pos", "q_pos"]

    @cached_property
    def num_heads(self) -> int | None:
        """How many query heads its tables hold numbers for; None: any number.

        A kernel reads the last number of a table for heads beyond; the torch reference raises IndexError.
        """
        every = dict.fromkeys(("score", "q_pos", "k_pos", "head"), np.arange(HEADS))
        values = self.program.fold(Clamped(self.program, every))
        found = []
        for step in self.program.steps:
            if step.op == "load" and self.program.steps[step.args[0]].inputs <= {"head"}:
                fits = values[step.args[0]] < len(self.program.tables[step.value])
                found.append(int(fits.astype(np.int64).cumprod().sum()))
        return min((n for n in found if n < HEADS), default=None)


def trace(variant: Variant) -> Traced:
    """The program of a variant's methods. Attributes that are numbers become parameters; tuples, lists and 1-d
    arrays of numbers become tables. Raises TraceError, which says where the problem is and what to write instead.
    """
    bound = _bind(variant, Parameter, "")
    score = Expr("input", "float", (), "score")
    q_pos, k_pos = (Expr("input", "int", (), n, Range(0, POSITIONS - 1)) for n in ("q_pos", "k_pos"))
    head = Expr("input", "int", (), "head", Range(0, HEADS - 1))
    new = _call(bound, "score", score, q_pos, k_pos, head)
    if new.kind == "bool":
        raise TraceError(f"{type(variant).__name__}.score gives a condition, not a score; {INSTEAD}")
    if new.kind == "int":
        new = Expr("float", "float", (new,))
    mask = _call(bound, "mask", q_pos, k_pos, head)
    if mask.kind != "bool":
        raise TraceError(f"{type(variant).__name__}.mask gives a number, not a condition; {INSTEAD}")
    return Traced(program(new, _causal(mask, k_pos <= q_pos)))


def _causal(mask: Expr, causal: Expr) -> Expr:
    """mask & causal, unless the mask says so itself."""
    if mask.op == "const" and mask.value:
        return causal
    both = program(mask, causal)
    conjuncts = {both.results[0]}
    for i in reversed(range(len(both.steps))):  # arguments come before what is made of them
        if i in conjuncts and both.steps[i].op == "and":
            conjuncts |= set(both.steps[i].args)
    return mask if both.results[1] in conjuncts else Expr("and", "bool", (mask, causal))


def with_tables(variant: Variant) -> Variant:
    """A copy of the variant whose sequences of numbers can be indexed by tensors, as its methods expect.

    The copy is remembered as long as the variant lives.
    """
    if (bound := _WITH_TABLES.get(id(variant))) is None:
        bound = _WITH_TABLES[id(variant)] = _bind(variant, lambda value, name: value, "")
        weakref.finalize(variant, _WITH_TABLES.pop, id(variant))
    return bound


def _call(variant: Variant, method: str, *args: Expr) -> Expr:
    where = f"{type(variant).__name__}.{method}"
    try:
        return as_expr(getattr(variant, method)(*args))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not _inside(f.filename)]
        line = f" ({os.path.basename(theirs[-1].filename)}, line {theirs[-1].lineno})" if theirs else ""
        told = str(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"
        raise TraceError(f"{where}{line} cannot be traced: {told}; {INSTEAD}") from error


def _inside(file: str) -> bool:
    """Whether a file is ours or torch's, and not the definition's."""
    path = os.path.abspath(file)
    loaded = sys.modules.get("torch")
    return path.startswith(_OURS) or (
        loaded is not None and path.startswith(os.path.dirname(os.path.abspath(loaded.__file__ or "")) + os.sep)
    )


def _bind(variant: Variant, number: Callable[[Any, str], Any], prefix: str) -> Variant:
    """A copy with the numbers among its attributes, and those of variants in it, replaced."""
    bound = copy.copy(variant)
    for name, value in _attributes(variant).items():
        new = _bound(value, number, f"{prefix}{name}")
        if new is not value:
            object.__setattr__(bound, name, new)
    return bound


def _bound(value: Any, number: Callable[[Any, str], Any], name: str) -> Any:
    if isinstance(value, Variant):
        return _bind(value, number, f"{name}.")
    if isinstance(value, Real) and not isinstance(value, bool):
        huge = isinstance(value, Integral) and abs(int(value)) >= 1 << 63
        return value if huge else number(value, name)
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (tuple, list)) or not value:
        return value
    if all(isinstance(v, Real) and not isinstance(v, bool) for v in value):
        return Table(value, name)
    if any(isinstance(v, Variant) for v in value):
        return tuple(_bound(v, number, f"{name}[{i}]") for i, v in enumerate(value))
    return value


def _attributes(variant: Variant) -> dict[str, Any]:
    """What `self` finds by name: the instance's own, then numbers and sequences of its classes."""
    found: dict[str, Any] = {}
    for cls in reversed(type(variant).__mro__):
        plain = {n: v for n, v in vars(cls).items() if not n.startswith("__")}
        found |= {n: v for n, v in plain.items() if isinstance(v, (Real, tuple, list))}
    if dataclasses.is_dataclass(variant):  # which may have slots
        found |= {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}
    return found | vars(variant)
