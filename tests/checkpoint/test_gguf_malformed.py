"""Broken GGUF files, by the numbers of the project's file checklist: each is a ModelError, fast and in
little memory.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounded import bounded
from ggufs import MERGES, TEMPLATE, TOKENS, metadata, pair, raw, row, string, tensors, write

from dovetail import LLM, SamplingParams
from dovetail.checkpoint.gguf import GGUFFile
from dovetail.core.errors import ModelError
from dovetail.models import open_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return U32(kind) + U64(count % (1 << 64)) + data


HUGE = 1 << 63
RAW_CASES: dict[str, tuple[bytes, str]] = {
    "1 empty": (b"", "header"),
    "1 short": (b"GGUF" + b"\0" * 19, "header"),
    **{f"1 {n} bytes": ((b"GGUF\3" + b"\0" * 18)[:n], "header") for n in range(1, 24)},
    "2 magic": (raw(magic=b"GGML"), "magic"),
    "2 version 0": (raw(version=0), "version"),
    "2 version 1": (raw(version=1), "version"),
    "2 version 4": (raw(version=4), "version"),
    "2 byte-swapped": (raw(version=3 << 24), "big-endian"),
    "3 tensors -1": (raw(counts=(-1, 0)), "tensor count"),
    "3 tensors 2^63": (raw(counts=(HUGE, 0)), "tensor count"),
    "3 tensors overflow": (raw(counts=((1 << 64) // 33 + 1, 0)), "tensor count"),
    "3 tensors more than bytes": (raw(rows=[row()], counts=(2, 0), data=b"\0" * 16), "tensor count"),
    "3 keys 2^63": (raw(counts=(0, HUGE)), "metadata count"),
    "3 keys -1": (raw(counts=(0, -1)), "metadata count"),
    "3 product overflow": (raw(counts=(0, (1 << 64) // 14 + 1)), "metadata count"),
    "3 more than bytes": (raw(counts=(0, 100)), "metadata count"),
    "4 key empty": (raw([pair("", 4, U32(1))]), "empty"),
    "4 key -1": (raw([U64((1 << 64) - 1) + b"x" * 16]), "length"),
    "4 key past end": (raw([U64(1000) + b"x" * 16]), "left"),
    "4 key utf-8": (raw([pair(b"\xff\xfe", 4, U32(1))]), "UTF-8"),
    "4 key NUL": (raw([pair("a\0b", 4, U32(1))]), "NUL"),
    "5 string 2^63": (raw([pair("k", 8, U64(HUGE) + b"x")]), "length"),
    "5 string 1 GiB": (raw([pair("k", 8, U64(1 << 30) + b"x" * 1000)]), "length"),
    "5 string past end": (raw([pair("k", 8, U64(500) + b"x")]), "left"),
    "5 string utf-8": (raw([pair("k", 8, string(b"\xff"))]), "UTF-8"),
    "5 strings count": (raw([pair("k", 9, array(8, 1 << 40))]), "do not fit"),
    "5 strings inside": (raw([pair("k", 9, array(8, 2, string("a") + U64(1 << 62)))]), "past the end"),
    "5 strings -1": (raw([pair("k", 9, array(8, 2, string("a") + U64((1 << 64) - 1)))]), "past the end"),
    "5 strings overflow": (raw([pair("k", 9, array(8, 1 << 61))]), "do not fit"),
    "5 strings that are tiny": (raw([pair("k", 9, array(8, 3 << 20, b"\0" * (24 << 20)))]), "do not fit"),
    "6 array overflow": (raw([pair("k", 9, array(10, 1 << 61))]), "needs"),
    "6 array count -1": (raw([pair("k", 9, array(0, -1))]), "needs"),
    "6 nested": (raw([pair("k", 9, array(9, 1, array(4, 1, U32(1))))]), "nested"),
    "6 unknown element": (raw([pair("k", 9, array(13, 1, U32(1)))]), "unknown element type 13"),
    "6 unknown type": (raw([pair("k", 77, U32(1))]), "unknown value type 77"),
    "6 bool 2": (raw([pair("k", 7, b"\2")]), "bool"),
    "6 bool 2 in array": (raw([pair("k", 9, array(7, 3, b"\0\1\2"))]), "bool"),
    "7 duplicate key": (raw([pair("k", 4, U32(1)), pair("k", 4, U32(1))]), "twice"),
    "8 alignment 0": (raw([pair("general.alignment", 4, U32(0))]), "alignment"),
    "8 alignment 13": (raw([pair("general.alignment", 4, U32(13))]), "alignment"),
    "8 alignment 2^31": (raw([pair("general.alignment", 4, U32(1 << 31))]), "alignment"),
    "8 alignment type": (raw([pair("general.alignment", 10, U64(32))]), "alignment"),
    "8 alignment array": (raw([pair("general.alignment", 9, array(4, 1, U32(32)))]), "alignment"),
    "8 alignment text": (raw([pair("general.alignment", 8, string("32"))]), "alignment"),
    "8 alignment twice": (raw([pair("general.alignment", 4, U32(32))] * 2), "twice"),
    "9 name empty": (raw(rows=[row("")], data=b"\0" * 32), "empty"),
    "9 name 64": (raw(rows=[row("x" * 64)], data=b"\0" * 32), "limit of 63"),
    "9 duplicate": (raw(rows=[row("t"), row("t", offset=32)], data=b"\0" * 64), "twice"),
    "9 dots": (raw(rows=[row("../t")], data=b"\0" * 32), "slash"),
    "9 absolute": (raw(rows=[row("/etc/passwd")], data=b"\0" * 32), "slash"),
    "9 backslash": (raw(rows=[row("..\\t")], data=b"\0" * 32), "slash"),
    "9 NUL": (raw(rows=[row("a\0b")], data=b"\0" * 32), "control"),
    "9 utf-8": (raw(rows=[row(b"\xc3")], data=b"\0" * 32), "UTF-8"),
    "10 no dims": (raw(rows=[row(dims=())], data=b"\0" * 32), "0 dimensions"),
    "10 five dims": (raw(rows=[row(dims=(1, 1, 1, 1, 1))], data=b"\0" * 32), "5 dimensions"),
    "10 dims 2^32-1": (raw(rows=[string("t") + U32(0xFFFFFFFF) + b"\0" * 64]), "4294967295 dimensions"),
    "10 dim 0": (raw(rows=[row(dims=(0,))], data=b"\0" * 32), "dimension 0 is 0"),
    "10 dim -1": (raw(rows=[row(dims=(-1,))], data=b"\0" * 32), "2\\^63"),
    "10 dim 2^63-1": (raw(rows=[row(dims=(HUGE - 1,))], data=b"\0" * 32), "bytes"),
    "10 product 0": (raw(rows=[row(dims=(1 << 32, 1 << 32))], data=b"\0" * 32), "2\\^63"),
    "10 product negative": (raw(rows=[row(dims=(1 << 32, 1 << 31))], data=b"\0" * 32), "2\\^63"),
    "10 product small": (raw(rows=[row(dims=((1 << 63) + 2, 2))], data=b"\0" * 32), "2\\^63"),
    "11 unknown type": (raw(rows=[row(kind=99)], data=b"\0" * 32), "type 99 is not supported"),
    "11 removed type": (raw(rows=[row(kind=4)], data=b"\0" * 32), "removed"),
    "11 row and block": (raw(rows=[row(dims=(33,), kind=8)], data=b"\0" * 64), "multiple"),
    "12 bytes overflow": (raw(rows=[row(dims=(1 << 61,))], data=b"\0" * 32), "needs"),
    "12 padding overflow": (raw(rows=[row(dims=((1 << 62) - 1,))], data=b"\0" * 32), "needs"),
    "12 table without data": (raw(rows=[row()]), "ends at"),
    "12 sum overflow": (
        raw(rows=[row("a", (1 << 62,)), row("b", (1 << 62,), offset=1 << 63)], data=b"\0"),
        "needs",
    ),
    "13 misaligned": (raw(rows=[row(offset=4)], data=b"\0" * 64), "offset is 4"),
    "13 past the end": (raw(rows=[row(offset=1 << 40)], data=b"\0" * 64), "offset"),
    "13 overlap": (raw(rows=[row("a", (16,)), row("b", offset=32)], data=b"\0" * 96), "end at 64"),
    "13 equal": (raw(rows=[row("a"), row("b")], data=b"\0" * 64), "end at 32"),
    "13 decreasing": (raw(rows=[row("a", offset=32), row("b")], data=b"\0" * 64), "offset is 32"),
    "13 wrap": (raw(rows=[row(offset=-32)], data=b"\0" * 64), "offset"),
    "14 short": (raw(rows=[row()], data=b"\0" * 15), "ends at"),
    "14 trailing": (raw(rows=[row()], data=b"\0" * 33), "follow"),
    "16 long template": (raw([pair("tokenizer.chat_template", 8, string("x" * 10**7))]), "limit"),
}


@pytest.mark.parametrize("case", RAW_CASES)
def test_raw_case(case: str, tmp_path: Path) -> None:
    data, message = RAW_CASES[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with bounded(path), pytest.raises(ModelError, match=message) as caught:
        GGUFFile(path)
    assert "m.gguf" in str(caught.value)


def test_4_million_tiny_keys(tmp_path: Path) -> None:
    pairs = [pair(str(index), 0, b"\0") for index in range(10**6)]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw(pairs))
    with bounded(path), pytest.raises(ModelError, match="1000000"):
        GGUFFile(path)


def test_most_keys_allowed_are_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([pair(str(index), 0, b"\0") for index in range(1 << 15)]))
    assert len(GGUFFile(path).metadata) == 1 << 15


def test_well_formed_corner_cases(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for version in (2, 3):
        path.write_bytes(
            raw(
                [
                    pair("empty", 9, array(8, 0)),
                    pair("flags", 9, array(7, 2, b"\0\1")),
                    pair("big", 10, U64(7)),
                ],
                [row("a", (4,)), row("b", (2, 3), offset=32)],
                b"\0" * 32 + np.arange(6, dtype="<f4").tobytes(),
                version=version,
            )
        )
        file = GGUFFile(path)
        assert file.metadata["empty"] == [] and file.metadata["flags"].tolist() == [False, True]
        assert file.metadata["big"] == 7 and "big" in file.metadata and len(file.metadata) == 3
        assert file.tensor("b").dequantize().tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        with pytest.raises(ModelError, match="no tensor 'c'"):
            file.tensor("c")


SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*TOKENS[:-1], "\u2581"],
}
KEY_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "7 missing": ({"llama.block_count": None}, "llama.block_count is missing"),
    "7 wrong type": ({"llama.block_count": "2"}, "must be int"),
    "7 float": ({"llama.block_count": 2.0}, "must be int"),
    "7 negative": ({"llama.block_count": -2}, "-2"),
    "7 NaN": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "nan"),
    "7 infinite theta": ({"llama.rope.freq_base": float("inf")}, "inf"),
    "7 theta 0": ({"llama.rope.freq_base": 0.0}, "rope_theta"),
    "7 negative theta": ({"llama.rope.freq_base": -1.0}, "rope_theta"),
    "7 heads 0": ({"llama.attention.head_count": 0}, "head_count is 0"),
    "7 kv heads 0": ({"llama.attention.head_count_kv": 0}, "num_kv_heads"),
    "7 kv heads 3": ({"llama.attention.head_count_kv": 3}, "multiple"),
    "7 heads 5": ({"llama.attention.head_count": 5}, "multiple"),
    "7 layers 0": ({"llama.block_count": 0}, "num_layers"),
    "7 layers 2^31-1": ({"llama.block_count": (1 << 31) - 1}, "block_count"),
    "7 one layer": ({"llama.block_count": 1}, "unexpected tensors"),
    "7 context 2^31": ({"llama.context_length": 1 << 31}, "context_length"),
    "7 context 0": ({"llama.context_length": 0}, "max_position_embeddings"),
    "7 head_dim": ({"llama.attention.key_length": 16}, "value_length|blk|rope|config asks"),
    "7 rope dims": ({"llama.rope.dimension_count": 4}, "rope.dimension_count"),
    "7 scaling": ({"llama.rope.scaling.type": "spiral", "llama.rope.scaling.factor": 2.0}, "spiral"),
    "7 scaling factor": ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor is missing"),
    "7 scaling factor 0": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, "factor"),
    "7 hidden": ({"llama.embedding_length": 64}, "model.embed_tokens.weight"),
    "7 wide": (
        {"llama.feed_forward_length": 32},
        "mlp.gate_proj.weight is .64, 32., the config asks for .32, 32.",
    ),
    "7 per-layer heads": ({"llama.attention.head_count_kv": [2, 1]}, "differs by layer"),
    "7 vocab": ({"llama.vocab_size": 5}, "vocabulary of 5|embed_tokens"),
    "7 experts": ({"llama.expert_count": 8}, "experts"),
    "16 model": ({"tokenizer.ggml.model": "bert"}, "bert"),
    "16 no tokens": ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
    "16 tokens are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "array of strings"),
    "16 too many tokens": ({"tokenizer.ggml.tokens": [str(i) for i in range(len(TOKENS) + 1)]}, "vocabulary"),
    "16 token twice": ({"tokenizer.ggml.tokens": TOKENS[:-1] + TOKENS[:1]}, "twice"),
    "16 types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type"),
    "16 no merges": ({"tokenizer.ggml.merges": None}, "merges is missing"),
    "16 merge absent": ({"tokenizer.ggml.merges": [*MERGES, "h zz"]}, "merges.6."),
    "16 merge of three": ({"tokenizer.ggml.merges": ["h e l"]}, "merges.0."),
    "16 merged absent": ({"tokenizer.ggml.merges": ["h h"]}, "merges.0."),
    "16 scores missing": (SENTENCEPIECE, "scores"),
    "16 scores NaN": (
        SENTENCEPIECE | {"tokenizer.ggml.scores": [float("nan")] * len(TOKENS)},
        "scores.0.",
    ),
    "16 scores short": (SENTENCEPIECE | {"tokenizer.ggml.scores": [1.0]}, "scores"),
    "16 unknown id": (
        SENTENCEPIECE | {"tokenizer.ggml.scores": [0.0] * len(TOKENS), "tokenizer.ggml.unknown_token_id": 9999},
        "unknown_token_id is 9999",
    ),
}


def load(path: Path) -> None:
    """Everything that a runtime does with a checkpoint before it computes."""
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    if tokenizer.templates:
        tokenizer.encode("hello 123")
    for name in checkpoint.names():
        checkpoint.tensor(name).dequantize()


@pytest.mark.parametrize("case", KEY_CASES)
def test_key_case(case: str, tmp_path: Path) -> None:
    changes, message = KEY_CASES[case]
    path = write(tmp_path / "m.gguf", changes)
    with bounded(path), pytest.raises(ModelError, match=message):
        load(path)


def change(edit: Callable[[dict[str, np.ndarray]], Any]) -> dict[str, np.ndarray]:
    weights = tensors()
    edit(weights)
    return weights


TENSOR_CASES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "missing": (
        change(lambda w: w.pop("blk.1.ffn_up.weight")),
        "model.layers.1.mlp.up_proj.weight is missing",
    ),
    "embedding": (change(lambda w: w.pop("token_embd.weight")), "token_embd.weight"),
    "shape": (
        change(lambda w: w.update({"blk.0.attn_v.weight": w["output_norm.weight"]})),
        "v_proj.weight is",
    ),
    "factors": (change(lambda w: w.update({"rope_freqs.weight": np.ones(3, np.float32)})), "3 rope factors"),
    "factor 0": (change(lambda w: w.update({"rope_freqs.weight": np.zeros(4, np.float32)})), "positive"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensor_case(case: str, tmp_path: Path) -> None:
    weights, message = TENSOR_CASES[case]
    path = write(tmp_path / "m.gguf", weights=weights)
    with bounded(path), pytest.raises(ModelError, match=message):
        load(path)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'gpt2' is not known; known are llama, mistral, qwen2, qwen3, gemma3"):
        load(write(tmp_path / "m.gguf", architecture="gpt2"))


def test_16_broken_template(tmp_path: Path) -> None:
    tokenizer = open_checkpoint(write(tmp_path / "m.gguf", {"tokenizer.chat_template": "{% for %}"})).tokenizer()
    with pytest.raises(ModelError, match="chat template"):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_14_file_shrinks(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ModelError, match="shrank"):
        checkpoint.tensor("model.norm.weight")


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight", "token_embd.weight"])
@pytest.mark.parametrize("kind", ["Q8_0", "float16"])
def test_11_a_type_that_is_unusual_for_a_tensor_is_read_as_it_is(name: str, kind: str, tmp_path: Path) -> None:
    weights = tensors()
    if kind == "float16":
        weights[name] = weights[name].astype(np.float16)
    path = write(tmp_path / "m.gguf", weights=weights, formats={name: kind} if kind == "Q8_0" else None)
    (out,) = LLM(path, threads=1, kv_memory=1 << 20).generate([[5, 6, 7]], GREEDY, progress=False)
    assert len(out.outputs[0].token_ids) == 3


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_17_scales_that_are_no_numbers_load_and_end_requests_with_an_error(scale: float, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", formats={"blk.0.ffn_up.weight": "Q8_0"})
    data = bytearray(path.read_bytes())
    at = GGUFFile(path).tensors["blk.0.ffn_up.weight"].offset
    data[at : at + 2] = np.float16(scale).tobytes()
    path.write_bytes(data)
    llm = LLM(path, threads=1, kv_memory=1 << 20)
    for _ in range(2):
        for out in llm.generate([[5, 6, 7], [8]], GREEDY, progress=False):
            assert (out.outputs[0].token_ids, out.outputs[0].finish_reason) == ([], "error")
        llm.engine.check()
    assert llm.engine.pool.num_free == llm.engine.pool.num_pages


def small(path: Path) -> bytes:
    """A valid file of a few kilobytes, with every kind of value."""
    values = {
        "k.u8": [1, 2, 3],
        "k.flag": True,
        "k.text": "some text",
        "k.number": 1.5,
        "k.words": ["a", "bc"],
    }
    keys = dict.fromkeys(metadata()) | values
    weights = {"a.weight": np.ones((3, 32), np.float32), "b.weight": np.ones(5, np.float32)}
    return write(path, keys, weights, {"a.weight": "Q4_0"}).read_bytes()


def test_1_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = small(path)
    GGUFFile(path)
    last = 5 * 4  # the padding behind the last tensor may be absent
    end = len(data) - (32 - last)
    for length in range(end):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"does not fit in the file|do not fit|fetch it again$"):
            GGUFFile(path)
    path.write_bytes(b"PK" + data)
    with pytest.raises(ModelError, match="this is no GGUF file"):
        GGUFFile(path)
    path.write_bytes(data[:end])
    GGUFFile(path)


def mutate(rng: random.Random, data: bytes, limit: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(limit, len(changed)))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            value = rng.choice((0, 1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, rng.randrange(1 << 64)))
            changed[at : at + 8] = U64(value)
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 9)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_mutations_of_a_header(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = small(path)
    rng = random.Random(seed)
    for _ in range(500):
        path.write_bytes(mutate(rng, data, len(data)))
        try:
            file = GGUFFile(path)
            for key in file.metadata:
                file.metadata[key]
            for name in file.tensors:
                file.tensor(name).dequantize()
        except ModelError:
            pass


@pytest.mark.filterwarnings("ignore")
def test_mutations_of_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    header = data.index(b"output_norm.weight") + 60
    rng = random.Random(7)
    loaded = 0
    for _ in range(2000):
        path.write_bytes(mutate(rng, data, header))
        try:
            load(path)
            loaded += 1
        except ModelError:
            pass
    assert loaded > 20  # enough mutants pass the reader to exercise what comes after it


def test_template_is_the_models(tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path / "m.gguf")).tokenizer().templates == {"default": TEMPLATE}
