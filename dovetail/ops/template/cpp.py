"""Prints programs as C++17: one function that a compiler turns into vector code.

The body has no branch. Arithmetic is float32, or exact on whole numbers of 32 bits, or of 64 bits where the range
needs them. tanh, exp and log are polynomials (after Cephes, S. Moshier), because calls into libm are not
vectorised. Their relative error is below 2e-7 where the result is a normal number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dovetail.ops.template.program import Program, Step

SYMBOL = "dovetail_variant"
SIGNATURE = (
    f"void {SYMBOL}(float* __restrict scores, const int32_t* __restrict k_pos, int32_t n, int32_t q_pos, "
    "int32_t head, const float* __restrict params)"
)


def cpp(program: Program) -> str:
    """The C++ source of a program with two results, score and readable. It contains no parameter's value."""
    printer = _Cpp(program)
    done = program.fold(printer)
    score, readable = (done[i] for i in program.results)
    names = [f"//   params[{i}]: {name}" for i, name in enumerate(program.names)]
    tables = [f"//   params[{program.offset(i)}...]: {len(t)} of {t.name}" for i, t in enumerate(program.tables)]
    return "\n".join(
        [
            "// scores[i] becomes the new score of key k_pos[i], or -inf where the query must not read it.",
            *names,
            *tables,
            "#include <cstdint>",
            *((_INLINE,) if printer.helpers else ()),
            "",
            *(_HELPERS[h] for h in _HELPERS if h in printer.helpers),
            f'extern "C" {SIGNATURE} {{',
            *(f"    {line}" for line in printer.before),
            "    for (int32_t i = 0; i < n; ++i) {",
            *(f"        {line}" for line in printer.body),
            f"        scores[i] = {readable} ? {score} : -__builtin_inff();",
            "    }",
            "}",
            "",
        ]
    )


def params(program: Program) -> np.ndarray:
    """The float32 array that the function of a program is called with."""
    numbers = [*program.parameters, *(v for table in program.tables for v in table)]
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


class _Cpp:
    """The language: each step becomes a named value. It stands before the loop if it depends on no key and no
    score."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.before: list[str] = []
        self.body: list[str] = []
        self.helpers: set[str] = set()
        self.wide: dict[str, bool] = {}  # which int values have 64 bits

    def step(self, step: Step, args: Sequence[str]) -> str:
        if step.op == "input" and step.value in ("q_pos", "head"):
            self.wide[step.value] = False
            return str(step.value)
        varying = bool(step.inputs & {"score", "k_pos"})
        lines = self.body if varying else self.before
        name = f"{'v' if varying else 'u'}{len(lines)}"
        wide = _wide(step)
        kind = {"float": "float", "bool": "bool", "int": "int64_t" if wide else "int32_t"}[step.kind]
        lines.append(f"const {kind} {name} = {self._value(step, args, kind)};")
        self.wide[name] = wide
        return name

    def _value(self, step: Step, args: Sequence[str], kind: str) -> str:
        if step.op == "input":
            return {"score": "scores[i]", "k_pos": "k_pos[i]"}[step.value]
        if step.op == "const":
            return _literal(step)
        cast = "" if step.kind == "float" else f"({kind})"
        if step.op == "param":
            return f"{cast}params[{step.value}]"
        if step.op == "load":
            table, start = self.program.tables[step.value], self.program.offset(step.value)
            last = len(table) - 1
            return f"{cast}params[{start} + ({args[0]} < {last} ? {args[0]} : {last})]"
        self.helpers |= {step.op, *_USES.get(step.op, ())} & _HELPERS.keys()
        if step.kind == "int" and step.op != "where":
            return self._whole(step, args, kind)
        return _FORMS[step.op].format(*args)

    def _whole(self, step: Step, args: Sequence[str], kind: str) -> str:
        """Arithmetic on whole numbers, in 64 bits if an argument or the result needs them."""
        wide = _wide(step) or any(self.wide[a] for a in args)
        same = [a if self.wide[a] == wide else f"(int64_t){a}" for a in args]
        value = (_WHOLE.get(step.op) or _FORMS[step.op]).format(*same)
        return f"({kind})({value})" if wide and not _wide(step) else value


def _wide(step: Step) -> bool:
    return step.range is not None and not -(1 << 31) <= step.range.low <= step.range.high < 1 << 31


def _literal(step: Step) -> str:
    if step.kind == "bool":
        return "true" if step.value else "false"
    if step.kind == "int":
        if step.value == -(1 << 63):  # C++ has no negative literals
            return "INT64_MIN"
        return f"INT64_C({step.value})"
    with np.errstate(over="ignore"):
        value = np.float32(step.value)
    if np.isnan(value):
        return '__builtin_nanf("")'
    if np.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inff()"
    digits = format(value, ".9g")
    return f"{digits}f" if any(c in digits for c in ".e") else f"{digits}.0f"


_FORMS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "float": "(float){0}",
    "neg": "-{0}",
    "not": "!{0}",
    "abs": "__builtin_fabsf({0})",
    "floor": "__builtin_floorf({0})",
    "sqrt": "__builtin_sqrtf({0})",
    "tanh": "tanh_approx({0})",
    "exp": "exp_approx({0})",
    "log": "log_approx({0})",
    "minimum": "least({0}, {1})",
    "maximum": "largest({0}, {1})",
    "where": "{0} ? {1} : {2}",
}

_WHOLE = {
    "abs": "{0} < 0 ? -{0} : {0}",
    "floordiv": "floor_div({0}, {1})",
    "mod": "{0} - {1} * floor_div({0}, {1})",
}

_USES = {"mod": ("floordiv",), "tanh": ("exp", "bits"), "exp": ("bits",), "log": ("bits",)}

# A call that stays one keeps the loop from becoming vector code.
_INLINE = "#define INLINE static inline __attribute__((always_inline))"

_HELPERS = {
    "bits": """\
