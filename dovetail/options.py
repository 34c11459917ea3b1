"""The engine's options, as a user asks for them. Importing this is cheap: no torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass

SIZES = ("kv_memory", "kv_offloading_size", "packed_cache_size")  # in bytes; also taken as text such as "512MiB"


@dataclass(frozen=True)
class Options:
    """What the user asked for; None and "auto" leave a choice to `config.resolve`. Names are vLLM's."""

    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    kv_memory: int | None = None  # bytes
    kv_cache_dtype: str = "auto"
    kv_offloading_size: int | None = None  # bytes
    kv_offloading_backend: str = "disk"
    kv_offloading_path: str | None = None
    emulate_link: float | None = None  # GB/s
    kernels: str = "auto"
    activations: str = "auto"
    packed_cache: str = "auto"
    packed_cache_size: int | None = None  # bytes
    block_size: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0
