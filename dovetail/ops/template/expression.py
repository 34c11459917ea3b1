"""Typed expressions over a score, two positions and a head. Tracing turns the methods of a variant into these.

Kinds are "float" (float32 in kernels), "int" and "bool". An int carries the range of its values. The range decides
its width in kernels, and shows that no kernel can divide by zero or read beyond a table. Positions are below 2^30
and heads below 2^12.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np

from dovetail.host.lazy_torch import torch
from dovetail.ops.template.errors import TraceError

Kind = Literal["float", "int", "bool"]
POSITIONS = 1 << 30
HEADS = 1 << 12
FUNCTIONS = ("tanh", "exp", "log", "sqrt", "abs", "floor", "minimum", "maximum", "where")

_BOOL = (
    "a traced value has no truth: if, while, and, or, not, min, max and a < b < c cannot look at it; write "
    "where(condition, a, b) for a choice, & | ~ between conditions in parentheses, minimum and maximum for min "
    "and max"
)
_NUMBER = (
    "a traced value is no number yet: range, int, float, math functions and lists cannot use it; write "
    f"{', '.join(FUNCTIONS)} from dovetail.ops.template, and keep lists of numbers as attributes of the variant"
)
_LOOP = "a traced value cannot be looped over; loop over numbers that depend on no score, position or head"
_TENSOR = (
    "a tensor cannot be part of a traced expression; keep numbers, or a sequence of them to index, as attributes "
    "of the variant"
)
_POWER = "of powers only x ** 2 and x ** 3 can be traced; write sqrt(x) or exp(y * log(x))"
_FLOAT_DIVISION = "// and % are for positions and other whole numbers; write floor(a / b) for fractions"
_CONDITION = "is for conditions; they come from comparisons"


class Range(NamedTuple):
    """The least and the largest value that an int may have."""

    low: int
    high: int


class Expr:
    """A node: an operation on other nodes, or an input, a constant, a parameter. Equality of nodes is identity.

    op: its name. value: the input's name, the constant, the parameter's number, or the table that is read.
    range: of an int. inputs: those it depends on, of score, q_pos, k_pos, head.
    """

    __slots__ = ("args", "inputs", "kind", "op", "range", "value")
    __array_ufunc__ = None  # so that numpy's numbers leave arithmetic to this class
    __hash__ = object.__hash__

    def __init__(
        self, op: str, kind: Kind, args: tuple[Expr, ...] = (), value: Any = None, range: Range | None = None
    ) -> None:
        self.op = op
        self.kind = kind
        self.args = args
        self.value = value
        self.range = range
        own = frozenset({value}) if op == "input" else frozenset()
        self.inputs: frozenset[str] = own.union(*(a.inputs for a in args))
        if range is not None and not -(1 << 63) <= range.low <= range.high < 1 << 63:
            raise TraceError("whole numbers may exceed 64 bits here; begin with 1.0 * to compute in fractions")

    def __add__(self, other: Any) -> Any:
        return build("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return build("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return build("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return build("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return build("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return build("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return build("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return build("div", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return build("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return build("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return build("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return build("mod", other, self)

    def __pow__(self, other: Any) -> Any:
        return build("pow", self, other)

    def __rpow__(self, other: Any) -> Any:
        return build("pow", other, self)

    def __neg__(self) -> Any:
        return build("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return build("abs", self)

    def __lt__(self, other: Any) -> Any:
        return build("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return build("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return build("lt", other, self)

    def __ge__(self, other: Any) -> Any:
        return build("le", other, self)

    def __eq__(self, other: object) -> Any:
        return build("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return build("ne", self, other)

    def __and__(self, other: Any) -> Any:
        return build("and", self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return build("or", self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Any:
        return build("xor", self, other)

    __rxor__ = __xor__

    def __invert__(self) -> Any:
        return build("not", self)

    def __bool__(self) -> bool:
        raise TraceError(_BOOL)

    def __index__(self) -> int:
        raise TraceError(_NUMBER)

    def __int__(self) -> int:
        raise TraceError(_NUMBER)

    def __float__(self) -> float:
        raise TraceError(_NUMBER)

    def __iter__(self) -> Any:
        raise TraceError(_LOOP)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """torch.tanh and its like, for definitions that were written for tensors."""
        name = getattr(function, "__name__", "")
        if name not in FUNCTIONS or kwargs:
            tensors = any(hasattr(a, "__torch_function__") and not isinstance(a, Expr) for a in args)
            raise TraceError(_TENSOR if tensors else f"torch.{name} is not one of {', '.join(FUNCTIONS)}")
        return build(name, *args)


class Parameter(Expr):
    """A number that a kernel is called with, or what Python has computed from such numbers.

    It behaves like the number: it may be compared and used in `if`, `range` and math functions. Only the value
    that remains in the expression can change without a new kernel.
    """

    __slots__ = ("name",)

    def __init__(self, value: float, name: str) -> None:
        if isinstance(value, Integral):
            super().__init__("param", "int", (), int(value), Range(int(value), int(value)))
        else:
            super().__init__("param", "float", (), float(value))
        self.name = name if len(name) <= 60 else f"{name[:57]}..."

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return operator.index(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)


class Table(tuple):
    """Numbers that can be indexed by a tensor, by a traced value, and as the tuple that they are.

    A tensor [...] of int64 gives float32 [...], or int64 if all the numbers are whole.
    """

    name: str

    def __new__(cls, values: Sequence[float], name: str) -> Table:
        self = super().__new__(cls, values)
        self.name = name
        return self

    @property
    def whole(self) -> bool:
        return all(isinstance(v, Integral) for v in self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray):
            return np.array(self, np.int64 if self.whole else np.float32)[index]
        if isinstance(index, Parameter) or not hasattr(index, "__torch_function__"):
            return super().__getitem__(index)
        if isinstance(index, Expr):
            return _load(self, index)
        dtype = torch.int64 if self.whole else torch.float32
        return torch.tensor(self, dtype=dtype, device=index.device)[index]


def _load(table: Table, index: Expr) -> Expr:
    if index.kind != "int" or index.range is None:
        raise TraceError(f"{table.name}[...] takes a whole number, not a {index.kind}")
    if index.range.low < 0:
        raise TraceError(f"the index of {table.name} may be negative; write maximum(index, 0)")
    if index.range.high >= len(table) and not index.inputs <= {"head"}:
        last = len(table) - 1
        raise TraceError(f"the index of {table.name} may be above its last, {last}; write minimum(index, {last})")
    if not table.whole:
        return Expr("load", "float", (index,), table)
    if max(map(abs, table)) > 1 << 24:
        raise TraceError(f"whole numbers in {table.name} must be within 2^24 of zero")
    return Expr("load", "int", (index,), table, Range(min(table), max(table)))


def build(op: str, *args: Any) -> Any:
    """The node for `op` on nodes and numbers. Raises TraceError.

    Where all are parameters or numbers, Python computes the result: a Parameter again, or a bool.
    """
    if all(isinstance(a, (Parameter, Real)) for a in args):
        value = PYTHON[op](*(a.value if isinstance(a, Parameter) else a for a in args))
        if isinstance(value, bool):
            return value
        names = ", ".join(a.name if isinstance(a, Parameter) else repr(a) for a in args)
        return Parameter(value, f"{op}({names})")
    if op == "where" and isinstance(args[0], (bool, Parameter)):
        return args[1] if args[0] else args[2]
    return _RULES[op](op, *(as_expr(a) for a in args)) if op != "pow" else _power(*args)


def as_expr(value: Any) -> Expr:
    """A node, or the constant of a number. Raises TraceError for anything else."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return Expr("const", "bool", (), value)
    if isinstance(value, Integral):
        return Expr("const", "int", (), int(value), Range(int(value), int(value)))
    if isinstance(value, Real):
        return Expr("const", "float", (), float(value))
    if hasattr(value, "__torch_function__"):
        raise TraceError(_TENSOR)
    raise TraceError(f"{type(value).__name__} {value!r} cannot be part of a traced expression")


