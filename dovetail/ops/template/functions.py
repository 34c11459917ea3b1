"""The functions of a variant's definition, on tensors, on traced values and on Python's numbers alike.

On tensors they are torch's, with numbers allowed in every place; whole numbers become float32 where a fraction
results. Kernels compute tanh, exp and log within 2e-7 of the exact value (relative), the others exactly rounded.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

from dovetail.ops.template.expression import PYTHON, Expr, build


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return _call("tanh", x)


def exp(x: Any) -> Any:
    """e to the x."""
    return _call("exp", x)


def log(x: Any) -> Any:
    """Natural logarithm: -inf at zero, nan below."""
    return _call("log", x)


def sqrt(x: Any) -> Any:
    """Square root: nan below zero."""
    return _call("sqrt", x)


def floor(x: Any) -> Any:
    """The largest whole number that is not above x; of tensors, as a float."""
    return _call("floor", x)


def minimum(a: Any, b: Any) -> Any:
    """The lesser of two; nan if one is."""
    return _call("minimum", a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two; nan if one is."""
    return _call("maximum", a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`. Both are computed everywhere."""
    return _call("where", condition, a, b)


def _call(op: str, *args: Any) -> Any:
    if any(isinstance(a, Expr) for a in args):
        return build(op, *args)
    if all(isinstance(a, Real) for a in args):
        return PYTHON[op](*args)
    from dovetail.ops.template.evaluate import TORCH

    return TORCH[op](*args)
