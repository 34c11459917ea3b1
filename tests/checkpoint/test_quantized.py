"""Quantized Hugging Face checkpoints: against the compressed-tensors library and the published layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hf_models import edit_json, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import dovetail
from dovetail.core.errors import ModelError
from dovetail.models import open_checkpoint
from dovetail.ops.stored import StoredTensor

Tensors = dict[str, Tensor]
Quantize = Callable[[str, Tensor], Tensors]  # of a layer: its name, its weight; its tensors by their last part
TOKEN = {"num_bits": 8, "dynamic": True, "strategy": "token"}
TOKEN8: dict[str, Any] = TOKEN | {"type": "float"}
WIDTH = 64  # of the model, and 96 of its MLP
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model"
    save_model(path, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    return path


class Written:
    """A copy of a model whose layers are quantized. `expected`: their values by name."""

    def __init__(self, plain: Path, path: Path, config: dict[str, Any]) -> None:
        self.plain, self.path, self.config = plain, path, config
        self.tensors = load_file(plain / "model.safetensors")
        path.mkdir()
        for file in plain.glob("*.json"):
            (path / file.name).write_bytes(file.read_bytes())
        self.expected: Tensors = {}

    def layers(self) -> list[str]:
        return [n.removesuffix(".weight") for n in self.tensors if "_proj" in n]

    def quantize(self, quantize: Quantize, names: list[str] | None = None) -> None:
        for name in names or self.layers():
            made = quantize(name, self.tensors.pop(f"{name}.weight").float())
            self.expected[f"{name}.weight"] = made.pop("")
            self.tensors |= {f"{name}.{part}": t.contiguous() for part, t in made.items()}

    def save(self) -> dovetail.checkpoint.Checkpoint:
        save_file(self.tensors, self.path / "model.safetensors", {"format": "pt"})
        edit_json(self.path / "config.json", quantization_config=self.config)
        return open_checkpoint(self.path)


def same(found: StoredTensor, expected: Tensor) -> None:
    np.testing.assert_array_equal(found.values(), expected.float().numpy(), err_msg=found.name)


# compressed-tensors


def scheme(form: str, activations: dict[str, Any] | None = None, **weights: Any) -> QuantizationScheme:
    made = None if activations is None else QuantizationArgs(**activations)
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=made, format=form
    )


def ct_config(*schemes: QuantizationScheme, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    groups = {f"group_{i}": json.loads(s.model_dump_json()) for i, s in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups,
            "ignore": list(ignore), "quantization_status": "compressed", "version": "0.20.1"}  # fmt: skip


def extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure or (1, 1)
        cut = [r.split(columns, 1) for r in weight.split(rows)]
        low, high = (torch.stack([torch.stack([f(b) for b in r]) for r in cut]) for f in (torch.min, torch.max))
        return low, high
    groups = weight.reshape(n, -1, args.group_size if args.strategy == "group" else k)
    return groups.amin(-1), groups.amax(-1)


def by_library(made: QuantizationScheme) -> Quantize:
    """The library's own scales, codes and values."""
    args = made.weights
    assert args is not None

    def quantize(name: str, weight: Tensor) -> Tensors:
        scale, zero = calculate_qparams(*extremes(weight, args), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(str(made.format))
        found = compressor.compress(state, made)
        values = compressor.decompress(found, made)["weight"]
        return {**found, "": values}

    return quantize


CASES: dict[str, tuple[QuantizationScheme, str, str]] = {
    "fp8": (scheme("float-quantized", TOKEN8, type="float", strategy="channel"), "F8", "fp8-token"),
    "fp8 tensor": (
        scheme("float-quantized", {"type": "float"}, type="float", strategy="tensor"), "F8", "fp8-token",
    ),
    "fp8 blocks": (
        scheme("float-quantized", TOKEN8, type="float", strategy="block", block_structure=[48, 32]),
        "F8", "fp8-token",
    ),
    "fp8 weights": (scheme("naive-quantized", type="float", strategy="group", group_size=32), "F8", "int16"),
    "int8": (scheme("int-quantized", TOKEN, strategy="channel"), "I8", "int8-token"),
    "int8 tensor": (scheme("int-quantized", TOKEN, strategy="tensor"), "I8", "int8-token"),
    "int8 asymmetric": (scheme("int-quantized", TOKEN, strategy="channel", symmetric=False), "I8", "int8-token"),
    "int8 packed": (scheme("pack-quantized", strategy="channel"), "I8", "int16"),
    "int8 groups": (scheme("pack-quantized", strategy="group", group_size=32, symmetric=False), "I8", "int16"),
    "w4a16": (scheme("pack-quantized", num_bits=4, strategy="group", group_size=32), "I4", "int16"),
    "w4a16 asymmetric": (
        scheme("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False), "I4", "int16",
    ),
    "w4a16 rows": (scheme("pack-quantized", num_bits=4, strategy="channel", symmetric=False), "I4", "int16"),
    "w4a8": (scheme("int-quantized", TOKEN, num_bits=4, strategy="group", group_size=32), "I4", "int8-token"),
    "w4a8 packed": (scheme("pack-quantized", TOKEN, num_bits=4, strategy="channel"), "I4", "int8-token"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_librarys(case: str, plain: Path, tmp_path: Path) -> None:
    made, form, activation = CASES[case]
    written = Written(plain, tmp_path / "q", ct_config(made))
    written.quantize(by_library(made))
    checkpoint = written.save()
    for name, expected in written.expected.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.format(name) == form
        found = checkpoint.tensor(name)
        assert (found.format, found.shape, found.activation) == (form, tuple(expected.shape), activation)
        same(found, expected)
    assert not [n for n in checkpoint.names() if "scale" in n or "packed" in n or "shape" in n or "zero" in n]
    assert checkpoint.format("lm_head.weight") == "F32" and checkpoint.format("model.norm.weight") == "F32"


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_the_order_of_their_groups(bits: int, plain: Path, tmp_path: Path) -> None:
    """weight_g_idx, as versions before 0.18 wrote it: scale column weight_g_idx[j] is of column j."""
    made = scheme("pack-quantized", num_bits=bits, strategy="group", group_size=32, symmetric=False)
    rng = np.random.default_rng(0)

    def quantize(name: str, weight: Tensor) -> Tensors:
        index = torch.from_numpy(rng.permutation(np.arange(weight.shape[1]) // 32).astype(np.int32))
        gathered = weight[:, torch.argsort(index.long(), stable=True)]
        found = by_library(made)(name, gathered)
        values = torch.empty_like(weight)
        values[:, torch.argsort(index.long(), stable=True)] = found[""]
        q = torch.empty(weight.shape, dtype=torch.int8)
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        codes = unpack_from_int32(found["weight_packed"], bits, weight.shape)
        q[:, torch.argsort(index.long(), stable=True)] = codes
        return found | {"weight_packed": pack_to_int32(q, bits), "weight_g_idx": index, "": values}

    written = Written(plain, tmp_path / "q", ct_config(made))
    written.quantize(quantize)
    checkpoint = written.save()
    for name, expected in written.expected.items():
        found = checkpoint.tensor(name)
        assert sorted(found.shared["order"]) == list(range(expected.shape[1]))
        same(found, expected)


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class(plain: Path, tmp_path: Path) -> None:
    wide = scheme("int-quantized", TOKEN, strategy="channel")
    some = scheme("pack-quantized", TOKEN, num_bits=4, strategy="group", group_size=32)
    one = scheme("float-quantized", TOKEN8, type="float", strategy="channel")
    config = ct_config(wide, some, one, ignore=("re:.*o_proj", "lm_head"))
    config["config_groups"]["group_1"]["targets"] = [r"re:.*\.mlp\..*"]
    config["config_groups"]["group_2"]["targets"] = ["model.layers.0.mlp.down_proj"]
    written = Written(plain, tmp_path / "q", config)
    layers = written.layers()
    written.quantize(by_library(one), ["model.layers.0.mlp.down_proj"])
    written.quantize(by_library(some), [n for n in layers if ".mlp." in n and n != "model.layers.0.mlp.down_proj"])
    written.quantize(by_library(wide), [n for n in layers if "attn" in n and "o_proj" not in n])
    checkpoint = written.save()
    assert checkpoint.format("model.layers.0.mlp.down_proj.weight") == "F8"
    assert checkpoint.format(f"{UP}.weight") == "I4"
    assert checkpoint.format("model.layers.1.self_attn.q_proj.weight") == "I8"
    assert checkpoint.format("model.layers.1.self_attn.o_proj.weight") == "F32"
    for name, expected in written.expected.items():
        same(checkpoint.tensor(name), expected)


def test_it_runs_without_a_flag_and_as_its_values_do(plain: Path, tmp_path: Path) -> None:
    made, _, _ = CASES["w4a16"]
    written = Written(plain, tmp_path / "q", ct_config(made))
    written.quantize(by_library(made))
    written.save()
    dense = load_file(plain / "model.safetensors") | written.expected
    (tmp_path / "dense").mkdir()
    save_file(
        {n: t.contiguous() for n, t in dense.items()}, tmp_path / "dense/model.safetensors", {"format": "pt"}
    )
    for file in plain.glob("*.json"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    texts = []
    for path in (written.path, tmp_path / "dense"):
        llm = dovetail.LLM(path, kernels="torch", dtype="float32", kv_memory="1MiB", max_model_len=64)
        params = dovetail.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        texts.append(llm.generate("the quick", params, progress=False)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]


# FP8


@pytest.mark.parametrize("kind", ["blocks", "uneven", "rows", "tensor", "static"])
def test_fp8(kind: str, plain: Path, tmp_path: Path) -> None:
    """A scale multiplies, also where its name ends in _inv (Qwen3's and DeepSeek's files)."""
    rng = np.random.default_rng(1)
    block = {"blocks": (32, 32), "uneven": (40, 64)}.get(kind)

    def quantize(name: str, weight: Tensor) -> Tensors:
        n, k = weight.shape
        codes = weight.to(torch.float8_e4m3fn)
        if block is None:
            shape = {"rows": (n, 1), "tensor": (), "static": (1,)}[kind]
            scale = torch.from_numpy(np.asarray(rng.uniform(0.5, 2, shape), np.float32))
            parts = {"weight": codes, "weight_scale": scale, "": codes.float() * scale}
            return parts | ({"input_scale": torch.ones(1)} if kind == "static" else {})
        rows, columns = block
        scale = torch.from_numpy(rng.uniform(0.5, 2, (-(-n // rows), -(-k // columns))).astype(np.float32))
        each = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        return {"weight": codes, "weight_scale_inv": scale, "": codes.float() * each}

    config = {"quant_method": "fp8", "activation_scheme": "static" if kind == "static" else "dynamic"}
    written = Written(plain, tmp_path / "q", config | ({"weight_block_size": block} if block else {}))
    written.quantize(quantize)
    checkpoint = written.save()
    for name, expected in written.expected.items():
        found = checkpoint.tensor(name)
        assert (found.format, found.activation) == ("F8", "fp8-token")
        same(found, expected)
    assert checkpoint.format("lm_head.weight") == "F32"


# GPTQ and AWQ


def words(fields: np.ndarray, bits: int) -> Tensor:
    """Unsigned fields [rows, n] -> int32 [rows, n bits / 32], lowest bits first."""
    per = 32 // bits
    out = np.zeros((fields.shape[0], fields.shape[1] // per), np.uint32)
    for i in range(per):
        out |= fields[:, i::per].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(out.view(np.int32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "symmetric", "act-order"])
def test_gptq(kind: str, size: int, bits: int, plain: Path, tmp_path: Path) -> None:
    """w[k, n] = scale[g_idx[k], n] (code[k, n] - zero[g_idx[k], n]), and files hold zero - 1."""
    rng = np.random.default_rng(2)

    def quantize(name: str, weight: Tensor) -> Tensors:
        n, k = weight.shape
        group = k if size == -1 else size
        code = rng.integers(0, 1 << bits, (k, n))
        zero = rng.integers(1, 1 << bits, (k // group, n))
        if kind == "symmetric":
            zero[:] = 1 << (bits - 1)
        scale = rng.uniform(0.01, 0.02, zero.shape).astype(np.float16)
        index = np.arange(k) // group
        if kind == "act-order":
            index = rng.permutation(index)
        values = scale[index].astype(np.float32) * (code - zero[index]).astype(np.float32)
        return {
            "qweight": words(code.T, bits).T, "qzeros": words(zero - (kind != "gptq_v2"), bits),
            "scales": torch.from_numpy(scale), "g_idx": torch.from_numpy(index.astype(np.int32)),
            "": torch.from_numpy(values.T.copy()),
        }  # fmt: skip

    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": kind == "act-order"}
    written = Written(plain, tmp_path / "q", config | ({"checkpoint_format": kind} if kind == "gptq_v2" else {}))
    written.quantize(quantize)
    checkpoint = written.save()
    for name, expected in written.expected.items():
        found = checkpoint.tensor(name)
        assert (found.format, found.activation) == (f"I{bits}", "int16")
        assert ("zero" in found.parts) == (kind != "symmetric")
        assert ("order" in found.shared) == (kind == "act-order" and size != -1)
        same(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_awq(zeros: bool, bits: int, plain: Path, tmp_path: Path) -> None:
    """w[k, n] = scale[k / g, n] (code[k, n] - zero[k / g, n]); field i of a word is column interleave[i]."""
    rng = np.random.default_rng(3)
    per, size = 32 // bits, 32
    interleave = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}[bits]

    def packed(fields: np.ndarray) -> Tensor:
        return words(fields.reshape(len(fields), -1, per)[:, :, interleave].reshape(fields.shape), bits)

    def quantize(name: str, weight: Tensor) -> Tensors:
        n, k = weight.shape
        code = rng.integers(0, 1 << bits, (k, n))
        zero = rng.integers(0, 1 << bits, (k // size, n)) if zeros else np.full((k // size, n), 1 << (bits - 1))
        scale = rng.uniform(0.01, 0.02, zero.shape).astype(np.float16)
        values = scale.repeat(size, 0).astype(np.float32) * (code - zero.repeat(size, 0)).astype(np.float32)
        found = {"qweight": packed(code), "scales": torch.from_numpy(scale), "": torch.from_numpy(values.T.copy())}
        return found | ({"qzeros": packed(zero)} if zeros else {})

    config = {"quant_method": "awq", "bits": bits, "group_size": size, "zero_point": zeros, "version": "gemm"}
    written = Written(plain, tmp_path / "q", config)
    written.quantize(quantize)
    checkpoint = written.save()
    for name, expected in written.expected.items():
        found = checkpoint.tensor(name)
        assert (found.format, found.activation, "zero" in found.parts) == (f"I{bits}", "int16", zeros)
        same(found, expected)


# What does not fit


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "hqq"}, "hqq is not supported; supported are compressed-tensors, fp8, fbgemm_fp8, gptq"),
        ({"bits": 4}, "without a quant_method"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits must be 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"x": {"bits": 8}}}, "differ by layer"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format must be gptq or"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version must be gemm"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "no tensor is a qweight"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "config_groups is missing"),
    ],
)  # fmt: skip
def test_methods_that_are_refused(config: dict[str, Any], words: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(words)):
        Written(plain, tmp_path / "q", config).save()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format must be one of float-quantized"),
        ({"weights": {"num_bits": 3, "type": "int"}}, "3 bits (int) are not supported"),
        ({"weights": {"num_bits": 4, "type": "float"}}, "4 bits (float) are not supported"),
        ({"weights": {"num_bits": 8, "strategy": "tensor_group"}}, "strategy must be one of tensor"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}, "format must be one for float"),
        ({"weights": None}, "has no weights"),
        ({"input_activations": {"num_bits": 4, "type": "int"}}, "activations of 4 bits (int) are not supported"),
        ({"targets": ["re:(("]}, "is no regular expression"),
        ({"targets": ["re:nothing"]}, "nothing targets it"),
        ({"targets": "Linear"}, "targets must be a list of strings"),
    ],
)  # fmt: skip
def test_schemes_that_are_refused(change: dict[str, Any], words: str, plain: Path, tmp_path: Path) -> None:
    made, _, _ = CASES["w4a16"]
    config = ct_config(made)
    config["config_groups"]["group_0"] |= change
    written = Written(plain, tmp_path / "q", config)
    written.quantize(by_library(made))
    with pytest.raises(ModelError, match=re.escape(words)):
        written.save()


def _cut(t: Tensor) -> Tensor:
    return t[:, :1].contiguous()


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight_scale", None, f"tensor {UP}.weight_scale is missing, and {UP} is quantized"),
        ("weight_packed", None, f"tensor {UP}.weight_packed is missing"),
        ("weight_shape", None, f"tensor {UP}.weight_shape is missing"),
        ("weight_scale", _cut, f"tensor {UP}.weight_scale is [96, 1], it must be [96, 2]"),
        ("weight_packed", _cut, f"tensor {UP}.weight_packed is [96, 1], it must be [96, 8]"),
        ("weight_scale", lambda t: t.to(torch.int8), f"tensor {UP}.weight_scale is I8; expected is F32 or"),
        ("weight_scale", lambda t: t * torch.nan, f"tensor {UP}.weight_scale has values that are not finite"),
        ("weight_shape", lambda t: torch.tensor([96, 80]), f"{UP}: groups of 32 columns do not divide its 80"),
        ("weight_shape", lambda t: torch.tensor([96, 0]), f"{UP}: a weight of 96 rows and 0 columns"),
        ("weight_shape", lambda t: torch.tensor([96, 32]), "the config asks for [96, 64]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    part: str, change: Callable[[Tensor], Tensor] | None, words: str, plain: Path, tmp_path: Path
) -> None:
    made, _, _ = CASES["w4a16"]
    written = Written(plain, tmp_path / "q", ct_config(made))
    written.quantize(by_library(made))
    tensor = written.tensors.pop(f"{UP}.{part}")
    if change is not None:
        written.tensors[f"{UP}.{part}"] = change(tensor)
    if words.endswith("[96, 64]"):  # its scales agree with the wrong shape
        written.tensors[f"{UP}.weight_scale"] = written.tensors[f"{UP}.weight_scale"][:, :1].contiguous()
    with pytest.raises(ModelError, match=re.escape(words)):
        written.save().tensor(f"{UP}.weight")


def test_a_group_index_that_is_wrong(plain: Path, tmp_path: Path) -> None:
    made, _, _ = CASES["w4a16"]
    written = Written(plain, tmp_path / "q", ct_config(made))
    written.quantize(by_library(made))
    written.tensors[f"{UP}.weight_g_idx"] = torch.tensor([0] * 33 + [1] * 31, dtype=torch.int32)
    with pytest.raises(ModelError, match=f"{UP}: its group index does not name each of 2 groups 32 times"):
        written.save().tensor(f"{UP}.weight")


def test_a_shard_that_is_cut_short(plain: Path, tmp_path: Path) -> None:
    made, _, _ = CASES["w4a16"]
    written = Written(plain, tmp_path / "q", ct_config(made))
    written.quantize(by_library(made))
    written.save()
    file = written.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut short"):
        open_checkpoint(written.path)


def test_layers_of_one_product_must_agree(plain: Path, tmp_path: Path) -> None:
    made, _, _ = CASES["w4a16"]
    written = Written(plain, tmp_path / "q", ct_config(made, ignore=("re:.*k_proj", "lm_head")))
    written.quantize(by_library(made), [n for n in written.layers() if "k_proj" not in n])
    words = "model.layers.0.self_attn: q_proj is I4 with int16 activations, k_proj is not quantized, v_proj is I4"
    with pytest.raises(ModelError, match=words):
        written.save()
