"""The attention engine: queries over paged KV, planned once per step and run once per layer.

KV is block-sparse rows in FlashInfer's terms (arXiv 2501.01005, section 3): request i reads the pages
`indices[indptr[i]:indptr[i + 1]]`, the last of which holds `last_page_len[i]` tokens. `plan` cuts long sequences
into chunks of 128 tokens, counted from their start, and gives the threads equal work. It finds chunks that several
requests share. Partial states are merged in order, so the result has the same bits whatever the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dovetail.core.errors import ConfigError
from dovetail.core.seams import Variant
from dovetail.host.lazy_torch import torch
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import kernel_variant
from dovetail.ops.attention.page_lists import Numbers, page_lists, placed

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("NHD", "HND")
# (dtype, whether there are scales) -> name, dimensions per stored element, scales per vector.
_KINDS = {
    ("float32", False): ("float32", 1, 0),
    ("bfloat16", False): ("bf16", 1, 0),
    ("int8", True): ("int8", 1, 1),
    ("uint8", True): ("int4", 2, 2),
}
_STORED = "float32, bfloat16, int8 with scales, or int4 (uint8, two codes each) with scales"
MAX_THREADS = 4096


class Shape(NamedTuple):
    """Query heads, KV heads (which divide them), head dimension (even, at most 512), tokens per page."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int


class State(NamedTuple):
    """Attention over some keys.

    out: [rows, heads, head_dim]. lse: [rows, heads], the natural logarithm of the sum of exp(score). Without any
    keys they are 0 and -inf.
    """

    out: Tensor
    lse: Tensor


def merge_states(a: State, b: State) -> State:
    """The state of attention over the keys of both. Commutative; the empty state is the identity."""
    most = torch.maximum(a.lse, b.lse)
    base = most.masked_fill(most == -torch.inf, 0)
    wa, wb = torch.exp(a.lse - base), torch.exp(b.lse - base)
    total = wa + wb
    safe = total.masked_fill(total == 0, 1)[..., None]
    out = (wa[..., None] * a.out + wb[..., None] * b.out) / safe
    return State(out, base + torch.log(total))


