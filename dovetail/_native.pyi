# What csrc/bind.cpp gives to Python, in its order. An address is a number: the memory behind it must outlive the
# call, or the Program that keeps it.
import numpy as np
from numpy.typing import NDArray

def isas() -> list[str]: ...  # that this CPU runs, best first
def emulated() -> list[str]: ...  # instruction sets that it runs in emulation, for tests
def formats() -> list[str]: ...  # of stored blocks
def grids() -> list[str]: ...  # of weights on uniform grids
def read_bandwidth(megabytes: int, threads: int) -> float: ...  # GB/s
def run_dots(isa: str, threads: int) -> float: ...  # int8 dot products on registers; how many operations
def dequantize_row(format: str, row: int, k: int, out: int, /) -> None: ...
def layout() -> int: ...  # the number of the packed layout
def checksums(
    ranges: list[tuple[int, int]], threads: int
) -> list[int]: ...  # of each range: an address, and how many bytes

class Mapping:
    def __init__(self, file: int, bytes: int) -> None: ...  # of an open file, which may be closed afterwards
    @property
    def address(self) -> int: ...
    def packed(self, format: str, n: int, k: int, offset: int) -> Packed: ...

class Packed:
    def __init__(self, format: str, rows: int, row_bytes: int, n: int, k: int, threads: int, /) -> None: ...
    @staticmethod
    def grid(
        format: str,
        sizes: tuple[int, int, int, int, bool],  # n, k, groups, outliers, whether pairs of rows share scales
        codes: tuple[int, int],  # an address, and the bytes of a row
        # addresses or 0: scales, zero points (int16), scales of outliers, Tender's biases [n, chunks]
        parts: tuple[int, int, int, int],
        activation: str,
        shared: list[tuple[int, int]],  # by kind (`ops.grids.SHARED`): an address, and how many elements
        threads: int,
    ) -> Packed: ...
    @property
    def activation(self) -> str: ...  # how the checkpoint wants rows of activations
    @property
    def row_rule(self) -> bytes: ...  # that, and what is shared by all rows; weights with equal ones share rows
    @property
    def bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def data(self) -> NDArray[np.uint8]: ...  # to be read
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def format(self) -> str: ...

class LowRankKeys:
    def __init__(
        self,
        stored: str,
        sizes: tuple[int, int, int],  # KV heads, head_dim, page size
        rotations: list[tuple[list[float], float]],  # frequencies, and the factor on cosines and sines
        of_layer: list[int],  # the number of each layer's rotation
    ) -> None: ...
    def add(
        self, aliases: list[int], layers: list[tuple[int, int, int]], /
    ) -> None: ...  # of each layer: addresses of coefficients and basis, rank
    def remove(self, aliases: list[int], /) -> None: ...
    def rebuild(
        self, isa: str, at: tuple[int, int, int], out: int, /
    ) -> None: ...  # K of a page in tiles: layer, alias, KV head; an address

class Tiers:
    def __init__(
        self,
        shape: tuple[int, int, int, int, int, bool, int],  # heads, cells, layers, stages, pages, aliases, blob
        cells: int,
        folder: str,  # of the disk tier; empty for the host's memory
        link: float,  # bytes per second
    ) -> None: ...
    def bring(self, layer: int, pages: list[int], written: bool) -> None: ...
    def put(self, pages: list[int], /) -> None: ...
    def stored(self, pages: list[int], /) -> bool: ...
    def drop(self, pages: list[int], /) -> None: ...
    def copy(self, source: list[int], target: list[int], /) -> None: ...
    def load(self, page: int, head: int, out: int, /) -> bool: ...
    def step(self) -> None: ...
    def alias(self, names: list[int], pages: list[int], apart: int) -> None: ...
    def set_keys(self, keys: LowRankKeys, /) -> None: ...
    @property
    def descriptor(self) -> int: ...  # of the disk tier's file, or -1
    def places(self) -> NDArray[np.int32]: ...  # [pages of all layers, KV heads], as long as the tiers live
    def stats(self) -> dict[str, float]: ...

