"""Finds how far back a variant can read, so that kernels may skip earlier blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from dovetail.ops.template.expression import POSITIONS
from dovetail.ops.template.program import Program, Step
from dovetail.ops.template.tracing import Traced

_NEVER = -1.0
_MOST_CHOICES = 6


def window(traced: Traced) -> int | None:
    """The largest q_pos - k_pos that can be readable for any q_pos and head, or a number above it.

    None: the mask sets no such limit, or none that this analysis finds. It understands comparisons of sums,
    differences and multiples of positions and whole numbers. They may go through // and %, abs, minimum, maximum
    and tables, and be joined by & | ~ and where.
    """
    analysis = _Analysis(traced.program)
    bound = analysis.true[traced.program.results[1]]
    return None if bound >= POSITIONS else max(0, int(bound))


@dataclass(frozen=True)
class _Linear:
    """constant + the sum of factor x step."""

    constant: Fraction = Fraction(0)
    factors: dict[int, Fraction] = field(default_factory=dict)

    def plus(self, other: _Linear, times: Fraction = Fraction(1)) -> _Linear:
        factors = dict(self.factors)
        for step, factor in other.factors.items():
            factors[step] = factors.get(step, Fraction(0)) + factor * times
        return _Linear(self.constant + other.constant * times, {s: f for s, f in factors.items() if f})


class _Analysis:
    """Passes over the steps. `true` and `false` are the largest distances at which a condition can be so."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps = program.steps
        self.forms: list[_Linear] = []
        self.true: list[float] = []
        self.false: list[float] = []
        for i, step in enumerate(self.steps):
            self.forms.append(self._form(i, step))
            true, false = self._distances(step) if step.kind == "bool" else (math.inf, math.inf)
            self.true.append(true)
            self.false.append(false)

    def _form(self, i: int, step: Step) -> _Linear:
        if step.kind != "int":
            return _Linear()
        forms = [self.forms[a] for a in step.args]
        if step.op == "const":
            return _Linear(Fraction(step.value))
        if step.op == "param":
            return _Linear(Fraction(self.program.parameters[step.value]))
        if step.op in ("add", "sub"):
            return forms[0].plus(forms[1], Fraction(1 if step.op == "add" else -1))
        if step.op == "neg":
            return _Linear().plus(forms[0], Fraction(-1))
        if step.op == "mul" and not (forms[0].factors and forms[1].factors):
            number, other = sorted(forms, key=lambda f: len(f.factors))
            return _Linear().plus(other, number.constant)
        return _Linear(factors={i: Fraction(1)})

    def _distances(self, step: Step) -> tuple[float, float]:
        args = step.args
        if step.op == "const":
            return (math.inf, _NEVER) if step.value else (_NEVER, math.inf)
        if step.op in ("and", "or", "not"):
            true, false = ([side[a] for a in args] for side in (self.true, self.false))
            if step.op == "not":
                return false[0], true[0]
            return (min(true), max(false)) if step.op == "and" else (max(true), min(false))
        if step.op == "where":
            return self._choice(self.true, args), self._choice(self.false, args)
        if step.op in ("lt", "le", "eq", "ne") and self.steps[args[0]].kind == "int":
            return self._comparison(step.op, self.forms[args[0]], self.forms[args[1]])
        return math.inf, math.inf

    def _choice(self, side: list[float], args: tuple[int, ...]) -> float:
        condition, a, b = args
        return max(min(self.true[condition], side[a]), min(self.false[condition], side[b]))

    def _comparison(self, op: str, a: _Linear, b: _Linear) -> tuple[float, float]:
        above, below = b.plus(a, Fraction(-1)), a.plus(b, Fraction(-1))  # b - a and a - b
        one = _Linear(Fraction(-1))
        if op in ("eq", "ne"):
            equal = min(self._distance(above), self._distance(below))
            return (equal, math.inf) if op == "eq" else (math.inf, equal)
        if op == "lt":
            return self._distance(above.plus(one)), self._distance(below)
        return self._distance(above), self._distance(below.plus(one))

    def _distance(self, form: _Linear) -> float:
        """The largest q_pos - k_pos with form >= 0. Several bounds of the form from above are tried; the least
        result counts."""
        return min((self._of_positions(f) for f in self._above(form, _MOST_CHOICES)), default=math.inf)

    def _above(self, form: _Linear, choices: int) -> Iterator[_Linear]:
        """Forms of positions only that are never less than `form`."""
        last = max((s for s in form.factors if not self._is_position(s)), default=None)
        if last is None:
            yield form
            return
        factor = form.factors[last]
        rest = form.plus(_Linear(factors={last: -factor}))
        bounds = list(self._bounds(last, factor > 0))
        for bound in bounds[: 2 if choices else 1]:
            yield from self._above(rest.plus(bound, factor), choices - (len(bounds) > 1))

    def _bounds(self, i: int, upper: bool) -> Iterator[_Linear]:
        """Forms that are never below (never above, unless `upper`) the value of a step, the sharpest first."""
        step = self.steps[i]
        forms = [self.forms[a] for a in step.args]
        if step.op == "floordiv" and not forms[1].factors and forms[1].constant > 0:
            divisor = forms[1].constant
            below = Fraction(0) if upper else 1 - divisor
            yield _Linear().plus(forms[0].plus(_Linear(below)), 1 / divisor)
        elif step.op == "abs" and not upper:
            yield from (forms[0], _Linear().plus(forms[0], Fraction(-1)))
        elif step.op == ("minimum" if upper else "maximum"):
            yield from forms
        elif step.range is not None:
            yield _Linear(Fraction(step.range.high if upper else step.range.low))

    def _is_position(self, i: int) -> bool:
        return self.steps[i].value in ("q_pos", "k_pos") and self.steps[i].op == "input"

    def _of_positions(self, form: _Linear) -> float:
        """With q_pos = k_pos + d and k_pos >= 0: (q + k) k_pos + q d + constant >= 0, which bounds d where
        q < 0 and q + k <= 0."""
        by_name = {self.steps[s].value: f for s, f in form.factors.items()}
        q, k = by_name.get("q_pos", Fraction(0)), by_name.get("k_pos", Fraction(0))
        if q > 0 or q + k > 0:
            return math.inf
        if q == 0:
            return _NEVER if form.constant < 0 else math.inf
        return max(_NEVER, math.floor(form.constant / -q))
