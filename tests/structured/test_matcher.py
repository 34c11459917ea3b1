"""What may follow, token by token."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dovetail.core.structured import Constraint, StructuredOutputs
from dovetail.structured.grammar import Grammar, GrammarError, source
from dovetail.structured.vocabulary import Vocabulary
from tests.helpers.examples import examples
from tests.helpers.forms import CALL, END, TOKENS, allowed, grammar, schemas, text
from tests.helpers.forms import ids as spell


def walk(matcher: Constraint, seed: int, most: int = 2000) -> tuple[list[int], bool]:
    """A random answer, closed as soon as may be after a while. Returns it, and whether it is complete."""
    random, ids = np.random.default_rng(seed), []
    for _ in range(most):
        found = allowed(matcher.masks([])[0])
        assert matcher.error is None and found
        if END in found and (len(ids) > 20 or random.random() < 0.5):
            return ids, True
        options = sorted(found - {END})
        closing = [i for i in options if TOKENS[i] in (b'"', b"}", b"]", b'"}', b"}}")]
        token = int(random.choice(closing if closing and len(ids) > 20 else options))
        ids.append(token)
        if matcher.commit(token):
            return ids, True
    return ids, False


def taken(matcher: Constraint, guesses: list[int]) -> int:
    """How many of the guesses may follow."""
    same = (a == b for a, b in zip(matcher.drafts(guesses), guesses, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


@given(schemas, st.integers(0, 2**32))
@examples(200)
def test_every_answer_is_valid_by_its_schema(schema: dict[str, Any], seed: int) -> None:
    try:
        start = grammar(json=schema)
    except GrammarError as error:
        assert "no answer" in str(error) or "Unsatisfiable" in str(error)
        return
    ids, complete = walk(start.matcher([END]), seed)
    assert complete, text(ids)
    Draft202012Validator(schema).validate(json.loads(text(ids)))


EXPRESSIONS = [
    "a|ab*c", "[a-f0-9]{2}(:[a-f0-9]{2}){2}", "(?i:abc)+", r"\d{1,3}(\.\d+)?", "(a|b)*abb", "[^a-y]{3}", "x?y+z*",
    "^abc$", "^(yes|no)$", "a{0,500}", "(ab){3}|c", ".{4}", r"-?\d+", "(a*b*)*c",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_answer_matches_the_whole_expression(expression: str) -> None:
    start = grammar(regex=expression)
    for seed in range(20):
        ids, _ = walk(start.matcher([END]), seed, most=200)
        if ids and not re.fullmatch(expression, text(ids)):
            assert len(ids) == 200  # was cut off
    assert any(re.fullmatch(expression, text(walk(start.matcher([END]), s, 600)[0])) for s in range(5))


@given(
    st.lists(st.text('ab{}"\n 1c,', min_size=1, max_size=9), min_size=1, max_size=8, unique=True),
    st.integers(0, 2**32),
)
@examples(100)
def test_an_answer_is_one_of_the_choices_and_each_can_come(choices: list[str], seed: int) -> None:
    start = grammar(choice=choices)
    ids, complete = walk(start.matcher([END]), seed)
    assert complete and text(ids) in choices
    for choice in choices:
        matcher = start.matcher([END])
        for token in spell(choice):
            assert token in allowed(matcher.masks([])[0])
            over = matcher.commit(token)
        assert over or END in allowed(matcher.masks([])[0])


def test_choices_may_hold_any_character() -> None:
    choices = ["\0", "\\", "a\\nb", "🎉", "\u2028", "/", "<end>", "\x7f", '"', "é"]
    spelled = Vocabulary([bytes([i]) for i in range(256)] + [b"<end>"], [256])
    start = Grammar(spelled, source(StructuredOutputs(choice=choices)))
    for choice in choices:
        matcher = start.matcher([256])
        assert [matcher.commit(b) for b in choice.encode()][-1] or choice == "a", choice
    assert taken(Grammar(spelled, source(StructuredOutputs(regex="a\0b|🎉"))).matcher([]), list(b"a\0b")) == 3


def test_drafts_are_followed_and_leave_no_trace() -> None:
    start = grammar(json={"type": "object", "properties": {"ab": {"type": "integer"}}, "required": ["ab"]})
    ids = spell('{"ab": 12, "c": [true]}')
    stepwise = start.matcher([END])
    want = [stepwise.masks([])[0]]
    for token in ids[:-1]:
        assert not stepwise.commit(token)
        want.append(stepwise.masks([])[0])
    ahead = start.matcher([END])
    for at in range(len(ids)):
        for count in range(len(ids) - at):
            np.testing.assert_array_equal(ahead.masks(ids[at : at + count]), want[at : at + count + 1])
            assert taken(ahead, ids[at : at + count]) == count
        assert taken(ahead, [*ids[at : at + 2], CALL, 7]) == len(ids[at : at + 2])
        ended = ahead.commit(ids[at])
        assert ended is (at + 1 == len(ids))
    assert ahead.error is None


def test_what_must_come_is_drafted() -> None:
    matcher = grammar(regex="(a|b)(true|x)").matcher([])
    assert list(matcher.drafts([])) == []
    matcher = grammar(choice=["abc, null", "abctrue"]).matcher([])
    start = list(matcher.drafts([]))
    assert start == spell("abc")[: len(start)] and start
    assert list(matcher.drafts([TOKENS.index(b"{")])) == start
    longer = spell("abctrue")
    assert list(matcher.drafts(longer)) == longer
    before = matcher.masks([])[0]
    matcher.masks(start)
    np.testing.assert_array_equal(matcher.masks([])[0], before)


def test_ends_may_come_only_where_the_answer_is_complete() -> None:
    matcher = grammar(regex="ab|abc+").matcher([END, CALL])
    a, b, c = (TOKENS.index(x) for x in (b"a", b"b", b"c"))
    for token, complete in ((a, False), (b, True), (c, True)):
        assert not {END, CALL} & allowed(matcher.masks([])[0]) or matcher.masks([])[0][0] & 1
        assert not matcher.commit(token)
        assert ({END, CALL} <= allowed(matcher.masks([])[0])) is complete
    without = grammar(regex="a").matcher([])
    assert allowed(without.masks([])[0]) == {a}
    assert without.commit(a)


def test_masks_behind_a_complete_answer_allow_its_ends_only() -> None:
    matcher = grammar(choice=["ab"]).matcher([END])
    ids = spell("ab")
    assert allowed(matcher.masks(ids)[-1]) == {END}
    assert not matcher.masks(ids)[0][0] & 1


def test_special_tokens_come_where_a_grammar_names_them() -> None:
    matcher = grammar(grammar='start: <call> "a" | "b" <[1]>').matcher([END])
    assert allowed(matcher.masks([])[0]) == {CALL, TOKENS.index(b"b")}
    assert not matcher.commit(TOKENS.index(b"b"))
    assert allowed(matcher.masks([])[0]) == {CALL}
    assert matcher.commit(CALL)
    spelled = grammar(regex="<call>|.*").matcher([END])
    assert CALL not in allowed(spelled.masks([])[0])


def test_a_grammar_in_gbnf_is_taken_too() -> None:
    matcher = grammar(grammar='root ::= "a" digit+\ndigit ::= [0-9]').matcher([END])
    for token in spell("a12"):
        assert not matcher.commit(token)
    assert matcher.error is None and END in allowed(matcher.masks([])[0])
    with pytest.raises(GrammarError, match="GBNF"):
        grammar(grammar='root ::= "a')


def test_json_inside_a_grammar() -> None:
    lark = 'start: "ab" %json {"type": "object", "required": ["a"], "properties": {"a": {"type": "null"}}}'
    matcher = grammar(grammar=lark).matcher([])
    for token in spell('ab{"a":null'):
        assert not matcher.commit(token)
    assert matcher.commit(TOKENS.index(b"}"))


def test_whitespace_between_the_parts_of_json() -> None:
    space, line = TOKENS.index(b" "), TOKENS.index(b"\n")
    schema = {"type": "array", "items": {"type": "integer"}}
    for form, most in (({}, 2), ({"disable_any_whitespace": True}, 0), ({"whitespace_pattern": " ?"}, 1)):
        matcher = grammar(json=schema, **form).matcher([])
        matcher.commit(TOKENS.index(b"["))
        assert taken(matcher, [space] * 50) == most, form
    matcher = grammar(json_object=True).matcher([])
    matcher.commit(TOKENS.index(b"{"))
    assert taken(matcher, [line] * 50) == 2
    assert taken(matcher, [line] + [space] * 50) == 33


def test_what_a_vocabulary_cannot_write_is_an_error_of_its_request() -> None:
    matcher = grammar(regex="a[QR]").matcher([END])
    assert matcher.masks([])[0].any()
    assert not matcher.commit(TOKENS.index(b"a"))
    assert not matcher.masks([]).any()
    assert "no token of the vocabulary" in matcher.error
    assert list(matcher.drafts([5])) == [] and not matcher.masks([]).any()


def test_a_dead_end_behind_a_draft_counts_only_if_the_draft_does() -> None:
    matcher = grammar(regex="(a|b)aQ|bb").matcher([END])
    a, b = TOKENS.index(b"a"), TOKENS.index(b"b")
    masks = matcher.masks([b, a])
    assert masks[0].any() and masks[1].any() and not masks[2].any()
    assert matcher.error is None
    assert not matcher.commit(b)
    assert b in allowed(matcher.masks([])[0])
    assert matcher.commit(b) and matcher.error is None


def test_a_token_that_does_not_fit_is_an_error() -> None:
    matcher = grammar(regex="ab").matcher([])
    assert not matcher.commit(TOKENS.index(b"{"))
    assert matcher.error is not None and "cannot be followed" in matcher.error


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json": False}, "nothing is valid"),
        ({"json": {"type": "banana"}}, "banana"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'uniqueItems.*"lenient": true'),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "coerce_one_of"),
        ({"json": {"type": "string", "format": "colour"}}, "colour.*lenient"),
        ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json": {"type": "string", "pattern": "a(?=b)"}}, "look-around"),
        ({"json": {"$ref": "#/$defs/x"}}, "does not exist"),
        ({"json": {"$ref": "https://example.org/x"}}, "example.org"),
        ({"json": {"$ref": "#"}}, "no answer but the empty one"),
        ({"regex": "aQ"}, "no answer but the empty one"),
        ({"regex": "a{0}"}, "no answer but the empty one"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "Unsatisfiable"),
        ({"regex": "a{,"}, "regex"),
        ({"regex": "(a"}, "regex"),
        ({"regex": r"(a)\1"}, "backreference"),
        ({"grammar": "start: "}, "no answer but the empty one"),
        ({"grammar": 'strat: "a"'}, "start"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "start: <none>"}, "none"),
        ({"grammar": '{"grammars": []}'}, "grammar"),
    ],
)
def test_a_wrong_form_says_what_is_wrong(form: dict[str, Any], words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        grammar(**form)
    assert len(str(caught.value)) <= 500
    assert "non-verbose" not in str(caught.value)
