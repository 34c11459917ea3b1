"""Calls written as JSON: {"name": "f", "arguments": {...}}, or a list of such objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from dovetail.tools.call import Call, dumps, named
from dovetail.tools.source import Read, Source

MAX_DEPTH = 128
ARGUMENTS = ("arguments", "parameters")
KEYS = frozenset({"name", "function", "type", "id", *ARGUMENTS})

_DECODER = json.JSONDecoder(strict=False)  # models write line breaks inside strings
_BRACKET = re.compile(r'["\[\]{}]')
_QUOTE = re.compile(r'["\\]')
_SPACE = re.compile(r"\s*")
_CLOSES = {"{": "}", "[": "]"}


def value_end(source: Source, at: int, passed: Callable[[int], None] = lambda at: None) -> Read[int | None]:
    """The end of the object or list that begins at `at`. None if brackets do not match, or the text ends before.

    `passed` is told how far the value reaches so far, each time that more text is awaited.
    """
    expected: list[str] = []
    inside_string = False
    while True:
        found = (_QUOTE if inside_string else _BRACKET).search(source.text, at)
        char = found.group() if found else ""
        at = found.end() if found else max(at, len(source.text))
        if char == "\\":
            while at == len(source.text) and not source.closed:
                passed(at)
                yield
            at += 1  # what it escapes
        elif char == '"':
            inside_string = not inside_string
        elif char in _CLOSES:
            expected.append(_CLOSES[char])
            if len(expected) > MAX_DEPTH:
                return None
        elif char:
            if not expected or expected.pop() != char:
                return None
            if not expected:
                passed(at)
                return at
        else:
            passed(len(source.text))
            if source.closed:
                return None
            yield


def read(source: Source, at: int) -> Read[tuple[list[Call], int] | None]:
    """Calls in the JSON value that begins at `at`, and its end. Models that saw templates double its braces."""
    if (yield from source.char(at)) not in _CLOSES:
        return None
    doubled = yield from source.starts(at, "{{")
    at += doubled
    end = yield from value_end(source, at)
    if end is None:
        return None
    calls = calls_of(source.text[at:end])
    if doubled and (yield from source.char(end)) == "}":
        end += 1
    return (calls, end) if calls else None


def looks_like_calls(source: Source, at: int) -> Read[bool]:
    """Whether an object with a key that calls have begins here, or a list of such objects."""
    if (yield from source.char(at)) == "[":
        at = yield from source.after_space(at + 1)
    if (yield from source.char(at)) != "{":
        return False
    if (yield from source.starts(at, "{{")):
        at += 1
    at = yield from source.after_space(at + 1)
    end = yield from source.after_word(at + 1)
    return (yield from source.char(at)) == '"' and source.text[at + 1 : end] in KEYS


def calls_of(text: str) -> list[Call] | None:
    """The calls that a JSON object or list says. None if anything in it is no call."""
    try:
        if text[:1] != "[":
            call = _call(_members(text))
            return None if call is None else [call]
        calls = [_call(_members(item)) for item in _items(text)]
    except (ValueError, RecursionError):
        return None
    return [c for c in calls if c is not None] if None not in calls else None


def call_of(name: str, text: str) -> Call | None:
    """A call with the arguments of a JSON object's text. None if that is malformed."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return named(name, _arguments(value, text)) if end == len(text) else None


def has_arguments(text: str) -> bool:
    return any(f'"{key}"' in text for key in ARGUMENTS)


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """The members of an object as values and as they are written. ValueError if it is malformed."""
    found: dict[str, tuple[Any, str]] = {}
    at = _expect(text, 0, "{")
    if text[at : at + 1] != "}":
        while True:
            key, at = _DECODER.raw_decode(text, at)
            start = _expect(text, _space(text, at), ":")
            value, end = _DECODER.raw_decode(text, start)
            if not isinstance(key, str):
                raise ValueError
            found[key] = value, text[start:end]
            at = _space(text, end)
            if text[at : at + 1] == "}":
                break
            at = _expect(text, at, ",")
    return found


def _items(text: str) -> list[str]:
    """The items of a list as they are written."""
    at = _expect(text, 0, "[")
    found: list[str] = []
    if text[at : at + 1] == "]":
        return found
    while True:
        _, end = _DECODER.raw_decode(text, at)
        found.append(text[at:end])
        at = _space(text, end)
        if text[at : at + 1] == "]":
            return found
        at = _expect(text, at, ",")


def _expect(text: str, at: int, char: str) -> int:
    if text[at : at + 1] != char:
        raise ValueError
    return _space(text, at + 1)


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _call(members: dict[str, tuple[Any, str]]) -> Call | None:
    inner, written = members.get("function", (None, ""))
    if isinstance(inner, dict) and "name" not in members:  # OpenAI's own shape
        members = _members(written)
    elif isinstance(inner, str) and "name" not in members:
        members = members | {"name": (inner, written)}
    if "description" in members:  # a function as it was offered, which the model repeats
        return None
    value, written = next((members[key] for key in ARGUMENTS if key in members), (None, ""))
    return named(members.get("name", (None, ""))[0], _arguments(value, written))


def _arguments(value: Any, written: str) -> str | None:
    """Arguments as the text of an object: as the model wrote it, if that is strict JSON."""
    if value is None:
        return "{}"
    if isinstance(value, str):  # some models quote the object once more
        try:
            value, written = json.loads(value or "{}", strict=False), value or "{}"
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, dict):
        return None
    try:
        json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return dumps(value)
    return written.strip()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