INLINE uint32_t bits_of(float x) {
    uint32_t b;
    __builtin_memcpy(&b, &x, 4);
    return b;
}

INLINE float of_bits(uint32_t b) {
    float x;
    __builtin_memcpy(&x, &b, 4);
    return x;
}
""",
    "minimum": """\
// The lesser; nan if one is.
template <class T> INLINE T least(T a, T b) { return (a < b) | (a != a) ? a : b; }
""",
    "maximum": """\
// The larger; nan if one is.
template <class T> INLINE T largest(T a, T b) { return (a > b) | (a != a) ? a : b; }
""",
    "floordiv": """\
// Rounded down. The quotient of 32-bit numbers is further from the next whole number than a double's rounding.
INLINE int32_t floor_div(int32_t a, int32_t b) { return (int32_t)__builtin_floor((double)a / (double)b); }

INLINE int64_t floor_div(int64_t a, int64_t b) {
    const int64_t q = a / b, r = a - q * b;
    return q - (int64_t)((r != 0) & ((r < 0) != (b < 0)));
}
""",
    "exp": """\
// x = k ln 2 + r with |r| <= ln(2) / 2, and e^r by a polynomial; 2^k in two factors, for results near 0 and inf.
INLINE float exp_approx(float x) {
    const float limited = x > 90.0f ? 90.0f : x < -105.0f ? -105.0f : x;  // nan stays
    const float shifted = limited * 1.44269504f + 12582912.0f;
    const float whole = shifted - 12582912.0f;
    const int32_t k = (int32_t)(bits_of(shifted) - 0x4b400000u);
    const float r = limited - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t half = k >> 1;
    const float low = of_bits((uint32_t)(half + 127) << 23), high = of_bits((uint32_t)(k - half + 127) << 23);
    return p * low * high;
}
""",
    "log": """\
// x = m 2^k with m between sqrt(1/2) and sqrt(2), and log m by a polynomial.
INLINE float log_approx(float x) {
    const bool small = x < 1.17549435e-38f;
    const uint32_t b = bits_of(small ? x * 8388608.0f : x);
    const uint32_t shifted = b - 0x3f3504f3u;
    const float k = (float)((int32_t)shifted >> 23) - (small ? 23.0f : 0.0f);
    const float f = of_bits((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float z = f * f;
    const float tail = f * z * p - k * 2.12194440e-4f - 0.5f * z;
    const float value = f + tail + k * 0.693359375f;
    const float inf = __builtin_inff();
    const float special = x == 0.0f ? -inf : x == inf ? inf : __builtin_nanf("");
    return (x > 0.0f) & (x < inf) ? value : special;
}
""",
    "tanh": """\
// A polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
INLINE float tanh_approx(float x) {
    const float a = __builtin_fabsf(x);
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float far = 1.0f - 2.0f / (exp_approx(a + a) + 1.0f);
    const float near = p * z * x + x;
    return a < 0.625f ? near : x < 0.0f ? -far : far;
}
""",
}
