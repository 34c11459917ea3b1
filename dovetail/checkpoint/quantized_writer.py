"""Quantized weights as other programs read them: the layouts of the compressed-tensors library.

What is read here is in `compressed_tensors`. Codes are stored as they are, so nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dovetail.checkpoint import own_format
from dovetail.checkpoint.own_format import HEAD, entry
from dovetail.checkpoint.safetensors_writer import Entry
from dovetail.ops.schemes import Scheme
from dovetail.ops.stored import StoredTensor

VERSION = "0.17.0"  # of compressed-tensors, since when the layouts are as written here
_TYPES = {"I4": (4, "int"), "I8": (8, "int"), "F8": (8, "float")}
_FORMATS = {"I4": "pack-quantized", "I8": "int-quantized", "F8": "float-quantized"}
_ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "int16": None,
    "int8-token": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8-token": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
}


def entries(stored: StoredTensor) -> Iterator[Entry]:
    """The tensors of a quantized weight in a file."""
    if stored.format not in _FORMATS:
        yield from own_format.entries(stored)
        return
    scale = entry(f"{stored.name}_scale", stored.parts["scale"])
    if stored.format == "I4":
        words = np.ascontiguousarray(stored.data).view(np.int32)
        yield entry(f"{stored.name}_packed", words)
        yield scale
        yield entry(f"{stored.name}_shape", np.array(stored.shape, np.int64))
        return
    kind = "I8" if stored.format == "I8" else "F8_E4M3"
    yield Entry(stored.name, kind, stored.shape, stored.data.nbytes, lambda: stored.data)
    yield scale


def quantization_config(linear: Scheme, head: Scheme | None) -> dict[str, Any]:
    """The object for config.json. linear: of all linear layers of the blocks. head: of lm_head, if it has one."""
    if linear.format not in _FORMATS:
        return own_format.config(linear.format, head is not None)
    groups = [_group(linear, "Linear"), *([_group(head, HEAD)] if head is not None else [])]
    forms = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [HEAD] if head is None else [],
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, target: str) -> dict[str, Any]:
    bits, kind = _TYPES[scheme.format]
    how: dict[str, Any] = (
        {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    )
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **how}
    return {
        "targets": [target],
        "format": _FORMATS[scheme.format],
        "weights": weights,
        "input_activations": _ACTIVATIONS[scheme.activation],
        "output_activations": None,
    }
