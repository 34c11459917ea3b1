"""The same greedy text whatever the batch-mates, the budget, the chunks, the cache, preemption or drafts."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.technique import compose
from dovetail.models import facts
from dovetail.techniques import MODULES, technique
from tests.helpers.examples import examples
from tests.tiny import CHECKPOINT, NEEDED, OFFERED, finish, make_request, run_all, run_staggered, tiny_engine

NEW = 24
FACTS = facts(CHECKPOINT.config) | OFFERED
LOSSY = [
    *("sink-window:sink=4,window=8", "sink-window:sink=0,window=5", "sink-window:sink=9,window=16"),
    *(
        "quest:budget=12,skip_layers=0,score=bound",
        "quest:budget=16,skip_layers=1",
        "quest:budget=12,skip_layers=0,score=mean_std,chunk=2",
        "quest:budget=12,skip_layers=0,score=codes",
        "quest:budget=12,skip_layers=0,score=bound,chunk=2",
        "shadowkv:rank=3,budget=20,chunk=2,outliers=2",
        "shadowkv:rank=6,budget=12,chunk=1,outliers=0",
        "shadowkv:rank=3,budget=20,chunk=2,outliers=2,score=codes",
        "shadowkv:rank=16,budget=16,chunk=1,outliers=1,energy=0.9",
    ),
    *(
        "infinigen:alpha=9,budget=12,skip_layers=1",
        "infinigen:alpha=0.5,partial=1,skip_layers=1,norm=same,fit=none",
        "infinigen:alpha=6,budget=16,skip_layers=1,pool=20",
        "infinigen:alpha=6,budget=16,skip_layers=1,pool=20,eviction=fifo",
        "infinigen:alpha=6,budget=16,skip_layers=1,pool=20,eviction=lru",
    ),
]


@cache
def alone(spec: str, prompt: tuple[int, ...], n: int = NEW) -> list[int]:
    """The text of one request on an engine of its own, in one chunk, with plenty of pages."""
    use = (spec,) if spec else ()
    engine = tiny_engine(*use, enable_prefix_caching=False)
    return run_all(engine, [prompt], SamplingParams(temperature=0, max_tokens=n))[0]


prompts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30).map(tuple), min_size=1, max_size=5)


@given(
    prompts,
    st.sampled_from(["", *LOSSY]),
    st.sampled_from(["", "ngram:tokens=3,min_n=1,max_n=2", "suffix:others=true,min_odds=0"]),
    st.sampled_from([1, 2, 3, 5, 8, 17, 64]),
    st.integers(1, 5),
    st.integers(14, 40),
    st.booleans(),
    st.lists(st.integers(0, 12), min_size=5, max_size=5),
    st.sampled_from([1, 4, 64]),
)
@examples(60)
def test_same_text_under_any_schedule(
    batch, spec, drafter, budget, seqs, pages, caching, arrivals, crowded
) -> None:
    use = [s for s in (spec, drafter) if s]
    engine = tiny_engine(
        *use, pages=pages, max_num_batched_tokens=budget, max_num_seqs=seqs, enable_prefix_caching=caching
    )
    engine.seams.policy.crowded = crowded
    params = SamplingParams(temperature=0, max_tokens=NEW)
    requests = [make_request(engine, f"r{i}", p, params) for i, p in enumerate(batch)]
    run_staggered(engine, requests, arrivals)
    assert [r.output for r in requests] == [alone(spec, p) for p in batch]


def test_lossy_settings_do_change_the_text() -> None:
    """Else the test above would prove nothing about them."""
    prompt = tuple(i * 7 % 61 for i in range(40))
    texts = {tuple(alone(spec, prompt)) for spec in ["", *LOSSY]}
    assert len(texts) == 1 + len(LOSSY)


def test_lossy_prefixes_are_not_shared_beyond_the_dense_part() -> None:
    prompt = tuple(i * 7 % 61 for i in range(40))
    engine = tiny_engine(LOSSY[0])
    params = SamplingParams(temperature=0, max_tokens=NEW)
    first = run_all(engine, [prompt], params)[0]
    follow_up = (*prompt, *first)
    again = run_all(engine, [follow_up], params)[0]
    assert again == alone(LOSSY[0], follow_up)


def test_dense_until_makes_part_of_the_prompt_sparse_under_any_chunking() -> None:
    prompt = tuple(i * 7 % 61 for i in range(60))
    params = SamplingParams(temperature=0, max_tokens=8)
    texts = set()
    for budget in (1, 7, 64):
        engine = tiny_engine(LOSSY[0], max_num_batched_tokens=budget)
        request = make_request(engine, "r", prompt, params, dense_until=20)
        engine.add(request)
        finish(engine)
        assert engine.seams.selector.dropped > 0
        texts.add(tuple(request.output))
    assert len(texts) == 1
    assert texts != {tuple(alone(LOSSY[0], prompt, 8))}


# Formats of weights round: tests/techniques/test_rounded.py. Drafts must be named: tests/techniques/test_draft.py.
EXACT = [name for name in sorted(MODULES) if name not in NEEDED and technique(name).fills != ("format",)]


@pytest.mark.parametrize("name", EXACT)
def test_at_its_exact_setting_a_technique_gives_the_plain_text(name: str) -> None:
    plain = technique(name)
    exact = technique(f"{name}:" + ",".join(f"{k}={v}" for k, v in plain.exact_at.items()))
    assert plain.lossless or plain.exact_at
    for other in [None, *EXACT]:
        if other == name:
            continue
        if other and set(technique(other).fills) & set(plain.fills):
            with pytest.raises(ConfigError, match=f"{name} and {other}"):
                compose(exact, technique(other), facts=FACTS)
            continue
        more = (
            [technique(f"{other}:" + ",".join(f"{k}={v}" for k, v in technique(other).exact_at.items()))]
            if other
            else []
        )
        compose(exact, *more, facts=FACTS)
        prompts = [tuple((i * 5 + j) % 7 for i in range(30)) for j in range(3)]
        texts = run_all(tiny_engine(exact, *more), prompts, SamplingParams(temperature=0, max_tokens=NEW))
        assert texts == [alone("", p) for p in prompts]


def test_drafts_are_proposed_and_some_are_right() -> None:
    engine = tiny_engine("ngram")
    run_all(engine, [(1, 2, 3, 4) * 6], SamplingParams(temperature=0, max_tokens=64))
    drafter = engine.seams.drafter
    assert drafter.proposed >= drafter.accepted > 0
    assert engine.steps < 64


def test_sampled_text_is_the_same_with_drafts_and_batch_mates() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_tokens=40, seed=11)
    prompts = [(1, 2, 3, 4) * 5, (5, 1, 5, 1, 5, 1), (9,)]
    single = [run_all(tiny_engine(), [p], params)[0] for p in prompts]
    together = run_all(tiny_engine("ngram", pages=30, max_num_batched_tokens=7), prompts, params)
    assert together == single
    other = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_tokens=40, seed=12)
    assert run_all(tiny_engine(), [prompts[0]], other)[0] != single[0]