def _floats(*args: Expr) -> tuple[Expr, ...]:
    return tuple(a if a.kind == "float" else _to_float(a) for a in args)


def _to_float(a: Expr) -> Expr:
    if a.op != "const":
        return Expr("float", "float", (a,))
    try:
        return Expr("const", "float", (), float(a.value))
    except OverflowError:
        raise TraceError(f"{a.value} is too large for a float") from None


def _promote(op: str, *args: Expr) -> tuple[Expr, ...]:
    """Arguments of one numeric kind: float if any is."""
    if any(a.kind == "bool" for a in args):
        raise TraceError(f"a condition is no number in {op}; write where(condition, 1, 0)")
    return args if all(a.kind == "int" for a in args) else _floats(*args)


def _arithmetic(op: str, *given: Expr) -> Expr:
    args = _promote(op, *given)
    ranges = [a.range for a in args if a.range is not None]
    if args[0].kind == "float":
        return Expr(op, "float", args)
    return Expr(op, "int", args, range=_RANGES[op](*ranges))


def _division(op: str, a: Expr, b: Expr) -> Expr:
    return Expr(op, "float", _floats(*_promote(op, a, b)))


def _whole_division(op: str, a: Expr, b: Expr) -> Expr:
    a, b = _promote(op, a, b)
    if a.range is None or b.range is None:
        raise TraceError(_FLOAT_DIVISION)
    if b.range.low <= 0 <= b.range.high:
        raise TraceError("the divisor of // or % may be zero here; write maximum(divisor, 1)")
    return Expr(op, "int", (a, b), range=_RANGES[op](a.range, b.range))


