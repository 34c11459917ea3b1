"""Grammars that hold an answer to calls of the functions that are offered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dovetail.core.structured import JSON_WHITESPACE
from dovetail.tools.frame import Frame
from dovetail.tools.request import Function, Tools

GUIDANCE = {"whitespace_pattern": JSON_WHITESPACE}  # of llguidance
_TEXT = r"text: /(.|\n)*/"
# What may be a control token: <...> or [UPPERCASE].
_MARK = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")

TokenOf = Callable[[str], int | None]  # the id of a control token that is spelled so


class CallGrammar:
    """Writes grammars of llguidance for calls in a frame."""

    def __init__(self, frame: Frame, tools: Tools, token_of: TokenOf) -> None:
        self._frame = frame
        self._tools = tools
        self._token_of = token_of
        self._first = frame.opening + frame.head  # what stands before the name of the first call

    def calls(self) -> str:
        """One call or several, and nothing else."""
        return _lines("start: calls", *self._calls(self._first))

    def calls_or_json(self, schema: Mapping[str, Any], guidance: Mapping[str, Any] = GUIDANCE) -> str:
        """Calls, or an answer that follows a JSON schema. guidance: of llguidance, for the answer's whitespace."""
        answer = _json("answer", schema, guidance)
        if self._first.lstrip("[").startswith("{"):  # two kinds of JSON that begin alike
            return _lines("start: calls | answer", answer, *self._json_calls())
        return _lines("start: calls | answer", answer, *self._calls(self._first))

    def text_and_calls(self) -> str | None:
        """Any text, and calls behind it. None if no mark says where they begin."""
        mark = _MARK.match(self._first)
        if mark is None:
            return None
        if self._token_of(mark.group()) is not None:
            return _lines("start: text calls?", _TEXT, *self._calls(self._first))
        begun = f"begun[suffix={json.dumps(mark.group())}]: /(.|\\n)*/"
        return _lines("start: text | begun calls", _TEXT, begun, *self._calls(self._first[mark.end() :]))

    def _calls(self, first: str) -> list[str]:
        frame, functions = self._frame, self._tools.callable
        more = f" ({self._rule(frame.between + frame.head)} call)*" if self._tools.parallel else ""
        rules = [
            f"calls: {self._rule(first)} call{more} {self._rule(frame.closing)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            before, after = self._rule(function.name + frame.middle), self._rule(frame.tail)
            rules.append(f"call_{i}: {before} arguments_{i} {after}")
            rules.append(_json(f"arguments_{i}", self._schema(function)))
        return rules

    def _json_calls(self) -> list[str]:
        """Calls that are JSON as a whole."""
        frame, functions = self._frame, self._tools.callable
        more = f" ({self._rule(frame.between)} call)*" if self._tools.parallel else ""
        rules = [
            f"calls: {self._rule(frame.opening)} call{more} {self._rule(frame.closing)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        key = frame.middle.strip('", :')
        for i, function in enumerate(functions):
            schema = {"$id": "urn:arguments", **self._schema(function)}  # the root of its own references
            asked = {"x-guidance": schema.pop("x-guidance", {})}
            members = {"name": {"const": function.name}, key: schema}
            call = {"type": "object", "properties": members, "required": [*members], "additionalProperties": False}
            rules.append(_json(f"call_{i}", call | asked))
        return rules

    def _schema(self, function: Function) -> dict[str, Any]:
        """What the arguments follow: any object, if neither the request nor the function wants more."""
        return function.schema if self._tools.required or function.strict else {"type": "object"}

    def _rule(self, text: str) -> str:
        """A text in the words of a grammar, in which control tokens are named by their ids."""
        parts: list[str] = []
        plain = ""
        for piece in _MARK.split(text):
            token = self._token_of(piece) if _MARK.fullmatch(piece) else None
            if token is None:
                plain += piece
                continue
            parts += [json.dumps(plain)] * bool(plain) + [f"<[{token}]>"]
            plain = ""
        return " ".join(parts + [json.dumps(plain)] * bool(plain))


def _json(rule: str, schema: Mapping[str, Any], guidance: Mapping[str, Any] = GUIDANCE) -> str:
    own = schema.get("x-guidance")
    asked = {**guidance, **(own if isinstance(own, Mapping) else {})}
    return f"{rule}: %json {json.dumps({**schema, 'x-guidance': asked})}"


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
