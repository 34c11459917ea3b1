"""Exactly how a model writes calls: the text around names and arguments, and the grammar that holds it to that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dovetail.tools.call import Call
from dovetail.tools.request import Tools

# Between the parts of JSON: what models write, but never so much that one goes on for ever.
_GUIDANCE = {"whitespace_pattern": r"[ \t]{1,4}|\r?\n[ \t]{0,16}"}
_TEXT = r"text: /(.|\n)*/"
# What may be a control token: <...> or [UPPERCASE].
_MARK = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")

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

    def grammar(self, tools: Tools, token_of: TokenOf, schema: Any = None) -> str | None:
        """A grammar of llguidance for answers that may call these tools; None if it would hold nothing back.

        Where calls are required there is nothing else. With `schema`, a JSON schema, an answer without calls is
        JSON. Otherwise there is any text before the calls; without a mark that no text contains, that cannot be
        told from them, so nothing is held back then.
        """
        marks = _Marks(token_of)
        if tools.required:
            return _lines("start: calls", *self._calls(tools, marks, self.opening + self.head))
        if schema is not None:
            answer = _json("answer", {"x-guidance": _GUIDANCE, **schema})
            return _lines("start: calls | answer", answer, *self._calls(tools, marks, self.opening + self.head))
        mark = _MARK.match(self.opening + self.head)
        if mark is None or not any(f.strict for f in tools.callable):
            return None
        if token_of(mark.group()) is not None:
            start = ["start: text calls?", _TEXT]
            return _lines(*start, *self._calls(tools, marks, self.opening + self.head))
        begun = f"begun[suffix={json.dumps(mark.group())}]: /(.|\\n)*/"
        first = (self.opening + self.head)[mark.end() :]
        return _lines("start: text | begun calls", _TEXT, begun, *self._calls(tools, marks, first))

    def _calls(self, tools: Tools, marks: _Marks, first: str) -> list[str]:
        """Rules for one call or several. first: what stands before the name of the first one."""
        functions = tools.callable
        before, again = marks.rule(first), marks.rule(self.between + self.head)
        more = f" ({again} call)*" if tools.parallel else ""
        rules = [
            f"calls: {before} call{more} {marks.rule(self.closing)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            named, tail = marks.rule(function.name + self.middle), marks.rule(self.tail)
            exact = tools.required or function.strict
            schema = function.schema if exact else {"type": "object"}
            rules.append(f"call_{i}: {named} arguments_{i} {tail}")
            rules.append(_json(f"arguments_{i}", {**schema, "x-guidance": _GUIDANCE}))
        return rules


class _Marks:
    """Texts in the words of a grammar, in which control tokens are named by their ids."""

    def __init__(self, token_of: TokenOf) -> None:
        self._token_of = token_of

    def rule(self, text: str) -> str:
        parts: list[str] = []
        plain = ""
        for piece in _MARK.split(text):
            token = self._token_of(piece) if piece and _MARK.fullmatch(piece) else None
            if token is None:
                plain += piece
                continue
            parts += [json.dumps(plain)] * bool(plain) + [f"<[{token}]>"]
            plain = ""
        return " ".join(parts + [json.dumps(plain)] * bool(plain))


def _json(rule: str, schema: dict[str, Any]) -> str:
    return f"{rule}: %json {json.dumps(schema)}"


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
