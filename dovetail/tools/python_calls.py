"""Calls written as in Python: f(a=1, b=["x"]). Values are literals; nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.tools.call import Call, dumps, named
from dovetail.tools.source import Read, Source

MAX_DEPTH = 32
MAX_NUMBER = 400  # characters

_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\\": "\\", "'": "'",
    '"': '"', "/": "/", "\n": "",
}  # fmt: skip
_DIGITS = {"x": 2, "u": 4, "U": 8}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_CLOSES = {"[": "]", "(": ")", "{": "}"}

Parameters = Mapping[str, Sequence[str]]  # names of the parameters of each function that may be called


class _Malformed(Exception):
    """The text is no literal."""


def read_call(source: Source, at: int, known: Parameters) -> Read[tuple[Call, int] | None]:
    """A call of one of the known functions that begins at `at`, and its end."""
    end = yield from source.after_word(at, ".-")
    name = source.text[at:end]
    if name not in known or (yield from source.char(end)) != "(":
        return None
    try:
        arguments, at = yield from _arguments(source, end + 1, known[name])
    except _Malformed:
        return None
    call = named(name, dumps(arguments))
    return None if call is None else (call, at)


def read_list(source: Source, at: int, known: Parameters) -> Read[tuple[list[Call], int] | None]:
    """The calls of a list [f(a=1), g()] that begins at `at`, and its end."""
    calls: list[Call] = []
    if (yield from source.char(at)) != "[":
        return None
    while True:
        at = yield from source.after_space(at + 1)
        found = yield from read_call(source, at, known)
        if found is None:
            return None
        calls.append(found[0])
        at = yield from source.after_space(found[1])
        char = yield from source.char(at)
        if char == "]":
            return calls, at + 1
        if char != ",":
            return None


def _arguments(source: Source, at: int, names: Sequence[str]) -> Read[tuple[dict[str, Any], int]]:
    found: dict[str, Any] = {}
    place = 0
    while True:
        at = yield from source.after_space(at)
        if (yield from source.char(at)) == ")":
            return found, at + 1
        key, at = yield from _keyword(source, at)
        if key is None:
            if place >= len(names):
                raise _Malformed
            key, place = names[place], place + 1
        if key in found:
            raise _Malformed
        found[key], at = yield from _value(source, at, 0)
        at = yield from source.after_space(at)
        char = yield from source.char(at)
        if char == ",":
            at += 1
        elif char != ")":
            raise _Malformed


def _keyword(source: Source, at: int) -> Read[tuple[str | None, int]]:
    """The name before an "=" and the position of its value, or None and the position as it was."""
    end = yield from source.after_word(at)
    equals = yield from source.after_space(end)
    if end == at or (yield from source.char(equals)) != "=":
        return None, at
    return source.text[at:end], equals + 1


def _value(source: Source, at: int, depth: int) -> Read[tuple[Any, int]]:
    at = yield from source.after_space(at)
    char = yield from source.char(at)
    if char and char in "'\"":
        return (yield from _string(source, at))
    if char in _CLOSES:
        if depth >= MAX_DEPTH:
            raise _Malformed
        return (yield from _container(source, at, depth + 1))
    end = yield from source.after_word(at, "+-.")
    text = source.text[at:end]
    if text in _WORDS:
        return _WORDS[text], end
    if len(text) > MAX_NUMBER or not _NUMBER.fullmatch(text):
        raise _Malformed
    return (int(text) if text.lstrip("+-").isdecimal() else float(text)), end


def _container(source: Source, at: int, depth: int) -> Read[tuple[Any, int]]:
    """A list, a tuple (as a list) or a dict."""
    opening = source.text[at]
    items: list[Any] = []
    members: dict[str, Any] = {}
    at += 1
    while True:
        at = yield from source.after_space(at)
        if (yield from source.char(at)) == _CLOSES[opening]:
            return (members if opening == "{" else items), at + 1
        value, at = yield from _value(source, at, depth)
        at = yield from source.after_space(at)
        if opening == "{":
            if not isinstance(value, str) or (yield from source.char(at)) != ":":
                raise _Malformed
            members[value], at = yield from _value(source, at + 1, depth)
            at = yield from source.after_space(at)
        else:
            items.append(value)
        char = yield from source.char(at)
        if char == ",":
            at += 1
        elif char != _CLOSES[opening]:
            raise _Malformed


def _string(source: Source, at: int) -> Read[tuple[str, int]]:
    quote = source.text[at]
    if (yield from source.starts(at, quote * 3)):
        quote *= 3
    at += len(quote)
    pieces: list[str] = []
    while True:
        end = at
        while (char := (yield from source.char(end))) and char not in (quote[0], "\\"):
            end += 1
        pieces.append(source.text[at:end])
        if not char:
            raise _Malformed
        if char == "\\":
            piece, at = yield from _escape(source, end + 1)
            pieces.append(piece)
        elif (yield from source.starts(end, quote)):
            return "".join(pieces), end + len(quote)
        else:
            pieces.append(char)
            at = end + 1


def _escape(source: Source, at: int) -> Read[tuple[str, int]]:
    """The characters for what follows a backslash. One that means nothing stays, as in Python."""
    char = yield from source.char(at)
    if not char:
        raise _Malformed
    if char in _DIGITS:
        end = at + 1 + _DIGITS[char]
        yield from source.char(end - 1)
        digits = source.text[at + 1 : end]
        if len(digits) != _DIGITS[char] or not all(d in "0123456789abcdefABCDEF" for d in digits):
            raise _Malformed
        if int(digits, 16) > 0x10FFFF:
            raise _Malformed
        return chr(int(digits, 16)), end
    return _ESCAPES.get(char, "\\" + char), at + 1
