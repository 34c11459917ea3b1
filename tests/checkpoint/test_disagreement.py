"""Files of a model that disagree with each other: what is used, and what a warning says."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from ggufs import HEADS, metadata, permuted, tensors, write
from hf_models import edit_json, save_model
from safetensors.numpy import load_file, save_file

from dovetail.core.errors import ModelError
from dovetail.core.sampling import SamplingParams
from dovetail.llm import LLM
from dovetail.models import open_checkpoint
from dovetail.ops.dequant import BLOCKS

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def warnings_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Change the tensors of a folder with one file."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def other(weights: dict[str, np.ndarray]) -> np.ndarray:
    return weights[EMBEDDING][::-1].copy()


def last_row(weights: dict[str, np.ndarray]) -> np.ndarray:
    head = weights[EMBEDDING].copy()
    head[-1, -1] += 1
    return head


HEADS_OF_FILES: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "another": other, "another in its last value": last_row, "the embedding": lambda w: w[EMBEDDING].copy(),
    "in another format": lambda w: w[EMBEDDING].astype(np.float16),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS_OF_FILES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_one_that_transformers_uses(
    tied: bool, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, tie_word_embeddings=tied)
    edit(tmp_path, lambda w: w.update({HEAD: HEADS_OF_FILES[case](w)}))
    checkpoint = open_checkpoint(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    name = EMBEDDING if checkpoint.config.tie_word_embeddings else HEAD
    assert torch.equal(checkpoint.tensor(name).dequantize(), reference.lm_head.weight.detach())
    assert checkpoint.config.tie_word_embeddings is (tied and case == "the embedding")
    assert ("tie_word_embeddings" in caplog.text) is (tied and case != "the embedding")


def test_tied_with_another_head_answers_as_transformers(tmp_path: Path) -> None:
    save_model(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda w: w.update({HEAD: other(w)}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = list(b"hello")
    llm = LLM(tmp_path, dtype="float32", threads=1, kv_memory=1 << 20)
    (output,) = llm.generate(ids, SamplingParams(temperature=0, max_tokens=1), progress=False)
    assert output.outputs[0].token_ids == [int(model(torch.tensor([ids])).logits[0, -1].argmax())]


def test_model_safetensors_wins_over_an_index_of_other_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path / "old", shard="40KB")
    save_model(tmp_path / "new")
    edit(tmp_path / "new", lambda w: w.update({EMBEDDING: other(w)}))
    both = Path(shutil.copytree(tmp_path / "old", tmp_path / "both"))
    shutil.copy(tmp_path / "new" / "model.safetensors", both)
    stale = Path(shutil.copytree(tmp_path / "new", tmp_path / "stale"))  # the index was left behind alone
    shutil.copy(both / "model.safetensors.index.json", stale)
    expected = load_file(tmp_path / "new" / "model.safetensors")
    for directory in (both, stale):
        caplog.clear()
        checkpoint = open_checkpoint(directory)
        reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
        for name, value in expected.items():
            assert np.array_equal(checkpoint.tensor(name).values(), value)
            assert np.array_equal(reference[name].numpy(), value)
        assert checkpoint.files == (directory / "model.safetensors",)
        assert "model.safetensors is read; the" in caplog.text and "index.json names are not" in caplog.text


def test_an_index_that_agrees_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert set(open_checkpoint(tmp_path).names()) == set(names) and not caplog.text


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.vision.weight"])
def test_a_tensor_that_is_not_used_is_a_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path)
    edit(tmp_path, lambda w: w.update({name: np.ones(8, np.float32)}))
    assert name in open_checkpoint(tmp_path).names()
    assert f"llama does not use {name}" in caplog.text
    edit(tmp_path, lambda w: w.update({"model.layers.3.input_layernorm.weight": np.ones(32, np.float32)}))
    with pytest.raises(ModelError, match="the config has 3 layers"):
        open_checkpoint(tmp_path)


def test_a_tensor_of_a_gguf_file_that_is_not_used_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tensors() | {"blk.0.ffn_gate_exps.weight": np.ones(32, np.float32)}
    open_checkpoint(write(tmp_path / "m.gguf", weights=weights))
    assert "llama does not use blk.0.ffn_gate_exps.weight" in caplog.text


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("ids", "known"), [(100_000, ()), ([257, 260, 2], (257, 2))])
def test_an_end_outside_the_vocabulary_is_a_warning(
    file: str, ids: Any, known: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path)
    for path in (tmp_path / "config.json", tmp_path / "generation_config.json"):
        edit_json(path, eos_token_id=None)
    edit_json(tmp_path / file, eos_token_id=ids, bos_token_id=300)
    config = open_checkpoint(tmp_path).config
    assert config.eos_token_ids == known
    wrong = ids if isinstance(ids, int) else 260
    assert f"{file}: eos_token_id {wrong} is not used, the model has 260 tokens" in caplog.text
    if file == "config.json":
        assert config.bos_token_id is None and "config.json: bos_token_id 300" in caplog.text


def test_a_token_that_is_put_into_every_text_must_be_the_models(tmp_path: Path) -> None:
    save_model(tmp_path, vocab_size=256)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert open_checkpoint(tmp_path).tokenizer().encode("a") == [97]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [256], "tokens": ["<|bos|>"]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"tokenizer.json: puts token 256 into every text.*256 tokens"):
        open_checkpoint(tmp_path).tokenizer()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LENGTHS = [
    # what the files say of the length the model was trained on, and of the length now: the limit
    (32, {"original_max_position_embeddings": 32}, 128),
    (128, {"original_max_position_embeddings": 32}, 128),
    (40, {"original_max_position_embeddings": 32}, 128),
    (200, {"original_max_position_embeddings": 32}, 200),
    (32, {}, 128),
]


@pytest.mark.parametrize(("now", "original", "limit"), LENGTHS)
def test_yarn_extends_the_limit(now: int, original: dict[str, int], limit: int, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2", max_position_embeddings=now, rope_parameters=YARN | original)
    assert open_checkpoint(tmp_path).config.max_position_embeddings == limit
    keys = {"llama.context_length": now, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    for length in original.values():
        keys["llama.rope.scaling.original_context_length"] = length
    found = open_checkpoint(write(tmp_path / "m.gguf", keys))
    assert found.config.max_position_embeddings == limit
    if limit > now:
        llm = LLM(tmp_path / "m.gguf", threads=1, kv_memory=1 << 20, max_model_len=limit)
        params = SamplingParams(temperature=0, max_tokens=limit - 100, ignore_eos=True)
        (output,) = llm.generate([5] * 100, params, progress=False)
        assert len(output.outputs[0].token_ids) == limit - 100


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_other_rotations_do_not_extend_the_limit(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, rope_parameters={"rope_type": kind, "factor": 4.0, "rope_theta": 1e4})
    assert open_checkpoint(tmp_path).config.max_position_embeddings == 128


def iq4_nl(weight: np.ndarray) -> np.ndarray:
    """Blocks of random codes with a scale that keeps the size of `weight`, uint8 [rows, row bytes]."""
    rng = np.random.default_rng(3)
    count = weight.size // 32
    scale = np.full((count, 1), np.abs(weight).max() / 127, np.float16).view(np.uint8)
    codes = rng.integers(0, 256, (count, 16), np.uint8)
    return np.concatenate([scale, codes], 1).reshape(len(weight), -1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_iq4_nl_answers_as_its_values(dtype: str, tmp_path: Path) -> None:
    """Small models with Q2_K and Q3_K have such tensors where rows are no multiple of 256."""
    weights = tensors()
    plain, coded = dict(weights), dict(weights)
    for name in weights:
        if name.endswith(("attn_q.weight", "ffn_down.weight", "ffn_up.weight")):
            coded[name] = iq4_nl(weights[name])
            plain[name] = BLOCKS["IQ4_NL"].dequantize(coded[name].reshape(-1, 18)).reshape(weights[name].shape)
    write_raw(tmp_path / "coded.gguf", coded)
    write(tmp_path / "plain.gguf", weights=plain)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    outputs = []
    for name in ("coded", "plain"):
        llm = LLM(tmp_path / f"{name}.gguf", dtype=dtype, threads=1, kv_memory=1 << 20)
        outputs.append(llm.generate([5, 6, 7], params, progress=False)[0].outputs[0])
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].cumulative_logprob == outputs[1].cumulative_logprob


def write_raw(path: Path, weights: dict[str, np.ndarray]) -> None:
    """A tiny model in which byte arrays are IQ4_NL blocks."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata().items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value))
        (add or writer.add_array)(key, value)
    for name, weight in weights.items():
        heads = {"attn_q": HEADS, "attn_k": HEADS // 2}.get(name.split(".")[-2])
        stored = np.ascontiguousarray(weight if heads is None else permuted(weight, heads))
        blocks = gguf.GGMLQuantizationType.IQ4_NL if weight.dtype == np.uint8 else None
        writer.add_tensor(name, stored, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
