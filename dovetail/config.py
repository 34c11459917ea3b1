"""One frozen configuration. It is resolved once from the options, the model and the machine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovetail.core.errors import CapacityError, ConfigError
from dovetail.core.model import PLAIN_FORMATS, ModelConfig
from dovetail.core.pages import pages_for
from dovetail.core.seams import Geometry
from dovetail.core.technique import Beside, Composition
from dovetail.host import lazy_torch
from dovetail.ops.cpu import MAX_HEAD_DIM, TORCH, native
from dovetail.options import Options

GIB = 1 << 30
SECTOR = 4096  # bytes that a disk reads or writes together
DTYPES = ("float32", "bfloat16", "float16", "float64")
ALIASES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8_e4m3": "fp8",
}  # what users also call them
MAX_BLOCK_SIZE = 4096
DEFAULT_SEQS = 64
DEFAULT_BATCHED_TOKENS = 512
PACKED_CACHE_SIZE = 20 * GIB


@dataclass(frozen=True)
class Config:
    """What runs. KV has `num_kv_pages` pages of `block_size` tokens. With a slow tier the device has
    `num_kv_cells` cells, each for one layer of a page; without one this is 0. `emulate_link` is in GB/s, 0 for
    none. `packed_cache` is the folder where packed weights are kept, empty for none.
    """

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
    num_kv_cells: int = 0
    kv_offloading_backend: str = "disk"
    kv_offloading_path: str = ""
    emulate_link: float = 0.0
    packed_cache: str = ""
    packed_cache_size: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def arithmetic(self) -> str:
        """In words, the types and kernels of a step: everything on which the bits of its results depend."""
        return f"{self.dtype}, {self.activations} activations, {self.kv_cache_dtype} KV, {self.kernels} kernels"

    @property
    def slow_tier(self) -> str:
        """In words, the slow tier, for pages of KV that the device has no room for. Empty if there is none."""
        if not self.num_kv_cells:
            return ""
        link = f", emulated link of {self.emulate_link:g} GB/s" if self.emulate_link else ""
        return f"{self.kv_offloading_backend}{link}"

    def __str__(self) -> str:
        return "\n".join(f"{k}: {v}" for k, v in self.to_dict().items())


@dataclass(frozen=True)
class Machine:
    """What the machine offers: threads worth starting, CPUs, free bytes for KV, whether there is CUDA, and
    instruction sets for native kernels, best first. Emulated ones are used only if they are asked for by name."""

    threads: int
    cpus: int
    free_memory: int
    cuda: bool
    isas: tuple[str, ...] = ()
    emulated: tuple[str, ...] = ()


@dataclass(frozen=True)
class KVBudget:
    """Tokens per page, pages, bytes on the device, the longest sequence that they allow, and the cells on the
    device, which are pages of one layer (0 without a slow tier)."""

    block_size: int
    pages: int
    bytes: int
    max_model_len: int
    cells: int = 0


def resolve_kernels(options: Options, device: str, machine: Machine, head_dim: int) -> str:
    """An instruction set, or "torch" for the reference. "auto" takes the best one that can do what is asked. If
    none can run the model, there is a warning and the reference is taken."""
    dtype, isas = ALIASES.get(options.dtype, options.dtype), machine.isas
    reason = ""
    if device != "cpu":
        reason = f"native kernels run on the CPU, not on {device}"
    elif dtype not in ("auto", "float32", "bfloat16"):
        reason = f"native kernels compute in float32 or bfloat16, not in {dtype}"
    elif ALIASES.get(options.kv_cache_dtype, options.kv_cache_dtype) in ("float16", "float64"):
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


def _why_torch(options: Options, machine: Machine) -> str:
    """Why the reference is needed, and what else to do."""
    if options.kernels == TORCH:
        return "kernels 'torch' need it; use --kernels auto"
    if not machine.isas:
        return (
            "the native library is not built or does not load (`dovetail doctor` says why; `make setup` builds it)"
        )
    asked = f"--dtype {options.dtype}, --kv-cache-dtype {options.kv_cache_dtype} or this model's head_dim"
    return f"native kernels cannot do what {asked} ask for"


def resolve_activations(options: Options, stored: str, kernels: str, own: str = "") -> str:
    """How rows of activations are kept.

    own: what the checkpoint says of it, which no option changes. Else "auto" is int8 with native kernels on
    quantized weights, unless a dtype was asked for; else exact.
    """
    asked, quantized = options.activations, stored not in PLAIN_FORMATS
    if own and asked != "auto":
        raise ConfigError(f"activations '{asked}' were asked for, but the checkpoint was made for {own}; drop it")
    if own:
        return own
    if asked not in ("auto", "int8", "int16", "exact"):
        raise ConfigError(f"activations '{asked}' is unknown; the known ones are auto, int8, int16, exact")
    rounded = asked in ("int8", "int16")
    if rounded and kernels == TORCH:
        raise ConfigError(f"activations '{asked}' needs native kernels; drop it, or use --kernels auto")
    if rounded and (not quantized or ALIASES.get(options.dtype, options.dtype) == "bfloat16"):
        raise ConfigError(
            f"activations '{asked}' needs weights that are stored in blocks, and no --dtype bfloat16"
        )
    if asked != "auto":
        return asked
    return "int8" if kernels != TORCH and quantized and options.dtype == "auto" else "exact"


def resolve_dtype(asked: str, stored: str, device: str, kernels: str = TORCH) -> str:
    """The compute type. "auto" is what the checkpoint stores, or float32 for quantized blocks on a CPU.

    Native kernels keep float16 weights as they are and compute in float32.
    """
    if asked != "auto":
        asked = ALIASES.get(asked, asked)
        if asked not in DTYPES:
            raise ConfigError(f"dtype '{asked}' is unknown; the known ones are auto, {', '.join(DTYPES)}")
        return asked
    if stored in PLAIN_FORMATS and not (stored == "F16" and kernels != TORCH):
        return PLAIN_FORMATS[stored]
    return "float32" if device == "cpu" else "bfloat16"


def resolve_device(asked: str, cuda: bool) -> str:
    if asked == "auto":
        return "cuda" if cuda else "cpu"
    kind, _, number = str(asked).partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdigit())):
        raise ConfigError(f"device '{asked}' is unknown; use auto, cpu, cuda or cuda:0")
    if kind == "cuda" and not cuda:
        missing = "torch sees no CUDA device here"
        if not lazy_torch.installed():
            missing = f"torch is not installed: {lazy_torch.INSTALL}"
        raise ConfigError(f"device 'cuda' was asked for, but {missing}; or use --device cpu")
    return asked


def resolve_kv_dtype(asked: str, dtype: str, activations: str = "exact") -> str:
    """The type of KV. "auto" is the compute type's precision, and bf16 with 8-bit activations."""
    if asked == "auto" and activations not in ("exact", "int16"):
        return "bf16"
    name = dtype if asked == "auto" else ALIASES.get(asked, asked)
    return "bf16" if name == "bfloat16" else name


