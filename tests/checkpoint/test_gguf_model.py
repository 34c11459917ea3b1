"""GGUF files as checkpoints, and exporting checkpoints to Hugging Face directories."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from ggufs import HEADS, HIDDEN, KV_HEADS, metadata, permuted, tensors, write
from hf_models import save_model

from dovetail.checkpoint import RopeConfig
from dovetail.checkpoint.export import export
from dovetail.checkpoint.gguf_checkpoint import hf_name
from dovetail.checkpoint.hf_config import llama3_factors
from dovetail.core.errors import ConfigError, ModelError
from dovetail.models import open_checkpoint

QUANTIZED = ("attn_q.weight", "attn_k.weight", "ffn_down.weight")


@pytest.mark.parametrize("bias", [False, True])
def test_plain_tensors_have_hugging_face_order(bias: bool, tmp_path: Path) -> None:
    weights = tensors(bias=bias)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", weights=weights))
    assert set(checkpoint.names()) == {hf_name(name) for name in weights}
    assert checkpoint.config.tie_word_embeddings and checkpoint.config.qkv_bias is bias
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(hf_name(name)).dequantize(), torch.from_numpy(weight)), name
    assert checkpoint.bytes == (tmp_path / "m.gguf").stat().st_size
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_blocks_are_moved_not_rounded_again(kind: str, tmp_path: Path) -> None:
    weights = tensors()
    formats = {name: kind for name in weights if name.endswith(QUANTIZED)}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", weights=weights, formats=formats))
    dtype = gguf.GGMLQuantizationType[kind]
    for name, heads in (
        ("blk.1.attn_q.weight", HEADS),
        ("blk.1.attn_k.weight", KV_HEADS),
        ("blk.1.ffn_down.weight", 0),
    ):
        stored = permuted(weights[name], heads) if heads else weights[name]
        values = gguf.quants.dequantize(gguf.quants.quantize(stored, dtype), dtype)
        back = permuted_back(values, heads) if heads else values
        found = checkpoint.tensor(hf_name(name))
        assert found.format == kind
        assert np.array_equal(found.dequantize().numpy(), back)


def permuted_back(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_other_architectures_are_not_permuted(tmp_path: Path) -> None:
    weights = tensors(bias=True)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", weights=weights, architecture="qwen2"))
    assert checkpoint.config.architecture == "qwen2" and checkpoint.config.qkv_bias
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(hf_name(name)).dequantize(), torch.from_numpy(weight))


def test_directory_with_one_gguf(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path).config.num_layers == 2
    write(tmp_path / "n.gguf")
    with pytest.raises(ModelError, match="2 GGUF files"):
        open_checkpoint(tmp_path)


ROPES: list[tuple[dict[str, Any], RopeConfig]] = [
    ({}, RopeConfig(10000.0)),
    ({"llama.rope.scale_linear": 4.0}, RopeConfig(10000.0, "linear", {"factor": 4.0})),
    (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        RopeConfig(10000.0, "linear", {"factor": 2.0}),
    ),
    (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.original_context_length": 32,
        },
        RopeConfig(10000.0, "yarn", {"factor": 2.0, "original_max_position_embeddings": 32.0}),
    ),
]


@pytest.mark.parametrize(("changes", "rope"), ROPES)
def test_rope(changes: dict[str, Any], rope: RopeConfig, tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path / "m.gguf", changes)).config.rope == rope


def test_sliding_window_key(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"llama.attention.sliding_window": 16}))
    assert checkpoint.config.sliding_windows == (16, 16)


def test_a_pattern_of_another_length_is_refused(tmp_path: Path) -> None:
    changes = {"llama.attention.sliding_window": 16, "llama.attention.sliding_window_pattern": [True] * 3}
    with pytest.raises(ModelError, match="sliding_window_pattern must be a number, or a flag for each of 2"):
        open_checkpoint(write(tmp_path / "m.gguf", changes, architecture="gemma3"))


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}


def test_rope_factors_and_their_export(tmp_path: Path) -> None:
    factors = llama3_factors(RopeConfig(5e5, "llama3", LLAMA3), HIDDEN // HEADS)
    weights = tensors() | {"rope_freqs.weight": np.array(factors, np.float32)}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"llama.rope.freq_base": 5e5}, weights=weights))
    rope = checkpoint.config.rope
    assert rope.kind == "factors" and rope.factors == pytest.approx(factors)
    assert "rope_freqs.weight" not in checkpoint.names()
    export(checkpoint, tmp_path / "out", "float32")
    again = open_checkpoint(tmp_path / "out").config.rope
    assert again.kind == "llama3" and again.parameters == pytest.approx(LLAMA3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
    assert torch.allclose(model.model.rotary_emb.inv_freq, plain / torch.tensor(rope.factors), rtol=1e-5)
    odd = write(
        tmp_path / "odd.gguf", weights=tensors() | {"rope_freqs.weight": np.array([1, 9, 2, 3], np.float32)}
    )
    with pytest.raises(ModelError, match="cannot be exported"):
        export(open_checkpoint(odd), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [1 << 32, 20000])
def test_export_round_trip(kind: str, shard: int, tmp_path: Path) -> None:
    dtype = getattr(torch, kind)
    formats = {name: "Q8_0" for name in tensors() if name.endswith(QUANTIZED)}
    source = open_checkpoint(write(tmp_path / "m.gguf", formats=formats))
    target = export(source, tmp_path / "out", kind, shard)
    again = open_checkpoint(target)
    ends = source.tokenizer().eos_ids  # also those that the file's keys do not name
    assert again.config == replace(source.config, eos_token_ids=ends) and ends == (2, 0)
    assert (target / "model.safetensors").exists() is (shard > 20000)
    assert not list(target.glob(".*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    values = model.state_dict()
    for name in source.names():
        expected = source.tensor(name).dequantize(dtype)
        assert torch.equal(again.tensor(name).dequantize(dtype), expected)
        assert torch.equal(values[name], expected)
    ours, theirs = again.tokenizer(), transformers.AutoTokenizer.from_pretrained(target)
    for text in ("hello hello 1212", "  é\n\n你好 🎉<|im_end|>x"):
        assert source.tokenizer().encode(text) == ours.encode(text) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "hello 12"}]
    expected_ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(messages) == expected_ids
    assert model.generation_config.eos_token_id == [2, 0]


ROPE = {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LOCAL = {"rope_theta": 50.0, "rope_type": "default"}
WINDOWS = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPORTED: dict[str, dict[str, Any]] = {  # by model_type
    "llama": {"rope_parameters": ROPE, "attention_bias": True, "mlp_bias": True},
    "mistral": {"rope_parameters": ROPE},
    "qwen2": {"rope_parameters": ROPE, **WINDOWS},
    "qwen3": {"rope_parameters": ROPE, **WINDOWS},
    "smollm3": {"rope_parameters": ROPE, "no_rope_layers": [1, 0, 1], "mlp_bias": True, **TOKENS},
    "gemma3_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": LOCAL},
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
        "head_dim": 8,
    },
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_exported_config_means_the_same_to_transformers(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", kind, **EXPORTED[kind])
    source = open_checkpoint(tmp_path / "m")
    assert open_checkpoint(export(source, tmp_path / "out", "float32")).config == source.config
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


def test_export_refuses(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf"))
    with pytest.raises(ConfigError, match="not an empty directory"):
        export(checkpoint, tmp_path)
    with pytest.raises(ConfigError, match="dtype"):
        export(checkpoint, tmp_path / "out", "int8")
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_crash_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dovetail.checkpoint.safetensors_writer.write_file", full)
    (tmp_path / "out").mkdir()
    for target in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(ModelError, match=r"not enough disk space for the model.*choose another folder"):
            export(checkpoint, target)
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_export_explains_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write the model to .*Not a directory; choose another folder"):
        export(checkpoint, tmp_path / "file" / "out")
    before = os.umask(0o027)
    try:
        export(checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    monkeypatch.setattr("dovetail.host.files.free_bytes", lambda directory: 7)
    with pytest.raises(ModelError, match="needed, 7B free"):
        export(checkpoint, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_big_vocabulary_is_parsed_fast(tmp_path: Path) -> None:

    from dovetail.checkpoint.gguf import GGUFFile

    tokens = [f"token{index}" for index in range(262144)]
    keys = dict.fromkeys(metadata()) | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": tokens[:100000],
    }
    path = write(tmp_path / "m.gguf", keys, {})
    file = GGUFFile(path)
    assert file.metadata.strings("tokenizer.ggml.tokens") == tokens
