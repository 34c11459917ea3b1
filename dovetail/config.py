"""One frozen configuration, resolved once from what was asked, what the model is and what the machine has."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from dovetail.checkpoint.config import ModelConfig
from dovetail.core.errors import CapacityError, ConfigError
from dovetail.core.pages import pages_for
from dovetail.core.seams import Geometry
from dovetail.ops.cpu import MAX_HEAD_DIM
from dovetail.options import Options

GIB = 1 << 30
TORCH = "torch"  # the reference kernels
PLAIN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # stored formats without blocks
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_BLOCK_SIZE = 4096
DEFAULT_SEQS = 64
DEFAULT_BATCHED_TOKENS = 512


@dataclass(frozen=True)
class Config:
    """What runs. `num_kv_pages` pages of `block_size` tokens hold KV."""

    model: str
    architecture: str
    use: tuple[str, ...]
    dtype: str
    device: str
    threads: int
    kernels: str
    activations: str
    kv_cache_dtype: str
    kv_memory: int
    block_size: int
    num_kv_pages: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    enable_prefix_caching: bool
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def arithmetic(self) -> str:
        """What a step computes in, in words: everything on which the bits of its results depend."""
        return f"{self.dtype}, {self.activations} activations, {self.kv_cache_dtype} KV, {self.kernels} kernels"

    def __str__(self) -> str:
        return "\n".join(f"{k}: {v}" for k, v in self.to_dict().items())


@dataclass(frozen=True)
class Machine:
    """What the machine offers: threads worth starting, CPUs, free bytes for KV, whether there is CUDA, and the
    instruction sets that native kernels can use (best first), or can if asked to by name (emulated)."""

    threads: int
    cpus: int
    free_memory: int
    cuda: bool
    isas: tuple[str, ...] = ()
    emulated: tuple[str, ...] = ()


@dataclass(frozen=True)
class KVBudget:
    """Tokens per page, pages, bytes and the longest sequence that they allow."""

    block_size: int
    pages: int
    bytes: int
    max_model_len: int


def resolve_kernels(options: Options, device: str, machine: Machine, head_dim: int) -> str:
    """An instruction set, or "torch" for the reference. "auto" takes the best one that can do what is asked, with
    a warning where it is the model, and no option, that none can do."""
    kinds = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype, isas = kinds.get(options.dtype, options.dtype), machine.isas
    reason = ""
    if device != "cpu":
        reason = f"native kernels run on the CPU, not on {device}"
    elif dtype not in ("auto", "float32", "bfloat16"):
        reason = f"native kernels compute in float32 or bfloat16, not in {dtype}"
    elif options.kv_cache_dtype in ("float16", "fp16", "float64"):
        reason = f"native kernels have no {options.kv_cache_dtype} KV"
    elif head_dim > MAX_HEAD_DIM:
        reason = f"native kernels take a head_dim of at most {MAX_HEAD_DIM}, and this model's is {head_dim}"
        if options.kernels == "auto" and isas:
            warnings.warn(f"the slow torch reference runs: {reason}", stacklevel=2)
    if options.kernels == "auto":
        return TORCH if reason or not isas else isas[0]
    if options.kernels == TORCH:
        return TORCH
    if options.kernels not in (*isas, *machine.emulated):
        raise ConfigError(
            f"kernels '{options.kernels}' cannot be used here; possible: auto, {', '.join((TORCH, *isas))}"
        )
    if reason:
        raise ConfigError(f"kernels '{options.kernels}': {reason}; use --kernels auto or {TORCH}")
    return options.kernels


def resolve_activations(options: Options, stored: str, kernels: str) -> str:
    """ "auto": int8 with native kernels on quantized weights, unless a dtype was asked for."""
    asked, quantized = options.activations, stored not in PLAIN
    if asked not in ("auto", "int8", "exact"):
        raise ConfigError(f"activations '{asked}' is unknown; the known ones are auto, int8, exact")
    if asked == "int8" and kernels == TORCH:
        raise ConfigError("activations 'int8' needs native kernels; drop it, or use --kernels auto")
    if asked == "int8" and (not quantized or options.dtype in ("bfloat16", "bf16")):
        raise ConfigError("activations 'int8' needs weights that are stored in blocks, and no --dtype bfloat16")
    if asked != "auto":
        return asked
    return "int8" if kernels != TORCH and quantized and options.dtype == "auto" else "exact"


def resolve_dtype(asked: str, stored: str, device: str, kernels: str = TORCH) -> str:
    """The compute type. "auto": what the checkpoint stores, float32 for quantized blocks on a CPU.

    Native kernels keep float16 weights as they are and compute in float32.
    """
    if asked != "auto":
        asked = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(asked, asked)
        if asked not in DTYPES:
            raise ConfigError(f"dtype '{asked}' is unknown; the known ones are auto, {', '.join(DTYPES)}")
        return asked
    if stored in PLAIN and not (stored == "F16" and kernels != TORCH):
        return PLAIN[stored]
    return "float32" if device == "cpu" else "bfloat16"


def resolve_device(asked: str, cuda: bool) -> str:
    if asked == "auto":
        return "cuda" if cuda else "cpu"
    kind, _, number = str(asked).partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdigit())):
        raise ConfigError(f"device '{asked}' is unknown; use auto, cpu, cuda or cuda:0")
    if kind == "cuda" and not cuda:
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device here; use --device cpu")
    return asked


def resolve_kv_dtype(asked: str, dtype: str, activations: str = "exact") -> str:
    """ "auto" keeps KV in the compute type's precision, and in bf16 beside int8 activations."""
    if asked == "auto" and activations == "int8":
        return "bf16"
    if asked == "auto":
        return {"bfloat16": "bf16"}.get(dtype, dtype)
    return {"bfloat16": "bf16", "fp32": "float32"}.get(asked, asked)


