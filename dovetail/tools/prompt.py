"""Tools and calls for chat templates that do not know them: as text, in messages that every template shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.text.conversation import Message, check_messages, content, joined, tool_calls
from dovetail.text.traits import Traits
from dovetail.tools.call import Call
from dovetail.tools.frame import Frame
from dovetail.tools.request import Tools


def instructions(tools: Tools, frame: Frame) -> str:
    """What a model is told of tools: a line of JSON for each function, and how to write calls."""
    lines = "\n".join(json.dumps(shown["function"], ensure_ascii=False) for shown in tools.shown())
    example = frame.written([Call("<name>", "<arguments, as a JSON object>")])
    return (
        "# Tools\n\nYou may call functions to answer. They are described here, with the JSON schemas of their "
        f"arguments:\n{lines}\n\nTo call a function, write exactly this and nothing else:\n{example}\n"
        "The next message brings the result. If no function helps, answer in plain text."
    )


def with_instructions(messages: Sequence[Message], text: str, traits: Traits) -> list[Message]:
    """Messages with a text added to the system message, or put before the first one of the user where the template
    shows no system message."""
    check_messages(messages)
    found = list(messages)
    place = 0
    if traits.takes_system:
        if found[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}, *found]
        parts = [joined(content(found[0], "messages[0]")), text]
    else:
        place = next((i for i, m in enumerate(found) if m["role"] == "user"), -1)
        if place < 0:
            return [{"role": "user", "content": text}, *found]
        parts = [text, joined(content(found[place], f"messages[{place}]"))]
    found[place] = {**found[place], "content": "\n\n".join(filter(None, parts))}
    return found


def with_calls_as_text(messages: Sequence[Message], frame: Frame) -> list[Message]:
    """Messages in which calls are written out, and results are in messages of the user."""
    check_messages(messages)
    found: list[dict[str, Any]] = []
    results = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        text = joined(content(message, where))
        if message["role"] == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if results:
                found[-1] = _continued(found[-1], text)
            else:
                found.append({"role": "user", "content": text})
            results = True
            continue
        if message["role"] == "user" and results:  # templates want the roles to alternate
            found[-1] = _continued(found[-1], text)
        else:
            found.append(_as_text(message, text, where, frame))
        results = False
    return list(found)


def _as_text(message: Message, text: str, where: str, frame: Frame) -> dict[str, Any]:
    calls = tool_calls(message, where) if message["role"] == "assistant" else []
    if not calls:
        return dict(message)
    written = frame.written(Call(c["function"]["name"], _text(c["function"]["arguments"])) for c in calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, [text, written]))}


def _continued(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {**message, "content": f"{message['content']}\n{text}"}


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
