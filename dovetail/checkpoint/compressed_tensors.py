"""Quantized weights as the compressed-tensors library stores them.

config.json's quantization_config has groups of layers. Each group names its layers, how their weights are stored,
and how rows of activations are quantized. A weight [N, K] with g columns in a group is these tensors:

- float-quantized: `weight` e4m3 [N, K]; `weight_scale` [N, 1], [N, K / g], [1], or one for each block.
- int-quantized: `weight` int8 [N, K]; `weight_scale` as above; `weight_zero_point` int8 if it is asymmetric.
- pack-quantized: `weight_packed` int32 [N, K bits / 32] of q + 2^(bits - 1), lowest bits first; `weight_scale`;
  `weight_shape` [2]; `weight_zero_point` int32, packed along N; `weight_g_idx` [K], the group of each column.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.quantized_weight import (
    Array,
    Grid,
    Module,
    QuantizedWeight,
    by_group,
    from_blocks,
    num_groups,
    unpacked,
)
from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.core.errors import ModelError
from dovetail.ops.stored import StoredTensor

_LOG = logging.getLogger(__name__)
FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Scheme:
    """One group of layers. `activation` is one of `ops.grids.ACTIVATIONS`; group_size is of "group" only."""

    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    activation: str

    def grid_shapes(self, module: Module, n: int, k: int) -> list[tuple[int, ...]]:
        """What shapes scales may have."""
        rows, columns = self.block
        if self.strategy == "group":
            return [(n, num_groups(module, k, self.group_size))]
        if self.strategy == "block":
            return [(-(-n // rows), -(-k // columns))]
        return [(n, 1), (n,)] if self.strategy == "channel" else [(1,), (), (1, 1)]

    def spread(self, module: Module, values: Array, n: int, k: int) -> Array:
        """Scales or zero points of any of the shapes -> [N, groups]."""
        if self.strategy == "block":
            return from_blocks(module, values, (n, k), self.block)
        return np.broadcast_to(values.reshape(-1, 1), (n, 1)) if self.strategy != "group" else values


def weights(config: Fields, folder: SafetensorsFolder) -> dict[str, QuantizedWeight]:
    """The quantized weights by name. ModelError naming what is not supported, or what does not fit."""
    schemes, ignore = list(_schemes(config)), config.texts("ignore")
    for name in ("sparsity_config", "transform_config"):
        inner = config.object(name)
        if inner is not None and inner.values.get("format") != "dense":
            raise ModelError(f"{config.source}: {name} is not supported; supported are {', '.join(FORMATS)}")
    if config.object("kv_cache_scheme") is not None:
        _LOG.warning("%s: kv_cache_scheme is not followed; --kv-cache-dtype says how KV is stored", config.source)
    found = {}
    for module in (Module(folder, name) for name in folder.modules()):
        kind = "Embedding" if module.name == EMBEDDING else "Linear"
        coded = "weight_packed" in module or "weight_scale" in module
        if not coded and ("weight" not in module or len(module.shape("weight")) < 2):
            continue
        scheme = None if _match(module.name, kind, ignore) else _scheme(module.name, kind, schemes)
        if scheme is not None:
            if kind == "Embedding":
                raise module.wrong("a quantized embedding is not supported; quantize linear layers only")
            found[f"{module.name}.weight"] = _weight(module, scheme)
        elif coded:
            raise module.wrong("it is quantized, but quantization_config does not say how: nothing targets it")
    return found


def _schemes(config: Fields) -> Iterator[Scheme]:
    groups = config.object("config_groups")
    if groups is None:
        raise ModelError(f"{config.source}: config_groups is missing")
    for name in groups.values:
        group = groups.object(name)
        if group is None or (args := group.object("weights")) is None:
            raise ModelError(f"{groups.source}: {name[:64]}: has no weights; only quantized weights are supported")
        form = group.text("format", config.text("format", ""))
        if form not in FORMATS:
            raise group.wrong("format", form, f"one of {', '.join(FORMATS)}")
        yield _read(group, args, form)


def _read(group: Fields, args: Fields, form: str) -> Scheme:
    """ModelError for what no StoredTensor can hold."""
    bits, kind, size = args.integer("num_bits", 8), args.text("type", "int"), args.values.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = args.text("strategy", default)
    if strategy not in STRATEGIES:
        raise args.wrong("strategy", strategy, f"one of {', '.join(STRATEGIES)}")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise ModelError(
            f"{args.source}: weights of {bits} bits ({kind}) are not supported; int 4, int 8, float 8 are"
        )
    if (kind == "float" and form not in ("float-quantized", "naive-quantized")) or (
        kind == "int" and form == "float-quantized"
    ):
        raise group.wrong("format", form, f"one for {kind} weights")
    if args.values.get("dynamic"):
        raise args.wrong("dynamic", args.values["dynamic"], "false for weights")
    block = args.values.get("block_structure") or [1, 1]
    if strategy == "block" and not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise args.wrong("block_structure", block, "two numbers of rows and columns")
    group_size = args.integer("group_size") if strategy == "group" else 0
    symmetric = args.flag("symmetric", True)
    if kind == "float" and not symmetric:
        raise args.wrong("symmetric", symmetric, "true for float weights")
    return Scheme(
        group.texts("targets"), form, bits, kind, symmetric, strategy, group_size,
        (int(block[0]), int(block[1])), _activation(group.object("input_activations")),
    )  # fmt: skip


def _activation(args: Fields | None) -> str:
    """How rows are quantized. Rows are always quantized by themselves, so that no batch-mate changes a result."""
    if args is None:
        return "int16"  # really 16 bits
    bits, kind = args.integer("num_bits", 8), args.text("type", "int")
    if bits != 8 or kind not in ("int", "float"):
        raise ModelError(
            f"{args.source}: activations of {bits} bits ({kind}) are not supported; int 8, float 8 are"
        )
    found = "int8-token" if kind == "int" else "fp8-token"
    how = (args.values.get("dynamic"), args.text("strategy", "tensor"), args.flag("symmetric", True))
    if how != (True, "token", True):
        _LOG.warning("%s: rows are quantized by %s, symmetric, with a scale for each row", args.source, found)
    return found


def _match(name: str, kind: str, patterns: Sequence[str]) -> bool:
    return _rank(name, kind, patterns) < 3


def _rank(name: str, kind: str, patterns: Sequence[str]) -> int:
    """0 where a pattern is the layer's name, 1 where a `re:` pattern matches, 2 where one is its class, else 3."""
    if name in patterns:
        return 0
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], name):
                    return 1
            except re.error as error:
                raise ModelError(
                    f"quantization_config: {pattern[:80]!r} is no regular expression: {error}"
                ) from error
    return 2 if kind in patterns else 3


