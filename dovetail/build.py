"""From a checkpoint to a running engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dovetail.checkpoint import Checkpoint
from dovetail.checkpoint.identity import identity
from dovetail.checkpoint.packed_cache import PackedCache
from dovetail.config import Config
from dovetail.core.engine import Engine
from dovetail.core.errors import ConfigError
from dovetail.core.pages import PagePool
from dovetail.core.scheduler import Limits
from dovetail.core.seams import Calibration, Executor, Format, Seams, Site
from dovetail.core.technique import Composition
from dovetail.core.types import UNLIMITED
from dovetail.host.lazy_torch import torch
from dovetail.layers.linear import Dense, Packed
from dovetail.layers.loader import Loader, Recoding
from dovetail.models import MODELS, geometry
from dovetail.ops.cpu import TORCH
from dovetail.ops.stored import PARTED
from dovetail.runtime.batch import BatchBuilder
from dovetail.runtime.executor import ModelExecutor
from dovetail.runtime.kv import KV, KVConfig
from dovetail.runtime.native import NativeExecutor, recordable
from dovetail.runtime.residency import Offload, tiers_of

Text = Callable[[str], Sequence[int]]
DEVICE_SIDE = frozenset({"rows", "codec", "selector", "residency", "variant", "format"})  # seams that a model asks


def stored_format(checkpoint: Checkpoint) -> str:
    """The format of most of the weights: some layers of a checkpoint may be quantized and others not."""
    values: Counter[str] = Counter()
    for name in checkpoint.names():
        if len(shape := checkpoint.shape(name)) > 1:
            values[checkpoint.format(name)] += math.prod(shape)
    return values.most_common(1)[0][0]


def stored_activation(checkpoint: Checkpoint, fmt: str) -> str:
    """How the weights of a format want rows of activations (`StoredTensor.activation`); the first one is asked."""
    if fmt not in PARTED:
        return ""
    return checkpoint.tensor(next(n for n in checkpoint.names() if checkpoint.format(n) == fmt)).activation


def numbers(checkpoint: Checkpoint, config: Config, composition: Composition) -> str:
    """A text for everything on which the model's results depend, down to the bits, except what it reads of KV."""
    inside = {"format", "variant", "rows"}
    parts = [t.spec for t in composition.techniques if inside & set(t.fills)]
    return " ".join([identity(checkpoint), config.dtype, config.activations, config.kernels, *parts])


def build_engine(
    checkpoint: Checkpoint,
    config: Config,
    composition: Composition,
    text: Text | None = None,
    cache: PackedCache | None = None,
) -> Engine:
    """Fill the seams and choose the executor. Weights are loaded and KV is allocated only if the model itself
    runs.

    text: for techniques that measure the model first, see `Calibration`. cache: packed weights of this checkpoint.
    """
    shape = geometry(checkpoint.config)
    pool = PagePool(config.num_kv_pages, config.block_size)
    site = Site(shape, config.block_size, pool, device=config.device)
    if text is not None:
        site.calibration = Calibration(text, partial(numbers, checkpoint, config, composition))
    seams = composition.build(site)
    _check_asked(composition, seams)
    executor = seams.executor or _load(checkpoint, config, site, seams, cache)
    site.clock = executor.clock
    limits = Limits(
        config.max_model_len, config.max_num_batched_tokens, config.max_num_seqs, config.enable_prefix_caching,
        shape.vocab_size,
    )  # fmt: skip
    return Engine(executor, pool, seams, limits)


def _check_asked(composition: Composition, seams: Seams) -> None:
    """ConfigError for a technique that an executor of another technique would never ask."""
    asked = DEVICE_SIDE if seams.executor is None else getattr(seams.executor, "asks", frozenset())
    runs = next((t.name for t in composition.techniques if "executor" in t.fills), "")
    for t in composition.techniques:
        if unasked := DEVICE_SIDE.intersection(t.fills) - asked:
            raise ConfigError(
                f"{t.name} fills {', '.join(sorted(unasked))}, which {runs} never asks; leave one of them out"
            )


def packed_cache(checkpoint: Checkpoint, config: Config) -> PackedCache | None:
    """Where this configuration's packed weights are kept, if they are."""
    if not config.packed_cache:
        return None
    values = "bfloat16" if config.dtype == "bfloat16" else "stored"  # see `cpu.pack`
    return PackedCache(checkpoint, Path(config.packed_cache), config.packed_cache_size, values)


def _format(config: Config) -> Format:
    if config.kernels != TORCH:
        return Packed(config.dtype, config.activations, config.kernels, config.threads)
    return Dense(config.dtype, config.device)


def _load(checkpoint: Checkpoint, config: Config, site: Site, seams: Seams, cache: PackedCache | None) -> Executor:
    """The model as the executor: its weights, KV, and the techniques that wait for both."""
    native = config.kernels != TORCH
    if seams.format is not None:
        cache = None
    elif native and cache is not None:
        cache.open(config.threads)
    recoding = seams.format if isinstance(seams.format, Recoding) else None
    fmt = seams.format if seams.format is not None and recoding is None else _format(config)
    load = Loader(checkpoint, fmt, config.dtype, config.device, cache=cache, recoding=recoding)
    site.model = model = MODELS[checkpoint.config.architecture].program(load, seams.rows, seams.variant)
    offload = None
    if config.num_kv_cells:
        offload = Offload(config.num_kv_cells, config.kv_offloading_path, config.emulate_link)
    sizes = KVConfig(
        config.num_kv_pages, config.block_size, config.kv_cache_dtype, len(model.program), native, offload,
        aliases=seams.codec.capacity < UNLIMITED,
    )  # fmt: skip
    site.kv = kv = KV(site.geometry, sizes, site.device)
    if (tiers := tiers_of(kv.k)) is not None:
        seams.residency = tiers
    kv.seams = seams
    for act in site.ready:
        act()
    executor: NativeExecutor | ModelExecutor
    if native and recordable(model, kv):
        executor = NativeExecutor(model, kv, config.kernels, config.threads)
    else:
        torch.set_num_threads(config.threads)
        builder = BatchBuilder(config.block_size, seams.selector.window, kv.stage_pages, site.device)
        executor = ModelExecutor(model, kv, builder)
    if recoding is not None:
        recoding.steps = lambda: executor.calls
    return executor
