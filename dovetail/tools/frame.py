"""Exactly how a model writes calls: the text around names and arguments, and the grammar that holds it to that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.tools.call import Call
from dovetail.tools.request import Function

# Between the parts of JSON: what models write, but never so much that one goes on for ever.
_WHITESPACE = r"[ \t]{1,4}|\r?\n[ \t]{0,16}"

TokenOf = Callable[[str], int | None]  # the id of a control token that is spelled so


@dataclass(frozen=True)
class Frame:
    """What stands around calls.

    opening, closing: before the first call and after the last. head, middle, tail: before a name, between it and
    the arguments, after them. between: between two calls.
    """

    head: str
    middle: str
    tail: str
    between: str = "\n"
    opening: str = ""
    closing: str = ""

    def written(self, calls: Iterable[Call]) -> str:
        texts = [f"{self.head}{call.name}{self.middle}{call.arguments}{self.tail}" for call in calls]
        return f"{self.opening}{self.between.join(texts)}{self.closing}"

    def grammar(self, functions: Sequence[Function], parallel: bool, token_of: TokenOf) -> str:
        """A grammar of llguidance: calls of these functions, one or several, and nothing else."""
        marks = _Marks(token_of)
        repeated = f" ({marks.rule(self.between)} call)*" if parallel and self.between else ""
        repeated = " call*" if parallel and not self.between else repeated
        lines = [
            f"start: {marks.rule(self.opening)} call{repeated} {marks.rule(self.closing)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            before = marks.rule(f"{self.head}{function.name}{self.middle}")
            lines += [f"call_{i}: {before} arguments_{i} {marks.rule(self.tail)}", _arguments(i, function)]
        return "\n".join(lines) + "\n"


class _Marks:
    """Texts in the words of a grammar, in which control tokens are named by their ids."""

    # What may be a control token: <|...|>, <...>, [UPPERCASE].
    _PATTERN = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")

    def __init__(self, token_of: TokenOf) -> None:
        self._token_of = token_of

    def rule(self, text: str) -> str:
        parts: list[str] = []
        plain = ""
        for piece in self._PATTERN.split(text):
            token = self._token_of(piece) if piece and self._PATTERN.fullmatch(piece) else None
            if token is None:
                plain += piece
                continue
            parts += [json.dumps(plain)] * bool(plain) + [f"<[{token}]>"]
            plain = ""
        return " ".join(parts + [json.dumps(plain)] * bool(plain))


def _arguments(index: int, function: Function) -> str:
    schema: dict[str, Any] = {**function.schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
    return f"arguments_{index}: %json {json.dumps(schema)}"
