"""Every seam that acts inside a step is asked, with what its contract says, and its answer is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import EVERY_ROW, Codec, Drafter, Experts, Policy, Residency, RowFilter, Selector, Variant
from dovetail.core.technique import Technique, compose
from dovetail.core.types import PageSet
from dovetail.layers.linear import Dense
from dovetail.models import MODELS, Llama
from dovetail.ops.cpu import isas
from tests.tiny import TinyCheckpoint, break_token, finish, make_request, run_all, tiny_config, tiny_engine

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

        def seal(self, runs, kv):
            for run in runs:
                assert kv.keys(0, torch.tensor(run.pages)).shape == (len(run.pages), 4, 2, 8)
                assert run.first * 4 + len(run.pages) * 4 <= 18 + 20
                self.sealed += run.pages

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


def test_a_codec_is_asked_for_chosen_pages_too() -> None:
    class Scaled(Codec):
        """Keeps K at half its size; opening doubles it again."""

        def seal(self, runs, kv):
            for run in runs:
                slots = kv._slots(torch.tensor(run.pages)).flatten()
                for layer in range(2):
                    kv.k.data[slots + layer * kv.k.slots] *= 0.5

        def open(self, layer, pages, kv):
            return torch.where(self.halved(pages), kv[0] * 2, kv[0]), kv[1]

    class Tracking(Scaled):
        def __init__(self):
            self.sealed = torch.zeros(64, dtype=torch.bool)

        def seal(self, runs, kv):
            super().seal(runs, kv)
            self.sealed[[p for r in runs for p in r.pages]] = True

        def drop(self, pages):
            self.sealed[pages] = False

        def halved(self, pages):
            return self.sealed[pages].reshape(*pages.shape, *[1] * (5 - pages.ndim))

    for use in ((), ("sink-window:sink=4,window=8",)):
        want = run_all(tiny_engine(*use), PROMPTS * 3, PARAMS)
        engine = tiny_engine(*use, fill(codec=Tracking()), pages=24)  # few pages, so that they are used again
        assert run_all(engine, PROMPTS * 3, PARAMS) == want


def test_a_residency_that_takes_pages_away_is_asked_to_bring_them_back() -> None:
    class Away(Residency):
        """Keeps sealed pages elsewhere and spoils them on the device until they are fetched."""

        def __init__(self, site):
            self.site, self.store = site, {}

        def slots(self, page):
            kv = self.site.kv
            return [kv._slots(torch.tensor([page])).flatten() + layer * kv.k.slots for layer in range(2)]

        def put(self, pages):
            for p in pages.tolist():
                self.store[p] = [self.site.kv.k.data[s].clone() for s in self.slots(p)]
                for s in self.slots(p):
                    self.site.kv.k.data[s] = float("nan")

        def fetch(self, layer, pages, batch, wait):
            for p in set(batch.tables.flatten().tolist()) & self.store.keys() if wait else ():
                self.site.kv.k.data[self.slots(p)[layer]] = self.store[p][layer]

        def drop(self, pages):
            for p in pages.tolist():
                self.store.pop(p, None)

    away = Technique("away", ("residency",), lambda site: {"residency": Away(site)})
    assert run_all(tiny_engine(away, pages=24), PROMPTS * 2, PARAMS) == PLAIN * 2
    engine = tiny_engine(away, pages=40)
    requests = [make_request(engine, f"r/{i}", (1, 2, 3, 4) * 3, PARAMS) for i in range(3)]
    for r in requests[1:]:
        r.fork_of = requests[0]
    for r in requests:
        engine.add(r)
    finish(engine)
    assert {tuple(r.output) for r in requests} == {tuple(run_all(tiny_engine(), [(1, 2, 3, 4) * 3], PARAMS)[0])}


def test_a_variant_cannot_look_ahead_and_counts_in_sliding_layers() -> None:
    class Blocks(Variant):
        def mask(self, q_pos, k_pos, head):
            return k_pos // 8 == q_pos // 8

    texts = []
    for dirt in (0.0, 9.0):
        engine = tiny_engine(fill(variant=Blocks()))
        engine.executor.kv.k.data.fill_(dirt)
        texts.append(run_all(engine, PROMPTS, PARAMS))
    assert texts[0] == texts[1]
    sliding = TinyCheckpoint(tiny_config(sliding_windows=(6, 6)))
    with_window = run_all(tiny_engine(checkpoint=sliding), PROMPTS, PARAMS)
    assert run_all(tiny_engine(fill(variant=Blocks()), checkpoint=sliding), PROMPTS, PARAMS) != with_window


def test_a_failure_behind_a_wrong_draft_does_not_count() -> None:
    class Garbage(Drafter):
        def propose(self, requests, limits, total):
            return [[50, 50][:limit] for limit in limits]

    engine = tiny_engine(fill(drafter=Garbage()))
    break_token(engine, 50)
    assert run_all(engine, PROMPTS[:1], PARAMS) == PLAIN[:1]


def test_the_site_knows_the_model_and_the_kv_once_built() -> None:
    sites = []
    engine = tiny_engine(Technique("curious", (), lambda site: sites.append(site) or {}))
    assert sites[0].model is engine.executor.model
    assert sites[0].kv is engine.executor.kv


def test_selection_is_predicted_a_layer_ahead_and_both_reach_residency() -> None:
    class Everything(Selector):
        window = 6

        def select(self, layer, q, batch):
            rows = batch.sparse_rows
            pages = torch.arange(int(batch.eligible.max())).expand(len(rows), 2, -1)
            return PageSet(pages)

        def ahead(self, layer, hidden, batch):
            return PageSet(torch.full((len(batch.sparse_rows), 2, 1), layer))

    class Log(Residency):
        def __init__(self):
            self.events = []

        def put(self, pages):
            self.events.append(("put", None))

        def fetch(self, layer, pages, batch, wait):
            self.events.append(("fetch" if wait else "prefetch", layer))

    log = Log()
    assert run_all(tiny_engine(fill(selector=Everything()), fill(residency=log)), PROMPTS, PARAMS) == PLAIN
    assert ("put", None) in log.events
    moves = [e for e in log.events if e[0] != "put"]
    assert moves[-3:] == [("prefetch", 1), ("fetch", 0), ("fetch", 1)]  # one step, all rows past the window


def test_a_row_filter_stops_rows_at_a_layer_and_keeps_their_state() -> None:
    class Skip(RowFilter):
        def keep(self, layer, hidden, batch):
            return EVERY_ROW if layer else (batch.positions % 3 != 0).nonzero().flatten()

    class All(RowFilter):
        def keep(self, layer, hidden, batch):
            return torch.arange(len(hidden))

    checkpoint = TinyCheckpoint(tiny_config(num_layers=3))
    plain = run_all(tiny_engine(checkpoint=checkpoint), PROMPTS, PARAMS)
    assert run_all(tiny_engine(fill(rows=All()), checkpoint=checkpoint), PROMPTS, PARAMS) == plain

    # Rows that read only themselves: nobody misses the K and V that a dropped row does not write.
    class OnlySelf(Variant):
        def mask(self, q_pos, k_pos, head):
            return k_pos == q_pos

    def run(rows: RowFilter, dirt: float = 0.0, **more: Any) -> list[list[int]]:
        engine = tiny_engine(fill(rows=rows), fill(variant=OnlySelf()), checkpoint=checkpoint, **more)
        engine.executor.kv.k.data.fill_(dirt)
        return run_all(engine, PROMPTS, PARAMS)

    skipped = run(Skip())
    assert skipped != run(All())
    assert skipped == run(Skip(), dirt=7.0, max_num_batched_tokens=5)


def test_a_variant_changes_scores_and_masks() -> None:
    class SoftCap(Variant):
        def score(self, score, q_pos, k_pos, head):
            return torch.tanh(score / 1e6) * 1e6

    class Alibi(Variant):
        def score(self, score, q_pos, k_pos, head):
            return score - 0.5 * (q_pos - k_pos)

    class OnlySelf(Variant):
        def mask(self, q_pos, k_pos, head):
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


@pytest.mark.parametrize("kernels", ["torch", *isas()[:1]])
@pytest.mark.parametrize("use", [(), ("sink-window:sink=4,window=8",), ("ngram:min_n=1",)])
def test_a_tied_program_batches_requests_at_different_depths(
    use: tuple[str, ...], kernels: str, monkeypatch
) -> None:  # fmt: skip
    native: dict[str, Any] = dict(kernels=kernels, dtype="float32", kv_cache_dtype="bf16")

    def looped(loops: int, **more: Any):
        class Looped(Llama):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.program *= loops

        monkeypatch.setitem(MODELS, "llama", Looped)
        return tiny_engine(*use, pages=128, **more, **(native if kernels != "torch" else {}))

    one_by_one = [run_all(looped(3), [p], PARAMS)[0] for p in PROMPTS]
    engine = looped(3, max_num_batched_tokens=11)  # so that requests fall out of step
    requests = [make_request(engine, str(i), p, PARAMS) for i, p in enumerate(PROMPTS)]
    for r in requests:
        engine.add(r)
    sealed: list[int] = []
    engine.seams.codec.seal = lambda runs, kv: sealed.extend(p for r in runs for p in r.pages)
    largest = 0
    while engine.busy:
        engine.step()
        engine.check()
        largest = max(largest, engine.last_plan.num_tokens)
    assert largest <= 11
    assert [r.output for r in requests] == one_by_one
    assert engine.executor.calls == engine.steps
    assert {p // engine.executor.kv.stage_pages for p in sealed} == {0, 1, 2}
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
