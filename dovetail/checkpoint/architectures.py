"""The model architectures that checkpoints may hold: the one place where their names and defaults are
listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dovetail.core.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """What a config file leaves unsaid about an architecture.

    `kv_heads` and `head_dim` are HF's defaults for a missing field (None: as many as heads; hidden size /
    heads);
    `interleaved` says that GGUF writers reorder q and k rows for rotation of neighbouring pairs.
    """

    name: str
    hf_class: str
    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    interleaved: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture("llama", "LlamaForCausalLM", 2048, interleaved=True),
        Architecture("mistral", "MistralForCausalLM", 131072, kv_heads=8, interleaved=True),
        Architecture("qwen2", "Qwen2ForCausalLM", 32768, kv_heads=32, qkv_bias=True),
        Architecture("qwen3", "Qwen3ForCausalLM", 32768, kv_heads=32, head_dim=128, qk_norm=True),
    )
}


def find_architecture(name: Any, source: str) -> Architecture:
    """The architecture called `name` in `source` (a file or field, for the message); ModelError if
    unknown.
    """
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    known = ", ".join(ARCHITECTURES)
    raise ModelError(f"{source}: architecture {str(name)[:64]!r} is not known; known are {known}")
