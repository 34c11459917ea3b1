"""The parts of an answer as OpenAI's messages and deltas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dovetail.tools.call import CallPart, Part, TextPart


def message(parts: Iterable[Part]) -> dict[str, Any]:
    """The message of the assistant. Beside calls, no text is `content: null`."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif part.name is not None:
            calls.append(_begun(part))
        else:
            calls[part.index]["function"]["arguments"] += part.arguments
    found: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        found["content"] = found["content"] or None
        found["tool_calls"] = calls
    return found


def delta(part: Part) -> dict[str, Any]:
    """A part as the delta of a stream."""
    if isinstance(part, TextPart):
        return {"content": part.text}
    if part.name is not None:
        return {"tool_calls": [{"index": part.index, **_begun(part)}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}


def _begun(part: CallPart) -> dict[str, Any]:
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}