def key_bytes(kv_dtype: str, native_page: int) -> int:
    """Bytes of a key's value as techniques keep it. native_page: the page size with native kernels, else 0.

    It is what attention computes in: bfloat16 for tiles of codes, and float32 for codes in other layouts.
    """
    if kv_dtype in ("fp8", "int8", "int4"):
        return 2 if native_page and native_page % 16 == 0 else 4
    return {"bf16": 2, "float16": 2, "float64": 8}.get(kv_dtype, 4)


def resolve_slow_tier(options: Options, kv: tuple[str, str], default: Path) -> str:
    """The folder of a slow tier on disk, or nothing. kv: device and type of KV. ConfigError for options that are
    impossible here or would be ignored."""
    device, kv_dtype = kv
    backend, folder, link = options.kv_offloading_backend, options.kv_offloading_path, options.emulate_link
    if backend not in ("disk", "host"):
        raise ConfigError(f"kv_offloading_backend '{backend}' is unknown; the known ones are disk and host")
    if options.kv_offloading_size is None:
        for name, value in (("kv_offloading_path", folder), ("emulate_link", link)):
            if value is not None:
                raise ConfigError(
                    f"{name} means nothing without a slow tier; give its size with --kv-offloading-size"
                )
        return ""
    if link is not None and not (isinstance(link, int | float) and 0 < link < 1e6):
        raise ConfigError(f"emulate_link must be a number of GB/s above 0, got {link!r}")
    if device != "cpu":
        raise ConfigError(f"a slow tier is behind the CPU's memory, and KV is on {device}; use --device cpu")
    if native() is None:
        raise ConfigError("a slow tier for KV needs the native library, which this installation or CPU lacks")
    from dovetail.runtime.store import TILED, fits_tiles

    size = positive("block_size", options.block_size, 16)
    if not fits_tiles(kv_dtype, size):
        change = "--kv-cache-dtype bf16" if fits_tiles("bf16", size) else "--block-size 16"
        raise ConfigError(
            f"a slow tier holds KV in {', '.join(TILED)}, in pages of a multiple of 16 tokens, not {kv_dtype} in "
            f"pages of {size}; use {change}"
        )
    if backend == "host":
        if folder is not None:
            raise ConfigError("kv_offloading_path is the disk's; drop it, or use --kv-offloading-backend disk")
        return ""
    place = Path(folder) if folder is not None else default
    if folder is None:
        place.mkdir(parents=True, exist_ok=True)
    if not place.is_dir():
        wrong = "is a file" if place.exists() else "does not exist"
        raise ConfigError(f"kv_offloading_path '{folder}' {wrong}; give a folder on a disk")
    return str(place)


