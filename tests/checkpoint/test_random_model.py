"""Models with random weights: what is in their files, and that they can be run."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dovetail import LLM, SamplingParams
from dovetail.checkpoint.gguf_writer import NewTensor, write_gguf
from dovetail.checkpoint.random_model import FORMATS, SPREAD, format_of, write_random
from dovetail.checkpoint.random_vocabulary import random_vocabulary
from dovetail.core.errors import ConfigError, ModelError
from dovetail.models import MODELS, open_checkpoint
from dovetail.models.shapes import SHAPES, shape

PUBLISHED = {  # parameters, as the models' pages count them
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248, "mistral-7b": 7_248_023_552, "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360, "gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952, "smollm3-3b": 3_075_098_624,
}  # fmt: skip
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}


def make(path: Path, architecture: str = "llama", format: str = "Q4_K", seed: int = 0, **changes: int) -> Path:
    record, config = shape(architecture, None, {**SIZES, **changes})
    write_random(record, config, path, format=format, seed=seed)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    record, config = shape(SHAPES[name].architecture, name, {})
    assert sum(math.prod(size) for _, size in record.tensors(config)) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_means_the_shape(name: str, tmp_path: Path) -> None:
    """What is read from the file is the config that was written; sizes that make it large are cut."""
    sizes = {"num_hidden_layers": 7, "vocab_size": 260, "intermediate_size": 256}
    record, config = shape(SHAPES[name].architecture, name, sizes)
    write_random(record, config, tmp_path / "m.gguf", format="Q4_K")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.architecture is record
    known = {
        "bos_token_id": 256,
        "eos_token_ids": (257, 259),
        "rms_norm_eps": float(np.float32(config.rms_norm_eps)),
    }
    assert vars(checkpoint.config) == {**vars(config), **known}


@pytest.mark.parametrize("format", FORMATS)
def test_weights_have_the_spread_that_models_have(format: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", "qwen2", format))
    for name in checkpoint.names():
        values = np.asarray(checkpoint.tensor(name).dequantize())
        if name.endswith("norm.weight"):
            assert (values == 1).all()
            continue
        assert abs(values.std() / SPREAD - 1) < (0.05 if values.size > 4096 else 0.4), name
        assert abs(values.mean()) < 5 * SPREAD / values.size**0.5 + 0.01 * SPREAD, name


@pytest.mark.parametrize("format", FORMATS)
def test_the_gguf_package_reads_the_same_values(format: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", "qwen3", format)
    ours, theirs = open_checkpoint(path), gguf.GGUFReader(path)
    assert theirs.fields["qwen3.attention.head_count_kv"].contents() == ours.config.num_kv_heads
    assert theirs.fields["general.architecture"].contents() == "qwen3"
    found = {tensor.name: tensor for tensor in theirs.tensors}
    assert len(found) == len(ours.names())
    for own, name in (
        ("token_embd", "embed_tokens"), ("blk.1.attn_v", "layers.1.self_attn.v_proj"),
        ("blk.0.attn_k_norm", "layers.0.self_attn.k_norm"), ("blk.1.ffn_down", "layers.1.mlp.down_proj"),
    ):  # fmt: skip
        tensor = found[f"{own}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(np.asarray(ours.tensor(f"model.{name}.weight").dequantize()), values), own


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """In every version: only raw draws of a generator are used, whose stream numpy keeps."""
    first, again, other = (
        make(tmp_path / f"{n}.gguf", format="Q4_K_M", seed=seed).read_bytes() for n, seed in enumerate((3, 3, 4))
    )
    assert first == again != other
    assert hashlib.sha256(first).hexdigest() == "695c7db3804b4935457e485336c53d388d5b0f4c46a74302537592964276e49a"


def test_a_tensor_does_not_depend_on_the_others(tmp_path: Path) -> None:
    two, three = (open_checkpoint(make(tmp_path / f"{n}.gguf", num_hidden_layers=n)) for n in (2, 3))
    for name in two.names():
        assert np.array_equal(np.asarray(two.tensor(name).data), np.asarray(three.tensor(name).data)), name


def test_large_tensors_are_drawn_in_pieces(tmp_path: Path) -> None:
    record, config = shape("llama", None, {"hidden_size": 2048, "vocab_size": 30000, "num_hidden_layers": 1})
    tracemalloc.start()
    written = write_random(record, config, tmp_path / "m.gguf", format="BF16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written.bytes == (tmp_path / "m.gguf").stat().st_size > 120 << 20
    assert peak < 80 << 20


def test_deep_models_stay_finite(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", "qwen3", "Q4_K_M", num_hidden_layers=48)
    llm = LLM(str(path), threads=1, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    answer = llm.generate("Once upon a time", params)[0].outputs[0]
    assert answer.logprobs is not None
    values = [entry.logprob for step in answer.logprobs for entry in step.values()]
    assert all(math.isfinite(value) for value in values) and -30 < min(values) < max(values) < 0


@pytest.mark.parametrize("format", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_packed_weights_answer_as_their_values(format: str, tmp_path: Path) -> None:
    """Also the embedding and the head. Codes times rows differ from values times rows in float32's rounding."""
    path = make(tmp_path / "m.gguf", "qwen3", format, num_hidden_layers=2)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    found = []
    for options in ({"kernels": "torch"}, {"activations": "exact"}, {"activations": "int16"}):
        llm = LLM(str(path), threads=1, max_model_len=64, **options)
        found.append(llm.generate("Once upon a time", params)[0].outputs[0])
    reference, exact, int16 = found
    assert exact.token_ids == int16.token_ids == reference.token_ids
    assert abs(exact.cumulative_logprob - reference.cumulative_logprob) < 1e-3
    assert abs(int16.cumulative_logprob - reference.cumulative_logprob) < 3e-3


