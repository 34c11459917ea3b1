"""Translates a Variant for the native attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dovetail.core.seams import SlidingWindow, Variant
from dovetail.ops.template import TraceError, compile_variant, trace, window
from dovetail.ops.template.expression import POSITIONS

WIDEST = POSITIONS  # no key is farther away, and the native side counts in 32 bits


@dataclass(frozen=True)
class KernelVariant:
    """A Variant as the native attention takes it.

    window: keys that may be read, 0 for all. address: a compiled function, 0 for none. `held` keeps it alive.
    """

    window: int
    address: int
    params: list[float]
    held: Any = None


def kernel_variant(variant: Variant, num_heads: int) -> KernelVariant:
    """The variant for the kernels. Windows are native; other scores and masks are compiled on first use.

    Raises TemplateError where the definition cannot be traced or compiled. The caller then uses the reference.
    """
    if type(variant) is Variant:
        return KernelVariant(0, 0, [])
    if type(variant) is SlidingWindow:
        inner = kernel_variant(variant.inner, num_heads)
        narrow = min(variant.window, inner.window or variant.window, WIDEST)
        return KernelVariant(narrow, inner.address, inner.params, inner.held)
    traced = trace(variant)
    if traced.is_causal:
        return KernelVariant(0, 0, [])
    if traced.num_heads is not None and traced.num_heads < num_heads:
        raise TraceError(f"{variant!r} covers {traced.num_heads} heads, the model has {num_heads}")
    reach, compiled = window(traced), compile_variant(traced)
    narrow = 0 if reach is None else min(reach + 1, WIDEST)
    return KernelVariant(narrow, compiled.address, compiled.params.tolist(), compiled)
