"""What GGUF metadata says the same way for most decoders: reading it, and writing it.

An architecture's record composes these functions and adds what is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.fields import Keys
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig

if TYPE_CHECKING:
    from dovetail.checkpoint.gguf import GGUFFile

ENDS = ("eos", "eot", "eom")  # end of the text, of a turn, of a message
_YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}


def decoder_rope(keys: Keys, head_dim: int, positions: int) -> RopeConfig:
    """The rotation of heads of `head_dim`, scaled by metadata or by the tensor rope_freqs.weight."""
    theta = keys.number("rope.freq_base", 10000.0)
    rotated = keys.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ModelError(
            f"{keys.file.path}: rope.dimension_count is {rotated}, attention.key_length is {head_dim}"
        )
    kind = keys.metadata.read(f"{keys.prefix}.rope.scaling.type", str, "none")
    legacy = keys.number("rope.scale_linear", 0.0)
    factors: tuple[float, ...] = ()
    if "rope_freqs.weight" in keys.file.tensors:
        factors = tuple(keys.file.tensor("rope_freqs.weight").dequantize().flatten().tolist())
        if kind not in ("none", "llama3"):
            raise ModelError(f"{keys.file.path}: both rope_freqs.weight and rope.scaling.type {kind!r} are given")
        return RopeConfig(theta, "factors", {}, factors)
    if kind == "none":
        return RopeConfig(theta, "linear", {"factor": legacy}) if legacy not in (0.0, 1.0) else RopeConfig(theta)
    parameters = {"factor": keys.number("rope.scaling.factor")}
    if kind == "linear":
        return RopeConfig(theta, "linear", parameters)
    if kind != "yarn":
        raise ModelError(f"{keys.file.path}: rope.scaling.type {kind[:64]!r} is not none, linear or yarn")
    original = keys.integer("rope.scaling.original_context_length", positions)
    parameters["original_max_position_embeddings"] = float(original)
    for key, name in _YARN.items():
        if f"{keys.prefix}.{key}" in keys.metadata:
            parameters[name] = keys.number(key)
    if f"{keys.prefix}.rope.scaling.attn_factor" in keys.metadata:
        # GGUF's factor multiplies the length correction that Hugging Face's attention_factor includes.
        correction = 0.1 * math.log(max(parameters["factor"], 1.0)) + 1.0
        parameters["attention_factor"] = keys.number("rope.scaling.attn_factor") * correction
    return RopeConfig(theta, "yarn", parameters)


def decoder_config(keys: Keys) -> ModelConfig:
    """What the keys that decoders share say. Biases are there where the first layer has them, windows in no layer.

    ModelError naming the file and the key for anything missing or wrong, and for mixtures of experts.
    """
    file, name = keys.file, keys.prefix
    heads, hidden = keys.per_layer("attention.head_count"), keys.integer("embedding_length")
    if heads == 0:
        raise ModelError(f"{file.path}: {name}.attention.head_count is 0")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if f"{name}.attention.key_length" not in file.metadata and hidden % heads:
        raise ModelError(f"{file.path}: embedding_length {hidden} is not a multiple of head_count {heads}")
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: {name}.attention.value_length differs from key_length {head_dim}")
    if keys.integer("expert_count", 0):
        raise ModelError(f"{file.path}: {name}.expert_count: mixtures of experts are not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: has no tensor 'token_embd.weight'")
    vocab = keys.integer("vocab_size", embedding.shape[0])
    layers, positions = keys.integer("block_count"), keys.integer("context_length")
    if layers > 65536:
        raise ModelError(f"{file.path}: {name}.block_count is {layers}, more than any model has")
    tensors = file.tensors
    return ModelConfig(
        architecture=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=keys.per_layer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.per_layer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=decoder_rope(keys, head_dim, positions),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        bos_token_id=next(iter(gguf_ids(file, ("bos",), vocab)), None),
        eos_token_ids=gguf_ids(file, ENDS, vocab),
    )


def decoder_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys that say what `decoder_config` and the architectures' records read; ints, floats, lists of bool.

    What tensors say (biases, norms of queries and keys, whether the head is tied) has no key. ModelError for
    rotations that are scaled.
    """
    if config.rope.kind != "default":
        raise ModelError(f"a rotation of type {config.rope.kind!r} cannot be written to a GGUF file")
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.head_dim,
    }
    slides = [window is not None for window in config.sliding_windows]
    if any(slides):
        first = slides.index(True)
        keys["attention.sliding_window"] = config.window_of(first)
        if not all(slides):
            keys["attention.sliding_window_pattern"] = slides
            keys["rope.freq_base_swa"] = config.rope_of(first).theta
    return {f"{config.architecture}.{name}": value for name, value in keys.items()}


def window_in_all_layers(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """One entry per layer, () where the file gives no window."""
    window = keys.integer("attention.sliding_window", 0)
    return (window,) * layers if window else ()


def sliding_layers(keys: Keys, layers: int, period: int) -> list[bool]:
    """Which layers slide: a flag for each, or all but every n-th, where n is `period` if the file does not say."""
    key = f"{keys.prefix}.attention.sliding_window_pattern"
    if not keys.metadata.is_array(key):
        n = keys.integer("attention.sliding_window_pattern", period)
        return [n == 0 or (layer + 1) % n != 0 for layer in range(layers)]
    flags = keys.metadata.numbers(key)
    if flags is None or len(flags) != layers:
        raise ModelError(f"{keys.file.path}: {key} must be a number, or a flag for each of {layers} layers")
    return [bool(flag) for flag in flags]


def gguf_ids(file: GGUFFile, names: Sequence[str], count: int) -> tuple[int, ...]:
    """The ids that tokenizer.ggml.<name>_token_id give and that are among `count` tokens."""
    ids = [file.metadata.read(f"tokenizer.ggml.{name}_token_id", int) for name in names]
    return tuple(dict.fromkeys(token for token in ids if token is not None and token < count))
