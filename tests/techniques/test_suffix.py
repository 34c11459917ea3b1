"""The suffix automaton against its definition by brute force, its memory, and what it may look up."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import Room
from dovetail.ops.cpu import native
from dovetail.techniques import technique
from dovetail.techniques.suffix import LONGEST, SOURCES
from tests.helpers.examples import examples
from tests.tiny import finish, make_request, run_all, tiny_engine

EXACT = (16, 1, math.inf, 0.0)  # nothing but 16 tokens ends a guess


class Followers(NamedTuple):
    counts: Counter[int]
    last: dict[int, int]  # when each followed
    all: int  # and how often nothing did, because a text had ended


def followers(texts: list[list[int]], context: list[int], ended: bool) -> Followers:
    """What followed each occurrence of the context."""
    counts, last, total, time = Counter[int](), {}, 0, 0
    for text in texts:
        for end in range(len(context), len(text) + 1):
            time += 1
            if text[end - len(context) : end] != context:
                continue
            total += end < len(text) or ended
            if end < len(text):
                counts[text[end]] += 1
                last[text[end]] = time
    return Followers(counts, last, total)


def match(texts: list[list[int]], tail: list[int], ended: bool) -> tuple[int, Followers]:
    """The length of the longest end of the tail that something followed, and what did."""
    for n in range(min(len(tail), LONGEST), 0, -1):
        found = followers(texts, tail[-n:], ended)
        if found.counts:
            return n, found
    return 0, Followers(Counter(), {}, 0)


def reference(texts: list[list[int]], tail: list[int], limit: int, rule: Any = EXACT, ended: bool = False) -> Any:
    """Tokens, odds and the length of the match."""
    most, min_match, factor, min_odds = rule
    matched, _ = match(texts, tail, ended)
    limit = min(limit, most, factor * matched if matched else 0)
    tokens: list[int] = []
    odds: list[float] = []
    while len(tokens) < int(limit):
        n, found = match(texts, [*tail, *tokens], ended)
        if n < min_match or not found.counts:
            break
        token = max(found.counts, key=lambda t: (found.counts[t], found.last[t]))
        odds.append((found.counts[token] - 1 / (n + 0.5)) / found.all)
        if math.prod(odds) < min_odds:
            odds.pop()
            break
        tokens.append(token)
    return tokens, odds, matched


def index(rule: Any = EXACT, history: int = 4096, shared: int = 0) -> Any:
    return native().SuffixDrafter(rule, history, shared)


def ask(drafter: Any, text: list[int], limit: int = 16, salt: str = "", name: str = "r") -> Any:
    return drafter.propose([name], [salt], [text], [limit], 1000)[0]


def like(found: Any, want: Any) -> bool:
    return found[0] == want[0] and found[1] == pytest.approx(want[1], abs=1e-12) and found[2] == want[2]


def texts(most: int = 60) -> st.SearchStrategy[list[int]]:
    """Random tokens of a small alphabet, and repetitions of a short piece."""
    tokens = st.integers(1, 3).flatmap(lambda n: st.lists(st.integers(0, n), min_size=1, max_size=most))
    pieces = st.lists(st.integers(0, 3), min_size=1, max_size=7)
    repeated = st.tuples(pieces, st.integers(1, most), tokens).map(lambda p: (p[0] * p[1])[:most] + p[2][:9])
    return tokens | repeated


@given(texts(), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20))
@examples(150)
def test_it_guesses_what_followed_most_often_after_the_longest_match(text, chunks, limit) -> None:
    drafter, end = index(), 0
    for size in [*chunks, len(text)]:
        end = min(len(text), end + size)
        assert like(ask(drafter, text[:end], limit), reference([text[:end]], text[:end], limit))


@given(st.integers(1, 3), st.integers(70, 130), st.integers(0, 3))
@examples(20)
def test_matches_longer_than_are_counted(period: int, length: int, odd: int) -> None:
    text = [i % period for i in range(length)]
    text[length // 2] += odd
    for end in (length // 2 + 3, length - 1, length):
        drafter = index()
        assert like(ask(drafter, text[:end]), reference([text[:end]], text[:end], 16))


rules = st.tuples(st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.4, 1.0, 2.5]), st.floats(0, 0.9))


@given(texts(), rules, st.integers(0, 20))
@examples(60)
def test_a_guess_ends_by_its_match_and_by_its_odds(text, rule, limit) -> None:
    found = ask(index(rule), text, limit)
    want = reference([text], text, limit, rule)
    assert like(found, want)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), texts(20)), max_size=6), texts(20),
    st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(2, 90),
)  # fmt: skip
@examples(100)
def test_ended_texts_are_looked_up_within_their_salt(kept, text, chunks, shared) -> None:
    """While there is room for all of them. Those of another salt are never looked up."""
    drafter, newer, older, ends = index(EXACT, 4096, shared), [], [], [*chunks, len(text)]
    end = 0
    for size, (salt, output) in zip([*ends, *[0] * 6], [*kept, *[("", [])] * len(ends)], strict=False):
        if output:
            output = output[max(0, len(output) - shared // 2) :]
            if sum(len(o) for _, o in newer) + len(output) > shared // 2:
                newer, older = [], newer
            newer.append((salt, output))
            drafter.keep(salt, output)
        end = min(len(text), max(end + size, 1))
        for asked in "ab":
            stores = [[o for s, o in generation if s == asked] for generation in (newer, older)]
            found = ask(drafter, text[:end], 16, asked, asked)
            options = [reference([text[:end]], text[:end], 16)]
            options += [reference(store, text[:end], 16, ended=True) for store in stores]
            want = max(options, key=lambda option: option[2])  # the first of the longest
            assert like(found, want) and found[3] == (want is not options[0])
        # both requests' texts, and what is kept
        assert drafter.tokens() == 2 * end + sum(len(o) for _, o in newer + older)
        assert drafter.tokens() <= 2 * end + shared


def test_an_output_longer_than_the_room_keeps_its_end() -> None:
    drafter = index(EXACT, 4096, 20)
    drafter.keep("", list(range(100)))
    assert drafter.tokens() == 10
    assert ask(drafter, [95])[:1] == ([96, 97, 98, 99],)
    assert ask(drafter, [5], name="other")[0] == []


@given(texts(300), st.integers(64, 100), st.lists(st.integers(1, 40), min_size=1, max_size=9))
@examples(40)
def test_a_long_text_is_remembered_from_its_latest_half_on(text, history, chunks) -> None:
    drafter, end, first = index(EXACT, history), 0, 0
    for size in [*chunks, len(text)]:
        end = min(len(text), end + size)
        if end - first > history:
            first = max(0, end - (history + 1) // 2)
        assert like(ask(drafter, text[:end]), reference([text[first:end]], text[first:end], 16))
        assert drafter.tokens() == end - first <= history


def test_memory_is_bounded_for_each_token() -> None:
    """The worst texts for an automaton: the most states, and the most edges."""
    n = 1 << 14
    for text in ([0] + [1] * n, [0] * (n // 2) + [1] * (n // 2) + [2], [i % 17 * (i // 3 % 5) for i in range(n)]):
        drafter = index(EXACT, 1 << 20)
        ask(drafter, text)
        assert 0 < drafter.bytes() / len(text) < 250  # vectors and the table may be half empty
        drafter.forget("r")
        assert drafter.bytes() == drafter.tokens() == 0


def test_room_is_for_all_guesses_together() -> None:
    drafter, text = index(), [1, 2, 3, 4] * 6
    found = drafter.propose(["a", "b", "c"], [""] * 3, [text] * 3, [8] * 3, 11)
    assert [len(f[0]) for f in found] == [8, 3, 0]
    with pytest.raises(ValueError, match="for each id"):
        drafter.propose(["a"], [], [text], [8], 11)


# ---- in the engine


def held(engine: Any) -> int:
    return int(engine.seams.drafter.index.tokens())


def test_a_request_that_ends_or_is_preempted_is_forgotten_and_found_again() -> None:
    engine = tiny_engine("suffix:min_odds=0", pages=30, max_num_batched_tokens=7)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [(1, 2, 3, 1, 2, 3, 1, 2), (4, 4, 4), (1, 2, 3, 1, 2), (3, 1, 3, 1)]
    requests = [make_request(engine, f"r{i}", p, params) for i, p in enumerate(prompts)]
    for r in requests:
        engine.add(r)
    while engine.busy:
        engine.step()
        assert held(engine) <= sum(len(r.tokens) for r in engine.scheduler.running)
    assert engine.scheduler.stats.preemptions and held(engine) == 0
    assert engine.scheduler.stats.accepted and not engine.scheduler.stats.failures
    assert [r.output for r in requests] == run_all(tiny_engine(), prompts, params)
    assert technique("suffix").activity(engine.seams) == engine.scheduler.stats.drafted


def accepted(engine: Any, prompt: tuple[int, ...], salt: str) -> int:
    """How many guesses were right for a prompt."""
    before = engine.scheduler.stats.accepted
    request = make_request(engine, salt, prompt, SamplingParams(temperature=0, max_tokens=12))
    request.salt = salt
    engine.add(request)
    finish(engine)
    return int(engine.scheduler.stats.accepted - before)


@pytest.mark.parametrize(("others", "again"), [("false", False), ("true", True)])
def test_answers_of_the_same_salt_are_looked_up_on_request_only(others: str, again: bool) -> None:
    engine = tiny_engine(f"suffix:min_odds=0,others={others}")
    prompt = tuple(range(5, 25))  # nothing is repeated in it
    alone = accepted(engine, prompt, "a")
    assert held(engine) == (12 if again else 0)
    assert accepted(engine, prompt, "b") == alone
    assert (accepted(engine, prompt, "a") > alone) == again


def test_what_a_guess_says_of_itself() -> None:
    drafter: Any = tiny_engine("suffix:tokens=3,others=true").seams.drafter
    engine = tiny_engine()
    text = [7, 1, 2, 3, 4, 9, 1, 2, 3]
    request = make_request(engine, "r", text, SamplingParams())
    guess = drafter.propose([request], [8], Room(8))[0]
    assert (guess.tokens, guess.source) == ([4, 9, 1], "suffix:3")
    assert guess.odds == pytest.approx([1 - 1 / 3.5, 1 - 1 / 4.5, 1 - 1 / 5.5])
    drafter.index.keep("", [*text, 6])
    guess = drafter.propose([request], [8], Room(8))[0]
    assert (guess.tokens, guess.source) == ([6], "others:8")
    assert set(SOURCES.values()) >= {"suffix:1", "suffix:7", "suffix:8", "suffix:16+", "others:16+"}
    assert drafter.propose([request], [8], Room(0))[0].tokens == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("tokens=0", "tokens >= 1"),
        ("min_match=0", "min_match <= 32"),
        ("min_match=33", "min_match <= 32"),
        ("factor=0", "factor > 0"),
        ("factor=inf", "factor > 0"),
        ("factor=nan", "factor > 0"),
        ("min_odds=1.5", "min_odds <= 1"),
        ("min_odds=nan", "min_odds <= 1"),
        ("history=63", "64 <= history"),
        ("shared=1", "2 <= shared"),
        ("history=200000000", "history <= 100000000"),
        ("others=maybe", "others must be a bool"),
    ],
)
def test_options_out_of_range_are_refused(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        technique(f"suffix:{options}")
