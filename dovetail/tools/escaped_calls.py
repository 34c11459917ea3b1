"""Calls as FunctionGemma writes them: name{city:<escape>Oslo<escape>,days:3}."""

from __future__ import annotations

import json
from typing import Any

from dovetail.tools import json_calls
from dovetail.tools.call import Call, dumps, named
from dovetail.tools.source import Read, Source

MAX_DEPTH = 32
QUOTE = "<escape>"
_ENDS = "{}[],:<"


class _Malformed(Exception):
    """The text is no value."""


def read_call(source: Source, at: int) -> Read[tuple[Call, int] | None]:
    """A call that begins at `at`, and its end. The arguments may also be JSON."""
    end = yield from source.after_word(at, ".-")
    name = source.text[at:end]
    if (yield from source.char(end)) != "{":
        return None
    first = yield from source.after_space(end + 1)
    if (yield from source.char(first)) == '"':
        stop = yield from json_calls.value_end(source, end)
        call = None if stop is None else json_calls.call_of(name, source.text[end:stop])
        return None if call is None or stop is None else (call, stop)
    try:
        arguments, at = yield from _value(source, end, 0)
    except _Malformed:
        return None
    call = named(name, dumps(arguments))
    return None if call is None else (call, at)


def _value(source: Source, at: int, depth: int) -> Read[tuple[Any, int]]:
    char = yield from source.char(at)
    if depth > MAX_DEPTH:
        raise _Malformed
    if char == "{":
        return (yield from _object(source, at + 1, depth + 1))
    if char == "[":
        return (yield from _list(source, at + 1, depth + 1))
    if (yield from source.starts(at, QUOTE)):
        return (yield from _quoted(source, at))
    text, at = yield from _plain(source, at)
    try:
        return json.loads(text), at  # a number, true, false or null
    except ValueError:
        return text, at


def _object(source: Source, at: int, depth: int) -> Read[tuple[dict[str, Any], int]]:
    found: dict[str, Any] = {}
    while (yield from source.char(at)) != "}":
        if (yield from source.starts(at, QUOTE)):
            key, at = yield from _quoted(source, at)
        else:
            key, at = yield from _plain(source, at)
        if (yield from source.char(at)) != ":":
            raise _Malformed
        found[key], at = yield from _value(source, at + 1, depth)
        at = yield from _after_comma(source, at, "}")
    return found, at + 1


def _list(source: Source, at: int, depth: int) -> Read[tuple[list[Any], int]]:
    found: list[Any] = []
    while (yield from source.char(at)) != "]":
        value, at = yield from _value(source, at, depth)
        found.append(value)
        at = yield from _after_comma(source, at, "]")
    return found, at + 1


def _after_comma(source: Source, at: int, closing: str) -> Read[int]:
    char = yield from source.char(at)
    if char not in (",", closing):
        raise _Malformed
    return at + (char == ",")


def _quoted(source: Source, at: int) -> Read[tuple[str, int]]:
    at += len(QUOTE)
    end = yield from source.find(QUOTE, at)
    if end < 0:
        raise _Malformed
    return source.text[at:end], end + len(QUOTE)


def _plain(source: Source, at: int) -> Read[tuple[str, int]]:
    """Text up to the next sign of structure."""
    end = at
    while (char := (yield from source.char(end))) and char not in _ENDS:
        end += 1
    if not char or end == at:
        raise _Malformed
    return source.text[at:end].strip(), end