class PagedAttention:
    """`plan` once for the lists of a step, then `run` for every layer.

    layout: "NHD", KV [pages, page_size, KV heads, head_dim], or "HND", [pages, KV heads, page_size, head_dim].
    cascade: chunks that several requests share are read once. split: long sequences are cut over threads. Both
    change the time and no bit of the result. Lists may be numpy arrays or torch tensors. Everything is checked
    before native code sees it. Raises ConfigError for wrong arguments, and where the native kernels were not
    built. Only one thread at a time may use it.
    """

    def __init__(
        self, shape: Shape, *, layout: str = "NHD", variant: Variant | None = None, threads: int = 1,
        isa: str = "", cascade: bool = True, split: bool = True,
    ) -> None:  # fmt: skip
        if layout not in LAYOUTS:
            raise ConfigError(f"layout '{layout}' is unknown; the known ones are {', '.join(LAYOUTS)}")
        _check_shape(shape)
        if not _whole(threads, 1, MAX_THREADS):
            raise ConfigError(f"threads must be a whole number from 1 to {MAX_THREADS}, got {threads!r}")
        native, isas = cpu.native(), cpu.isas()
        if native is None:
            raise ConfigError(
                "PagedAttention needs the native kernels, which were not built: `pip install .`, or use "
                "the torch reference, dovetail.ops.attention"
            )
        if isa and isa not in isas:
            raise ConfigError(f"isa '{isa}' cannot be used here; possible: {', '.join(isas)}")
        self.shape = shape
        self.layout = layout
        self.variant = kernel_variant(variant or Variant(), shape.num_heads)
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._engine: Any = native.PagedAttention(isa, threads, heads, cascade, split)
        self._pages = 0
        self._rows = -1  # until something is planned

    def plan(
        self, qo_indptr: Numbers, indptr: Numbers, indices: Numbers | Sequence[Numbers], last_page_len: Numbers, *,
        positions: Sequence[Numbers] | None = None, starts: Numbers | None = None,
    ) -> None:  # fmt: skip
        """Plan a step. Rows qo_indptr[i]:qo_indptr[i + 1] of request i are the last of its sequence, or begin at
        position starts[i].

        indices: one list for all KV heads, or one per KV head (all cut by the same `indptr`). positions: for lists
        that leave pages out, the position of the first token of each listed page, per KV head; `starts` is then
        needed. Raises ConfigError for lists that do not agree, and for positions outside [0, 2^30).
        """
        size = self.shape.page_size
        lists = page_lists((qo_indptr, indptr, last_page_len), indices, size, self.shape.num_kv_heads)
        lists = placed(lists, starts, positions, size)
        flat, where = ([p for x in each for p in x] for each in (lists.pages, lists.positions))
        self._engine.plan(
            lists.qo_indptr, lists.indptr, lists.lengths, lists.starts, flat, where, len(lists.pages), size
        )
        self._pages = 1 + max(flat, default=-1)
        self._rows = lists.qo_indptr[-1]

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attention of q float32 [rows, heads, head_dim] -> the same shape. All tensors are on the CPU.

        k, v are pages in the layout, in one of these types: float32 or bfloat16; int8 codes with a float32 scale
        for each token and head; int4 codes with (scale, minimum) for each token and head, value = minimum + scale
        * code. int4 codes are uint8 [.., head_dim / 2], two in a byte, the even dimension in the low half.
        """
        return self.run_state(q, k, v, scales=scales).out

    def run_state(
        self, q: Tensor, k: Tensor, v: Tensor, *, scales: tuple[Tensor, Tensor] | None = None
    ) -> State:  # fmt: skip
        """The result with its log-sum-exp, to be merged with others."""
        s = self.shape
        kind = self._checked(q, (k, v), scales)
        q, k, v = q.float().contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), torch.empty(self._rows, s.num_heads)
        held = [t.float().contiguous() for t in scales] if scales is not None else []
        addresses = (k.data_ptr(), v.data_ptr(), *([t.data_ptr() for t in held] or [0, 0]))
        sizes = (len(k), s.page_size, s.num_kv_heads, s.head_dim, 0)
        self._engine.run(
            self.layout, kind, addresses, sizes, q.data_ptr(), out.data_ptr(), lse.data_ptr(), self.variant.window,
            self.variant.address, self.variant.params,
        )  # fmt: skip
        return State(out, lse)

    def _checked(self, q: Tensor, kv: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor] | None) -> str:
        """The name of the type in which K and V are stored. ConfigError for what does not fit the plan."""
        s = self.shape
        if self._rows < 0:
            raise ConfigError("nothing is planned; call `plan` before `run`")
        if scales is not None and len(scales) != 2:
            raise ConfigError(f"{len(scales)} tensors of scales were given; give two, of k and of v")
        named = [("q", q), ("k", kv[0]), ("v", kv[1]), *(("scales", t) for t in scales or ())]
        for name, t in named:
            if t.device.type != "cpu":
                raise ConfigError(f"{name} is on {t.device}; the native kernels need it on the CPU")
        inner = (s.page_size, s.num_kv_heads) if self.layout == "NHD" else (s.num_kv_heads, s.page_size)
        kind, codes, pairs = _KINDS.get((str(kv[0].dtype).removeprefix("torch."), scales is not None), ("", 1, 0))
        for name, t in (("k", kv[0]), ("v", kv[1])):
            wanted = (*inner, s.head_dim // codes)
            if not kind or t.dtype != kv[0].dtype or tuple(t.shape[1:]) != wanted or len(t) < self._pages:
                raise ConfigError(
                    f"{name} is {t.dtype} {list(t.shape)}; needed: {_STORED}, "
                    f"[at least {self._pages}, {', '.join(map(str, wanted))}]"
                )
        if tuple(q.shape) != (self._rows, s.num_heads, s.head_dim):
            raise ConfigError(f"q is {list(q.shape)}; planned were {[self._rows, s.num_heads, s.head_dim]}")
        for t, scale in zip(kv, scales or (), strict=False):
            needed = (*t.shape[:3], pairs) if pairs > 1 else tuple(t.shape[:3])
            if tuple(scale.shape) != needed:
                raise ConfigError(f"scales are {list(scale.shape)}; needed: {list(needed)}, for each vector")
        return kind

    def stats(self) -> dict[str, int]:
        """Counts of the plan: items of work, rows merged from several items, tokens read per KV head, and how many
        that would be without sharing."""
        found: dict[str, int] = self._engine.stats()
        return found


def _check_shape(shape: Shape) -> None:
    for name, value in shape._asdict().items():
        if not _whole(value, 1, 2**31 - 1):
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(f"{shape.num_heads} query heads do not divide over {shape.num_kv_heads} KV heads")
    if shape.head_dim % 2 or shape.head_dim > cpu.MAX_HEAD_DIM:
        raise ConfigError(f"head_dim must be even and at most {cpu.MAX_HEAD_DIM}, got {shape.head_dim}")


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
