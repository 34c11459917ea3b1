"""Chat templates turn messages into prompt text, in a sandbox. `Shield` keeps what users type from acting as
control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from dovetail.core.errors import ModelError, RequestError
from dovetail.text.conversation import Message
from dovetail.text.template_sandbox import Sandbox, begin
from dovetail.text.traits import Traits

_MAX_SOURCE = 1 << 20  # characters
_MAX_OUTPUT = 1 << 24  # characters
_RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "continue_final_message", "chat_template"})


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model wrote (for training); it renders as its
    body.
    """

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """A compiled template. Settings, filters and globals are those of transformers, so output is the same."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        if len(source) > _MAX_SOURCE:
            raise ModelError(f"chat template: {len(source)} characters, the limit is {_MAX_SOURCE}")
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().compiled(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ModelError(f"chat template: {error}") from error

    @cached_property
    def traits(self) -> Traits:
        return Traits(self.render, self.source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, which may end after the text of the last message. RequestError if the template rejects
        the messages or `variables` sets a reserved name.
        """
        if continue_final_message:
            open_ended = self.render(
                _marked(messages), add_generation_prompt=False, tools=tools, variables=variables
            )
            return _cut_at_mark(open_ended)
        variables = dict(variables or {})
        if taken := sorted((_RESERVED | self._special_tokens.keys()) & variables.keys()):
            raise RequestError(
                f"{taken[0]} cannot be set as a chat template variable", param="chat_template_kwargs"
            )
        context = {**self._special_tokens, **variables}
        context.update(messages=list(messages), tools=tools, add_generation_prompt=add_generation_prompt)
        context.setdefault("documents", None)
        begin()
        parts, length = [], 0
        try:
            for part in self._template.generate(context):
                parts.append(part)
                length += len(part)
                if length > _MAX_OUTPUT:
                    raise RequestError(f"the chat template wrote over {_MAX_OUTPUT} characters", param="messages")
        except RequestError:
            raise
        except Exception as error:  # a template is a program: any failure of it is about these messages
            raise RequestError(
                f"the chat template rejected the messages: {type(error).__name__}: {error}", param="messages"
            ) from error
        return "".join(parts)


class Shield:
    """Replaces control tokens inside what users wrote, so that a rendered prompt shows which ones are real.

    Each special token that occurs in `values` is replaced by one character that occurs neither in them nor in
    `rendered`, the prompt made from them.
    """

    def __init__(self, pattern: re.Pattern[str], rendered: str, *values: Any) -> None:
        self._pattern = pattern
        found: set[str] = set()
        used = set(rendered)
        for text in strings(values):
            found.update(pattern.findall(text))
            used.update(text)
        # Rare ideographs rather than private-use characters, which Python escapes where a template prints a
        # dict.
        free = (chr(code) for code in range(0x30000, 0x31340) if chr(code) not in used)
        self._stand_in = dict(zip(sorted(found), free, strict=False))
        self.active = bool(found) and len(self._stand_in) == len(found)

    def hide(self, value: Any) -> Any:
        """A copy of a JSON-like value with every special token replaced, also in keys."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._stand_in[match.group()], value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """Undo `hide` in a text."""
        return text.translate({ord(char): token for token, char in self._stand_in.items()})


def strings(value: Any) -> list[str]:
    """All strings in a JSON-like value, keys included."""
    found, stack = [], [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found


_MARK = chr(0x31345)  # rare, and not among those that `Shield` uses


def _marked(messages: Sequence[Message]) -> list[Message]:
    """`messages` with a mark at the end of the last one's text, where the model shall go on."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + _MARK}]
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        part = {**content[-1], "text": content[-1]["text"] + _MARK}
        return [*messages[:-1], {**last, "content": [*content[:-1], part]}]
    raise RequestError("continue_final_message needs a last message with text", param="continue_final_message")


def _cut_at_mark(rendered: str) -> str:
    """The text before the mark. RequestError if the template has left it out."""
    before, mark, _ = rendered.rpartition(_MARK)
    if not mark:
        raise RequestError(
            "the chat template does not show the last message's text", param="continue_final_message"
        )
    return before
