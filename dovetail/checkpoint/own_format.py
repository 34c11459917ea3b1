"""Weights that no other program's layout holds (Atom, Tender), in safetensors: quant_method "dovetail".

config.json's quantization_config is {"quant_method": "dovetail", "version": 1, "formats": {...}}. `formats` says
which format of `ops.grids` "Linear" has, which is all linear layers of the blocks, and "lm_head", if that is
quantized. A weight `X.weight` [N, K] is these tensors:

- `X.weight_codes` uint8 [N, bytes of a row] and `X.weight_shape` [2] = (N, K).
- `X.weight_PART` for what belongs to rows: scale, outlier_scale, bias.
- `X.weight_common_PART` for what all rows have in common: order, clip; sizes, scales, means, chunk.

Their shapes are those of `ops.grids`. The first dimension of parts is N.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.quantized_weight import FLOATS, Array, Module, QuantizedWeight
from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.checkpoint.safetensors_writer import Entry
from dovetail.core.errors import ModelError
from dovetail.ops.memory import from_bfloat16, to_bfloat16
from dovetail.ops.stored import StoredTensor

METHOD, VERSION = "dovetail", 1
ACTIVATIONS = {"ATOM": "atom", "TENDER8": "tender", "TENDER4": "tender", "I8": "int8-token"}
HEAD = "lm_head"
GROUPS = (128, 64, 32)  # columns of ATOM's that share a scale, if not all of 4 bits do
COLUMNS = 32  # the columns of 4 bits are a multiple of this
_PARTS = {
    "ATOM": ("scale", "outlier_scale"),
    "TENDER8": ("scale", "bias"),
    "TENDER4": ("scale", "bias"),
    "I8": ("scale",),
}
_TENDER = ("order", "sizes", "scales", "means", "chunk")
_COMMON = {"ATOM": ("order", "clip"), "TENDER8": _TENDER, "TENDER4": _TENDER, "I8": ()}
_OPTIONAL = {"ATOM": ("order",), "TENDER8": ("bias", "means"), "TENDER4": ("bias", "means"), "I8": ()}
_INTEGERS = {"order", "sizes", "chunk"}
_KINDS: dict[str, Any] = {
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}


def config(form: str, head: bool) -> dict[str, Any]:
    """The object for config.json. form: of the linear layers in blocks. head: whether lm_head is I8."""
    formats = {"Linear": form, **({HEAD: "I8"} if head else {})}
    return {"quant_method": METHOD, "version": VERSION, "formats": formats}


def entries(stored: StoredTensor) -> Iterator[Entry]:
    """The tensors of a weight. Numbers that are bfloat16's are written as such."""
    yield entry(f"{stored.name}_codes", stored.data)
    yield entry(f"{stored.name}_shape", np.array(stored.shape, np.int64))
    for name, part in stored.parts.items():
        yield entry(f"{stored.name}_{name}", part)
    for name, part in stored.shared.items():
        narrow = part.astype(np.int32) if name == "order" else part
        yield entry(f"{stored.name}_common_{name}", narrow)


def entry(name: str, values: Array) -> Entry:
    """A tensor as a file has it."""
    kind, found = _KINDS[values.dtype.name], values
    if kind == "F32" and np.array_equal(from_bfloat16(narrow := to_bfloat16(values)), values):
        kind, found = "BF16", narrow
    return Entry(name, kind, values.shape, found.nbytes, lambda: found)


def weights(fields: Fields, folder: SafetensorsFolder) -> dict[str, QuantizedWeight]:
    """The quantized weights by name. ModelError naming what does not fit."""
    if fields.integer("version") != VERSION:
        raise fields.wrong("version", fields.values["version"], f"{VERSION}: a newer Dovetail may read it")
    formats = fields.object("formats")
    if formats is None:
        raise ModelError(f"{fields.source}: formats is missing")
    for name in formats.values:
        if formats.text(name, "") not in ACTIVATIONS:
            raise formats.wrong(name, formats.values[name], f"one of {', '.join(ACTIVATIONS)}")
    found: dict[str, QuantizedWeight] = {}
    common: dict[str, dict[str, Array]] = {}
    for module in (Module(folder, name) for name in folder.modules()):
        if "weight_codes" not in module:
            continue
        form = formats.text(HEAD if module.name == HEAD else "Linear", "")
        if not form:
            raise module.wrong("it is quantized, and quantization_config's formats do not say how")
        n, k = (int(size) for size in module.array("weight_shape", "I64", shape=[(2,)]))
        if n < 1 or k < 2 or k % 2:
            raise module.wrong(f"a weight of {n} rows and {k} columns cannot be {form}")
        shared = _shared(module, form, k)
        _agree(module, common, shared)
        read = partial(_stored, module, form, (n, k))
        found[f"{module.name}.weight"] = module.weight((n, k), form, ACTIVATIONS[form], read)
    return found


def _stored(module: Module, form: str, shape: tuple[int, int], name: str) -> StoredTensor:
    (n, k), shared = shape, _shared(module, form, shape[1])
    codes = module.array("weight_codes", "U8")
    parts = {
        part: module.scales(f"weight_{part}", [module.shape(f"weight_{part}")])
        for part in _PARTS[form]
        if part not in _OPTIONAL[form] or f"weight_{part}" in module
    }
    if any(len(part) != n for part in (codes, *parts.values())):
        raise module.wrong(f"not all of its tensors have {n} rows")
    width = codes.shape[1] if codes.ndim == 2 else 0
    if form == "ATOM":
        wide = 2 * width - k  # columns of 8 bits
        groups = parts["scale"].shape[-1]
        fits = 0 <= wide < k and wide % 2 == 0 and (k - wide) % COLUMNS == 0
        fits = fits and (groups == 1 or k - wide in [groups * size for size in GROUPS])
    else:
        fits = width == (k // 2 if form == "TENDER4" else k)
        fits = fits and ("bias" in parts) == ("means" in shared)
    if not fits:
        raise module.wrong(f"its codes {list(codes.shape)} and scales do not fit {form} weights of {k} columns")
    return StoredTensor(name, form, shape, codes, parts, shared, ACTIVATIONS[form])


def _shared(module: Module, form: str, k: int) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name in _COMMON[form]:
        part = f"weight_common_{name}"
        if name in _OPTIONAL[form] and part not in module:
            continue
        if name in _INTEGERS:
            found[name] = module.array(part, "I64", "I32").astype(np.int64)
        else:
            found[name] = module.array(part, *FLOATS).astype(np.float32, copy=False)
    if "order" in found and not np.array_equal(np.sort(found["order"]), np.arange(k)):
        raise module.wrong(f"its order is no permutation of {k} columns")
    if "sizes" in found and (found["sizes"].sum() != k or (found["sizes"] < 0).any() or found["chunk"].min() < 1):
        raise module.wrong(f"its groups are not of {k} columns together")
    chunks = len(found.get("scales", ()))
    if "means" in found and found["means"].shape != (chunks, k):
        raise module.wrong(f"its means are {list(found['means'].shape)}, not [{chunks}, {k}]")
    return found


def _agree(module: Module, known: dict[str, dict[str, Array]], shared: dict[str, Array]) -> None:
    """ModelError where layers with the same input want it rounded in different ways."""
    parent, _, name = module.name.rpartition(".")
    site = next(
        (i for i, names in enumerate((("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))) if name in names),
        None,
    )
    if site is None:
        return
    first = known.setdefault(f"{parent} {site}", shared)
    if first.keys() != shared.keys() or any(not np.array_equal(first[key], shared[key]) for key in first):
        raise module.wrong("its input is rounded in another way than that of the layers that share it")
