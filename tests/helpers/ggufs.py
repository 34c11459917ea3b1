"""Tiny GGUF files: well-formed ones by the gguf package, and raw ones built byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dovetail.text.detokenizer import BYTE_ALPHABET

HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS = 32, 4, 2, 64, 2
INTERLEAVED = ("llama", "smollm3")  # architectures whose writers reorder rows of q and k
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + list(BYTE_ALPHABET) + ["he", "ll", "hell", "hello", "Ġhello", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF writers store them for Llama: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors(seed: int = 0, bias: bool = False) -> dict[str, np.ndarray]:
    """float32 weights of a tiny Llama under GGUF names, in Hugging Face row order."""
    rng = np.random.default_rng(seed)
    keys = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HIDDEN, HIDDEN),
            "attn_k.weight": (keys, HIDDEN),
            "attn_v.weight": (keys, HIDDEN),
            "attn_output.weight": (HIDDEN, HIDDEN),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (WIDE, HIDDEN),
            "ffn_up.weight": (WIDE, HIDDEN),
            "ffn_down.weight": (HIDDEN, WIDE),
        }
        if bias:
            block |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in shapes.items()}


def metadata() -> dict[str, Any]:
    """Keys of the tiny Llama; ints become uint32."""
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def write(
    path: Path,
    changes: dict[str, Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    formats: dict[str, str] | None = None,
    architecture: str = "llama",
    split: int = 0,
    tensors_in_first: bool = True,
) -> Path:
    """A tiny model. A change to None removes a key; `formats` maps tensor names to quantized types.

    `split` cuts it into parts of as many tensors; the path of the first part is returned.
    """
    writer = gguf.GGUFWriter(
        str(path), architecture, split_max_tensors=split, small_first_shard=not tensors_in_first
    )
    keys = metadata() | (changes or {})
    for key, value in keys.items():
        key = key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in (tensors() if weights is None else weights).items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if heads is not None and architecture in INTERLEAVED:
            weight = permuted(weight, heads)
        kind = (formats or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(weight))
        else:
            dtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(weight, dtype), raw_dtype=dtype)
    return _close(writer, path)


def write_model(path: Path, model: Any, architecture: str, **changes: Any) -> Path:
    """A transformers model as GGUF writers store it: tensors under the gguf package's names.

    `changes` adds metadata under the architecture's prefix; None leaves a key out. Where the architecture's writer
    does so, rows of q and k are interleaved, and weights of norms get what they lack.
    """
    c, arch = model.config, {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    keys = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (keys | changes).items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        value, part = tensor.float().numpy(), name.split(".")[-2]
        if part in heads and architecture in INTERLEAVED:
            value = permuted(value, heads[part])
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(value))
    return _close(writer, path)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer.format_shard_names(path)[0]


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return string(key) + struct.pack("<I", kind) + value


def row(name: str | bytes = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor table entry."""
    sizes = b"".join(struct.pack("<Q", size % (1 << 64)) for size in dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset % (1 << 64))


def raw(
    pairs: list[bytes] | tuple[bytes, ...] = (),
    rows: list[bytes] | tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file."""
    tensors_, keys = counts or (len(rows), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors_ % (1 << 64), keys % (1 << 64))
    head += b"".join(pairs) + b"".join(rows)
    return head + b"\0" * (-len(head) % alignment if data else 0) + data