def _power(base: Any, exponent: Any) -> Any:
    exponent = exponent.value if isinstance(exponent, Parameter) else exponent
    if not isinstance(base, Expr) or isinstance(exponent, Expr) or exponent not in (2, 3):
        raise TraceError(_POWER)
    return base * base if exponent == 2 else base * base * base


def _function(op: str, a: Expr) -> Expr:
    return Expr(op, "float", _floats(*_promote(op, a)))


def _floor(op: str, a: Expr) -> Expr:
    return a if a.kind == "int" else _function(op, a)


def _compare(op: str, a: Expr, b: Expr) -> Expr:
    return Expr(op, "bool", _promote("a comparison", a, b))


def _logic(op: str, *args: Expr) -> Expr:
    if any(a.kind != "bool" for a in args):
        sign = {"and": "&", "or": "|", "xor": "^", "not": "~"}[op]
        raise TraceError(f"{sign} {_CONDITION}")
    return Expr(op, "bool", args)


def _where(op: str, condition: Expr, a: Expr, b: Expr) -> Expr:
    if condition.kind != "bool":
        raise TraceError(f"the first argument of where {_CONDITION}")
    if a.kind == b.kind == "bool":
        return Expr(op, "bool", (condition, a, b))
    a, b = _promote(op, a, b)
    if a.range is None or b.range is None:
        return Expr(op, "float", (condition, a, b))
    both = Range(min(a.range.low, b.range.low), max(a.range.high, b.range.high))
    return Expr(op, "int", (condition, a, b), range=both)


def _corners(f: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    """The range of a function that is monotone in each argument."""

    def bounds(a: Range, b: Range) -> Range:
        values = [f(x, y) for x in a for y in b]
        return Range(min(values), max(values))

    return bounds


def _remainders(a: Range, b: Range) -> Range:
    if b.low < 0:
        return Range(b.low + 1, 0)
    inside = a.low >= 0 and a.high < b.low
    return a if inside else Range(0, b.high - 1)


def _magnitudes(a: Range) -> Range:
    largest = max(abs(a.low), abs(a.high))
    return Range(0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high)), largest)


_RANGES: dict[str, Callable[..., Range]] = {
    "add": lambda a, b: Range(a.low + b.low, a.high + b.high),
    "sub": lambda a, b: Range(a.low - b.high, a.high - b.low),
    "mul": _corners(operator.mul),
    "floordiv": _corners(operator.floordiv),
    "mod": _remainders,
    "neg": lambda a: Range(-a.high, -a.low),
    "abs": _magnitudes,
    "minimum": _corners(min),
    "maximum": _corners(max),
}

_RULES: dict[str, Callable[..., Expr]] = {
    **dict.fromkeys(("add", "sub", "mul", "neg", "abs", "minimum", "maximum"), _arithmetic),
    **dict.fromkeys(("floordiv", "mod"), _whole_division),
    **dict.fromkeys(("lt", "le", "eq", "ne"), _compare),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("tanh", "exp", "log", "sqrt"), _function),
    "div": _division,
    "floor": _floor,
    "where": _where,
}

# What tensors and Python's own numbers have in common.
OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "neg": operator.neg,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
}

# What Python's own numbers do, for parameters and for definitions that are called with numbers.
PYTHON: dict[str, Callable[..., Any]] = {
    **OPERATORS,
    "pow": operator.pow,
    "tanh": math.tanh,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "abs": abs,
    "floor": math.floor,
    "minimum": min,
    "maximum": max,
    "where": lambda condition, a, b: a if condition else b,
}
