"""What a chat template does with each part of a conversation, found by rendering small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from dovetail.core.errors import RequestError

# Words that no template has of its own, and of which none contains another.
_WORD, _CALL, _OTHER_CALL, _RESULT, _FUNCTION = "needle", "weave", "spin", "haystack", "spare_tool"
_NINE, _LONG = "abcdef123", "call_abcdef123"
_ASK = {"role": "user", "content": "?"}
_TOOL = {
    "type": "function",
    "function": {"name": _FUNCTION, "description": "", "parameters": {"type": "object", "properties": {}}},
}

Render = Callable[..., str]


class Traits:
    """Answers of a template to questions about it. `render` is ChatTemplate.render, `source` the template."""

    def __init__(self, render: Render, source: str) -> None:
        self._render = render
        self._source = source
        self.reads_lists = cache(self._reads_lists)
        self.reads_strings = cache(self._reads_strings)

    def knows_role(self, role: str) -> bool:
        """Whether the template names `role`."""
        return f"'{role}'" in self._source or f'"{role}"' in self._source

    def _reads_lists(self, role: str) -> bool:
        """Whether it shows the text of content parts ({"type": "text", ...}) in messages of this role."""
        text, parts = self._with_content(role, _WORD), self._with_content(role, [{"type": "text", "text": _WORD}])
        if parts is None or _WORD not in parts:
            return False
        return all(parts.count(key) <= (text or "").count(key) for key in ("'type'", '"type"'))

    def _reads_strings(self, role: str) -> bool:
        """False if it shows content parts of this role, but not a content that is a string."""
        text = self._with_content(role, _WORD)
        return (text is not None and _WORD in text) or not self.reads_lists(role)

    @cached_property
    def takes_system(self) -> bool:
        text = self._with_content("system", _WORD)
        return text is not None and _WORD in text

    @cached_property
    def takes_tools(self) -> bool:
        """Whether it shows the functions that it is given."""
        return _FUNCTION in (self._try([_ASK], [_TOOL]) or "")

    @cached_property
    def shows_calls(self) -> bool:
        """Whether it shows the tool calls of an assistant's message, and a tool's result."""
        text = self._called() or ""
        return _CALL in text and _RESULT in text

    @cached_property
    def shows_many_calls(self) -> bool:
        """Whether it shows all calls of a message that has several."""
        message = _assistant(self._no_arguments)
        (one,) = message["tool_calls"]
        other = {**one, "id": _NINE[::-1], "function": {**one["function"], "name": _OTHER_CALL}}
        several = {**message, "tool_calls": [one, other]}
        text = self._try([_ASK, several, _tool(), _tool(_NINE[::-1])]) or ""
        return _CALL in text and _OTHER_CALL in text

    @cached_property
    def takes_null(self) -> bool:
        """Whether `content: null` beside tool calls shows nothing."""
        null, empty = self._called(content=None), self._called()
        return null is not None and null.count("None") <= (empty or "").count("None")

    @cached_property
    def takes_objects(self) -> bool:
        """Whether arguments of a call are to be objects. Only where that fails, they are to be JSON text."""
        if _well(self._called({_WORD: "pin"})):
            return True
        return not _well(self._called(f'{{"{_WORD}": "pin"}}'))

    @cached_property
    def takes_broken_arguments(self) -> bool:
        """Whether it shows arguments that are a text but no object."""
        return _WORD in (self._called(_WORD) or "")

    @cached_property
    def wants_nine(self) -> bool:
        """Whether ids of calls must have nine characters."""
        return self._called() is not None and self._called(identity=_LONG) is None

    @property
    def _no_arguments(self) -> Any:
        return {} if self.takes_objects else "{}"

    def _called(self, arguments: Any = None, content: str | None = "", identity: str = _NINE) -> str | None:
        arguments = self._no_arguments if arguments is None else arguments
        return self._try([_ASK, _assistant(arguments, content, identity), _tool(identity)])

    def _with_content(self, role: str, content: Any) -> str | None:
        message = {"role": role, "content": content}
        if role == "tool":
            return self._try([_ASK, _assistant(self._no_arguments), {**_tool(), **message}])
        return self._try({"user": [message], "assistant": [_ASK, message, _ASK]}.get(role, [message, _ASK]))

    def _try(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str | None:
        """The text, or None if the template refuses. Some templates refuse whatever comes without tools."""
        for given in (tools, tools or [_TOOL]):
            try:
                return self._render(messages, tools=given)
            except RequestError:
                continue
        return None


def _well(text: str | None) -> bool:
    """Whether arguments were shown as they should be: neither escaped JSON nor Python's own notation."""
    return text is not None and f"'{_WORD}'" not in text and f'\\"{_WORD}' not in text


def _assistant(arguments: Any, content: str | None = "", identity: str = _NINE) -> dict[str, Any]:
    function = {"name": _CALL, "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": identity, "type": "function", "function": function}],
    }


def _tool(identity: str = _NINE) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "name": _CALL, "content": _RESULT}
