"""The functions that a request offers to the model, and which of them it may or must call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.core.errors import RequestError

MAX_FUNCTIONS = 512
MAX_DEPTH = 64  # of a schema

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,127}")
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_CHOICES = ("none", "auto", "required")
# Keywords of JSON schema whose value is a schema, a list of schemas, or schemas by name.
_ONE, _SEVERAL, _NAMED = "a schema", "a list", "an object"
_KEYWORDS = {
    **dict.fromkeys(("items", "additionalProperties", "not", "contains", "propertyNames"), _ONE),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), _SEVERAL),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _NAMED),
}


@dataclass(frozen=True)
class Function:
    """A function as the model is told of it. parameters: the JSON schema of its arguments. more: other fields."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """In OpenAI's shape, as chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {**function, **self.more}}

    @property
    def schema(self) -> dict[str, Any]:
        """The schema that arguments are constrained to: an object without members that nobody asked for."""
        found = {"type": "object", **self.parameters}
        if not found.keys() & {"anyOf", "oneOf", "allOf", "$ref", "patternProperties", "additionalProperties"}:
            found["additionalProperties"] = False
        return found


@dataclass(frozen=True)
class Tools:
    """All functions that are offered. callable: those that may be called. required: the answer must be calls.

    parallel: there may be several.
    """

    functions: tuple[Function, ...]
    callable: tuple[Function, ...]
    required: bool = False
    parallel: bool = True

    def shown(self) -> list[dict[str, Any]]:
        return [f.shown() for f in self.functions]


def read_tools(tools: Any, tool_choice: Any = None, parallel_tool_calls: Any = None) -> Tools | None:
    """The `tools`, `tool_choice` and `parallel_tool_calls` of a request. RequestError names what is malformed.

    None if the answer may not contain calls: there are no tools, or the choice is "none".
    """
    functions = _functions(tools)
    names = [f.name for f in functions]
    if tool_choice is not None and tool_choice not in _CHOICES and not isinstance(tool_choice, Mapping):
        raise _wrong_choice(
            f"must be one of {', '.join(_CHOICES)}, or name a function; got {str(tool_choice)[:64]!r}"
        )
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise RequestError("parallel_tool_calls must be true or false", param="parallel_tool_calls")
    if not functions and tool_choice not in (None, "none", "auto"):
        raise _wrong_choice("asks for a call, but the request has no tools")
    if not functions or tool_choice == "none":
        return None
    allowed, required = functions, tool_choice == "required"
    if isinstance(tool_choice, Mapping):
        wanted = _named_function(tool_choice)
        if wanted not in names:
            raise _wrong_choice(f"names {wanted[:128]!r}; the tools are {', '.join(names)[:300]}")
        allowed, required = [functions[names.index(wanted)]], True
    named = isinstance(tool_choice, Mapping)
    return Tools(tuple(functions), tuple(allowed), required, parallel_tool_calls is not False and not named)


def check_schema(schema: Any, where: str) -> None:
    """RequestError if a value is no JSON schema, as far as that can be seen without compiling it."""
    waiting = [(schema, where, 0)]
    while waiting:
        found, at, depth = waiting.pop()
        if isinstance(found, bool) and depth:
            continue
        if not isinstance(found, Mapping):
            raise RequestError(f"{at} must be a JSON schema, which is an object", param=at)
        if depth > MAX_DEPTH:
            raise RequestError(f"{at} is nested deeper than {MAX_DEPTH} levels", param=where)
        for name, value in found.items():
            kind = _KEYWORDS.get(name)
            if kind is not None and value is not None:
                waiting += [
                    (part, f"{at}.{name}{key}", depth + 1) for key, part in _parts(kind, value, f"{at}.{name}")
                ]
        _check_values(found, at)


def _parts(kind: str, value: Any, at: str) -> Iterable[tuple[str, Any]]:
    """The schemas in a keyword's value, and where they stand in it."""
    if kind is _NAMED:
        if not isinstance(value, Mapping):
            raise RequestError(f"{at} must be an object", param=at)
        return ((f".{key}", part) for key, part in value.items())
    if kind is _SEVERAL or isinstance(value, list):  # older drafts have lists of items
        if not isinstance(value, list):
            raise RequestError(f"{at} must be a list", param=at)
        return ((f"[{i}]", part) for i, part in enumerate(value))
    return (("", value),)


def _check_values(schema: Mapping[str, Any], at: str) -> None:
    kinds = schema.get("type")
    for kind in kinds if isinstance(kinds, list) else () if kinds is None else (kinds,):
        if not isinstance(kind, str) or kind not in _TYPES:
            raise RequestError(f"{at}.type is {str(kind)[:64]!r}; types are {', '.join(sorted(_TYPES))}", param=at)
    for name in ("enum", "required"):
        if schema.get(name) is not None and not isinstance(schema[name], list):
            raise RequestError(f"{at}.{name} must be a list", param=at)
    if not all(isinstance(name, str) for name in schema.get("required") or ()):
        raise RequestError(f"{at}.required must be names of properties", param=at)


def _functions(tools: Any) -> list[Function]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RequestError("tools must be a list", param="tools")
    if len(tools) > MAX_FUNCTIONS:
        raise RequestError(f"at most {MAX_FUNCTIONS} tools are allowed, got {len(tools)}", param="tools")
    found: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        function = _function(tool, f"tools[{index}]")
        if function.name in found:
            raise RequestError(f"tools[{index}]: there are two functions {function.name}", param=f"tools[{index}]")
        found[function.name] = function
    return list(found.values())


def _function(tool: Any, where: str) -> Function:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        kind = str(tool.get("type"))[:64] if isinstance(tool, Mapping) else type(tool).__name__
        raise RequestError(f"{where} is a {kind}; only tools of type 'function' are supported", param=where)
    given = tool.get("function")
    if not isinstance(given, Mapping):
        raise RequestError(f"{where}.function must be an object", param=f"{where}.function")
    where += ".function"
    name, description, strict = given.get("name"), given.get("description"), given.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name must be up to 128 letters, digits, '_', '-' and '.', got {str(name)[:64]!r}",
            param=f"{where}.name",
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description must be text", param=f"{where}.description")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.strict must be true or false", param=f"{where}.strict")
    parameters = given.get("parameters") or {}
    check_schema(parameters, f"{where}.parameters")
    if parameters.get("type", "object") != "object":
        raise RequestError(f"{where}.parameters must be of type 'object'", param=f"{where}.parameters")
    known = ("name", "description", "parameters", "strict")
    more = {key: value for key, value in given.items() if key not in known and value is not None}
    shown = (
        {"type": "object", **parameters}
        if "properties" in parameters
        else {"type": "object", "properties": {}, **parameters}
    )
    return Function(name, description or "", shown, bool(strict), more)


def _named_function(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise _wrong_choice('that is an object must be {"type": "function", "function": {"name": ...}}')
    return name


def _wrong_choice(message: str) -> RequestError:
    return RequestError(f"tool_choice {message}", param="tool_choice")