def resolve_packed_cache(options: Options, kernels: str, default: Path | None) -> tuple[str, int]:
    """The folder of packed weights (or nothing), and the bytes that all files there may take together.

    "auto" keeps them where weights are packed, unless $DOVETAIL_PACKED_CACHE says off.
    """
    asked, size = options.packed_cache, options.packed_cache_size
    limit = positive("packed_cache_size", size, PACKED_CACHE_SIZE)
    if asked not in ("auto", "off"):
        raise ConfigError(f"packed_cache '{asked}' is unknown; the known ones are auto and off")
    if asked == "off" and size is not None:
        raise ConfigError("packed_cache_size means nothing with packed_cache off; drop one of them")
    wanted = os.environ.get("DOVETAIL_PACKED_CACHE") or "auto"
    if wanted not in ("auto", "off"):
        raise ConfigError(f"DOVETAIL_PACKED_CACHE is '{wanted}'; the known values are auto and off")
    if kernels == TORCH or default is None or "off" in (asked, wanted):
        return "", 0
    return str(default), limit


def _block_size(options: Options) -> int:
    size = positive("block_size", options.block_size, 16)
    if size > MAX_BLOCK_SIZE:
        raise ConfigError(f"block_size must be at most {MAX_BLOCK_SIZE}, got {size}")
    return size