class Program:
    def __init__(self, isa: str, threads: int, cascade: bool, split: bool) -> None: ...
    @property
    def isa(self) -> str: ...
    def slot(self, width: int, sampled: bool = False) -> int: ...
    def mark(self) -> int: ...
    def shape(
        self,
        heads: int,  # of queries
        layout: str,
        stored: str,
        addresses: tuple[int, int, int, int],  # k, v, k_scale, v_scale
        sizes: tuple[int, int, int, int, int],  # pages per layer, page size, heads, head_dim, pages of a head
    ) -> int: ...
    def embed(self, out: int, format: str, rows: int, row_bytes: int, width: int, scale: float, /) -> None: ...
    def angles(self, out: int, frequencies: list[float], temper: float, /) -> None: ...
    def linear(
        self,
        source: int,
        target: int,
        weights: list[Packed],
        activation: str,
        norm: list[float],
        eps: float,
        bias: list[float],
        add: bool,
        gate: str,
        sampled: bool,
    ) -> None: ...
    def norm_add(self, source: int, target: int, norm: list[float], eps: float) -> None: ...
    def rope(
        self,
        slots: tuple[int, int, int],  # q, k and v; angles, or -1 for no rotation; rotated queries
        layer: int,
        shape: int,
        scale: float,  # of queries
        q_norm: list[float],
        k_norm: list[float],
        eps: float,
    ) -> None: ...
    def attend(
        self,
        on: tuple[int, int, int, int, int],  # slots of q and out, layer, shape, what `choosing` gave or -1
        window: int,
        variant: int,
        params: list[float],
    ) -> None: ...
    def choosing(
        self,
        shape: int,
        window: int,  # tokens
        budget: int,  # pages in all
        leading: int,  # pages beside those of the window, instead of a budget; or -1
        adaptive: bool,
    ) -> int: ...
    def pick(
        self, chosen: int, q: int, layer: int, kind: str, summaries: int, vectors: int = 2
    ) -> None: ...  # summaries 0: the first pages
    def summarise(self, kind: str, layers: int, pages: list[int], out: int, vectors: int = 2) -> None: ...
    def set_tiers(self, tiers: Tiers, /) -> None: ...
    def fetch(
        self,
        on: tuple[int, int, int],  # layer, shape, what `choosing` gave or -1
        window: int,
        guessed: bool,
    ) -> None: ...
    def fetch_ahead(self, layer: int, chosen: int) -> None: ...
    def turn(
        self,
        slots: tuple[int, int, int],  # projected queries, angles or -1, partial queries
        shape: int,
        scale: float,
        q_norm: list[float],
        eps: float,
        basis: int,
        width: int,
    ) -> None: ...
    def pick_partial(self, chosen: int, q: int, layer: int, keys: int, width: int, alpha: float) -> None: ...
    def seal_partial(
        self, layers: tuple[int, int], basis: int, width: int, out: int, pages: list[int]
    ) -> None: ...
    def unread(self) -> int: ...
    def clear(self) -> None: ...
    def set_rows(self, rows: int, /) -> None: ...
    def add(
        self,
        start: int,
        stop: int,
        tokens: list[int],
        drafts: list[int],
        pages: list[int],
        first_page: int,
        sample: int,
        dense_until: int = ...,
        aliases: tuple[int, int] = ...,  # address of int64 numbers, and how many
        rows: list[int] = ...,  # positions, ascending; none: all of [start, stop)
    ) -> None: ...
    def keep(self, rows: list[int], slots: list[int]) -> None: ...
    def restore(self) -> None: ...
    def sample(self, rows: list[int], /) -> None: ...
    def plan(self) -> None: ...
    def run(self, first: int, last: int, /) -> None: ...
    def tune(self) -> None: ...
    def profile(self, first: int, last: int, /) -> list[tuple[str, float]]: ...
    def argmax(self, slot: int, /) -> list[int]: ...
    def penalise(
        self,
        row: int,  # of the sampled ones, until `clear`
        rates: tuple[float, float, float],  # repetition, presence, frequency
        tokens: list[int],
        prompt: int,  # so many first tokens were not written
        /,
    ) -> None: ...
    def shift(self, row: int, tokens: list[int], values: list[float], /) -> None: ...  # add to logits
    def allow(self, row: int, mask: NDArray[np.uint32], /) -> None: ...  # token t: bit t % 32 of word t // 32
    def choose(
        self,
        slot: int,
        rows: list[tuple[float, int, float, float, float]],  # temperature, top_k, top_p, min_p, noise
        /,
    ) -> list[int]: ...  # -1 where the largest logit is not finite, or one is NaN
    def num_rows(self) -> int: ...
    def view(self, slot: int, rows: int, /) -> NDArray[np.float32]: ...  # until the program grows
    def attention_stats(self) -> dict[str, int]: ...

class SuffixDrafter:
    def __init__(
        self,
        rule: tuple[int, int, float, float],  # most tokens, fewest matched, tokens for each matched, least odds
        history: int,  # tokens of each text, at most
        shared: int,  # tokens of all ended texts, at most; 0: none is looked up
    ) -> None: ...
    def propose(
        self,
        ids: list[str],
        salts: list[str],
        texts: list[list[int]],  # tokens; each text only grows until it is forgotten
        limits: list[int],
        room: int,  # tokens of all guesses
    ) -> list[
        tuple[list[int], list[float], int, bool]
    ]: ...  # tokens, odds, how many tokens matched, whether in an ended text
    def forget(self, id: str, /) -> None: ...
    def keep(self, salt: str, tokens: list[int]) -> None: ...  # a text that has ended
    def tokens(self) -> int: ...  # that are remembered
    def bytes(self) -> int: ...

class PagedAttention:
    def __init__(
        self, isa: str, threads: int, heads: tuple[int, int, int], cascade: bool, split: bool
    ) -> None: ...
    def plan(
        self,
        qo_indptr: list[int],
        kv_indptr: list[int],
        lengths: list[int],
        starts: list[int],
        indices: list[int],
        positions: list[int],
        lists: int,
        page_size: int,
    ) -> None: ...
    def run(
        self,
        layout: str,
        stored: str,
        addresses: tuple[int, int, int, int],
        sizes: tuple[int, int, int, int, int],
        q: int,
        out: int,
        lse: int,
        window: int,
        variant: int,
        params: list[float],
        /,
    ) -> None: ...
    def stats(self) -> dict[str, int]: ...
