"""Messages as clients send them: checked, and brought into the form that a chat template reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.text.traits import Traits

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_NINE = re.compile("[a-zA-Z0-9]{9}")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def check_messages(messages: Any) -> None:
    """RequestError unless `messages` is a non-empty list of objects with a role, and content where needed."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages must be a non-empty list", param="messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must be an object with a string role", param=where)
        if message.get("content") is None and message["role"] not in ("assistant", "tool"):
            raise RequestError(f"{where} needs content", param=f"{where}.content")


def conversation(messages: Sequence[Message], traits: Traits) -> list[dict[str, Any]]:
    """Messages as the template with these traits reads them. RequestError names what is malformed.

    Fields that are null are left out. Contents are text, or lists of parts where the template reads those.
    Arguments of tool calls are objects. Ids and names that tool messages lack are those of the calls that they
    answer, in order.
    """
    check_messages(messages)
    found: list[dict[str, Any]] = []
    open_calls: dict[str, str] = {}  # names of calls that wait for their result, by id
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _role(message["role"], where, traits)
        entry = {name: value for name, value in message.items() if value is not None} | {"role": role}
        calls = tool_calls(message, where) if role == "assistant" else []
        entry.pop("tool_calls", None)
        if calls:
            open_calls = {call["id"]: call["function"]["name"] for call in calls}
            entry["tool_calls"] = calls
        if role == "tool":
            _answer(entry, open_calls)
        entry["content"] = _fitting(content(message, where), role, traits)
        if calls and not entry["content"]:
            entry["content"] = None if traits.takes_null else ""
        found.append(entry)
    return _as_template_reads_calls(found, traits)


def content(message: Message, where: str) -> str | list[dict[str, str]]:
    """The content as text, or as parts of text. Null is nothing."""
    given = message.get("content")
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, (list, tuple)):
        raise RequestError(f"{where}.content must be text or a list of parts", param=f"{where}.content")
    return [{"type": "text", "text": _part(part, f"{where}.content[{i}]")} for i, part in enumerate(given)]


def joined(found: str | list[dict[str, str]]) -> str:
    """A content as one text, with parts on lines of their own."""
    return found if isinstance(found, str) else "\n".join(part["text"] for part in found)


def tool_calls(message: Message, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message, with ids; arguments are objects if they are a JSON object's text."""
    given = message.get("tool_calls") or []
    if not isinstance(given, (list, tuple)):
        raise RequestError(f"{where}.tool_calls must be a list", param=f"{where}.tool_calls")
    if message.get("function_call") is not None:
        raise RequestError(
            f"{where}.function_call is not supported; write it as tool_calls", param=f"{where}.function_call"
        )
    calls = []
    for index, call in enumerate(given):
        at = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{at} must be an object with function.name", param=at)
        name, arguments = function["name"], _object(function.get("arguments"))
        identity = call.get("id") or f"{at}"
        if not isinstance(identity, str):
            raise RequestError(f"{at}.id must be a string", param=f"{at}.id")
        calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _role(role: str, where: str, traits: Traits) -> str:
    if role == "developer" and not traits.knows_role(role):
        return "system"
    if role not in ROLES and not traits.knows_role(role):
        known = ", ".join(ROLES)
        raise RequestError(f"{where}.role is '{role[:64]}'; roles are {known}", param=f"{where}.role")
    return role


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise RequestError(f"{where}: only parts of type 'text' are supported", param=where)
    return text


def _fitting(found: str | list[dict[str, str]], role: str, traits: Traits) -> str | list[dict[str, str]]:
    """A content in a form that the template reads in messages of this role."""
    if isinstance(found, list):
        return found if found and traits.reads_lists(role) else joined(found)
    if found and not traits.reads_strings(role):
        return [{"type": "text", "text": found}]
    return found


def _object(arguments: Any) -> Any:
    """Arguments as an object. What is no JSON object, such as a call that a client broke, stays as it is."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _answer(entry: dict[str, Any], open_calls: dict[str, str]) -> None:
    """Complete a tool's message by the call that it answers."""
    identity = entry.get("tool_call_id") or next(iter(open_calls), None)
    name = open_calls.pop(identity, None) if isinstance(identity, str) else None
    if identity is not None:
        entry["tool_call_id"] = identity
    if name is not None:
        entry.setdefault("name", name)


def _as_template_reads_calls(messages: list[dict[str, Any]], traits: Traits) -> list[dict[str, Any]]:
    """Arguments as text, or an object whatever they are; ids of nine characters; one call in each message: where
    the template wants it so."""
    if not any("tool_calls" in m or m["role"] == "tool" for m in messages):
        return messages
    if not traits.takes_objects:
        messages = [_map_calls(m, _with_text_arguments) for m in messages]
    elif not traits.takes_broken_arguments:
        messages = [_map_calls(m, _with_object_arguments) for m in messages]
    if traits.wants_nine:
        messages = [_map_calls(m, lambda call: call | {"id": _nine(call["id"])}) for m in messages]
        messages = [m | {"tool_call_id": _nine(m["tool_call_id"])} if "tool_call_id" in m else m for m in messages]
    if any(len(m.get("tool_calls", ())) > 1 for m in messages) and not traits.shows_many_calls:
        messages = list(_one_by_one(messages))
    return messages


def _map_calls(message: dict[str, Any], change: Any) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [change(call) for call in message["tool_calls"]]}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    return (
        call
        if isinstance(arguments, dict)
        else call | {"function": function | {"arguments": {"arguments": arguments}}}
    )


def _nine(identity: Any) -> str:
    """An id of nine letters and digits, always the same for the same id."""
    text = str(identity)
    return text if _NINE.fullmatch(text) else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:9]


def _one_by_one(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Several calls of one message as several messages, each with its result behind it."""
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        results = []
        while index < len(messages) and messages[index]["role"] == "tool":
            results.append(messages[index])
            index += 1
        for number, call in enumerate(calls):
            text = message["content"] if number == 0 else (None if message["content"] is None else "")
            yield message | {"content": text, "tool_calls": [call]}
            for result in [r for r in results if r.get("tool_call_id") == call["id"]]:
                results.remove(result)
                yield result
        yield from results
