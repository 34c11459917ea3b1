"""Every seam that acts inside a step is asked, with what its contract says, and its answer is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import EVERY_ROW, Codec, Experts, Policy, Residency, RowFilter, Selector, Variant
from dovetail.core.technique import Technique, compose
from dovetail.core.types import PageSet
from dovetail.layers.linear import Dense
from tests.tiny import TinyCheckpoint, make_request, run_all, tiny_config, tiny_engine

PARAMS = SamplingParams(temperature=0, max_tokens=20)
PROMPTS = [tuple((i * 5 + j) % 7 for i in range(18)) for j in range(3)]
PLAIN = run_all(tiny_engine(), PROMPTS, PARAMS)


def fill(**parts: Any) -> Technique:
    return Technique("-".join(parts), tuple(parts), lambda site: parts)


def test_a_policy_orders_admission() -> None:
    class Last(Policy):
        def order(self, waiting):
            return list(reversed(waiting))

    engine = tiny_engine(fill(policy=Last()), max_num_seqs=1, max_num_batched_tokens=32)
    requests = [make_request(engine, str(i), p, PARAMS) for i, p in enumerate(PROMPTS)]
    for r in requests:
        engine.add(r)
    engine.step()
    assert engine.scheduler.running == [requests[-1]]


def test_a_codec_sees_sealed_pages_once_and_what_it_opens_is_read() -> None:
    class Doubling(Codec):
        sealed: list[int] = []

        def seal(self, pages, kv):
            assert kv.keys(0, pages).shape == (len(pages), 4, 2, 8)
            self.sealed += pages.tolist()

        def open(self, layer, pages, kv):
            return kv[0] * 2, kv[1]

    class Same(Codec):
        def open(self, layer, pages, kv):
            return kv[0].clone(), kv[1].clone()

    codec = Doubling()
    doubled = run_all(tiny_engine(fill(codec=codec), enable_prefix_caching=False), PROMPTS[:1], PARAMS)
    assert doubled != PLAIN[:1]
    assert len(codec.sealed) == len(set(codec.sealed)) == (18 + 20 - 1) // 4
    assert run_all(tiny_engine(fill(codec=Same())), PROMPTS, PARAMS) == PLAIN


def test_selection_is_predicted_a_layer_ahead_and_both_reach_residency() -> None:
    class Everything(Selector):
        window = 6

        def select(self, layer, q, batch):
            rows = batch.sparse_rows
            count = int(batch.eligible.max()) if len(rows) else 0
            pages = torch.arange(count).expand(len(rows), 2, -1)
            return PageSet(pages) if count else PageSet()

        def ahead(self, layer, hidden, batch):
            return PageSet(torch.full((len(batch.sparse_rows), 2, 1), layer))

    class Log(Residency):
        def __init__(self):
            self.events = []

        def put(self, pages):
            self.events.append(("put", None))

        def fetch(self, layer, pages, batch):
            self.events.append(("fetch", layer))

        def prefetch(self, layer, pages, batch):
            self.events.append(("prefetch", layer))

    log = Log()
    assert run_all(tiny_engine(fill(selector=Everything()), fill(residency=log)), PROMPTS, PARAMS) == PLAIN
    assert ("put", None) in log.events
    moves = [e for e in log.events if e[0] != "put"]
    assert moves[:3] == [("prefetch", 1), ("fetch", 0), ("fetch", 1)]


def test_a_row_filter_stops_rows_at_a_layer_and_keeps_their_state() -> None:
    class Skip(RowFilter):
        def __init__(self, layer):
            self.layer = layer

        def keep(self, layer, hidden, batch):
            if layer != self.layer:
                return EVERY_ROW
            return (batch.positions % 3 != 0).nonzero().flatten()

    class All(RowFilter):
        def keep(self, layer, hidden, batch):
            return torch.arange(len(hidden))

    checkpoint = TinyCheckpoint(tiny_config(num_layers=3))
    plain = run_all(tiny_engine(checkpoint=checkpoint), PROMPTS, PARAMS)
    assert run_all(tiny_engine(fill(rows=All()), checkpoint=checkpoint), PROMPTS, PARAMS) == plain
    use = {"enable_prefix_caching": False, "checkpoint": checkpoint}
    skipped = run_all(tiny_engine(fill(rows=Skip(0)), **use), PROMPTS, PARAMS)
    assert skipped != plain
    assert run_all(tiny_engine(fill(rows=Skip(0)), max_num_batched_tokens=5, **use), PROMPTS, PARAMS) == skipped


def test_a_variant_changes_scores_and_masks() -> None:
    class SoftCap(Variant):
        def score(self, score, q_pos, k_pos):
            return torch.tanh(score / 1e6) * 1e6

    class Alibi(Variant):
        def score(self, score, q_pos, k_pos):
            return score - 0.5 * (q_pos - k_pos)

    class OnlySelf(Variant):
        def mask(self, q_pos, k_pos):
            return k_pos == q_pos

    assert run_all(tiny_engine(fill(variant=SoftCap())), PROMPTS, PARAMS) == PLAIN
    assert run_all(tiny_engine(fill(variant=Alibi())), PROMPTS, PARAMS) != PLAIN
    alone = run_all(tiny_engine(fill(variant=OnlySelf())), [(1, 2, 3), (6, 5, 3)], PARAMS)
    assert alone[0] == alone[1]


def test_a_format_loads_the_weights() -> None:
    class Counting(Dense):
        seen: list[str] = []

        def linear(self, weights, bias):
            self.seen += [w.name for w in weights]
            return super().linear(weights, bias)

    fmt = Counting(torch.float64, torch.device("cpu"))
    assert run_all(tiny_engine(fill(format=fmt)), PROMPTS, PARAMS) == PLAIN
    assert len(fmt.seen) == 2 * 7 + 1


def test_experts_default_to_the_device() -> None:
    assert Experts().place(0, [3, 0, 9]) == ["device"] * 3


@pytest.mark.parametrize("use", [(), ("sink-window:sink=4,window=8",), ("ngram:min_n=1",)])
def test_a_tied_program_batches_requests_at_different_depths(use: tuple[str, ...]) -> None:
    def looped(loops: int, **more: Any):
        engine = tiny_engine(*use, pages=128, **more)
        executor = engine.executor
        executor.model.program *= loops
        kv = executor.kv
        for store in (kv.k, kv.v):
            store.data = store.data.repeat(loops, 1, 1)
        executor.num_stages = engine.scheduler.num_stages = loops
        return engine

    one_by_one = [run_all(looped(3), [p], PARAMS)[0] for p in PROMPTS]
    engine = looped(3, max_num_batched_tokens=11)  # so that requests fall out of step
    assert run_all(engine, PROMPTS, PARAMS) == one_by_one
    assert engine.executor.calls == engine.steps
    assert one_by_one != [run_all(looped(2), [p], PARAMS)[0] for p in PROMPTS]


def test_two_that_fill_one_seam_are_refused_by_name() -> None:
    one, two = Technique("one", ("policy",), lambda s: {}), Technique("two", ("policy",), lambda s: {})
    with pytest.raises(ConfigError, match=r"one and two both fill the 'policy' seam"):
        compose(one, two)


def test_a_missing_fact_an_exclusion_and_an_unknown_seam_are_refused_by_name() -> None:
    needy = Technique("needy", (), lambda s: {}, needs=frozenset({"slow tier"}))
    giver = Technique("giver", (), lambda s: {}, provides=frozenset({"slow tier"}))
    shy = Technique("shy", (), lambda s: {}, excludes=frozenset({"slow tier"}))
    with pytest.raises(ConfigError, match=r"needy needs slow tier"):
        compose(needy)
    assert compose(needy, giver).specs == ["needy", "giver"]
    assert compose(needy, facts=frozenset({"slow tier"})).specs == ["needy"]
    with pytest.raises(ConfigError, match=r"shy cannot be used with giver"):
        compose(shy, giver)
    with pytest.raises(ConfigError, match=r"'wings', which is no seam"):
        compose(Technique("bird", ("wings",), lambda s: {}))


def test_a_technique_that_builds_something_else_than_it_says_is_refused() -> None:
    with pytest.raises(ConfigError, match="liar"):
        tiny_engine(Technique("liar", ("policy",), lambda s: {"codec": Codec()}))
