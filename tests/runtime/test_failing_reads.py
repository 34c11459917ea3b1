"""Reads and writes of a slow tier that fail: whom they harm, what is left, and that nobody sees it later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.engine import Engine
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request
from dovetail.ops.cpu import isas
from dovetail.runtime.codes import CodedTiles
from tests.runtime.test_residency import BEST, LAYERS, engine_of, tight, unreadable, unwritable
from tests.tiny import TinyCheckpoint, make_request, run_all, tiny_config, tiny_engine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not isas(), reason="the native kernels were not built")]
SHADOWKV = "shadowkv:rank=8,budget=128,outliers=0"
LONG, OTHER, SHORT = (tuple((i * i * k + i // 3) % 61 for i in range(n)) for k, n in ((7, 300), (5, 150), (3, 9)))
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def exact_keys(engine: Engine) -> Engine:
    """The engine with its selector, but without aliases."""
    codec = engine.seams.codec
    seal = codec.seal
    codec.seal = lambda requests, kv: seal(requests, kv) and {}  # type: ignore[method-assign]
    return engine


def fail_while_sealing(engine: Engine, name: str, first: int) -> None:
    """From the `first`th layer on, nothing can be read while the prompt of request `name` is factorised."""
    kv: Any = engine.executor.kv  # type: ignore[attr-defined]
    codec, read = engine.seams.codec, kv.key_array
    seal = codec.seal

    def failing(layer: int, pages: np.ndarray) -> np.ndarray:
        if layer < first:
            return read(layer, pages)
        with unreadable(kv.seams.residency):
            return read(layer, pages)

    def sealed(requests: Any, kv: Any) -> Any:
        if any(r.id == name for r in requests):
            kv.key_array = failing
        try:
            return seal(requests, kv)
        finally:
            kv.key_array = read

    codec.seal = sealed  # type: ignore[method-assign]


def together(engine: Engine, names: dict[str, tuple[int, ...]]) -> tuple[dict[str, Request], list[str]]:
    """Requests that run together, and the names of those that failed; "twin" shares the pages of "long". The pool
    is checked after every step."""
    requests = {n: make_request(engine, n, p, GREEDY) for n, p in names.items()}
    if "twin" in requests:
        requests["twin"].fork_of = requests["long"]
    for r in requests.values():
        engine.add(r)
    failed = []
    while engine.busy:
        failed += [p.request.id for p in engine.step() if p.error]
        engine.check()
    return requests, failed


@pytest.mark.parametrize("kernels", [BEST, "torch"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_prompt_that_cannot_be_read_keeps_its_keys_and_the_others_go_on(
    tmp_path: Path, kernels: str, first: int
) -> None:
    """Of four requests one cannot be factorised: it reads its keys as they are."""
    place = tight(pages=48, kv_offloading_path=str(tmp_path), enable_prefix_caching=False)
    engine = engine_of(SHADOWKV, kernels=kernels, **place)
    fail_while_sealing(engine, "long", first)
    prompts = {"other": OTHER, "long": LONG, "short": SHORT, "twin": LONG}
    requests, failed = together(engine, prompts)
    stats = engine.seams.residency.stats()  # type: ignore[attr-defined]
    assert stats["failures"] > 0
    assert not failed

    def alone(prompt: tuple[int, ...], change: Callable[[Engine], Engine] = lambda e: e) -> list[int]:
        return run_all(change(engine_of(SHADOWKV, kernels=kernels, **place)), [prompt], GREEDY)[0]

    assert requests["long"].output == alone(LONG, exact_keys) != alone(LONG)
    assert requests["twin"].output == alone(LONG)  # what failed is not shared, and was read again
    assert [requests[n].output for n in ("other", "short")] == [alone(OTHER), alone(SHORT)]
    assert engine.pool.num_free == 48
    codec: Any = engine.seams.codec
    codec.drop(list(prompts))  # as the next plan would say
    codec.prompts.check()
    assert codec.prompts.num_free == 48 and not codec.prompts.prompts


NARROW = TinyCheckpoint(tiny_config(hidden_size=64, intermediate_size=96, head_dim=12, num_layers=LAYERS))


@pytest.mark.parametrize("kv", ["float32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("spec", ["", SHADOWKV, "quest:budget=48,skip_layers=0"])
def test_what_a_failing_read_leaves_in_the_padding_is_gone_when_cells_are_written(
    tmp_path: Path, kv: str, spec: str
) -> None:
    """A cell that cannot be read becomes NaN, with the dimensions that heads of 12 do not have: these are 0 for
    every token that is written there later, or its products would be NaN."""
    use = [spec] if spec else []
    options: dict[str, Any] = dict(
        checkpoint=NARROW, kernels=BEST, kv_cache_dtype=kv, pages=40, page_size=16, threads=2, dtype="float32",
        num_kv_cells=40 + LAYERS * 6, max_num_batched_tokens=32, max_num_seqs=4, enable_prefix_caching=False,
    )  # fmt: skip
    engine = tiny_engine(*use, kv_offloading_path=str(tmp_path), **options)
    sick = make_request(engine, "sick", LONG, GREEDY)
    engine.add(sick)
    while sick.num_output < 2:
        engine.step()
    memory: Any = engine.executor.kv.k  # type: ignore[attr-defined]
    with unreadable(engine.seams.residency):  # type: ignore[arg-type]
        while engine.busy:
            engine.step()
    assert sick.finish_reason == "error"
    assert any(broken(memory.store, *at) for at in np.ndindex(memory.array.shape[:2]))
    found, failed = together(engine, {"later": LONG[::-1], "short": SHORT})
    assert not failed
    for name, prompt in (("later", LONG[::-1]), ("short", SHORT)):
        assert found[name].output == run_all(tiny_engine(*use, **options), [prompt], GREEDY)[0]
    last = make_request(engine, "last", OTHER, GREEDY)
    engine.add(last)
    while last.num_output < 20:
        engine.step()
    places = torch.from_numpy(memory.tiers.native.places()).long()
    for i, page in enumerate(last.table.ids[: (len(OTHER) + 19) // 16]):  # full ones
        for layer in range(LAYERS):
            cells = places[layer * 40 + page].tolist()
            for head, cell in enumerate(cells):
                assert cell < 0 or not broken(memory.store, cell, head), (i, layer)


def broken(store: Any, cell: int, head: int) -> bool:
    """Whether a cell has NaN in the dimensions of K beyond 12, or among the scales of codes."""
    if isinstance(store, CodedTiles):
        return bool(np.isnan(store.pages(np.full((1, store.array.shape[1]), cell))[:, :, head]).any())
    tiles = store.data[cell, head]  # float32 [tiles, dim, 16], bfloat16 [tiles, dim / 2, 16, 2]
    rest = tiles[:, 12:] if store.kind == "float32" else tiles[:, 6:]
    return bool(rest.count_nonzero())


@pytest.mark.parametrize("spec", ["", "quest:budget=48,skip_layers=0"])
def test_a_prompt_that_was_lost_is_computed_again(tmp_path: Path, spec: str) -> None:
    """Pages that could not be written are gone when the device needs their room. Who reads them fails, once."""
    use = [spec] if spec else []
    engine = engine_of(*use, **tight(pages=36, kv_offloading_path=str(tmp_path)))
    with unwritable(engine.seams.residency):  # type: ignore[arg-type]
        _, failed = together(engine, {"long": LONG, "other": OTHER})
    assert failed
    for _ in range(2):  # whoever meets what is lost first makes room for the next one
        found, failed = together(engine, {"long": LONG})
    assert not failed
    assert found["long"].output == run_all(engine_of(*use), [LONG], GREEDY)[0]


def test_a_prompt_that_cannot_be_written_keeps_its_keys(tmp_path: Path) -> None:
    """An alias brings V from the slow tier, where there is none: rows read the pages as they are."""
    options: dict[str, Any] = dict(kv_offloading_path=str(tmp_path), enable_prefix_caching=False)
    engine = engine_of(SHADOWKV, num_kv_cells=40 * LAYERS, **options)
    request = make_request(engine, "long", LONG, GREEDY)
    engine.add(request)
    with unwritable(engine.seams.residency):  # type: ignore[arg-type]
        while engine.busy:
            engine.step()
    assert request.finish_reason == "length"
    assert request.output == run_all(exact_keys(engine_of(SHADOWKV)), [LONG], GREEDY)[0]
