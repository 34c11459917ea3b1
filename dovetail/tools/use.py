"""Tools in one request: its prompt, the parameters of its answers, and their parsers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.core.structured import StructuredOutputs
from dovetail.text.conversation import Message
from dovetail.text.tokenizer import Tokenizer
from dovetail.tools.formats import Format, format_of
from dovetail.tools.grammar import GUIDANCE, CallGrammar
from dovetail.tools.message import message
from dovetail.tools.parser import Parser, PlainParser, parser_for
from dovetail.tools.prompt import instructions, with_calls_as_text, with_instructions
from dovetail.tools.request import Tools


class ToolUse:
    """How a conversation uses tools with this tokenizer's chat template. `tools` is None if none can be called."""

    def __init__(self, tokenizer: Tokenizer, tools: Tools | None) -> None:
        self.tools = tools
        self._tokenizer = tokenizer
        self._shown = tools.shown() if tools is not None else None
        self._template = tokenizer.template(self._shown)

    @cached_property
    def format(self) -> Format:
        """How the model writes calls."""
        return format_of(self._template.source)

    def prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The ids of a conversation. Tools, calls and results are text where the template does not know them."""
        traits, shown = self._template.traits, self._shown
        if _mentions_calls(messages) and not traits.shows_calls:
            messages = with_calls_as_text(messages, self.format.frame)
        if self.tools is not None and not traits.takes_tools:
            told = instructions(self.tools, self.format.frame)
            messages, shown = with_instructions(messages, told, traits), None
        ids: list[int] = self._tokenizer.apply_chat_template(messages, tools=shown, **template)
        return ids

    def params(self, params: SamplingParams) -> SamplingParams:
        """Parameters with which marks of calls can be read, and calls are held to what was asked for."""
        if self.tools is None:
            return params
        marks = tuple(token for mark in self.format.marks if (token := self._control(mark)) is not None)
        params = replace(params, shown_token_ids=marks)
        grammar = self._grammar(params.structured_outputs)
        if grammar is None:
            return params
        return replace(params, structured_outputs=StructuredOutputs(grammar=grammar))

    def _grammar(self, form: StructuredOutputs | None) -> str | None:
        """What holds the answer to calls, or to them and the form that it has without calls; None if nothing
        does. RequestError if calls and the form exclude each other."""
        tools = self.tools
        if tools is None:
            return None
        grammar = CallGrammar(self.format.frame, tools, self._control)
        if form is None:
            if tools.required:
                return grammar.calls()
            return grammar.text_and_calls() if any(f.strict for f in tools.callable) else None
        if tools.required:
            raise RequestError(
                "the answer must be calls of tools, so it cannot have another form; leave out one of the two",
                param="tool_choice",
            )
        if form.form not in ("json", "json_object"):
            raise RequestError(
                f"an answer that is a {form.form} cannot call tools; leave them out, or set tool_choice to none",
                param="tools",
            )
        schema = json.loads(form.text)
        guidance: dict[str, Any] = GUIDANCE
        if form.disable_any_whitespace:
            guidance = {"whitespace_flexible": False}
        elif form.whitespace_pattern is not None:
            guidance = {"whitespace_pattern": form.whitespace_pattern}
        return grammar.calls_or_json(schema if isinstance(schema, dict) else {}, guidance)

    def parser(self) -> Parser:
        """A parser of one answer."""
        if self.tools is None:
            return PlainParser()
        hidden = [mark for mark in self.format.marks if self._control(mark) is not None]
        return parser_for(self.format, self.tools, hidden)

    def message(self, text: str) -> dict[str, Any]:
        """The message that an answer's text is."""
        parser = self.parser()
        return message([*parser.push(text), *parser.finish()])

    def _control(self, spelling: str) -> int | None:
        """The id of a control token that is spelled so."""
        token: int | None = self._tokenizer.backend.token_to_id(spelling)
        return token if token in self._tokenizer.special_ids else None


def _mentions_calls(messages: Any) -> bool:
    return isinstance(messages, Sequence) and any(
        hasattr(m, "get") and (m.get("role") == "tool" or m.get("tool_calls")) for m in messages
    )