def resolve_kv(options: Options, model: ModelConfig, sizes: KVSizes, free_memory: int) -> KVBudget:
    """How many pages KV gets, and so how long a sequence can be.

    What techniques keep is within KV's memory. Given numbers are kept or refused (CapacityError); only defaults
    are lowered to what fits.
    """
    trained = model.max_position_embeddings
    asked = options.max_model_len
    if asked is not None and not 1 < positive("max_model_len", asked, 0) <= trained:
        raise ConfigError(f"max_model_len must be between 2 and the model's {trained}, got {asked}")
    size, page_bytes, seqs = sizes.block_size, sizes.page_bytes, _seqs(options)
    paged = page_bytes + sizes.beside.page
    memory = positive("kv_memory", options.kv_memory, 0)
    if options.kv_memory is None:
        wanted = seqs * (pages_for(sizes.length, size) * paged + sizes.beside.request)
        memory = min(wanted, max(free_memory // 4, paged), 4 * GIB)
    elif memory > free_memory:
        raise CapacityError(
            f"kv_memory of {memory} bytes was asked for, but {free_memory} bytes are free; lower --kv-memory"
        )
    if options.kv_offloading_size is not None:
        return _with_slow_tier(options, sizes, memory)
    pages = max(0, memory - seqs * sizes.beside.request) // paged
    if pages < 1:
        raise CapacityError(
            f"{memory} bytes of KV memory hold no page: one page of {size} tokens takes {page_bytes} bytes"
            f"{_and_beside(sizes, 1, seqs)}; raise --kv-memory or lower --block-size"
        )
    return KVBudget(size, pages, pages * page_bytes, _length(options, sizes, pages, "--kv-memory"))


def _seqs(options: Options) -> int:
    return positive("max_num_seqs", options.max_num_seqs, DEFAULT_SEQS)


def _and_beside(sizes: KVSizes, pages: int, seqs: int) -> str:
    """In words, what techniques keep in addition to so many pages. Empty if they keep nothing."""
    beside = sizes.beside
    count = pages * beside.page + seqs * beside.request
    return f", and what {' and '.join(beside.by)} keeps beside KV {count} bytes" if count else ""


@dataclass(frozen=True)
class KVSizes:
    """Tokens per page, the longest sequence wanted, bytes of a page over all layers, layers, KV heads, and what
    techniques keep in addition to KV."""

    block_size: int
    length: int
    page_bytes: int
    num_layers: int
    num_kv_heads: int
    beside: Beside

    def stored(self, backend: str) -> int:
        """Bytes of a page in a slow tier. On a disk, each part that moves by itself takes whole sectors."""
        if backend != "disk":
            return self.page_bytes
        blobs = self.num_layers * self.num_kv_heads
        return blobs * SECTOR * pages_for(self.page_bytes // blobs, SECTOR)


def _length(options: Options, sizes: KVSizes, pages: int, option: str) -> int:
    """The longest sequence that `pages` allow. Errors name `option` as the one to raise."""
    size, length, page_bytes = sizes.block_size, sizes.length, sizes.page_bytes
    needed = pages_for(length, size)
    if needed > pages:
        if options.max_model_len is not None:
            beside = _and_beside(sizes, needed, _seqs(options)) if option == "--kv-memory" else ""
            raise CapacityError(
                f"max_model_len {length} needs {needed} pages ({needed * page_bytes} bytes) of KV{beside}, "
                f"but {pages * page_bytes} bytes hold {pages}; raise {option} or lower --max-model-len"
            )
        length = pages * size
    if length < 2:
        raise CapacityError(
            f"{pages} pages of KV hold {length} tokens, and at least 2 are needed; raise {option} "
            f"(a page of {size} tokens takes {page_bytes} bytes)"
        )
    return length


def _with_slow_tier(options: Options, sizes: KVSizes, memory: int) -> KVBudget:
    """The slow tier bounds the pages; the device must hold one layer of all of them and what a step writes."""
    asked = positive("kv_offloading_size", options.kv_offloading_size, 0)
    pages = asked // sizes.stored(options.kv_offloading_backend)
    length = _length(options, sizes, pages, "--kv-offloading-size")
    cell = sizes.page_bytes // sizes.num_layers
    tokens = positive("max_num_batched_tokens", options.max_num_batched_tokens, DEFAULT_BATCHED_TOKENS)
    seqs = _seqs(options)
    written = most_written(tokens, seqs, sizes.block_size)
    needed = min(pages + written * sizes.num_layers, pages * sizes.num_layers)
    left = max(0, memory - pages * sizes.beside.page - seqs * sizes.beside.request)
    cells = min(left // cell, pages * sizes.num_layers)
    if cells < needed:
        raise CapacityError(
            f"{memory} bytes of KV memory are too few for a slow tier of {asked}: one layer of its {pages} pages, "
            f"and all layers of the {written} pages that a step writes, take {needed * cell} bytes"
            f"{_and_beside(sizes, pages, seqs)}; raise --kv-memory, or lower --kv-offloading-size, "
            f"--max-num-batched-tokens or --max-num-seqs"
        )
    return KVBudget(sizes.block_size, pages, cells * cell, length, cells)


def most_written(tokens: int, seqs: int, size: int) -> int:
    """The most pages that `tokens` tokens of at most `seqs` sequences can lie in. Even two tokens of one sequence
    can lie in two pages."""
    across = min(tokens // 2, seqs)
    rest = tokens - 2 * across
    return 2 * across + rest // size + min(rest, seqs - across)


def positive(name: str, value: int | None, default: int) -> int:
    """An optional count that must be at least 1."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _threads(asked: int | None, machine: Machine) -> int:
    threads = positive("threads", asked, machine.threads)
    if threads > machine.cpus:  # threads that share a core would wait for each other at every operation
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
    """Resolve every option. ConfigError and CapacityError name the option that is wrong."""
    machine = found.machine
    device = resolve_device(options.device, machine.cuda)
    kernels = resolve_kernels(options, device, machine, geometry.head_dim)
    if kernels == TORCH and not lazy_torch.installed():
        raise ConfigError(f"torch is not installed, and {_why_torch(options, machine)}; or {lazy_torch.INSTALL}")
    dtype = resolve_dtype(options.dtype, found.stored_format, device, kernels)
    activations = resolve_activations(options, found.stored_format, kernels, found.activation)
    kv_dtype = resolve_kv_dtype(options.kv_cache_dtype, dtype, activations)
    tiled = kernels != TORCH or options.kv_offloading_size is not None
    native_page = positive("block_size", options.block_size, 16) if tiled else 0
    folder = resolve_slow_tier(options, (device, kv_dtype), found.folder)
    size = _block_size(options)
    sizes = KVSizes(
        size,
        options.max_model_len or model.max_position_embeddings,
        found.token_bytes(geometry, kv_dtype, native_page) * size,
        model.num_layers,
        geometry.num_kv_heads,
        found.beside(geometry, size, key_bytes(kv_dtype, native_page)),
    )
    kv = resolve_kv(options, model, sizes, machine.free_memory)
    packed_cache, packed_cache_size = resolve_packed_cache(options, kernels, found.packed)
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
        num_kv_cells=kv.cells,
        kv_offloading_backend=options.kv_offloading_backend,
        kv_offloading_path=folder,
        emulate_link=options.emulate_link or 0.0,
        packed_cache=packed_cache,
        packed_cache_size=packed_cache_size,
        max_model_len=kv.max_model_len,
        max_num_batched_tokens=positive(
            "max_num_batched_tokens", options.max_num_batched_tokens, DEFAULT_BATCHED_TOKENS
        ),
        max_num_seqs=_seqs(options),
        enable_prefix_caching=_flag("enable_prefix_caching", options.enable_prefix_caching),
        seed=_seed(options.seed),
    )


@dataclass(frozen=True)
class Found:
    """What is known besides the options: the model's name and weight format, techniques, the machine, and the
    default folder of a slow tier, and that of packed weights (None: they are not kept)."""

    name: str
    stored_format: str
    use: tuple[str, ...]
    machine: Machine
    # (Geometry, kv_cache_dtype, page size of the native kernels or 0) -> bytes of K and V of one token
    token_bytes: Any
    folder: Path = Path()
    # (Geometry, tokens of a page, bytes of a value) -> `technique.Beside`
    beside: Callable[[Geometry, int, int], Beside] = Composition().beside
    packed: Path | None = None
    activation: str = ""  # that the checkpoint was made for, or nothing
