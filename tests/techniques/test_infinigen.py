"""Pages guessed a layer ahead: the rule, what the guess is made of, and what is refused."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail import LLM, ConfigError, SamplingParams
from dovetail.core.seams import Residency, RowFilter
from dovetail.core.technique import Technique, compose
from dovetail.core.types import StepPlan
from dovetail.models import facts
from dovetail.techniques import technique
from dovetail.techniques.infinigen.eviction import POLICIES
from tests.tiny import CHECKPOINT, OFFERED, TinyCheckpoint, make_request, run_all, tiny_config, tiny_engine

PARAMS = SamplingParams(temperature=0, max_tokens=20)
PROMPT = tuple(i * 7 % 61 for i in range(70))
DEEP = TinyCheckpoint(tiny_config(num_layers=4))


def fill(**parts: Any) -> Technique:
    return Technique("-".join(parts), tuple(parts), lambda site: parts)


class Log(Residency):
    """Remembers what is fetched, by layer."""

    def __init__(self) -> None:
        self.moves: list[tuple[bool, int, Any]] = []

    def fetch(self, layer, pages, batch, wait):
        self.moves.append((wait, layer, pages.pages))


@pytest.mark.parametrize("skip", [1, 2])
def test_what_is_read_is_what_was_guessed_and_first_layers_read_everything(skip: int) -> None:
    log = Log()
    engine = tiny_engine(
        f"infinigen:alpha=1,budget=16,skip_layers={skip}", fill(residency=log), checkpoint=DEEP, pages=64
    )
    run_all(engine, [PROMPT], PARAMS)
    guesses: dict[int, Any] = {}
    sparse = set()
    for wait, layer, pages in log.moves:
        if not wait:
            guesses[layer] = pages
        elif pages is not None:
            assert pages is guesses[layer] or torch.equal(pages, guesses[layer])
            sparse.add(layer)
            assert 1 <= pages.shape[-1] <= 3
    assert sparse == set(range(skip, 4))


def chosen(spec: str, prompt: tuple[int, ...] = PROMPT) -> list[list[set[int]]]:
    """For each (layer, head) the pages that the first generated rows read, with the same text before them."""
    log = Log()
    engine = tiny_engine(spec, fill(residency=log), checkpoint=DEEP)
    run_all(engine, [prompt], SamplingParams(temperature=0, max_tokens=2))
    everything = set(range(len(prompt) // 4))
    return [
        [everything] * 2 if pages is None else [set(head.tolist()) - {-1} for head in pages[0]]
        for wait, layer, pages in log.moves[-8:]
        if wait and layer == 1
    ]


def test_choices_are_nested_in_alpha_and_in_the_budget() -> None:
    by_alpha = [chosen(f"infinigen:alpha={a},skip_layers=1,partial=1") for a in (0.1, 1, 3, 8, "inf")]
    by_budget = [chosen(f"infinigen:alpha=50,budget={b},skip_layers=1") for b in (12, 16, 32, 64, 4096)]
    for sets in (by_alpha, by_budget):
        for small, large in itertools.pairwise(sets):
            assert all(s <= b for x, y in zip(small, large, strict=True) for s, b in zip(x, y, strict=True))
        assert sets[0] != sets[-1]


def test_with_all_columns_and_the_true_input_the_rule_sees_true_scores() -> None:
    """A model whose layers add nothing: the guess is the truth, so the margins are those of the real queries."""
    config = tiny_config(num_layers=3)
    still = TinyCheckpoint(config)
    for i in range(3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            still.tensor(f"model.layers.{i}.{name}.weight").data[:] = 0
    engine = tiny_engine("infinigen:partial=1,skip_layers=1,fit=none", checkpoint=still)
    selector: Any = engine.seams.selector
    seen = []
    before = selector.select

    def select(layer, q, batch):
        if layer >= 1:
            rows = batch.sparse_rows
            pages = batch.tables[batch.span_of_row[rows], : int(batch.eligible.max())]
            keys = engine.executor.kv.keys(layer, pages)  # type: ignore[attr-defined]
            scores = torch.einsum("rhgd,rpthd->rhgpt", q[rows].unflatten(1, (2, 2)), keys) * 8**-0.5
            best = scores.amax(-1)
            want = (best - best.amax(-1, keepdim=True)).amax(2)
            found = selector.scored(layer, guesses.pop(layer), batch)[0]
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
            seen.append(layer)
        return before(layer, q, batch)

    guesses: dict[int, Any] = {}
    guess = selector.guess

    def remembered(layer, hidden, batch):
        guesses[layer] = guess(layer, hidden, batch)
        return guesses[layer]

    selector.select, selector.guess = select, remembered
    run_all(engine, [PROMPT], SamplingParams(temperature=0, max_tokens=5))
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_gives_up_pages_for_good(policy: str) -> None:
    """Each head of a layer keeps what the pool allows, and no row reads what was given up before it."""
    spec = f"infinigen:alpha=3,budget=12,skip_layers=1,pool=24,eviction={policy}"
    log = Log()
    engine = tiny_engine(spec, fill(residency=log), checkpoint=DEEP)
    selector: Any = engine.seams.selector
    request = make_request(engine, "r", PROMPT, SamplingParams(temperature=0, max_tokens=60))
    engine.add(request)
    checked = 0
    while engine.busy:
        position = len(request.tokens) - 1
        log.moves.clear()
        engine.step()
        eligible = max(0, position + 1 - 4) // 4
        for wait, layer, pages in log.moves:
            if not wait or layer == 0 or position < len(PROMPT):
                continue
            gone = selector.pools[request][0, layer].given_up(eligible)
            if position >= len(PROMPT) + 12:
                assert (eligible - gone.sum(1) == 6).all()
            for head, chosen in zip(gone, pages[0], strict=True):
                read = [p for p in chosen.tolist() if p >= 0]
                assert len(read) and not head[read].any()
                checked += head.any()
    assert checked
    assert len(selector.pools) == 1


def test_pools_are_forgotten_with_their_requests() -> None:
    engine = tiny_engine("infinigen:budget=12,skip_layers=1,pool=16", checkpoint=DEEP)
    selector: Any = engine.seams.selector
    run_all(engine, [PROMPT], PARAMS)
    engine.last_plan = StepPlan(())  # names the requests of the last step
    gc.collect()
    assert not selector.pools


@pytest.mark.parametrize("fit", ["mean", "linear"])
def test_fitted_guesses_are_right_on_the_average(fit: str) -> None:
    """On the calibration text itself they have the mean of the true queries, and linear ones the least error."""
    from dovetail.techniques.infinigen.calibration import layer_inputs
    from tests.tiny import calibration

    off: dict[str, list[float]] = {}
    for how in ("none", fit):
        engine = tiny_engine(f"infinigen:skip_layers=1,fit={how}", checkpoint=DEEP)
        selector: Any = engine.seams.selector
        guess, before = selector.guess, None
        for layer, hidden in layer_inputs(selector.site, [calibration("")]):
            if before is not None:
                error = guess.true(layer, hidden) - guess.projected(layer, before)
                if how != "none":
                    assert float(error.mean(0).abs().max()) < 0.02 * float(error.abs().max() + 0.1)
                off.setdefault(how, []).append(float(error.square().sum()))
            before = hidden
    assert all(b < a for a, b in zip(off["none"], off[fit], strict=True))


def test_rows_that_stop_early_take_nobody_elses_guess() -> None:
    class Skip(RowFilter):
        cuts = (1,)

        def keep(self, layer, hidden, batch):
            return (batch.positions % 3 != 0).nonzero().flatten()

    log = Log()
    engine = tiny_engine(
        "infinigen:alpha=1,budget=12,skip_layers=2", fill(residency=log), fill(rows=Skip()), checkpoint=DEEP
    )
    requests = [make_request(engine, str(i), PROMPT[i:], PARAMS) for i in range(3)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
    rows: dict[int, int] = {}
    fewer = 0
    for wait, layer, pages in log.moves:
        if layer != 2 or pages is None:
            continue
        if wait:
            assert len(pages) <= rows[layer]
            fewer += len(pages) < rows[layer]
        else:
            rows[layer] = len(pages)
    assert fewer


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("infinigen:alpha=0", "alpha > 0"),
        ("infinigen:alpha=nan", "alpha > 0"),
        ("infinigen:partial=1.5", "partial <= 1"),
        ("infinigen:skip_layers=0", "skip_layers >= 1"),
        ("infinigen:norm=last", "next or same"),
        ("infinigen:fit=2", "fit must be linear, mean or none"),
        ("infinigen:eviction=random", "counter, lru or fifo"),
        ("infinigen:budget=64,pool=63", "a pool of 63 tokens is less than the budget of 64"),
    ],
)
def test_wrong_options_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        technique(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("infinigen:budget=11,skip_layers=1", "give at least 12"),
        ("infinigen:skip_layers=2", "all of the model's 2 layers"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_engine(spec)


def test_missing_facts_are_named() -> None:
    known = facts(CHECKPOINT.config)
    with pytest.raises(ConfigError, match="infinigen needs a slow tier"):
        compose(technique("infinigen"), facts=known)
    with pytest.raises(ConfigError, match="infinigen needs rotary positions"):
        compose(technique("infinigen"), facts=(known | OFFERED) - {"rotary positions"})


@pytest.mark.slow
def test_text_to_measure_on_is_read_from_a_file(tiny_model: Path, tmp_path: Path) -> None:
    plain = replace(technique("infinigen:skip_layers=1"), needs=frozenset())
    text = tmp_path / "text"
    text.write_text("Words and more words. " * 30)
    named = replace(technique(f"infinigen:skip_layers=1,calibration={text}"), needs=frozenset())
    basis = [LLM(tiny_model, use=[t]).engine.seams.selector.keys.basis for t in (plain, plain, named)]  # type: ignore[attr-defined]
    assert torch.equal(basis[0], basis[1])
    assert not torch.equal(basis[0], basis[2])
    text.write_text("Few.")
    with pytest.raises(ConfigError, match=r"has \d+ tokens; give at least 8"):
        LLM(tiny_model, use=[named])
    absent = replace(technique("infinigen:skip_layers=1,calibration=/nowhere"), needs=frozenset())
    with pytest.raises(ConfigError, match="there is no such file"):
        LLM(tiny_model, use=[absent])
