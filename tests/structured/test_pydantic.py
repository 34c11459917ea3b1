"""Answers by the schemas of pydantic models are models: that is what most clients send."""

from __future__ import annotations

import enum
import random
import uuid
from decimal import Decimal
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, create_model

from dovetail.core.structured import StructuredOutputs
from dovetail.structured.grammar import Grammar, GrammarError, source
from dovetail.structured.vocabulary import Vocabulary

BYTES = Vocabulary([bytes([b]) for b in range(256)] + [b"<end>"], [256])


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str | None = None


class Colour(enum.Enum):
    red = "red"
    green = "green"


class Node(BaseModel):
    value: bool
    children: list[Node] = []


TYPES = {  # dates are left out: a grammar does not know which days a month has
    "union": Cat | Dog,
    "optional": int | None,
    "mapping": dict[str, int],
    "pair": tuple[int, bool],
    "enum": Colour,
    "id": uuid.UUID,
    "tree": Node,
    "decimal": Decimal,
    "any": Any,
    "several": list[Colour],
}
FIELDS = {
    "text": (str, Field(pattern="^[a-c]+$", min_length=1, max_length=5)),
    "number": (int, Field(gt=0, le=100, multiple_of=5)),
    "share": (float, Field(ge=0.5, lt=1)),
    "animal": (Cat | Dog, Field(discriminator="kind")),
    "list": (list[bool], Field(min_length=1, max_length=3)),
    **{name: (kind, ...) for name, kind in TYPES.items()},
}


def written(grammar: Grammar, seed: int) -> str:
    """A random answer; after 40 bytes it closes what is open as soon as may be."""
    matcher, chance, found = grammar.matcher([256]), random.Random(seed), bytearray()
    while True:
        mask = matcher.masks([])[0]
        options = [b for b in range(32, 127) if mask[b // 32] >> (b % 32) & 1]
        closing = [b for b in options if b in b'"}]'] if len(found) > 40 else []
        found.append(chance.choice(closing or options))
        if matcher.commit(found[-1]):
            return found.decode()


@pytest.mark.parametrize("name", FIELDS)
def test_answers_are_models(name: str) -> None:
    model = create_model("Model", field=FIELDS[name])
    grammar = Grammar(BYTES, source(StructuredOutputs(json=model.model_json_schema())))
    for seed in range(10):
        model.model_validate_json(written(grammar, seed))


def test_what_has_no_grammar_is_refused_by_name() -> None:
    for kind, words in ((set[str], "uniqueItems"), (bytes, "binary")):
        schema = create_model("Model", field=(kind, ...)).model_json_schema()
        with pytest.raises(GrammarError, match=f"{words}.*lenient"):
            Grammar(BYTES, source(StructuredOutputs(json=schema)))
        schema["x-guidance"] = {"lenient": True}
        assert Grammar(BYTES, source(StructuredOutputs(json=schema)))
