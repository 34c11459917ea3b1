"""ShadowKV: what rows read, what is rebuilt, who shares it, what is refused, and what stays on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dovetail.core.engine import Engine
from dovetail.core.errors import ConfigError
from dovetail.core.model import NO_ROPE, RopeConfig
from dovetail.core.sampling import SamplingParams
from dovetail.core.technique import compose
from dovetail.core.types import PageSet
from dovetail.models import MODELS, Decoder
from dovetail.ops.cpu import isas
from dovetail.techniques import technique
from dovetail.techniques.shadowkv.codec import SCORES
from tests.tiny import FACTS, TinyCheckpoint, finish, make_request, run_all, tiny_config, tiny_engine

PARAMS = SamplingParams(temperature=0, max_tokens=20)
PROMPTS = [tuple((i * i * 7 + i // 3 + j) % 61 for i in range(40 + 5 * j)) for j in range(3)]
FULL = "shadowkv:rank=16,budget=24,chunk=2,outliers=2"
LOW = "shadowkv:rank=3,budget=24,chunk=2,outliers=2"
YARN = RopeConfig(kind="yarn", parameters={"factor": 4.0, "original_max_position_embeddings": 16.0})


def exact_keys(engine: Engine) -> Engine:
    """The engine with its selector and outliers, but without aliases."""
    codec: Any = engine.seams.codec
    seal = codec.seal
    codec.seal = lambda requests, kv: seal(requests, kv) and {}
    return engine


def prompts_of(engine: Engine) -> Any:
    return engine.seams.codec.prompts  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "config",
    [
        {}, {"rope": YARN}, {"num_kv_heads": 4}, {"sliding_windows": (None, 12, None), "num_layers": 3},
        {"layer_ropes": (RopeConfig(), NO_ROPE, RopeConfig(50.0)), "num_layers": 3},
        {"post_norms": True, "qk_norm": True, "query_scale": 0.5, "embedding_scale": 3.0},
    ],
    ids=["plain", "yarn", "no groups", "sliding", "ropes", "norms"],
)  # fmt: skip
def test_keys_of_full_rank_are_the_keys(config: dict[str, Any]) -> None:
    checkpoint = TinyCheckpoint(tiny_config(**config))
    full = FULL.replace("16", "0")
    engine = tiny_engine(full, checkpoint=checkpoint)
    found = run_all(engine, PROMPTS, PARAMS)
    assert prompts_of(engine).rebuilt > 0
    without = exact_keys(tiny_engine(full, checkpoint=checkpoint))
    assert found == run_all(without, PROMPTS, PARAMS)
    assert prompts_of(without).rebuilt == 0
    low = run_all(tiny_engine(LOW, checkpoint=checkpoint), PROMPTS, PARAMS)
    assert low != found


def test_budgets_of_the_whole_context_are_exact_with_keys_of_full_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where keys are rebuilt, which a budget that covers the prompt avoids."""
    engine = tiny_engine("shadowkv:rank=0,budget=4096,chunk=2,outliers=2")
    monkeypatch.setattr(prompts_of(engine), "how", prompts_of(engine).how.__class__(16, 0.0, 2, 1, 0))
    assert run_all(engine, PROMPTS, PARAMS) == run_all(tiny_engine(), PROMPTS, PARAMS)
    assert prompts_of(engine).rebuilt > 0
    plain = tiny_engine("shadowkv:rank=1,budget=4096,chunk=2,outliers=2")
    assert run_all(plain, PROMPTS, PARAMS) == run_all(tiny_engine(), PROMPTS, PARAMS)
    assert prompts_of(plain).rebuilt == 0


def test_a_row_reads_its_budget_with_outliers_and_recent_pages() -> None:
    engine = tiny_engine(LOW, max_num_batched_tokens=7)
    selector: Any = engine.seams.selector
    select, rows = selector.select, []

    def watched(layer: int, q: Any, batch: Any) -> PageSet:
        found = select(layer, q, batch)
        apart = prompts_of(engine).outliers(layer, batch, batch.tables.shape[1])
        for i, row in enumerate(batch.sparse_rows.tolist()):
            eligible, position = int(batch.eligible[row]), int(batch.positions[row])
            for head, chosen in enumerate(found.pages[i].tolist()):
                rows.append((position, eligible, [p for p in chosen if p >= 0], apart[batch.row_spans[row], head]))
        return found

    selector.select = watched
    run_all(engine, PROMPTS, PARAMS)
    assert rows
    for position, eligible, chosen, apart in rows:
        recent = position // 4 + 1 - eligible
        assert len(chosen) == len(set(chosen)) == min(eligible, 6 - recent)
        assert all(p < eligible for p in chosen)
        outliers = [p for p in apart.nonzero().flatten().tolist() if p < eligible]
        assert set(outliers) <= set(chosen) and len(outliers) <= 1
        assert eligible * 4 <= position + 1 - 8  # the local window is among the recent ones
    assert any(p >= 10 for _, _, chosen, _ in rows for p in chosen)  # pages of generated tokens compete
    assert selector.dropped > 0


