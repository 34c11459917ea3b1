"""Hugging Face directories: what is read, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounded import bounded
from hf_models import edit_json, save_model

from dovetail.checkpoint.architecture import read_hf_config
from dovetail.core.errors import ModelError
from dovetail.core.model import NO_ROPE, RopeConfig
from dovetail.models import MODELS, open_checkpoint

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one safetensors file."""
    path = tmp_path_factory.mktemp("hf") / "model"
    save_model(path)
    return path


@pytest.fixture(scope="module")
def original_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an index and several shards."""
    path = tmp_path_factory.mktemp("hf") / "sharded"
    save_model(path, shard="40KB")
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def sharded(original_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_sharded, tmp_path / "sharded"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_wrote(kind: str, tied: bool, tmp_path: Path) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" and tied else {}
    reference = save_model(tmp_path / "m", kind, tie_word_embeddings=tied, **extra)
    checkpoint = open_checkpoint(tmp_path / "m")
    config = checkpoint.config
    assert config.architecture == kind.removesuffix("_text") and config.tie_word_embeddings is tied
    assert config.qkv_bias is (kind == "qwen2" or bool(extra)) and config.qk_norm is (
        kind in ("qwen3", "gemma3_text")
    )
    assert config.o_bias is config.mlp_bias is bool(extra)
    assert config.head_dim == {"qwen3": 128, "gemma3_text": 256}.get(kind, 8)
    expected = {
        name: value for name, value in reference.state_dict().items() if not tied or name != "lm_head.weight"
    }
    assert set(checkpoint.names()) == set(expected)
    for name, value in expected.items():
        if kind == "gemma3_text" and "norm" in name:
            value = value + 1  # what rows are multiplied by
        stored = checkpoint.tensor(name)
        assert stored.data.dtype == np.uint8 and stored.data.size == value.nbytes
        assert torch.equal(stored.dequantize(), value), name
        assert checkpoint.shape(name) == tuple(value.shape)
    assert checkpoint.bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert checkpoint.tokenizer().eos_ids[0] == 257


def test_shards(sharded: Path, original: Path) -> None:
    several, one = open_checkpoint(sharded), open_checkpoint(original)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert sorted(several.names()) == sorted(one.names())
    for name in one.names():
        assert np.array_equal(several.tensor(name).data, one.tensor(name).data)
    with pytest.raises(ModelError, match="no tensor 'x'"):
        one.tensor("x")


def test_weights_are_not_copied(original: Path) -> None:
    checkpoint = open_checkpoint(original)
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = checkpoint.tensor(name).data, checkpoint.tensor(name).data
    assert first.ctypes.data == second.ctypes.data


def test_generation_config_adds_eos_ids(model: Path) -> None:
    edit_json(model / "generation_config.json", eos_token_id=[5, 2], temperature=0.5)
    checkpoint = open_checkpoint(model)
    assert checkpoint.config.eos_token_ids == (2, 5)
    assert checkpoint.generation_config["temperature"] == 0.5
    assert checkpoint.tokenizer().eos_ids == (257, 2, 5, 259)  # 259 as the template ends messages


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def parse(**changes: Any) -> Any:
    values = {k: v for k, v in (CONFIG | changes).items() if v != "absent"}
    return read_hf_config(values, "config.json", MODELS)[1]


def test_defaults_of_missing_fields() -> None:
    config = parse()
    assert (config.num_kv_heads, config.head_dim, config.rope.theta, config.rope.kind) == (
        4,
        16,
        10000.0,
        "default",
    )
    assert config.sliding_windows == () and not config.tie_word_embeddings
    assert parse(eos_token_id=-1, bos_token_id=-1).bos_token_id is None


ROPES = [
    ({"rope_theta": 5e5}, 5e5, "default", {}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5, "linear", {"factor": 2.0}),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1e4, "dynamic", {"factor": 2.0}),
    (
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
        7.0,
        "yarn",
        {"factor": 4.0, "beta_fast": 32.0, "original_max_position_embeddings": 2048.0},
    ),
    (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        5e5,
        "llama3",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192.0,
        },
    ),
]


@pytest.mark.parametrize(("fields", "theta", "kind", "parameters"), ROPES)
def test_rope(fields: dict[str, Any], theta: float, kind: str, parameters: dict[str, float]) -> None:
    rope = parse(**fields).rope
    assert (rope.theta, rope.kind, rope.parameters, rope.factors) == (theta, kind, parameters, ())


def test_sliding_windows() -> None:
    assert parse(model_type="mistral", num_key_value_heads=4, sliding_window=9).sliding_windows == (9,) * 4
    assert parse(model_type="mistral", num_key_value_heads=4, sliding_window=None).sliding_windows == ()
    qwen: dict[str, Any] = {"model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 9}
    assert parse(**qwen).sliding_windows == ()
    some = parse(**qwen, use_sliding_window=True, max_window_layers=3).sliding_windows
    assert some == (None, None, None, 9)
    assert parse(**qwen, use_sliding_window=True, max_window_layers=4).sliding_windows == ()
    types = ["full_attention", "sliding_attention"] * 2
    assert parse(**qwen, layer_types=types).sliding_windows == (None, 9, None, 9)


GEMMA: dict[str, Any] = {"model_type": "gemma3_text", "num_key_value_heads": 4, "num_hidden_layers": 7}


def test_gemma_of_old_files_and_by_default() -> None:
    plain = parse(**GEMMA)
    assert plain.sliding_windows == (4096,) * 5 + (None, 4096)
    assert plain.tie_word_embeddings and plain.query_scale is None and plain.embedding_scale == 8.0
    assert [r.theta for r in plain.layer_ropes] == [1e4] * 5 + [1e6, 1e4]
    old = parse(
        **GEMMA, rope_theta=2e6, rope_local_base_freq=300.0, sliding_window=8, sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, query_pre_attn_scalar=100,
    )  # fmt: skip
    assert old.sliding_windows == (8, 8, None, 8, 8, None, 8) and old.query_scale == 0.1
    assert old.rope_of(2) == old.rope == RopeConfig(2e6, "linear", {"factor": 8.0})
    assert old.rope_of(0) == RopeConfig(300.0)


SMOLLM3: dict[str, Any] = {"model_type": "smollm3", "num_hidden_layers": 9}


def test_smollm3_leaves_out_rotations() -> None:
    by_default = parse(**SMOLLM3)
    assert [by_default.rope_of(i) == NO_ROPE for i in range(9)] == [i in (3, 7) for i in range(9)]
    assert by_default.rope == RopeConfig(2e6) and by_default.num_kv_heads == 4
    every_third = parse(**SMOLLM3, no_rope_layer_interval=3, use_sliding_window=True, sliding_window=5)
    assert every_third.sliding_windows == (None, None, 5) * 3
    assert parse(**SMOLLM3, no_rope_layers=[1] * 9).layer_ropes == ()


CONFIG_CASES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt_neox"}, "'gpt_neox' is not known; known are llama, mistral, qwen2, qwen3"),
    ({"model_type": "absent"}, "not known"),
    ({"hidden_size": "absent"}, "hidden_size is missing"),
    ({"hidden_size": "64"}, "hidden_size must be an integer"),
    ({"hidden_size": -64}, "hidden_size must be"),
    ({"hidden_size": 1 << 31}, "hidden_size must be"),
    ({"hidden_size": 66}, "66 is not a multiple of num_attention_heads 4"),
    ({"hidden_size": True}, "hidden_size must be"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
    ({"num_key_value_heads": 0}, "num_kv_heads"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": 0}, "num_layers is 0"),
    ({"num_hidden_layers": (1 << 31) - 1}, "num_hidden_layers"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_scaling": "linear"}, "rope_parameters must be an object"),
    ({"rope_scaling": {"type": "spiral"}}, "'spiral' is not one of"),
    ({"rope_scaling": {"type": "linear"}}, "needs factor"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor must be a finite"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
    ({"rope_scaling": {"type": "longrope", "factor": [1.0]}}, "factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "swoosh"}, "swoosh"),
    ({"layer_types": ["full_attention"], "sliding_window": 3}, "list of 4 names"),
    ({"layer_types": ["chunked"] * 4}, "chunked"),
    ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is missing"),
    ({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0}, "sliding_window is 0"),
    ({"eos_token_id": "x"}, "eos_token_id must be"),
    ({"tie_word_embeddings": "yes"}, "true or false"),
    ({"model_type": "gemma3", "text_config": {}}, "'gemma3' holds more than text"),
    (GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
    (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA | {"sliding_window_pattern": 0}, "sliding_window_pattern must be at least 1"),
    (GEMMA | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    (GEMMA | {"rope_parameters": {"rope_type": "default"}}, "must be by full_attention and sliding_attention"),
    (SMOLLM3 | {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 0 or 1 for each of 9 layers"),
    (SMOLLM3 | {"no_rope_layers": [2] * 9}, "no_rope_layers must be"),
    (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1"),
    ({"rope_parameters": {"rope_type": "factors"}}, "'factors' is not known"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIG_CASES)
def test_contradictory_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parse(**changes)
    assert str(caught.value).startswith("config.json")


def tensor_file(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


DATA = b"\0" * 8
DEEP = b'{"a":' * 10**5
ONCE = json.dumps(entry())[1:-1].encode()
TWICE = b"{" + ONCE + b"," + ONCE + b"}"
GAP = entry() | {"u": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}
OVERLAP = entry() | {"u": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
PAST_2_53 = (1 << 53) + 1
SAFETENSORS_CASES: dict[str, tuple[bytes, str]] = {
    "1 empty": (b"", "header length 0 does not fit"),
    "1 seven bytes": (b"\1\0\0\0\0\0\0", "header length 1 does not fit"),
    "1 header 0": (tensor_file(b"", length=0), "header length 0"),
    "1 header past end": (tensor_file(entry(), DATA, length=10**6), "header length 1000000 does not fit"),
    "1 header 2^64-1": (tensor_file(entry(), DATA, length=(1 << 64) - 1), "header length 18446744073709551615"),
    "1 header over the cap": (tensor_file(b"{" + b" " * (17 << 20) + b"}"), "header length 17825794 exceeds"),
    "2 not UTF-8": (tensor_file(b'{"\xff":1}'), "header: is not valid JSON: 'utf-8'"),
    "2 half a character": (tensor_file(b'{"\\ud800":1}'), "header: is not valid JSON: .*surrogates"),
    "2 not JSON": (tensor_file(b"{hello}"), "header: is not valid JSON"),
    "2 not an object": (tensor_file(b"[1, 2]"), "header does not begin with"),
    "2 leading space": (tensor_file(b" {}"), "header does not begin with"),
    "2 trailing text": (tensor_file(b"{} x"), "header: is not valid JSON: Extra data"),
    "2 depth bomb": (tensor_file(DEEP + b"1" + b"}" * 10**5), "header: is not valid JSON: .*recursion"),
    "3 duplicate": (tensor_file(TWICE, DATA), "header: key 't' appears twice"),
    "3 metadata values": (
        tensor_file({"__metadata__": {"a": 1}} | entry(), DATA),
        "integer `1`, expected a string",
    ),
    "3 metadata list": (tensor_file({"__metadata__": [1]} | entry(), DATA), "sequence, expected a map"),
    "3 metadata 50 MB": (tensor_file({"__metadata__": {"a": "x" * (50 << 20)}} | entry(), DATA), "header length"),
    "3 no entry": (tensor_file({"t": 5}, DATA), "tensor 't': its entry must be an object"),
    "4 reversed": (tensor_file(entry(data_offsets=[8, 0]), DATA), "tensor 't': data_offsets"),
    "4 hole": (tensor_file(GAP, b"\0" * 20), "invalid offset for tensor `u`"),
    "4 overlap": (tensor_file(OVERLAP, b"\0" * 12), "invalid offset for tensor `u`"),
    "4 not from 0": (tensor_file(entry(data_offsets=[8, 16]), b"\0" * 16), "invalid offset for tensor `t`"),
    "4 negative": (tensor_file(entry(data_offsets=[-8, 0]), DATA), "tensor 't': data_offsets"),
    "4 float": (tensor_file(entry(data_offsets=[0, 8.0]), DATA), "tensor 't': data_offsets"),
    "4 one": (tensor_file(entry(data_offsets=[8]), DATA), "tensor 't': data_offsets"),
    "4 three": (tensor_file(entry(data_offsets=[0, 4, 8]), DATA), "tensor 't': data_offsets"),
    "4 text": (tensor_file(entry(data_offsets=["0", "8"]), DATA), "tensor 't': data_offsets"),
    "4 missing": (tensor_file({"t": {"dtype": "F32", "shape": [2]}}, DATA), "tensor 't': data_offsets"),
    "4 huge": (tensor_file(entry(data_offsets=[0, 1 << 60]), DATA), "tensor 't': F32 of shape .2. does not have"),
    "4 2^53": (tensor_file(entry(dtype="U8", shape=[PAST_2_53], data_offsets=[0, PAST_2_53]), DATA), "tensor 't'"),
    "4 far": (tensor_file(entry(shape=[1 << 50], data_offsets=[0, 1 << 52]), DATA), "the file is cut short"),
    "5 negative": (tensor_file(entry(shape=[-2]), DATA), "tensor 't': shape"),
    "5 float": (tensor_file(entry(shape=[2.0]), DATA), "tensor 't': shape"),
    "5 true": (tensor_file(entry(shape=[True, 2]), DATA), "tensor 't': shape"),
    "5 text": (tensor_file(entry(shape="2"), DATA), "tensor 't': shape"),
    "5 overflow": (
        tensor_file(entry(shape=[1 << 33, 1 << 33]), DATA),
        "tensor 't': shape .* more than 2.53 values",
    ),
    "5 2^64": (tensor_file(entry(shape=[1 << 64]), DATA), "tensor 't': shape"),
    "5 zero": (tensor_file(entry(shape=[0], data_offsets=[0, 0])), "model.embed_tokens.weight is missing"),
    "5 many": (tensor_file(entry(shape=[1] * 10**5 + [2]), DATA), "model.embed_tokens.weight is missing"),
    "5 half a byte": (tensor_file(entry(dtype="F4", shape=[3], data_offsets=[0, 2]), b"\0\0"), "subbytes"),
    "6 unknown": (tensor_file(entry(dtype="F33"), DATA), "unknown variant `F33`"),
    "6 number": (tensor_file(entry(dtype=5), DATA), "tensor 't': dtype"),
    "6 size": (tensor_file(entry(dtype="F16"), DATA), "tensor 't': F16 of shape .2. does not have 8 bytes"),
    "7 trailing": (tensor_file(entry(), DATA + b"x"), "not fully covered"),
    "7 short": (tensor_file(entry(), DATA[:-1]), "the file is cut short"),
}


@pytest.mark.parametrize("case", SAFETENSORS_CASES)
def test_broken_safetensors(case: str, model: Path) -> None:
    data, message = SAFETENSORS_CASES[case]
    (model / "model.safetensors").write_bytes(data)
    with bounded(model), pytest.raises(ModelError, match=message):
        open_checkpoint(model)


@pytest.mark.parametrize("case", ["1 empty", "1 header past end", "7 short"])
def test_truncation_is_called_that(case: str, model: Path) -> None:
    (model / "model.safetensors").write_bytes(SAFETENSORS_CASES[case][0])
    with pytest.raises(ModelError, match=r"the file is cut short; fetch it again$"):
        open_checkpoint(model)


def test_6_dtype_that_cannot_be_used(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float64)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.norm.weight is F64"):
        open_checkpoint(model).tensor("model.norm.weight")


def test_7_file_shrinks(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    os.truncate(model / "model.safetensors", 4096)
    with pytest.raises(ModelError, match="shrank to 4096 bytes after it was opened"):
        checkpoint.tensor("model.norm.weight")


INDEX = "model.safetensors.index.json"


def rewrite_index(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((path / INDEX).read_text())
    edit(values["weight_map"])
    (path / INDEX).write_text(json.dumps(values))


NORM = "model.norm.weight"
INDEX_CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "absent shard": (lambda m: m.update({NORM: "model-9.safetensors"}), "does not exist|not listed"),
    "parent": (lambda m: m.update({NORM: "../model.safetensors"}), "not a safetensors file name"),
    "absolute": (lambda m: m.update({NORM: "/etc/model.safetensors"}), "not a safetensors file name"),
    "backslash": (lambda m: m.update({NORM: "..\\m.safetensors"}), "not a safetensors file name"),
    "pickle": (lambda m: m.update({NORM: "pytorch_model.bin"}), "not a safetensors file name"),
    "number": (lambda m: m.update({NORM: 3}), "not a safetensors file name"),
    "unlisted": (lambda m: m.pop(NORM), f"{NORM} is not listed"),
    "other shard": (lambda m: m.update({NORM: m["model.embed_tokens.weight"]}), "not listed"),
    "nowhere": (lambda m: m.update({"x.weight": m[NORM]}), "x.weight is not in"),
    "empty": (lambda m: m.clear(), "non-empty"),
}


@pytest.mark.parametrize("case", INDEX_CASES)
def test_8_broken_index(case: str, sharded: Path) -> None:
    edit, message = INDEX_CASES[case]
    rewrite_index(sharded, edit)
    with bounded(sharded), pytest.raises(ModelError, match=message):
        open_checkpoint(sharded)


def test_8_shard_twice_or_missing(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=r"is also in|not listed"):
        open_checkpoint(sharded)
    second.unlink()
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(sharded)


def test_8_shards_that_are_links(sharded: Path, tmp_path: Path) -> None:
    """The Hugging Face cache is made of links; those that lead nowhere are named."""
    shard = sorted(sharded.glob("*.safetensors"))[0]
    names = open_checkpoint(sharded).names()
    shutil.move(shard, tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert open_checkpoint(sharded).names() == names
    (tmp_path / "text").write_text("root:x:0:0" * 9)
    for target, message in (
        (shard, "does not exist"),  # a loop
        (tmp_path, "does not exist"),
        (Path("/dev/zero"), "does not exist"),
        (tmp_path / "text", "header length"),
    ):
        shard.unlink()
        shard.symlink_to(target)
        with bounded(sharded), pytest.raises(ModelError, match=message) as caught:
            open_checkpoint(sharded)
        assert shard.name in str(caught.value)


def test_config_against_tensors(model: Path) -> None:
    for field, value, message in (
        ("intermediate_size", 64, r"mlp.gate_proj.weight is \[48, 32\], the config asks for \[64, 32\]"),
        ("num_hidden_layers", 4, "model.layers.3.input_layernorm.weight is missing"),
        ("num_hidden_layers", 2, "unexpected tensors for llama: model.layers.2"),
        ("num_attention_heads", 8, "q_proj.weight is"),
        ("attention_bias", True, "q_proj.bias is missing"),
    ):
        before = (model / "config.json").read_text()
        edit_json(model / "config.json", **{field: value})
        with pytest.raises(ModelError, match=message):
            open_checkpoint(model)
        (model / "config.json").write_text(before)


def test_config_files_that_are_not_json_objects(model: Path) -> None:
    good = (model / "config.json").read_text()
    for text in ("", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "\xff", '{"a":' * 10**5, " " * (5 << 20)):
        (model / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelError, match=r"config.json"):
            open_checkpoint(model)
    (model / "config.json").write_text(good)
    (model / "generation_config.json").write_text('{"eos_token_id": {}}')
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id"):
        open_checkpoint(model)


def test_nothing_is_executed(model: Path) -> None:
    (model / "modeling_evil.py").write_text("raise SystemExit('imported')")
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    open_checkpoint(model).tokenizer().encode("x")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model.bin: pickle"):
        open_checkpoint(model)
    with pytest.raises(ModelError, match="pickle"):
        open_checkpoint(model / "pytorch_model.bin")


def test_paths_that_are_no_checkpoint(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ModelError, match="give the directory"):
        open_checkpoint(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors file"):
        open_checkpoint(model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json"):
        open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"\xff", b'{"model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}']
)
def test_broken_tokenizer_json(text: bytes, model: Path) -> None:
    (model / "tokenizer.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"tokenizer.json"):
        open_checkpoint(model).tokenizer()


def test_missing_tokenizer_json(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json"):
        open_checkpoint(model).tokenizer()
