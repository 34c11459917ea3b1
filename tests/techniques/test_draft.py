"""Draft models: the text is the plain engine's whatever they guess, and their KV follows the pages."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import CapacityError, ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.technique import Technique
from dovetail.ops.cpu import isas
from dovetail.techniques import technique
from dovetail.techniques.draft import Source, of
from tests.helpers.examples import examples
from tests.tiny import (
    CHECKPOINT,
    TinyCheckpoint,
    calibration,
    make_request,
    run_all,
    run_staggered,
    tiny_config,
    tiny_engine,
)
from tests.tiny import finish as finish_all

NEW = 16
NATIVE: dict[str, Any] = dict(kernels=isas()[0], dtype="float32", kv_cache_dtype="float32") if isas() else {}
OTHER = TinyCheckpoint(tiny_config(num_layers=1, num_heads=2, num_kv_heads=1), seed=7)
PROMPTS = [tuple((i * 5 + j) % 7 for i in range(18)) for j in range(3)]
LOSSY = ["", "sink-window:sink=4,window=8", "quest:budget=12,skip_layers=0,score=bound"]


def with_draft(checkpoint: TinyCheckpoint = OTHER, tokens: int = 4, head: int = 0) -> Technique:
    return of(Source(checkpoint), "tiny", tokens, head)  # type: ignore[arg-type]


def texts(params: SamplingParams, *use: str | Technique, **changes: object) -> list[list[int]]:
    return run_all(tiny_engine(*use, **changes), PROMPTS, params)  # type: ignore[arg-type]


KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=NEW),
    "sampled": SamplingParams(temperature=0.9, seed=3, max_tokens=NEW),
    "penalised": SamplingParams(temperature=0.7, seed=5, max_tokens=NEW, repetition_penalty=1.3, top_k=20),
    "biased": SamplingParams(temperature=0, max_tokens=NEW, logit_bias={3: 4.0}, logprobs=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("guesser", ["other", "trimmed", "self"])
def test_the_text_is_that_of_no_draft(kind: str, spec: str, guesser: str) -> None:
    use = [spec] if spec else []
    guessers = {"other": with_draft(), "trimmed": with_draft(head=20), "self": technique("self-draft:layers=1")}
    by = guessers[guesser]
    engine = tiny_engine(*use, by)
    assert run_all(engine, PROMPTS, KINDS[kind]) == texts(KINDS[kind], *use)
    assert engine.scheduler.stats.drafted > 0 == engine.scheduler.stats.failures


@pytest.mark.parametrize("kernels", [{}, NATIVE], ids=["torch", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_as_its_own_draft_is_always_right(kind: str, kernels: dict[str, Any]) -> None:
    """Also when it samples: both choose by the same seed and position."""
    engine = tiny_engine(with_draft(CHECKPOINT), **kernels)
    run_all(engine, PROMPTS, KINDS[kind])
    stats = engine.scheduler.stats
    assert stats.drafted == stats.accepted > 0


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30).map(tuple), min_size=1, max_size=4),
    st.sampled_from(LOSSY),
    st.sampled_from([1, 3, 8, 64]),
    st.integers(14, 40),
    st.booleans(),
    st.lists(st.integers(0, 12), min_size=4, max_size=4),
    st.lists(st.integers(0, 16), min_size=1, max_size=9),
    st.sampled_from(list(KINDS)),
    st.sampled_from(["other", "trimmed", "itself", "self"]),
    st.booleans(),
)
@examples(60)
def test_any_schedule_of_lengths_gives_the_same_text(
    batch, spec, budget, pages, caching, arrivals, lengths, kind, guesser, native
) -> None:
    """Also with preemption, prefixes that are shared, and a draft that falls behind and catches up."""
    use, params = [spec] if spec else [], KINDS[kind]
    kernels = NATIVE if native else {}
    plain = [run_all(tiny_engine(*use, enable_prefix_caching=False, **kernels), [p], params)[0] for p in batch]
    by = {
        "other": with_draft(tokens=16), "trimmed": with_draft(tokens=16, head=20),
        "itself": with_draft(CHECKPOINT, 16), "self": technique("self-draft:layers=1,tokens=16"),
    }[guesser]  # fmt: skip
    engine = tiny_engine(
        *use, by, pages=pages, max_num_batched_tokens=budget, max_num_seqs=3, enable_prefix_caching=caching,
        **kernels,
    )  # fmt: skip
    inner, asked = engine.seams.drafter.propose, iter(lengths * 500)
    engine.seams.drafter.propose = lambda requests, limits, room: inner(  # type: ignore[method-assign]
        requests, [min(n, next(asked)) for n in limits], room
    )
    requests = [make_request(engine, f"r{i}", p, params) for i, p in enumerate(batch)]
    run_staggered(engine, requests, arrivals)
    assert [r.output for r in requests] == plain
    stats = engine.scheduler.stats
    assert stats.failures == 0
    if guesser == "itself" and not spec:
        assert stats.accepted == stats.drafted


def test_what_the_draft_has_computed_is_not_computed_again() -> None:
    engine = tiny_engine(with_draft(CHECKPOINT))
    params = SamplingParams(temperature=0, max_tokens=NEW)
    rows: list[int] = []
    run = engine.seams.drafter.companion.run  # type: ignore[attr-defined]
    engine.seams.drafter.companion.run = lambda plan: (rows.append(plan.num_tokens), run(plan))[1]  # type: ignore
    first = run_all(engine, [PROMPTS[0]], params)[0]
    assert max(rows) == rows[0] == len(PROMPTS[0]) + 1 and sum(rows[1:]) <= 2 * NEW
    rows.clear()
    run_all(engine, [(*PROMPTS[0], *first, 1)], params)  # whole pages of it are stored, with the draft's KV
    assert rows[0] < 2 * engine.pool.page_size + 4


def test_a_long_prompt_is_caught_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.techniques.draft.CATCH_UP", 5)
    engine = tiny_engine(with_draft(CHECKPOINT))
    run = engine.seams.drafter.companion.run  # type: ignore[attr-defined]
    rows: list[int] = []
    engine.seams.drafter.companion.run = lambda plan: (rows.append(plan.num_tokens), run(plan))[1]  # type: ignore
    params = SamplingParams(temperature=0, max_tokens=NEW)
    assert run_all(engine, PROMPTS[:1], params) == texts(params)[:1]
    assert rows[:3] == [5, 5, 5] and engine.scheduler.stats.accepted > 0


def test_a_failed_run_costs_only_speed() -> None:
    engine = tiny_engine(with_draft())
    good, calls = engine.seams.drafter.companion.run, iter(range(1000))  # type: ignore[attr-defined]

    def run(plan):
        if next(calls) % 3 == 1:
            raise RuntimeError("broken")
        return good(plan)

    engine.seams.drafter.companion.run = run  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="the drafter failed, so nothing was guessed: RuntimeError: broken"):
        assert run_all(engine, PROMPTS, KINDS["greedy"]) == texts(KINDS["greedy"])
    assert engine.scheduler.stats.failures > 1 < engine.scheduler.stats.drafted


def test_rejected_guesses_leave_no_pages() -> None:
    engine = tiny_engine(with_draft(tokens=16), enable_prefix_caching=False)
    requests = [make_request(engine, f"r{i}", p, KINDS["greedy"]) for i, p in enumerate(PROMPTS)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
        engine.check()
        for r in engine.scheduler.running:
            assert len(r.table) <= -(-len(r.tokens) // engine.pool.page_size)
    finish_all(engine)
    assert engine.pool.num_free == engine.pool.num_pages


def test_kv_of_the_draft_is_counted() -> None:
    shape = OTHER.config
    beside = with_draft().beside(None, 16, 2)  # type: ignore[arg-type]
    padded = 16  # values of a head
    assert beside.page == 2 * shape.num_layers * shape.num_kv_heads * padded * 2 * 16


def test_tokens_that_the_draft_has_no_embedding_for_get_no_guess() -> None:
    """Embeddings may be filled up to different sizes, and a prompt may name what only fills one up."""

    def real(i: int) -> str | None:
        return str(i) if i < 50 else None

    small, large = TinyCheckpoint(tiny_config(vocab_size=50)), TinyCheckpoint(tiny_config())
    for checkpoint in (small, large):
        checkpoint.tokenizer = lambda: SimpleNamespace(backend=SimpleNamespace(id_to_token=real))  # type: ignore
    prompts, params = [*PROMPTS, (1, 2, 55, 3)], KINDS["greedy"]
    plain = run_all(tiny_engine(checkpoint=large), prompts, params)
    for changes in ({}, {"kernels": isas()[0], "dtype": "float32", "kv_cache_dtype": "float32"}):
        engine = tiny_engine(with_draft(small), checkpoint=large, **changes)
        found = run_all(engine, prompts, params)
        assert found == plain if not changes else len(found) == len(plain)
        assert engine.scheduler.stats.failures == 0 < engine.scheduler.stats.drafted


@pytest.mark.parametrize("lengths", [(3, 30, 3, 4), (30, 3, 30, 4)])
def test_no_page_is_taken_for_a_guess_that_others_need(lengths: tuple[int, ...]) -> None:
    """Short answers end soon and leave room. Guesses must not cost a preemption before that."""

    def preemptions(*use: Technique) -> int:
        engine = tiny_engine(*use, pages=13, enable_prefix_caching=False)
        for i, n in enumerate(lengths):
            params = SamplingParams(temperature=0, max_tokens=n)
            engine.add(make_request(engine, f"r{i}", PROMPTS[0][:4], params))
        finish_all(engine)
        return engine.scheduler.stats.preemptions

    assert preemptions(with_draft(tokens=16)) == preemptions()


# -- what is refused


def named(*tokens: str) -> TinyCheckpoint:
    found = TinyCheckpoint(tiny_config(num_layers=1))
    backend = SimpleNamespace(id_to_token=lambda i: tokens[i] if i < len(tokens) else f"t{i}")
    built: list[int] = []

    def tokenizer() -> Any:
        built.append(1)
        assert len(built) == 1, "building one takes a second"
        return SimpleNamespace(backend=backend)

    found.tokenizer = tokenizer  # type: ignore[method-assign]
    return found


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="has another vocabulary: token 1 is 'c' there and 'b' in the model"):
        tiny_engine(with_draft(named("a", "c")), checkpoint=named("a", "b"))
    small = TinyCheckpoint(tiny_config(vocab_size=40))
    with pytest.raises(ConfigError, match="token 40 is '40' there and '40' in the model, of 40 and 61"):
        tiny_engine(with_draft(small))


def test_a_vocabulary_that_is_filled_up_to_another_size_is_the_same() -> None:
    """With the last ids named as GGUF files do, or not named at all."""

    def sized(size: int) -> TinyCheckpoint:
        found = TinyCheckpoint(tiny_config(vocab_size=size, num_layers=1))
        piece = lambda i: str(i) if i < 61 else f"[PAD{i}]" if size == 70 else None  # noqa: E731
        found.tokenizer = lambda: SimpleNamespace(backend=SimpleNamespace(id_to_token=piece))  # type: ignore
        return found

    for ours, theirs in ((70, 61), (61, 70), (64, 70)):
        run_all(tiny_engine(with_draft(sized(theirs)), checkpoint=sized(ours)), PROMPTS, KINDS["greedy"])


def test_a_trimmed_head_guesses_frequent_tokens_only() -> None:
    """With all tokens it guesses what the whole head does."""
    whole = tiny_engine(with_draft(head=CHECKPOINT.config.vocab_size))
    assert run_all(whole, PROMPTS, KINDS["greedy"]) == texts(KINDS["greedy"])
    same = tiny_engine(with_draft())
    run_all(same, PROMPTS, KINDS["greedy"])
    assert whole.scheduler.stats == same.scheduler.stats
    engine = tiny_engine(with_draft(head=8))
    guessed: set[int] = set()
    inner = engine.seams.drafter.propose

    def propose(*asked):
        found = inner(*asked)
        guessed.update(t for guess in found for t in guess.tokens)
        return found

    engine.seams.drafter.propose = propose  # type: ignore[method-assign]
    run_all(engine, PROMPTS, KINDS["greedy"])
    counts = Counter(calibration(""))
    assert guessed <= set(sorted(counts, key=lambda t: (-counts[t], t))[:8])
    with pytest.raises(ConfigError, match="head=62 is more than the draft model's 61 tokens"):
        tiny_engine(with_draft(head=62))


def test_nothing_is_guessed_behind_the_end_of_an_answer() -> None:
    plain = texts(KINDS["greedy"])[0]
    params = SamplingParams(temperature=0, max_tokens=NEW, stop_token_ids=[plain[5]])
    engine = tiny_engine(with_draft(CHECKPOINT, tokens=16))
    guesses = []
    inner = engine.seams.drafter.propose
    engine.seams.drafter.propose = lambda *asked: (guesses.extend(g := inner(*asked)), g)[1]  # type: ignore
    stop = plain.index(plain[5])
    assert run_all(engine, PROMPTS[:1], params) == [plain[: stop + 1]]
    assert all(plain[5] not in list(guess.tokens)[:-1] for guess in guesses)


def test_a_draft_that_does_not_fit_is_refused() -> None:
    large = TinyCheckpoint(tiny_config())
    large.bytes = 2**60
    with pytest.raises(CapacityError, match=f"weights take {2**60} bytes beside the model's 0, but .* are free"):
        tiny_engine(with_draft(large))


def test_each_tokenizer_is_built_once() -> None:
    tiny_engine(with_draft(named()), checkpoint=named())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("draft", "draft needs model; write draft:model=..."),
        ("draft:model=x,tokens=0", "draft: tokens must be between 1 and 32, got 0"),
        ("draft:model=x,tokens=1000000", "draft: tokens must be between 1 and 32, got 1000000"),
        ("draft:model=x,head=-1", "draft: head must be 0 .* or a number of tokens, got -1"),
        ("self-draft", "self-draft needs layers"),
        ("self-draft:layers=0", "self-draft: layers must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        technique(spec)


@pytest.mark.parametrize("layers", [2, 3, 10**6])
def test_a_self_draft_of_all_layers_is_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=f"layers must be below the model's 2, got {layers}"):
        tiny_engine(f"self-draft:layers={layers}")


def test_guesses_stop_where_the_drafts_context_ends() -> None:
    short = TinyCheckpoint(tiny_config(max_position_embeddings=24))
    engine = tiny_engine(with_draft(short))
    assert run_all(engine, PROMPTS, KINDS["greedy"]) == texts(KINDS["greedy"])
    assert 0 < engine.scheduler.stats.drafted <= 3 * 12 and engine.scheduler.stats.failures == 0
