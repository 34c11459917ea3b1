"""A vocabulary of 61 tokens that can write JSON, for tiny engines, and random JSON schemas."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

from dovetail.core.structured import StructuredOutputs
from dovetail.structured.grammar import Grammar, source
from dovetail.structured.vocabulary import Speller, Vocabulary

END, CALL = 0, 1  # special tokens
_LONGER = ('{"', '":', '",', '"}', "}}", "true", "false", "null", "ab", "abc", ', "')
TOKENS = [
    b"<end>", b"<call>", *(c.encode() for c in '{}[]",:0123456789-.+ \nabcdefghijklmnopqrstuvwxyz'),
    *(t.encode() for t in _LONGER),
]  # fmt: skip
CLOSING = {TOKENS.index(t): 4.0 for t in (b'"', b"}", b"]", b'"}')}  # a bias, so that answers end soon


@cache
def vocabulary() -> Vocabulary:
    assert len(TOKENS) == 61
    return Vocabulary(TOKENS, [END, CALL])


def ids(text: str) -> list[int]:
    """The tokens of a text, the longest that fit."""
    return Speller(TOKENS, [END, CALL], None)(text)


def grammar(**form: Any) -> Grammar:
    return Grammar(vocabulary(), source(StructuredOutputs(**form)))


def text(tokens: Sequence[int]) -> str:
    return b"".join(TOKENS[i] for i in tokens).decode()


def allowed(mask: Any) -> set[int]:
    return {t for t in range(61) if mask[t // 32] >> t % 32 & 1}


_NAMES = st.sampled_from(["a", "b", "ab", "abc", "x1", "long name"])
_LEAVES = st.one_of(
    st.sampled_from([
        {"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}, {"type": "string"},
        {"type": ["integer", "null"]}, {"type": "string", "pattern": "^[ab]{1,3}$"}, {"const": {"a": [1, None]}},
        {"type": "number", "minimum": 0, "maximum": 1}, {"type": "string", "minLength": 2, "maxLength": 3},
        {"type": "number", "exclusiveMinimum": -2.5, "exclusiveMaximum": 3}, {"type": "integer", "multipleOf": 7},
    ]),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-1000, 1000), st.integers(0, 2000),
    ),
    st.lists(st.sampled_from([1, -2, 0.5, "a", "ab c", None, True, [], {"b": "x"}]), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)  # fmt: skip


@st.composite
def _objects(draw: Any, inner: st.SearchStrategy) -> dict[str, Any]:
    properties = draw(st.dictionaries(_NAMES, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    more = draw(st.one_of(st.just(False), inner))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


@st.composite
def _arrays(draw: Any, inner: st.SearchStrategy) -> dict[str, Any]:
    least = draw(st.integers(0, 2))
    found = {"type": "array", "items": draw(inner), "minItems": least, "maxItems": least + draw(st.integers(0, 2))}
    if draw(st.booleans()):
        found["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    return found


schemas = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        _objects(inner), _arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
    ),
    max_leaves=6,
)
