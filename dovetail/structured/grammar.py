"""From the form that a user asks for to a grammar, and to the parser of its answers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from dovetail.core.structured import JSON_WHITESPACE, StructuredOutputs
from dovetail.structured.matcher import DEAD_END, Matcher

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from dovetail.structured.vocabulary import Vocabulary

STATES = 20_000  # of a lexer, 1 to 2 KB each
# What a step may take. All answers of a step wait for the slowest, so these are below llguidance's own limits. The
# schemas of SchemaStore stay within them. A grammar that reaches them takes about 10 ms a step.
STEP_FUEL, STEP_ITEMS, ROW_ITEMS = 50_000, 10_000, 1000
HINTS = {
    "Unimplemented keys": 'leave them out, or put "x-guidance": {"lenient": true} into the schema to ignore them',
    "oneOf constraints": 'use anyOf, or put "x-guidance": {"coerce_one_of": true} into the schema',
    "Unknown format": 'leave it out, or put "x-guidance": {"lenient": true} into the schema to ignore it',
}

_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})  # by any name
_DATA = frozenset({"const", "default", "enum", "examples"})  # not schemas


class GrammarError(Exception):
    """Why a grammar cannot be used, in words for the user who wrote it."""


class Grammar:
    """A grammar that is compiled for a vocabulary.

    source: the grammar in llguidance's words. size: bytes of memory.
    """

    def __init__(self, vocabulary: Vocabulary, source: str, size: int = 0) -> None:
        self.size = size
        self._vocabulary = vocabulary
        self._parser = compiled(vocabulary, source)

    def matcher(self, ends: Collection[int]) -> Matcher:
        """The constraint of an answer, which `ends` may end where it is complete."""
        return Matcher(self._parser, self._vocabulary, ends)


def compiled(vocabulary: Vocabulary, source: str) -> LLMatcher:
    """The parser at the beginning of an answer. GrammarError if there is none."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_lexer_states=STATES, step_lexer_fuel=STEP_FUEL, step_max_items=STEP_ITEMS, max_items_in_row=ROW_ITEMS,
        verbose_errors=False,  # those would quote the grammar
    )  # fmt: skip
    parser = LLMatcher(vocabulary.native, source, log_level=0, limits=limits)
    first = int.from_bytes(parser.compute_bitmask(), "little") & ~(1 << vocabulary.complete)
    if parser.is_error() and not parser.get_error().startswith(DEAD_END):
        raise GrammarError(_readable(parser.get_error()))
    if not first:
        raise GrammarError("no answer but the empty one can have this form")
    return parser


def source(asked: StructuredOutputs) -> str:
    """What a user asks for as a grammar of llguidance. GrammarError if it is not written correctly."""
    from llguidance import LLMatcher

    if asked.form in ("json", "json_object"):
        return _json(asked)
    if asked.form == "regex":
        return LLMatcher.grammar_from_regex(asked.text)
    if asked.form == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(_literally, json.loads(asked.text))))
    if re.search(r"^\s*[\w-]+\s*::=", asked.text, re.MULTILINE):
        return _from_gbnf(asked.text)
    return asked.text


def _literally(text: str) -> str:
    """An expression that matches a text and nothing else."""
    return "".join([c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text])


def _json(asked: StructuredOutputs) -> str:
    schema = json.loads(asked.text)
    if not isinstance(schema, dict):
        if not schema:
            raise GrammarError("nothing is valid by the schema false")
        schema = {}
    _check_bounds(schema)
    own = schema.get("x-guidance")
    options: dict[str, object] = {"whitespace_pattern": asked.whitespace_pattern or JSON_WHITESPACE}
    if asked.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    schema = {**schema, "x-guidance": {**options, **(own if isinstance(own, dict) else {})}}
    return json.dumps({"grammars": [{"json_schema": schema}]}, ensure_ascii=False)


def _check_bounds(schema: object) -> None:
    """GrammarError for bounds that llguidance would read as others: it has 64 bits, and knows no draft 4."""
    if isinstance(schema, list):
        for item in schema:
            _check_bounds(item)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _DATA:
            continue
        if key in _BOUNDS and isinstance(value, bool):
            raise GrammarError(f"{key} is {str(value).lower()}, as in draft 4; write the bound itself as a number")
        if key in _BOUNDS and isinstance(value, int) and not -(2**63) < value < 2**63:
            raise GrammarError(f"{key} is {str(value)[:40]}, and bounds beyond 64 bits cannot be held")
        _check_bounds(list(value.values()) if key in _NAMED and isinstance(value, dict) else value)


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:  # its own errors, and Python's for what it does not foresee
        raise GrammarError(f"the GBNF grammar cannot be read: {str(error)[:300]}") from None


def _readable(message: str) -> str:
    text = " ".join(message.replace("<non-verbose/>", "").split())[:400]
    hint = next((hint for start, hint in HINTS.items() if text.startswith(start)), "")
    return f"{text}; {hint}" if hint else text
