"""From the progress of requests to deltas, text, log-probabilities and times; no engine runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.engine import Progress
from dovetail.core.pages import PagePool, PageTable
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Request, TokenLogprobs
from dovetail.outputs import Answer, Logprob, Metrics, Stream, named, text_of
from dovetail.text.byte_tokenizer import ByteTokenizer
from tests.helpers.examples import examples

TOKENIZER = ByteTokenizer()
PROMPT = [80, 81, 82]


def answer_of(n: int = 1, arrival: float = 10.0, first_choice: int = 0, score_from: int = 1, **params) -> Answer:
    p = SamplingParams(n=n, **({"max_tokens": None} | params))
    requests = [Request(f"r/{i}", PROMPT, p, PageTable(PagePool(1, 4)), 999, seed=0, index=i) for i in range(n)]
    streams = [Stream(r, TOKENIZER) for r in requests]
    return Answer("r", None, PROMPT, p, streams, TOKENIZER, arrival, score_from, first_choice)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def push(answer: Answer, text: str, now: float = 11.0, index: int = 0, end: str | None = None, **more):
    """A step brings a request the tokens of `text`, and its end."""
    request = answer.streams[index].request
    request.finish_reason = end
    return answer.push(Progress(request, ids(text), **more), now)


def about(text: str, logprob: float = -1.0, rank: int = 1, top: str = "") -> TokenLogprobs:
    return TokenLogprobs(ids(text)[0], logprob, rank, tuple((t, -i / 2) for i, t in enumerate(ids(top))))


# -- deltas


def test_a_delta_is_what_a_choice_gained() -> None:
    answer = answer_of(2, first_choice=4)
    one = push(answer, "ab", 11.0, logprobs=[about("a"), about("b")])
    two = push(answer, "xyz", 12.5, index=1)
    three = push(answer, "c", 14.0, end="length", logprobs=[about("c")])
    four = push(answer, "", 15.0, index=1, end="length")
    assert [(d.index, d.choice, d.text, d.token_ids) for d in (one, two, three, four)] == [
        (0, 4, "ab", ids("ab")), (1, 5, "xyz", ids("xyz")), (0, 4, "c", ids("c")), (1, 5, "", []),
    ]  # fmt: skip
    assert [(d.time, d.waited, d.finish_reason, d.last) for d in (one, two, three, four)] == [
        (11.0, 1.0, None, False), (12.5, 2.5, None, False), (14.0, 3.0, "length", False),
        (15.0, 2.5, "length", True),
    ]  # fmt: skip
    assert [[e.token for e in d.logprobs] for d in (one, two, three)] == [ids("ab"), [], ids("c")]
    assert answer.finished and text_of([one, three]) == "abc"


def test_deltas_of_one_choice_add_up() -> None:
    answer = answer_of()
    first = push(answer, "ab", 11.0, logprobs=[about("a"), about("b")])
    first.add(push(answer, "c", 12.0, end="length", logprobs=[about("c")]))
    (whole,) = answer.whole()
    assert (first.text, first.token_ids, first.time, first.waited, first.last) == (
        "abc",
        ids("abc"),
        12.0,
        1.0,
        True,
    )
    assert (first.finish_reason, first.stop_reason, len(first.logprobs)) == ("length", None, 3)
    assert (whole.text, whole.token_ids, whole.logprobs, whole.time) == ("abc", ids("abc"), first.logprobs, 12.0)
    assert (whole.finish_reason, whole.last, whole.waited) == ("length", False, 0.0)


def test_nothing_to_show_is_no_delta_unless_it_is_the_end() -> None:
    answer = answer_of()
    assert push(answer, "") is None
    euro = "€".encode()
    request = answer.streams[0].request
    assert answer.push(Progress(request, [euro[0]]), 11.0).text == ""  # a token is gained, if no character
    assert push(answer, "", end="abort").text == "\ufffd"


def test_what_is_unread_is_kept_for_who_follows() -> None:
    answer = answer_of()
    push(answer, "a")
    assert answer.unread is None
    answer.unread = []
    delta = push(answer, "b")
    assert answer.unread == [delta]


def test_closing_ends_the_choices_that_run_and_shows_what_they_held() -> None:
    answer = answer_of(3, stop="bcd")
    push(answer, "abc", 11.0)
    push(answer, "xbcd", 12.0, index=1)
    gained = answer.close("disconnect", 13.0)
    assert [(d.index, d.text, d.token_ids, d.finish_reason) for d in gained] == [
        (0, "bc", [], "disconnect"), (2, "", [], "disconnect"),
    ]  # fmt: skip
    assert [(d.waited, d.last) for d in gained] == [(2.0, False), (3.0, True)]
    assert answer.close("again", 14.0) == []
    assert [s.finish_reason for s in answer.streams] == ["disconnect", "stop", "disconnect"]
    assert answer.streams[0].last_token == 11.0 and answer.last_token == 12.0


# -- ends


def test_the_token_that_stops_is_counted_and_not_shown() -> None:
    for listed, reason in (([ids("b")[0]], ids("b")[0]), (None, None)):  # asked for, or the model's own
        answer = answer_of(stop_token_ids=listed)
        answer.streams[0].request.stop_reason = ids("b")[0]
        delta = push(answer, "bab", end="stop")
        assert (delta.text, delta.token_ids, delta.finish_reason) == ("ba", ids("bab"), "stop")
        assert delta.stop_reason == reason == answer.output().outputs[0].stop_reason


def test_the_same_token_at_the_end_of_a_text_of_another_reason_is_shown() -> None:
    answer = answer_of(stop_token_ids=ids("b"))
    answer.streams[0].request.stop_reason = ids("b")[0]
    assert push(answer, "ab", end="length").text == "ab"
    other = answer_of()
    other.streams[0].request.stop_reason = ids("c")[0]
    assert push(other, "ab", end="stop").text == "ab"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_where_it_begins(include: bool) -> None:
    answer = answer_of(stop=["cd", "bcd", "x"], include_stop_str_in_output=include)
    assert [push(answer, c).text for c in "abc"] == ["a", "", ""]
    delta = push(answer, "dx")
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == (
        "bcd" if include else "", ids("d"), "stop", "bcd",
    )  # fmt: skip
    assert answer.streams[0].text == ("abcd" if include else "a") and answer.finished


def test_text_that_may_become_a_stop_string_is_held_as_short_as_possible() -> None:
    answer = answer_of(stop=["bbc", "zzzzzzzz"])
    assert [push(answer, c).text for c in "abbbxb"] == ["a", "", "", "b", "bbx", ""]
    assert push(answer, "", end="length").text == "b"
    assert answer.streams[0].stop_reason is None
    short = answer_of(stop="b")
    assert [push(short, c).text for c in "ac"] == ["a", "c"]  # one character is never half a stop string


@examples(200)
@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=6), st.text("abc", max_size=12))
def test_what_is_held_back_is_the_longest_tail_that_begins_a_stop_string(stops: list[str], text: str) -> None:
    answer = answer_of(stop=stops)
    for end in range(1, len(text) + 1):
        push(answer, text[end - 1])
        if answer.finished:
            assert any(text[:end].endswith(s) for s in stops)
            return
        assert not any(s in text[:end] for s in stops)
        held = max((n for s in stops for n in range(len(s)) if text[:end].endswith(s[:n])), default=0)
        assert answer.streams[0].ready == end - held


def test_a_stop_string_is_not_found_in_what_least_tokens_have_shown() -> None:
    answer = answer_of(stop=["ab", "bc"], min_tokens=2)
    assert [push(answer, c).text for c in "abcab"] == ["a", "b", "c", "", ""]
    assert (answer.streams[0].text, answer.streams[0].stop_reason) == ("abc", "ab")


def test_a_text_may_begin_with_a_stop_string() -> None:
    answer = answer_of(stop="ab")
    assert [push(answer, c).text for c in "ab"] == ["", ""] and answer.streams[0].stop_reason == "ab"


END, BEGIN = 259, 258  # <|im_end|> and <|im_start|>


def step(answer: Answer, *tokens: int):
    return answer.push(Progress(answer.streams[0].request, list(tokens)), 11.0)


@pytest.mark.parametrize("include", [False, True])
def test_a_control_token_may_be_a_stop_string(include: bool) -> None:
    answer = answer_of(stop=["<|im_end|>"], include_stop_str_in_output=include)
    assert step(answer, 97, BEGIN).text == "a" and not answer.finished
    delta = step(answer, 98, END, 99)
    assert (delta.text, delta.token_ids) == ("b<|im_end|>" if include else "b", [98, END])
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "<|im_end|>")


def test_a_stop_string_may_have_control_tokens_in_it() -> None:
    answer = answer_of(stop="x<|im_end|>\n")
    assert [step(answer, t).text for t in (97, 120, END, 98)] == ["a", "", "", "xb"]  # the token is not shown
    assert [step(answer, t).text for t in (120, END, 10)] == ["", "", ""]
    assert answer.streams[0].text == "axb" and answer.streams[0].stop_reason == "x<|im_end|>\n"


def test_control_tokens_that_no_stop_string_spells_are_not_there() -> None:
    answer = answer_of(stop="ab")
    assert [step(answer, t).text for t in (97, END, 98)] == ["", "", ""] and answer.finished
    shown = answer_of(stop="a<|im_end|>b", skip_special_tokens=False)
    assert [step(shown, t).text for t in (97, END, 98)] == ["", "", ""] and shown.finished


STOPS = ["<|im_end|>", "a<|im_end|>", "<|im_end|>b", "<|im_end|><|im_end|>", "ab", "b<|im_start|>a"]


@examples(400)
@given(
    tokens=st.lists(st.sampled_from([97, 98, END, BEGIN]), max_size=10),
    stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3, unique=True),
    include=st.booleans(),
)
def test_stop_strings_against_brute_force(tokens: list[int], stops: list[str], include: bool) -> None:
    spelled = {END: "<|im_end|>", BEGIN: "<|im_start|>"}
    read = [spelled[t] if t in spelled else chr(t) for t in tokens]
    heard = [
        r if t not in spelled or any(r in s for s in stops) else "" for t, r in zip(tokens, read, strict=True)
    ]
    ends = [(n, "".join(heard[:n])) for n in range(1, len(tokens) + 1)]
    count, before = next(((n, text) for n, text in ends if any(s in text for s in stops)), (0, ""))
    answer = answer_of(stop=stops, include_stop_str_in_output=include)
    gained = [step(answer, token) for token in tokens[: count or len(tokens)]]
    if not count:
        assert not answer.finished
        gained.append(push(answer, "", end="length"))
        expected = "".join([r for t, r in zip(tokens, read, strict=True) if t not in spelled])
    else:
        at, stop = min((before.find(s), s) for s in stops if s in before)
        assert answer.finished and answer.streams[0].stop_reason == stop
        shown = before[:at].replace("<|im_end|>", "").replace("<|im_start|>", "")
        expected = shown + (stop if include else "")
    assert text_of([delta for delta in gained if delta]) == answer.streams[0].text == expected


def test_text_that_was_shown_is_not_held_again() -> None:
    answer = answer_of(stop="abcd", min_tokens=2)
    assert [push(answer, c).text for c in "abcdabx"] == ["a", "b", "c", "d", "", "", "abx"]


def test_tokens_behind_a_stop_string_are_dropped_with_what_is_known_of_them() -> None:
    answer = answer_of(stop="b", logprobs=0)
    delta = push(answer, "abc", logprobs=[about("a"), about("b"), about("c")])
    assert delta.token_ids == ids("ab") and [e.token for e in delta.logprobs] == ids("ab")


def test_a_text_continues_its_prompt_and_special_tokens_are_shown_on_request() -> None:
    special = min(TOKENIZER.special_ids)
    for skip in (True, False):
        answer = answer_of(skip_special_tokens=skip)
        request = answer.streams[0].request
        shown = answer.push(Progress(request, [97, special, 98]), 11.0).text
        assert shown == TOKENIZER.decode([97, special, 98], skip_special_tokens=skip)
        assert (shown == "ab") == skip


# -- log-probabilities, scores, errors


def test_the_chosen_token_comes_first_and_the_likeliest_with_their_ranks() -> None:
    entry = about("b", -3.0, 9, top="ab")
    assert list(named(entry, TOKENIZER).items()) == [
        (98, Logprob(-3.0, 9, "b")), (97, Logprob(0.0, 1, "a")),
    ]  # fmt: skip
    special = min(TOKENIZER.special_ids)
    both = named(TokenLogprobs(special, -1.0, 1, ((special + 1, -2.0),)), TOKENIZER)
    assert all(both[t].decoded_token == TOKENIZER.decode([t], skip_special_tokens=False) != "" for t in both)


def test_an_output_is_a_copy_with_the_sum_of_its_log_probabilities() -> None:
    answer = answer_of(logprobs=1)
    push(answer, "ab", logprobs=[about("a", -1.0), about("b", -0.5, top="b")])
    before = answer.output().outputs[0]
    push(answer, "c", logprobs=[about("c", -2.0)])
    after = answer.output().outputs[0]
    assert (before.text, before.token_ids, before.cumulative_logprob) == ("ab", ids("ab"), -1.5)
    assert (after.text, after.token_ids, after.cumulative_logprob) == ("abc", ids("abc"), -3.5)
    assert [list(e) for e in before.logprobs or ()] == [[97], [98]]
    assert [list(e) for e in after.logprobs or ()] == [[97], [98], [99]]
    silent = answer_of()
    push(silent, "ab", logprobs=[about("a"), about("b")])
    assert (silent.output().outputs[0].logprobs, silent.output().outputs[0].cumulative_logprob) == (None, None)


def test_scores_of_the_prompt_are_those_of_the_first_choice() -> None:
    answer = answer_of(2, prompt_logprobs=0, score_from=2)
    push(answer, "", prompt_logprobs=[about("Q", -1.0)])
    assert answer.output().prompt_logprobs == [None, None, {81: Logprob(-1.0, 1, "Q")}]
    push(answer, "", index=1, prompt_logprobs=[about("X", -7.0)])
    push(answer, "a", prompt_logprobs=[about("R", -2.0, 3)])
    assert answer.output().prompt_logprobs == [
        None, None, {81: Logprob(-1.0, 1, "Q")}, {82: Logprob(-2.0, 3, "R")},
    ]  # fmt: skip
    assert answer_of().output().prompt_logprobs is None


def test_an_output_says_what_it_answers() -> None:
    answer = answer_of(2)
    found = answer.output()
    assert (found.request_id, found.prompt, found.prompt_token_ids) == ("r", None, PROMPT)
    assert (found.num_cached_tokens, found.finished, found.error) == (0, False, None)
    assert [o.index for o in found.outputs] == [0, 1]
    answer.streams[0].request.cached_tokens = 2
    push(answer, "", end="error", error="NaN")
    push(answer, "", index=1, end="length")
    found = answer.output()
    assert (found.num_cached_tokens, found.finished, found.error) == (2, True, "NaN")


# -- times


def test_times_of_an_answer() -> None:
    answer = answer_of(2, arrival=10.0)
    assert answer.metrics() == Metrics(10.0, None, None, None)
    assert answer.whole()[0].time == 10.0
    push(answer, "", 11.0)
    assert answer.metrics() == Metrics(10.0, None, None, None)
    push(answer, "a", 12.0)
    assert answer.metrics() == Metrics(10.0, 2.0, 2.0, None)
    push(answer, "x", 12.5, index=1)
    push(answer, "bcd", 14.0)
    assert answer.metrics() == Metrics(10.0, 2.0, 4.0, 3 / 2.0)
    push(answer, "", 15.0, end="length")
    assert answer.metrics() == Metrics(10.0, 2.0, 4.0, 3 / 2.0)
    assert [d.time for d in answer.whole()] == [14.0, 12.5]


@pytest.mark.parametrize(
    ("steps", "rate"),
    [([("a", 12.0, 0), ("x", 12.5, 1)], None), ([("a", 12.0, 0), ("bx", 12.25, 0), ("c", 12.5, 1)], 2 / 0.5)],
)
def test_a_rate_is_of_tokens_after_the_first_of_each_choice(
    steps: list[tuple[str, float, int]], rate: float | None
) -> None:
    answer = answer_of(2)
    for text, now, index in steps:
        push(answer, text, now, index)
    assert answer.metrics().tokens_per_s == rate
    one = answer_of()
    push(one, "a", 12.0)
    push(one, "b", 12.5)
    assert one.metrics().tokens_per_s == 2.0


def test_an_answer_scores_its_whole_prompt_and_is_the_only_one_unless_told() -> None:
    given = answer_of()
    plain = Answer("r", None, PROMPT, given.params, given.streams, TOKENIZER, 10.0)
    assert (plain.score_from, plain.first_choice) == (1, 0)


def test_all_tokens_at_once_have_no_rate() -> None:
    answer = answer_of()
    push(answer, "abc", 12.0, end="length")
    assert answer.metrics() == Metrics(10.0, 2.0, 2.0, None)