def resolve_kv(options: Options, model: ModelConfig, token_bytes: int, free_memory: int) -> KVBudget:
    """How many pages KV gets, and so how long a sequence can be.

    Asked numbers are kept or refused (CapacityError); only defaults are lowered to what fits.
    """
    size = positive("block_size", options.block_size, 16)
    if size > MAX_BLOCK_SIZE:
        raise ConfigError(f"block_size must be at most {MAX_BLOCK_SIZE}, got {size}")
    trained = model.max_position_embeddings
    asked = options.max_model_len
    if asked is not None and not 1 < positive("max_model_len", asked, 0) <= trained:
        raise ConfigError(f"max_model_len must be between 2 and the model's {trained}, got {asked}")
    length = asked or trained
    page_bytes = token_bytes * size
    seqs = positive("max_num_seqs", options.max_num_seqs, DEFAULT_SEQS)
    memory = positive("kv_memory", options.kv_memory, 0)
    if options.kv_memory is None:
        wanted = seqs * pages_for(length, size) * page_bytes
        memory = min(wanted, max(free_memory // 4, page_bytes), 4 * GIB)
    elif memory > free_memory:
        raise CapacityError(
            f"kv_memory of {memory} bytes was asked for, but {free_memory} bytes are free; lower --kv-memory"
        )
    pages = memory // page_bytes
    if pages < 1:
        raise CapacityError(
            f"{memory} bytes of KV memory hold no page: one page of {size} tokens takes {page_bytes} bytes; "
            f"raise --kv-memory or lower --block-size"
        )
    needed = pages_for(length, size)
    if needed > pages:
        if asked is not None:
            raise CapacityError(
                f"max_model_len {asked} needs {needed} pages ({needed * page_bytes} bytes) of KV, "
                f"but {memory} bytes hold {pages}; raise --kv-memory or lower --max-model-len"
            )
        length = pages * size
    if length < 2:
        raise CapacityError(f"{memory} bytes of KV memory hold {length} token; at least 2 are needed")
    return KVBudget(size, pages, pages * page_bytes, length)


def positive(name: str, value: int | None, default: int) -> int:
    """An optional count that must be at least 1."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _threads(asked: int | None, machine: Machine) -> int:
    threads = positive("threads", asked, machine.threads)
    if threads > machine.cpus:  # threads that take turns on a core wait for each other at every operation
        raise ConfigError(f"threads must be at most {machine.cpus}, the CPUs of this process, got {threads}")
    return threads


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"seed must be a whole number, got {value!r}")
    return value


def resolve(options: Options, model: ModelConfig, geometry: Geometry, found: Found) -> Config:
    """Settle every choice. ConfigError or CapacityError name the option."""
    machine = found.machine
    device = resolve_device(options.device, machine.cuda)
    kernels = resolve_kernels(options, device, machine, geometry.head_dim)
    dtype = resolve_dtype(options.dtype, found.stored_format, device, kernels)
    activations = resolve_activations(options, found.stored_format, kernels)
    kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, dtype, activations)
    native_page = 0 if kernels == TORCH else positive("block_size", options.block_size, 16)
    kv = resolve_kv(options, model, found.token_bytes(geometry, kv_dtype, native_page), machine.free_memory)
    return Config(
        model=found.name,
        architecture=model.architecture,
        use=found.use,
        dtype=dtype,
        device=device,
        threads=_threads(options.threads, machine),
        kernels=kernels,
        activations=activations,
        kv_cache_dtype=kv_dtype,
        kv_memory=kv.bytes,
        block_size=kv.block_size,
        num_kv_pages=kv.pages,
        max_model_len=kv.max_model_len,
        max_num_batched_tokens=positive(
            "max_num_batched_tokens", options.max_num_batched_tokens, DEFAULT_BATCHED_TOKENS
        ),
        max_num_seqs=positive("max_num_seqs", options.max_num_seqs, DEFAULT_SEQS),
        enable_prefix_caching=_flag("enable_prefix_caching", options.enable_prefix_caching),
        seed=_seed(options.seed),
    )


@dataclass(frozen=True)
class Found:
    """What is known besides the options: the model's name and weight format, techniques, the machine."""

    name: str
    stored_format: str
    use: tuple[str, ...]
    machine: Machine
    # (Geometry, kv_cache_dtype, page size of the native kernels or 0) -> bytes of K and V of one token
    token_bytes: Any
