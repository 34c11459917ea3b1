"""Quantized Hugging Face checkpoints: by config.json's quantization_config, and the weights in their tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np

from dovetail.checkpoint import compressed_tensors, gptq_awq, own_format
from dovetail.checkpoint.fields import Fields
from dovetail.checkpoint.quantized_weight import Module, QuantizedWeight, from_blocks
from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.core.errors import ModelError
from dovetail.ops.stored import StoredTensor

_LOG = logging.getLogger(__name__)
_PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that are one product


def quantized_weights(config: Fields, folder: SafetensorsFolder) -> dict[str, QuantizedWeight]:
    """The quantized weights of a folder by name (`model.layers.0.mlp.up_proj.weight`).

    ModelError naming the method, scheme or tensor for what is not supported or does not fit.
    """
    method = config.text("quant_method", "")
    if method not in METHODS:
        kind = method or "without a quant_method"
        if method == "bitsandbytes":
            four = config.text("bnb_4bit_quant_type", "nf4")
            kind = f"bitsandbytes {four if config.flag('load_in_4bit') else 'int8'}"
        raise ModelError(
            f"{config.source}: {kind} is not supported; supported are {', '.join(METHODS)}, GGUF files, and "
            "what `dovetail quantize` writes from the unquantized model"
        )
    found = METHODS[method](config, folder)
    if not found:
        raise ModelError(f"{config.source}: {method} is named, but no weight is quantized")
    _check_products(found, folder)
    return found


def _check_products(weights: Mapping[str, QuantizedWeight], folder: SafetensorsFolder) -> None:
    """ModelError where layers that share an input and are computed as one disagree about its quantization."""

    def how(name: str) -> str:
        found = weights.get(f"{name}.weight")
        return f"{found.format} with {found.activation or 'any'} activations" if found else "not quantized"

    for parent in dict.fromkeys(name.rsplit(".", 2)[0] for name in weights):
        for names in _PRODUCTS:
            fulls = [f"{parent}.{name}" for name in names]
            present = [n for n in fulls if f"{n}.weight" in weights or f"{n}.weight" in folder]
            kinds = {weights[w].activation if (w := f"{n}.weight") in weights else None for n in present}
            if len(kinds) > 1:
                each = ", ".join(f"{n.rpartition('.')[2]} is {how(n)}" for n in present)
                raise ModelError(
                    f"{folder.path}: {parent}: {each}; they are one product, so all must be quantized alike"
                )


def _fp8(config: Fields, folder: SafetensorsFolder) -> dict[str, QuantizedWeight]:
    """e4m3 weights with a scale for the tensor, each row, or each block of weight_block_size.

    The scale is weight_scale, or weight_scale_inv of blocks; both multiply.
    """
    form = config.text("fmt", "e4m3")
    if form not in ("e4m3", "float8_e4m3fn"):
        raise config.wrong("fmt", form, "e4m3")
    if config.text("activation_scheme", "dynamic") == "static":
        _LOG.warning("%s: activation_scheme static: rows are quantized with a scale for each row", config.source)
    block = config.values.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise config.wrong("weight_block_size", block, "two numbers of rows and columns")
    modules = (Module(folder, name) for name in folder.modules())
    coded = [m for m in modules if "weight" in m and m.kind("weight") == "F8_E4M3"]
    return {f"{m.name}.weight": _fp8_weight(m, (block[0], block[1]) if block else None) for m in coded}


def _fp8_weight(module: Module, block: tuple[int, int] | None) -> QuantizedWeight:
    if len(module.shape("weight")) != 2 or 0 in module.shape("weight"):
        raise module.wrong(f"its weight is {list(module.shape('weight'))}, not a matrix")
    n, k = module.shape("weight")
    part = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (n,), (n, 1)]
    if block is not None:
        shapes = [(-(-n // block[0]), -(-k // block[1]))]
    module.check(part, *shapes)

    def read(name: str) -> StoredTensor:
        scale = module.scales(part, shapes)
        if block is not None:
            spread = from_blocks(module, scale, (n, k), block)
        else:
            spread = np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, 1), (n, 1)))
        data = module.array("weight", "F8_E4M3")
        return StoredTensor(name, "F8", (n, k), data, {"scale": spread}, activation="fp8-token")

    return module.weight((n, k), "F8", "fp8-token", read)


METHODS: dict[str, Callable[[Fields, SafetensorsFolder], dict[str, QuantizedWeight]]] = {
    "compressed-tensors": compressed_tensors.weights,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": gptq_awq.gptq,
    "awq": gptq_awq.awq,
    own_format.METHOD: own_format.weights,
}
