"""Attention variants from one definition (docs/attention.md).

A `dovetail.core.seams.Variant` is written once, with operators and the functions below. `trace` turns it into an
expression. From that come a torch evaluator (`Traced.torch`), a native function (`compile_variant`) and facts that
let kernels do less (`Traced.is_causal`, `window`).
"""

import builtins

from dovetail.ops.template.compiled import Compiled, compile_variant
from dovetail.ops.template.errors import CompileError, TemplateError, TraceError
from dovetail.ops.template.functions import exp, floor, log, maximum, minimum, sqrt, tanh, where
from dovetail.ops.template.tracing import Traced, trace, with_tables
from dovetail.ops.template.variants import ALiBi, BlockDiagonal, Sinks, SoftCap
from dovetail.ops.template.windows import window

abs = builtins.abs

__all__ = [
    "ALiBi",
    "BlockDiagonal",
    "CompileError",
    "Compiled",
    "Sinks",
    "SoftCap",
    "TemplateError",
    "TraceError",
    "Traced",
    "abs",
    "compile_variant",
    "exp",
    "floor",
    "log",
    "maximum",
    "minimum",
    "sqrt",
    "tanh",
    "trace",
    "where",
    "window",
    "with_tables",
]
