"""KV on a device that is too small for it: where pages lie, and that no text depends on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import CapacityError
from dovetail.core.model import NO_ROPE, RopeConfig
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Geometry
from dovetail.models import geometry
from dovetail.ops.cpu import isas, native
from dovetail.runtime.native import NativeExecutor
from dovetail.runtime.residency import Offload, TieredStore, Tiers, TierShape
from tests.helpers.examples import examples
from tests.runtime.test_native import GREEDY, PROMPTS, prompts
from tests.tiny import TinyCheckpoint, make_request, run_all, run_staggered, tiny_config, tiny_engine

pytestmark = pytest.mark.skipif(not isas(), reason="the native kernels were not built")
BEST = isas()[0] if isas() else ""
LAYERS = 6
CHECKPOINT = TinyCheckpoint(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, num_layers=LAYERS))


def engine_of(*use, kernels: str = BEST, kv: str = "bf16", **changes):
    base = dict(pages=40, page_size=16, threads=2, max_num_batched_tokens=32, max_num_seqs=4, dtype="float32")
    return tiny_engine(*use, checkpoint=CHECKPOINT, kernels=kernels, kv_cache_dtype=kv, **(base | changes))


def tight(**changes):
    """Of an engine whose device holds one layer of all pages, and what a step writes."""
    pages, budget = changes.setdefault("pages", 40), changes.setdefault("max_num_batched_tokens", 32)
    return dict(num_kv_cells=pages + LAYERS * (-(-budget // 16) + 4), **changes)


# -- the native tiers by themselves


def blob(page: int, version: int, size: int) -> torch.Tensor:
    return torch.full((size,), (page * 7 + version) % 251, dtype=torch.uint8)


actions = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "put", "drop", "copy"]),
        st.integers(0, 1),
        st.lists(st.integers(0, 5), min_size=1),
    ),
    max_size=40,
)  # fmt: skip


@pytest.mark.parametrize("size", [256, 4096, 6144])
@pytest.mark.parametrize("disk", [False, True])
def test_a_page_is_what_was_last_written_wherever_it_lies(size: int, disk: bool, tmp_path) -> None:
    heads, cells = 2, 7

    @examples(40)
    @given(actions)
    def check(steps) -> None:
        memory = torch.zeros(cells * heads * size + 4096, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 4096 :][: cells * heads * size]
        memory = memory.view(heads, cells, size).transpose(0, 1)
        tiers = native().Tiers(
            (heads, cells, 2, 1, 6, False, size), memory.data_ptr(), str(tmp_path) if disk else "", 0.0
        )
        places = tiers.places()
        held: dict[tuple[int, int], int] = {}  # (layer, page) -> version
        origin: dict[tuple[int, int], int] = {}  # the page as which it was written
        for version, (what, layer, pages) in enumerate(steps):
            pages = sorted(set(pages))
            if what == "write":
                tiers.bring(layer, pages, True)
                for p in pages:
                    for h in range(heads):
                        memory[places[layer * 6 + p, h], h] = blob(p, version, size)
                    held[layer, p], origin[layer, p] = version, p
            elif what == "put":
                tiers.put(pages)
            elif what == "drop":
                tiers.drop(pages)
                held = {at: v for at, v in held.items() if at[1] not in pages}
            elif what == "copy" and len(pages) > 1:
                source, target = pages[:2]
                if all((i, source) in held for i in range(2)):
                    tiers.copy([source], [target])
                    for i in range(2):
                        held[i, target] = held[i, source]
                        origin[i, target] = origin[i, source]
            tiers.bring(layer, pages, False)
            for p in pages:
                if (layer, p) in held:
                    for h in range(heads):
                        found = memory[places[layer * 6 + p, h], h]
                        assert torch.equal(found, blob(origin[layer, p], held[layer, p], size))
            for h in range(heads):
                mine = [c for c in places[:, h].tolist() if c >= 0]
                assert len(mine) == len(set(mine))
        found = tiers.stats()
        assert found["failures"] == 0

    check()


def test_wanting_more_at_once_than_there_are_cells_is_an_error() -> None:
    memory = torch.zeros(3, 1, 256, dtype=torch.uint8)
    tiers = native().Tiers((1, 3, 1, 1, 6, False, 256), memory.data_ptr(), "", 0.0)
    with pytest.raises(RuntimeError, match="more KV at once"):
        tiers.bring(0, [0, 1, 2, 3], True)
    tiers.bring(0, [0, 1, 2], True)


# -- the engine

LOSSY = [
    "quest:budget=48,skip_layers=0",
    "quest:budget=48,skip_layers=1,score=bound",
    "sink-window:window=20",
    "shadowkv:rank=8,budget=128,outliers=2",
    "shadowkv:rank=8,budget=128,outliers=2,score=codes",
    "shadowkv:rank=7,budget=128,outliers=0,chunk=16",
    "infinigen:alpha=1,partial=0.5,budget=96,skip_layers=1",
    "infinigen:alpha=4,partial=0.3,skip_layers=2,norm=same",
]


MIXED = TinyCheckpoint(tiny_config(
    num_layers=4, hidden_size=64, intermediate_size=96, head_dim=16, qk_norm=True, post_norms=True,
    query_scale=0.3, embedding_scale=3.0, layer_ropes=(RopeConfig(), RopeConfig(100.0), NO_ROPE, RopeConfig()),
    sliding_windows=(None, 24, None, None),
))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["", LOSSY[0], LOSSY[3], LOSSY[6]])
def test_layers_that_differ_are_read_as_the_reference_reads_them(spec: str) -> None:
    use, batch = [spec] if spec else [], [tuple((i * 3 + a) % 11 for i in range(190)) for a in range(2)]
    shape: dict[str, Any] = dict(
        checkpoint=MIXED, pages=40, page_size=16, dtype="float32", kv_cache_dtype="float32"
    )
    engine = tiny_engine(*use, kernels=BEST, num_kv_cells=40 + 4 * 8, **shape)
    assert isinstance(engine.executor, NativeExecutor)
    found, expected = run_all(engine, batch, GREEDY), run_all(tiny_engine(*use, **shape), batch, GREEDY)
    assert found == expected
    if spec:
        assert engine.seams.selector.dropped > 0


@pytest.mark.slow
@given(
    prompts,
    st.sampled_from(["", *LOSSY[:3]]),
    st.sampled_from([17, 64]),
    st.booleans(),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
)
@examples(30)
def test_text_does_not_depend_on_where_pages_lie(batch, spec, budget, caching, arrivals) -> None:
    use = [spec] if spec else []
    shape = dict(max_num_batched_tokens=budget, enable_prefix_caching=caching)
    texts = []
    for more in (shape, tight(**shape)):
        engine = engine_of(*use, **more)
        requests = [make_request(engine, f"r{i}", p, GREEDY) for i, p in enumerate(batch)]
        run_staggered(engine, requests, arrivals)
        texts.append([r.output for r in requests])
    assert texts[0] == texts[1]


@pytest.mark.slow
@given(
    prompts,
    st.sampled_from(LOSSY),
    st.booleans(),
    st.sampled_from([17, 64]),
    st.booleans(),
    st.integers(1, 4),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
)
@examples(40)
def test_lossy_text_is_the_same_under_any_schedule(batch, spec, drafts, budget, caching, seqs, arrivals) -> None:
    use = [spec, *(["ngram:tokens=3,min_n=1,max_n=2"] if drafts else [])]
    engine = engine_of(
        *use, **tight(max_num_batched_tokens=budget, enable_prefix_caching=caching, max_num_seqs=seqs)
    )
    assert isinstance(engine.executor, NativeExecutor)
    requests = [make_request(engine, f"r{i}", p, GREEDY) for i, p in enumerate(batch)]
    run_staggered(engine, requests, arrivals)
    assert [r.output for r in requests] == [alone(spec, p) for p in batch]


@cache
def alone(spec: str, prompt: tuple[int, ...]) -> list[int]:
    engine = engine_of(spec, threads=1, num_kv_cells=40 * LAYERS, enable_prefix_caching=False)
    return run_all(engine, [prompt], GREEDY)[0]


@pytest.mark.slow
@pytest.mark.parametrize("spec", LOSSY)
def test_native_text_is_the_definition_s(spec: str) -> None:
    """In float32, where rounding decides nothing in these texts."""
    native_engine, reference = (engine_of(spec, kernels=k, kv="float32", **tight()) for k in (BEST, "torch"))
    assert run_all(native_engine, PROMPTS, GREEDY) == run_all(reference, PROMPTS, GREEDY)
    assert native_engine.seams.selector.dropped > 0 and reference.seams.selector.dropped > 0


@pytest.mark.slow
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("kernels", [BEST, "torch"])
def test_what_is_fetched_ahead_is_what_was_stored_byte_for_byte(disk: bool, kernels: str, tmp_path) -> None:
    engine = engine_of(LOSSY[5], kernels=kernels, **tight(pages=20, kv_offloading_path=str(tmp_path) * disk))
    tiers = engine.seams.residency
    cells, places = tiers.cells, tiers.native.places()
    stored: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # (page of a layer, head) -> cell, bytes
    put, drop, moved = tiers.put, tiers.drop, 0

    def watched(pages: np.ndarray) -> None:
        for page in [p + layer * 20 for p in pages.tolist() for layer in range(LAYERS)]:
            for head, cell in enumerate(places[page].tolist()):
                if cell >= 0:
                    stored[page, head] = cell, cells[cell, head].copy()
        put(pages)

    def dropped(pages: np.ndarray) -> None:
        gone = set(pages.tolist())
        for at in [at for at in stored if at[0] % 20 in gone]:
            del stored[at]
        drop(pages)

    tiers.put, tiers.drop = watched, dropped
    for i, prompt in enumerate((PROMPTS[2], PROMPTS[2][::-1])):
        engine.add(make_request(engine, f"r{i}", prompt, GREEDY))
    while engine.busy:
        engine.step()
        for (page, head), (before, want) in stored.items():
            if (cell := int(places[page, head])) >= 0:
                moved += cell != before
                assert np.array_equal(cells[cell, head], want)
    assert moved and engine.seams.selector.dropped > 0


@pytest.mark.slow
def test_pools_of_limited_size_work_operation_by_operation() -> None:
    spec, params = "infinigen:alpha=6,budget=48,skip_layers=1", SamplingParams(temperature=0, max_tokens=60)
    small, large = (engine_of(f"{spec},pool=48", **sizes) for sizes in (tight(), {"num_kv_cells": 40 * LAYERS}))
    assert not isinstance(small.executor, NativeExecutor)
    found = run_all(small, PROMPTS[2:3], params)
    assert found == run_all(large, PROMPTS[2:3], params)
    assert found != run_all(engine_of(spec), PROMPTS[2:3], params)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [BEST, "torch"])
@pytest.mark.parametrize("kv", ["float32", "bf16", "fp8", "int8", "int4"])
def test_the_device_is_too_small_and_the_text_the_same(kv: str, kernels: str) -> None:
    engine = engine_of(kernels=kernels, kv=kv, **tight(pages=20))
    assert run_all(engine, PROMPTS, GREEDY) == run_all(engine_of(kernels=kernels, kv=kv), PROMPTS, GREEDY)
    stats = engine.seams.residency.stats()
    assert stats["evictions"] >= stats["misses"] > 0 and stats["hits"] > 0


def test_the_disk_gives_the_same_text(tmp_path) -> None:
    engine = engine_of(**tight(pages=20, kv_offloading_path=str(tmp_path)))
    assert run_all(engine, PROMPTS, GREEDY) == run_all(engine_of(), PROMPTS, GREEDY)
    stats = engine.seams.residency.stats()
    assert stats["bytes_in"] > 0 and stats["stall_seconds"] > 0
    assert not list(tmp_path.iterdir())  # the file has no name, so nothing stays behind


def test_an_emulated_link_bounds_the_bytes_per_second() -> None:
    engine = engine_of(**tight(pages=20, emulate_link=0.01))
    run_all(engine, PROMPTS, SamplingParams(temperature=0, max_tokens=4))
    stats = engine.seams.residency.stats()
    assert stats["stall_seconds"] > 0.5 * stats["bytes_in"] / 0.01e9


def test_a_step_that_writes_more_than_there_are_cells_for_writes_nothing() -> None:
    engine = engine_of(pages=20, num_kv_cells=3 * LAYERS)
    for i in range(4):  # each writes a page of every layer
        engine.add(make_request(engine, f"r{i}", (i, 2, 3), GREEDY))
    with pytest.raises(RuntimeError, match="a step wants more KV at once than the device has room for"):
        engine.step()


def test_pages_are_copied_in_every_stage() -> None:
    shape, slots = Geometry(2, 2, 2, 8, 61), torch.arange(16)
    k, _ = TieredStore.pair(TierShape(shape, 2, 3, 16), "float32", Offload(8, "", 0.0))
    expected = torch.randn(4, 16, 2, 8)
    for stage in range(2):
        for layer in range(2):
            k.write(layer, slots + stage * 2 * 3 * 16, expected[2 * stage + layer])
    k.copy(slots, slots + 2 * 16)
    for stage in range(2):
        for layer in range(2):
            found = k.read(layer, slots + (stage * 2 * 3 + 2) * 16)
            assert torch.equal(found, expected[2 * stage + layer]), (stage, layer)


@contextmanager
def opened_only_to(flag: int, tiers: Tiers) -> Iterator[None]:
    file = tiers.native.descriptor
    kept, other = os.dup(file), os.open(f"/proc/self/fd/{file}", flag | os.O_DIRECT)
    os.dup2(other, file)
    try:
        yield
    finally:
        os.dup2(kept, file)
        os.close(kept)
        os.close(other)


# Nothing can be written to the tier's file meanwhile; or read from it, while what is written arrives.
unwritable, unreadable = partial(opened_only_to, os.O_RDONLY), partial(opened_only_to, os.O_WRONLY)


def test_a_failing_read_ends_its_request_and_no_other(tmp_path) -> None:
    engine = engine_of(**tight(pages=36, kv_offloading_path=str(tmp_path), enable_prefix_caching=False))
    long, short = PROMPTS[2], (1, 2, 3)
    params = SamplingParams(temperature=0, max_tokens=12)
    a = make_request(engine, "long", long, params)
    b = make_request(engine, "short", short, SamplingParams(temperature=0, max_tokens=8))  # within one page
    for r in (a, b):
        engine.add(r)
    while a.num_output < 2:
        engine.step()
    filler = make_request(engine, "filler", PROMPTS[2][::-1] * 2, params)
    engine.add(filler)
    while filler.num_output < 1:  # takes the cells
        engine.step()
    errors = []
    with unreadable(engine.seams.residency):
        errors += [p for p in engine.step() if p.error]
    while engine.busy:
        errors += [p for p in engine.step() if p.error]
        engine.check()
    failed = {p.request.id for p in errors}
    assert failed and "short" not in failed
    assert (
        b.output
        == run_all(engine_of(enable_prefix_caching=False), [short], SamplingParams(temperature=0, max_tokens=8))[0]
    )
    assert engine.seams.residency.stats()["failures"] > 0
    again = make_request(engine, "again", long, params)  # what failed is not believed later
    engine.add(again)
    while engine.busy:
        engine.step()
    assert again.output == run_all(engine_of(enable_prefix_caching=False), [long], params)[0]


def test_a_slow_tier_without_room_is_refused_at_start(tmp_path) -> None:
    with pytest.raises(CapacityError, match=r"has no room.*--kv-offloading"):
        TieredStore.pair(
            TierShape(geometry(CHECKPOINT.config), 1, 1 << 24, 16),
            "bfloat16",
            Offload(4, str(tmp_path), 0.0),
        )


def test_memory_is_no_disk() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no memory file system here")
    with pytest.raises(CapacityError, match="is memory, not a disk"):
        engine_of(**tight(kv_offloading_path="/dev/shm"))


@pytest.mark.parametrize("tokens", [500, 620])
def test_a_guess_of_everything_is_dense_on_the_smallest_device(tokens: int) -> None:
    """Of 76 cells for each head: two layers of 32 pages fit beside the page that is written in all 6; two of 39 do
    not, so that part of each guess waits until its layer wants it."""
    prompt = (list(PROMPTS[0]) * 500)[:tokens]
    params = SamplingParams(temperature=0, max_tokens=8)
    use = "infinigen:alpha=inf,budget=1000000,skip_layers=1"
    found = run_all(engine_of(use, **tight()), [prompt], params)
    assert found == run_all(engine_of(), [prompt], params)
