"""Every seam that acts inside a step is asked, with what its contract says, and its answer is used."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import EVERY_ROW, Codec, Drafter, Guess, Policy, Residency, RowFilter, Selector, Variant
from dovetail.core.technique import Technique, compose
from dovetail.core.types import PageSet
from dovetail.layers.linear import Dense
from dovetail.models import MODELS, Decoder
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


class Copying(Codec):
    """Keeps its own copy of the keys of every whole page of a dense part, under aliases that are used again."""

    def __init__(self) -> None:
        self.keys: dict[int, list[torch.Tensor]] = {}  # of every layer, by alias
        self.owned: dict[str, list[int]] = {}
        self.sealed: list[str] = []
        self.opened = 0

    def seal(self, requests, kv):
        for r in requests:
            assert r.id not in self.owned
            assert r.computed >= r.dense_until  # committed, so that what `keys` reads is final
            pages = torch.from_numpy(r.table.pages[: r.dense_until // kv.page_size])
            free = (a for a in range(kv.num_pages, kv.num_pages + 10**6) if a not in self.keys)
            self.owned[r.id] = [next(free) for _ in pages] if len(pages) % 2 else []  # some have none
            for alias, page in zip(self.owned[r.id], pages, strict=False):
                self.keys[alias] = [kv.keys(layer, page).clone() for layer in range(2)]
            self.sealed.append(r.id)
        return {i: np.array(a, np.int64) for i, a in self.owned.items() if a and i in {r.id for r in requests}}

    def open(self, layer, pages, kv):
        k, v = (x.clone() for x in kv)
        assert k.shape == v.shape == (*pages.shape, 4, 8)
        for row, head, i in itertools.product(*map(range, pages.shape)):
            if (alias := int(pages[row, head, i])) in self.keys:
                assert torch.equal(k[row, head, i], self.keys[alias][layer][:, head])
                k[row, head, i] = self.read(self.keys[alias][layer][:, head])
                self.opened += 1
        return k, v

    def read(self, keys):
        return keys

    def drop(self, ids):
        for i in ids:
            for alias in self.owned.pop(i, ()):
                del self.keys[alias]


@pytest.mark.parametrize("prompt", [18, 20])  # five whole pages and four
def test_a_codec_gives_aliases_to_dense_parts_and_is_asked_for_what_lies_there(prompt: int) -> None:
    prompts = [tuple((i * 5 + j) % 7 for i in range(prompt + 4 * j)) for j in range(3)] * 3
    use = "sink-window:sink=4,window=8"
    want = run_all(tiny_engine(use), prompts, PARAMS)
    for more in ({}, {"pages": 24}, {"max_num_batched_tokens": 3}):  # few pages, so that they are used again
        engine = tiny_engine(use, fill(codec=(codec := Copying())), **more)
        assert run_all(engine, prompts, PARAMS) == want
        assert codec.opened > 0
        again = engine.scheduler.stats.preemptions
        assert (again > 0) == ("pages" in more)
        assert len(prompts) <= len(codec.sealed) <= len(prompts) + again  # some are preempted before they choose
        run_all(engine, [(1, 2)], PARAMS)
        assert not codec.keys and set(codec.owned) <= {"r0"}


def test_only_rows_that_leave_pages_unread_see_what_a_codec_opens() -> None:
    class Doubling(Copying):
        def read(self, keys):
            return keys * 2

    prompt = [tuple(i * 5 % 7 for i in range(22))]
    use = "sink-window:sink=4,window=8"
    assert run_all(tiny_engine(use, fill(codec=Doubling())), prompt, PARAMS) != run_all(
        tiny_engine(use), prompt, PARAMS
    )
    idle = Doubling()
    assert run_all(tiny_engine("sink-window:sink=4,window=100", fill(codec=idle)), prompt, PARAMS) == run_all(
        tiny_engine(), prompt, PARAMS
    )
    assert idle.sealed == ["r0"] and idle.opened == 0


def test_a_residency_that_takes_pages_away_is_asked_to_bring_them_back() -> None:
    class Away(Residency):
        """Keeps sealed pages elsewhere and spoils them on the device until they are fetched."""

        def __init__(self, site):
            self.site, self.store = site, {}

        def slots(self, page):
            kv = self.site.kv
            tokens = page * kv.page_size + torch.arange(kv.page_size)
            return [tokens + layer * kv.k.slots for layer in range(2)]

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
        def propose(self, requests, limits, room):
            return [Guess([50, 50][:limit]) for limit in limits]

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
        cuts = (0, 1, 2)

        def keep(self, layer, hidden, batch):
            return EVERY_ROW if layer else (batch.positions % 3 != 0).nonzero().flatten()

    class All(RowFilter):
        cuts = (0, 1, 2)

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

    fmt = Counting("float64")
    assert run_all(tiny_engine(fill(format=fmt)), PROMPTS, PARAMS) == PLAIN
    assert len(fmt.seen) == 2 * 7 + 1


@pytest.mark.parametrize("kernels", ["torch", *isas()[:1]])
@pytest.mark.parametrize("use", [(), ("sink-window:sink=4,window=8",), ("ngram:min_n=1",)])
def test_a_tied_program_batches_requests_at_different_depths(
    use: tuple[str, ...], kernels: str, monkeypatch
) -> None:  # fmt: skip
    native: dict[str, Any] = dict(kernels=kernels, dtype="float32", kv_cache_dtype="bf16")

    def looped(loops: int, **more: Any):
        class Looped(Decoder):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.program *= loops

        monkeypatch.setitem(MODELS, "llama", replace(MODELS["llama"], program=Looped))
        return tiny_engine(*use, pages=128, **more, **(native if kernels != "torch" else {}))

    one_by_one = [run_all(looped(3), [p], PARAMS)[0] for p in PROMPTS]
    engine = looped(3, max_num_batched_tokens=11)  # so that requests fall out of step
    requests = [make_request(engine, str(i), p, PARAMS) for i, p in enumerate(PROMPTS)]
    for r in requests:
        engine.add(r)
    sealed: list[int] = []
    engine.seams.selector.seal = lambda pages, kv: sealed.extend(pages.tolist())
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


def test_aliases_of_a_tied_program_are_offset_by_its_stage(monkeypatch) -> None:
    class Looped(Decoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.program *= 3

    class Numbers(Codec):
        seen: set[int] = set()

        def seal(self, requests, kv):
            self.kv = kv
            return {r.id: kv.num_pages + np.arange(4) for r in requests}

        def open(self, layer, pages, kv):
            self.seen |= {p for p in pages.flatten().tolist() if p >= self.kv.num_pages}
            return kv

    monkeypatch.setitem(MODELS, "llama", replace(MODELS["llama"], program=Looped))
    codec = Numbers()
    use = "sink-window:sink=16,window=8"
    found = run_all(tiny_engine(use, fill(codec=codec)), PROMPTS[:1], PARAMS)
    assert found == run_all(tiny_engine(use), PROMPTS[:1], PARAMS)
    kv = codec.kv
    assert codec.seen == {kv.num_pages + s * kv.stage_pages + j for s in range(3) for j in range(4)}


def test_two_that_fill_one_seam_are_refused_by_name() -> None:
    one, two = Technique("one", ("policy",), lambda s: {}), Technique("two", ("policy",), lambda s: {})
    with pytest.raises(ConfigError, match=r"one and two both fill the 'policy' seam"):
        compose(one, two)


def test_a_missing_fact_and_an_unknown_seam_are_refused_by_name() -> None:
    needy = Technique("needy", (), lambda s: {}, needs=frozenset({"slow tier"}))
    with pytest.raises(ConfigError, match=r"needy needs slow tier"):
        compose(needy)
    assert compose(needy, facts=frozenset({"slow tier"})).specs == ["needy"]
    with pytest.raises(ConfigError, match=r"'wings', which is no seam"):
        compose(Technique("bird", ("wings",), lambda s: {}))


def test_a_technique_that_builds_something_else_than_it_says_is_refused() -> None:
    with pytest.raises(ConfigError, match="liar"):
        tiny_engine(Technique("liar", ("policy",), lambda s: {"codec": Codec()}))
