"""GGUF metadata -> ModelConfig."""

from __future__ import annotations

import math

from dovetail.checkpoint.architectures import find_architecture
from dovetail.checkpoint.geometry import LIMIT, check_geometry
from dovetail.checkpoint.gguf import GGUFFile
from dovetail.core.errors import ModelError
from dovetail.core.model import ModelConfig, RopeConfig

_YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}


class _Keys:
    """Metadata keys under the architecture's prefix."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file, self.prefix, self.metadata = file, prefix, file.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        key = f"{self.prefix}.{name}"
        value = self.metadata.read(key, int, default)
        if value is None:
            raise ModelError(f"{self.file.path}: {key} is missing")
        if value >= LIMIT:
            raise ModelError(f"{self.file.path}: {key} is {value}, not below 2^31")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.metadata.read(f"{self.prefix}.{name}", float, default)
        if value is None:
            raise ModelError(f"{self.file.path}: {self.prefix}.{name} is missing")
        return float(value)

    def per_layer(self, name: str, default: int | None = None) -> int:
        """An integer, or an array with the same integer for every layer."""
        key = f"{self.prefix}.{name}"
        if self.metadata.is_array(key):
            numbers = self.metadata.numbers(key)
            if (
                numbers is None
                or not len(numbers)
                or numbers.dtype.kind not in "iu"
                or (numbers != numbers[0]).any()
            ):
                raise ModelError(f"{self.file.path}: {key} differs by layer, which is not supported")
            if not 0 <= int(numbers[0]) < LIMIT:
                raise ModelError(f"{self.file.path}: {key} is {int(numbers[0])}")
            return int(numbers[0])
        return self.integer(name, default)


def _rope(keys: _Keys, head_dim: int, positions: int) -> RopeConfig:
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


def gguf_eos_ids(file: GGUFFile) -> tuple[int, ...]:
    """Ids that end a turn: eos, end of turn, end of message, and the control tokens chat formats use for
    it.
    """
    ids = []
    for name in ("eos", "eot", "eom"):
        value = file.metadata.read(f"tokenizer.ggml.{name}_token_id", int)
        if value is not None:
            ids.append(value)
    return tuple(dict.fromkeys(ids))


def parse_gguf_config(file: GGUFFile) -> ModelConfig:
    """The model that `file` describes. ModelError naming the file and the key for anything missing, wrong or
    contradictory, and for an unknown architecture."""
    name = file.metadata.read("general.architecture", str)
    architecture = find_architecture(name, f"{file.path}: general.architecture")
    keys = _Keys(file, architecture.name)
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
    window = keys.integer("attention.sliding_window", 0) if architecture.interleaved else 0
    tensors = file.tensors
    config = ModelConfig(
        architecture=architecture.name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=keys.per_layer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.per_layer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, head_dim, positions),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias=architecture.qkv_bias or "blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture.qk_norm,
        sliding_windows=(window,) * layers if window else (),
        bos_token_id=file.metadata.read("tokenizer.ggml.bos_token_id", int),
        eos_token_ids=gguf_eos_ids(file),
    )
    return check_geometry(config, str(file.path))
