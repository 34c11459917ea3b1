"""From a checkpoint to a running engine."""

from __future__ import annotations

import copy
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
from dovetail.core.errors import CapacityError, ConfigError
from dovetail.core.pages import IntArray, PagePool
from dovetail.core.scheduler import Limits
from dovetail.core.seams import Calibration, Codec, Executor, Format, RowFilter, Seams, Site, Variant
from dovetail.core.technique import Composition
from dovetail.core.types import UNLIMITED, StepPlan, StepResult
from dovetail.host.lazy_torch import torch
from dovetail.host.machine import memory
from dovetail.layers.linear import Dense, Packed
from dovetail.layers.loader import Loader, Recoding
from dovetail.models import MODELS, geometry
from dovetail.models.decoder import Blocks
from dovetail.ops.cpu import TORCH
from dovetail.ops.stored import PARTED
from dovetail.runtime.batch import BatchBuilder
from dovetail.runtime.executor import ModelExecutor
from dovetail.runtime.kv import KV, KVConfig
from dovetail.runtime.model import Model
from dovetail.runtime.native import NativeExecutor, recordable
from dovetail.runtime.residency import Offload, Tiers, tiers_of

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


class _Second:
    """See `Companion`."""

    def __init__(self, model: Model, kv: KV, config: Config, vocab_size: int) -> None:
        self.length, self.vocab_size = model.config.max_position_embeddings, vocab_size
        self.executor: NativeExecutor | ModelExecutor
        if config.kernels != TORCH and recordable(model, kv):
            self.executor = NativeExecutor(model, kv, config.kernels, config.threads)
        else:
            builder = BatchBuilder(kv.page_size, UNLIMITED, kv.stage_pages, kv.device)
            self.executor = ModelExecutor(model, kv, builder)

    def run(self, plan: StepPlan) -> tuple[StepResult, Sequence[float]]:
        result = self.executor.run(plan)
        spans = zip(plan.spans, result.spans, strict=True)
        tokens = [r.tokens[0] if len(r.tokens) else -1 for s, r in spans if s.sample]
        native = isinstance(self.executor, NativeExecutor)
        return result, self.executor.odds(tokens) if native and tokens else ()  # type: ignore[union-attr]


class BesideModel:
    """See `Companions`: loads them as the model itself was loaded."""

    def __init__(self, checkpoint: Checkpoint, config: Config, model: Model, kv: KV) -> None:
        self.checkpoint, self.config, self.own, self.kv = checkpoint, config, model, kv

    def model(self, checkpoint: Checkpoint, head: IntArray | None) -> _Second:
        _check_vocabulary(checkpoint, self.checkpoint)
        config, native = self.config, self.config.kernels != TORCH
        if checkpoint.bytes > (free := memory().available):
            raise CapacityError(
                f"the draft model's weights take {checkpoint.bytes} bytes beside the model's "
                f"{self.checkpoint.bytes}, but {free} bytes are free; take a smaller draft, or lower --kv-memory"
            )
        cache = packed_cache(checkpoint, config)
        if native and cache is not None:
            cache.open(config.threads)
        load = Loader(checkpoint, _format(config), config.dtype, config.device, cache=cache)
        model = MODELS[checkpoint.config.architecture].program(load, RowFilter(), Variant())
        if head is not None:
            tied = checkpoint.config.tie_word_embeddings
            stored = checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
            model.trim_head(load.of(stored.rows(head)), len(head))
        wide = config.kv_cache_dtype in ("float32", "float64")
        dtype = config.kv_cache_dtype if wide else "bf16"
        sizes = KVConfig(config.num_kv_pages, config.block_size, dtype, len(model.program), native)
        kv = KV(geometry(checkpoint.config), sizes, config.device)
        if cache is not None:
            cache.save()
        return _Second(model, kv, config, checkpoint.config.vocab_size)

    def first(self, layers: int) -> _Second:
        if isinstance(self.kv.seams.residency, Tiers) or type(self.kv.seams.codec) is not Codec:
            raise ConfigError(
                "self-draft reads the model's own KV, which a slow tier or a codec moves; use a draft model, or "
                "leave the other one out"
            )
        shallow = copy.copy(self.own)
        (stage,) = self.own.program
        shallow.program = [Blocks(stage.blocks[:layers], RowFilter())]  # type: ignore[attr-defined,misc]
        kv = copy.copy(self.kv)
        kv.seams, kv._aliases = Seams(), {}
        return _Second(shallow, kv, self.config, self.own.config.vocab_size)


def _check_vocabulary(draft: Checkpoint, target: Checkpoint) -> None:
    """ConfigError unless the same numbers are the same tokens. What only fills up an embedding does not count."""
    sizes = [c.config.vocab_size for c in (draft, target)]
    theirs, ours = (_pieces(c, max(sizes)) for c in (draft, target))
    for token, (its, own) in enumerate(zip(theirs, ours, strict=True)):
        if its != own or (own is not None and token >= min(sizes)):
            raise ConfigError(
                f"the draft model {draft.path} has another vocabulary: token {token} is {its!r} there and {own!r} "
                f"in the model, of {sizes[0]} and {sizes[1]}; take a draft of the same family"
            )


def _pieces(checkpoint: Checkpoint, count: int) -> list[str | None]:
    """Of each token. GGUF files name what only fills up an embedding by its number."""
    read = checkpoint.tokenizer().backend.id_to_token
    return [None if (piece := read(t)) is None or piece == f"[PAD{t}]" else piece for t in range(count)]


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
    site.companions = BesideModel(checkpoint, config, model, kv)
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