def test_mixtures_give_more_bits_where_files_do() -> None:
    record, config = shape("llama", "llama-3-8b", {})
    formats = {name: format_of(name, size, config, "Q4_K_M") for name, size in record.tensors(config)}
    better = {name for name, kind in formats.items() if kind == "Q6_K"}
    layers = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert better == {"lm_head.weight"} | {
        f"model.layers.{i}.{part}.weight" for i in layers for part in ("self_attn.v_proj", "mlp.down_proj")
    }
    assert formats["model.norm.weight"] == "F32"
    tied = shape("qwen2", "qwen2.5-0.5b", {})[1]
    assert format_of("model.embed_tokens.weight", (1024, 1024), tied, "Q4_K_M") == "Q6_K"


def test_rows_that_do_not_divide(tmp_path: Path) -> None:
    record, config = shape("llama", "smollm2-135m", {"num_hidden_layers": 1, "vocab_size": 300})
    written = write_random(record, config, tmp_path / "m.gguf", format="Q4_K")
    assert written.formats == {"Q4_0": 7, "F32": 3, "Q4_K": 1}
    open_checkpoint(tmp_path / "m.gguf")
    record, config = shape("llama", None, {"hidden_size": 100, "vocab_size": 300})
    with pytest.raises(ConfigError, match="a row of 100 is not a multiple of Q4_0's 32 values"):
        write_random(record, config, tmp_path / "n.gguf", format="Q4_K")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_vocabularies(tmp_path: Path) -> None:
    for size in (260, 300, 20000):
        keys = random_vocabulary(size, seed=1)
        tokens = keys["tokenizer.ggml.tokens"]
        assert len(tokens) == len(set(tokens)) == len(keys["tokenizer.ggml.token_type"]) == size
        assert len(keys["tokenizer.ggml.merges"]) == size - 260
    checkpoint = open_checkpoint(make(tmp_path / "m.gguf", vocab_size=20000))
    tokenizer = checkpoint.tokenizer()
    for text in ("the quick brown fox jumps over the lazy dog", "Ärger\n\n123 🎉 你好", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("the quick brown fox jumps over the lazy dog")) < 30
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}])[0] == 258
    with pytest.raises(ConfigError, match="a vocabulary of 259 is too small: 260"):
        random_vocabulary(259, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shape("gpt2", None, {}), "unknown architecture 'gpt2'; known are llama, mistral"),
        (lambda: shape("llama", "llama-9", {}), "unknown shape 'llama-9'; known are smollm2-135m, .*, llama-3-8b"),
        (lambda: shape("qwen2", "llama-3-8b", {}), "llama-3-8b is a llama model, not a qwen2 one"),
        (lambda: shape("llama", "llama-3-8b", {"num_key_value_heads": 3}), "num_heads 32 .* 3|multiple"),
    ],
)
def test_wrong_shapes(call: Any, message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        call()


def test_unknown_formats_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'Q3_0'; random weights come in F32, .*, Q4_K_M"):
        make(tmp_path / "m.gguf", format="Q3_0")


def test_a_scaled_rotation_is_refused(tmp_path: Path) -> None:
    record, config = MODELS["llama"], shape("llama", None, {})[1]
    scaled = config.__class__(**{**vars(config), "rope": config.rope.__class__(1e4, "linear", {"factor": 2.0})})
    with pytest.raises(ModelError, match="'linear' cannot be written"):
        write_random(record, scaled, tmp_path / "m.gguf", format="F32")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.host.files.free_bytes", lambda directory: 7)
    with pytest.raises(ModelError, match=r"not enough disk space for m\.gguf: .* 7B free .*another folder"):
        make(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    def blocks(tensor: NewTensor) -> Any:
        yield bytes(4)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelError, match="not enough disk space"):
        write_gguf(tmp_path / "m.gguf", {}, [NewTensor("a", "F32", (2,))], blocks)
    with pytest.raises(ValueError, match="a: -4 bytes more"):
        write_gguf(tmp_path / "m.gguf", {}, [NewTensor("a", "F32", (2,))], lambda tensor: [bytes(4)])
    assert not list(tmp_path.iterdir())
