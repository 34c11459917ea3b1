"""Quantized weights as GPTQ and AWQ store them. Both have a weight [N, K] transposed: K inputs by N outputs.

Codes u are unsigned, fields of int32 words from the lowest bits on, and values are (u - zero) scale.

- gptq: `qweight` [K bits / 32, N], packed along K. `qzeros` [groups, N bits / 32], less 1 unless checkpoint_format
  is gptq_v2. `scales` [groups, N]. `g_idx` [K], the group of each input: with act-order (desc_act) groups are not
  of neighbours.
- awq: `qweight` [K, N bits / 32], packed along N, in an order of its own. `qzeros` [groups, N bits / 32], packed
  alike. `scales` [groups, N].
"""

from __future__ import annotations

from functools import partial

import numpy as np

from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.quantized_weight import (
    Array,
    Grid,
    Module,
    QuantizedWeight,
    by_group,
    num_groups,
    unpacked,
)
from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.core.errors import ModelError
from dovetail.ops.stored import StoredTensor

# Which of 32 / bits neighbouring columns each field of AWQ's words holds.
INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def gptq(config: Fields, folder: SafetensorsFolder) -> dict[str, QuantizedWeight]:
    """The quantized weights by name. ModelError naming what is not supported, or what does not fit."""
    bits, size = _grid(config, "bits", "group_size")
    if config.object("dynamic") is not None:
        raise ModelError(f"{config.source}: dynamic: bits that differ by layer are not supported")
    kind = config.text("checkpoint_format", "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise config.wrong("checkpoint_format", kind, "gptq or gptq_v2")
    less = 1 if kind == "gptq" else 0
    return {f"{m.name}.weight": _gptq_weight(m, bits, size, less) for m in _modules(folder)}


def awq(config: Fields, folder: SafetensorsFolder) -> dict[str, QuantizedWeight]:
    """As `gptq`."""
    bits, size = _grid(
        config, *(("w_bit", "q_group_size") if "w_bit" in config.values else ("bits", "group_size"))
    )
    version = config.text("version", "gemm").lower()
    if version != "gemm":
        raise config.wrong("version", version, "gemm")
    return {f"{m.name}.weight": _awq_weight(m, bits, size) for m in _modules(folder)}


def _grid(config: Fields, bits: str, size: str) -> tuple[int, int]:
    """Bits, and columns of a group: 0 for whole rows."""
    found = config.integer(bits)
    if found not in (4, 8):
        raise config.wrong(bits, found, "4 or 8")
    return found, 0 if config.values.get(size) in (-1, None) else config.integer(size)


def _modules(folder: SafetensorsFolder) -> list[Module]:
    found = [m for m in (Module(folder, name) for name in folder.modules()) if "qweight" in m]
    if not found:
        raise ModelError(
            f"{folder.path}: quantization_config says that it is quantized, but no tensor is a qweight"
        )
    return found


def _gptq_weight(module: Module, bits: int, size: int, less: int) -> QuantizedWeight:
    words, n = _matrix(module, "qweight")
    k, form = words * 32 // bits, f"I{bits}"
    groups = num_groups(module, k, size or k)
    module.check("scales", (groups, n))

    def read(name: str) -> StoredTensor:
        u = unpacked(module.array("qweight", "I32").T, bits, k)
        zeros = module.array("qzeros", "I32", shape=[(groups, -(-n * bits // 32))])
        zero = unpacked(zeros, bits, n).T.astype(np.int16) + np.int16(less)
        order = None
        if "g_idx" in module:
            order = by_group(module, module.array("g_idx", "I32", shape=[(k,)]), groups)
        return _stored(module, name, u if order is None else u[:, order], bits, (zero, order))

    return module.weight((n, k), form, "int16", read)


def _awq_weight(module: Module, bits: int, size: int) -> QuantizedWeight:
    k, words = _matrix(module, "qweight")
    n = words * 32 // bits
    groups = num_groups(module, k, size or k)
    module.check("scales", (groups, n))
    return module.weight((n, k), f"I{bits}", "int16", partial(_awq_stored, module, bits, (n, groups)))


def _awq_stored(module: Module, bits: int, shape: tuple[int, int], name: str) -> StoredTensor:
    n, groups = shape
    u = _interleaved(module.array("qweight", "I32"), bits, n)
    zero = np.full((groups, n), 1 << (bits - 1), np.int16)
    if "qzeros" in module:
        words = module.array("qzeros", "I32", shape=[(groups, n * bits // 32)])
        zero = _interleaved(words, bits, n).astype(np.int16)
    return _stored(module, name, u.T, bits, (zero.T, None))


def _matrix(module: Module, part: str) -> tuple[int, int]:
    shape = module.shape(part)
    if len(shape) != 2 or module.kind(part) != "I32" or 0 in shape:
        raise module.wrong(f"its {part} is {module.kind(part)} {list(shape)}, not an int32 matrix")
    return shape[0], shape[1]


def _interleaved(words: Array, bits: int, n: int) -> Array:
    """int32 [rows, n bits / 32] -> uint8 [rows, n]."""
    fields = unpacked(words, bits, n)
    out = np.empty_like(fields)
    per = 32 // bits
    columns = np.arange(n).reshape(-1, per)[:, INTERLEAVE[bits]].reshape(-1)
    out[:, columns] = fields
    return out


def _stored(module: Module, name: str, u: Array, bits: int, grid: tuple[Array, Array | None]) -> StoredTensor:
    """From unsigned codes u [N, K] and zero points [N, groups]."""
    half, (zero, order) = 1 << (bits - 1), grid
    scale = np.ascontiguousarray(module.scales("scales", [zero.T.shape]).T)
    q = (u - np.uint8(half)).view(np.int8)
    return Grid(scale, np.ascontiguousarray(zero - np.int16(half)), order).stored(name, q, bits, "int16")