def test_outliers_and_generated_pages_keep_exact_keys() -> None:
    """A rank that loses everything: what is not rebuilt decides the text."""
    engine = tiny_engine(LOW)
    prompts = prompts_of(engine)
    request = make_request(engine, "r", PROMPTS[0], PARAMS)
    engine.add(request)
    while len(request.tokens) < 50:
        engine.step()
    prompt = prompts.of("r")
    for layer in range(2):
        aliases = torch.from_numpy(prompt.aliases)[None, None].expand(1, 2, -1)
        marks = torch.randn(1, 2, len(prompt.aliases), 4, 8).double()
        opened = prompts.open(layer, aliases, marks)
        for head in range(2):
            kept = (opened[0, head] == marks[0, head]).flatten(1).all(1)
            assert kept.tolist() == prompt.outliers[layer, head].tolist()
            assert int(kept.sum()) == 1
        own = torch.tensor(request.table.ids)[None, None].expand(1, 2, -1)
        marks = torch.randn(1, 2, len(request.table.ids), 4, 8).double()
        assert torch.equal(prompts.open(layer, own, marks), marks)


def test_requests_of_one_prompt_share_what_is_kept_and_all_of_it_goes() -> None:
    engine = tiny_engine(LOW, pages=80)
    prompts = prompts_of(engine)
    requests = [make_request(engine, f"r/{i}", PROMPTS[1], PARAMS) for i in range(3)]
    for r in requests[1:]:
        r.fork_of = requests[0]
    other = make_request(engine, "other", PROMPTS[1][:32] + PROMPTS[2], PARAMS)
    for r in (*requests, other):
        engine.add(r)
    while not all(r.num_output for r in (*requests, other)):
        engine.step()
    engine.step()
    prompts.check()
    assert sorted(p.users for p in prompts.prompts) == [1, 3]
    assert prompts.num_free == 80 - 45 // 4 - (32 + 50) // 4
    finish(engine)
    assert len({tuple(r.output) for r in requests}) == 1
    run_all(engine, [(1, 2)], PARAMS)
    prompts.check()
    assert prompts.num_free == 80 and len(prompts.prompts) <= 1


def test_a_follow_up_reads_its_whole_prompt_from_the_prefix_cache_and_its_own_keys() -> None:
    engine = tiny_engine(LOW)
    first = run_all(engine, PROMPTS[:1], PARAMS)[0]
    follow_up = (*PROMPTS[0], *first, 5, 9, 2)
    again = make_request(engine, "again", follow_up, PARAMS)
    engine.add(again)
    finish(engine)
    assert again.cached_tokens >= 40 - 4
    assert again.output == run_all(tiny_engine(LOW, enable_prefix_caching=False), [follow_up], PARAMS)[0]


def test_a_tied_program_keeps_keys_of_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looped(Decoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.program *= 3

    monkeypatch.setitem(MODELS, "llama", replace(MODELS["llama"], program=Looped))
    engine = tiny_engine(FULL, max_num_batched_tokens=11)
    found = run_all(engine, PROMPTS, PARAMS)
    assert prompts_of(engine).rebuilt > 0
    assert found == run_all(exact_keys(tiny_engine(FULL)), PROMPTS, PARAMS)
    assert found == [run_all(tiny_engine(FULL), [p], PARAMS)[0] for p in PROMPTS]


@pytest.mark.parametrize("kv", ["float32", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("kernels", ["torch", *isas()[:1]])
@pytest.mark.parametrize("score", SCORES)
def test_it_runs_on_every_type_of_kv(score: str, kv: str, kernels: str) -> None:
    engine = tiny_engine(
        f"shadowkv:rank=8,budget=96,chunk=8,outliers=2,score={score}", page_size=16, pages=24, dtype="float32",
        kv_cache_dtype=kv, kernels=kernels,
    )  # fmt: skip
    long = [tuple(i * i % 61 for i in range(150))]
    assert len(run_all(engine, long, PARAMS)[0]) == 20
    assert engine.seams.selector.dropped > 0  # type: ignore[attr-defined]
    assert prompts_of(engine).rebuilt > 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rank=-1", "rank >= 0"),
        ("score=bound", "score must be landmarks or codes, got 'bound'"),
        ("energy=1", "energy < 1"),
        ("chunk=0", "chunk >= 1"),
        ("outliers=-2", "outliers >= 0"),
        ("rank=17,budget=64,chunk=2", "rank=17 is above the width of all 2 KV heads together, 16"),
        ("rank=4,budget=64,chunk=3", "chunk=3 does not divide the KV's block size, 4"),
        ("rank=4,budget=16,chunk=2,outliers=4", "leaves nothing to choose.*give at least 24"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"shadowkv.*{words}"):
        tiny_engine(f"shadowkv:{spec}")


def test_the_least_budget_that_is_asked_for_is_accepted() -> None:
    spec = "shadowkv:rank=4,budget=24,chunk=2,outliers=4"
    assert run_all(tiny_engine(spec), PROMPTS[:1], PARAMS)


def test_without_a_slow_tier_or_rotary_positions_it_is_refused_by_name() -> None:
    for fact in FACTS:
        with pytest.raises(ConfigError, match=f"shadowkv needs {fact}"):
            compose(technique("shadowkv"), facts=FACTS - {fact})