def _scheme(name: str, kind: str, schemes: Sequence[Scheme]) -> Scheme | None:
    """The scheme that names the layer most closely; the first of several."""
    ranked = [(_rank(name, kind, scheme.targets), i) for i, scheme in enumerate(schemes)]
    rank, at = min(ranked, default=(3, 0))
    return schemes[at] if rank < 3 else None


def _weight(module: Module, scheme: Scheme) -> QuantizedWeight:
    packed = scheme.format == "pack-quantized"
    if packed:
        shape = module.array("weight_shape", "I64", "I32", shape=[(2,)])
        n, k = (int(size) for size in shape)
    else:
        if len(module.shape("weight")) != 2:
            raise module.wrong(f"its weight is {list(module.shape('weight'))}, not a matrix")
        n, k = module.shape("weight")
    if n < 1 or k < 1 or (scheme.bits == 4 and k % 2):
        raise module.wrong(f"a weight of {n} rows and {k} columns cannot be of {scheme.bits} bits")
    module.check("weight_scale", *scheme.grid_shapes(module, n, k))
    form = "F8" if scheme.kind == "float" else f"I{scheme.bits}"
    return module.weight((n, k), form, scheme.activation, partial(_stored, module, scheme, (n, k)))


def _stored(module: Module, scheme: Scheme, shape: tuple[int, int], name: str) -> StoredTensor:
    n, k = shape
    packed, shapes = scheme.format == "pack-quantized", scheme.grid_shapes(module, n, k)
    scale = np.ascontiguousarray(scheme.spread(module, module.scales("weight_scale", shapes), n, k))
    if scheme.kind == "float":
        data = module.array("weight", "F8_E4M3", shape=[shape])
        return StoredTensor(name, "F8", shape, data, {"scale": scale}, activation=scheme.activation)
    zero = None if scheme.symmetric else _zeros(module, scheme, shape)
    order = None
    if scheme.strategy == "group" and "weight_g_idx" in module:
        index = module.array("weight_g_idx", "I32", "I64", shape=[(k,)])
        order = by_group(module, index, scale.shape[1]) if (index >= 0).any() else None
    grid = Grid(scale, zero, order)
    q = _packed_codes(module, scheme, shape) if packed else module.array("weight", "I8", shape=[shape])
    if scheme.bits == 4 and q.size and (q.min() < -8 or q.max() > 7):
        raise module.wrong(f"its 4-bit codes are from {q.min()} to {q.max()}, not from -8 to 7")
    return grid.stored(name, q if order is None else q[:, order], scheme.bits, scheme.activation)


def _packed_codes(module: Module, scheme: Scheme, shape: tuple[int, int]) -> NDArray[np.int8]:
    (n, k), bits = shape, scheme.bits
    words = module.array("weight_packed", "I32", shape=[(n, -(-k * bits // 32))])
    return (unpacked(words, bits, k) - np.uint8(1 << (bits - 1))).view(np.int8)


def _zeros(module: Module, scheme: Scheme, shape: tuple[int, int]) -> Array:
    """Zero points of rows and groups [N, groups], in the range of the codes."""
    n, k = shape
    shapes = scheme.grid_shapes(module, n, k)
    if scheme.format != "pack-quantized" or module.kind("weight_zero_point") != "I32":
        values = module.array("weight_zero_point", "I8", shape=shapes)
    else:  # packed along the rows
        groups = shapes[0][-1]
        words = module.array("weight_zero_point", "I32", shape=[(-(-n * scheme.bits // 32), groups)])
        half = 1 << (scheme.bits - 1)
        values = unpacked(words.T, scheme.bits, n).T.astype(np.int16) - np.int16(half)
    return scheme.spread(module, values, n, k)
