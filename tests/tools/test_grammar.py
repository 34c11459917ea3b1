"""Grammars of calls allow what each format writes, and nothing that was not asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dovetail.core.sampling import SamplingParams
from dovetail.core.structured import StructuredOutputs
from dovetail.structured.grammar import Grammar
from dovetail.structured.vocabulary import Vocabulary
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.tools.call import Call
from dovetail.tools.formats import FORMATS, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PYTHONIC, Format
from dovetail.tools.grammar import CallGrammar, TokenOf
from dovetail.tools.request import Tools, read_tools
from dovetail.tools.use import ToolUse

END = 257
VOCABULARY = Vocabulary.of(ByteTokenizer(), 260)
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": f} for f in (WEATHER, {"name": "fs.read-file"})]
PARIS, READ = Call("get_weather", '{"city": "Par\\"is", "days": 3}'), Call("fs.read-file", "{}")


def offered(choice: Any = "required", parallel: bool = True, strict: bool = False) -> Tools:
    tools = [{**t, "function": {**t["function"], "strict": strict}} for t in TOOLS]
    found = read_tools(tools, choice, parallel)
    assert found is not None
    return found


def allows(grammar: str | None, text: Sequence[int] | str) -> bool:
    """Whether an answer may be exactly this."""
    assert grammar is not None
    matcher = Grammar(VOCABULARY, grammar).matcher([END])
    for token in text.encode() if isinstance(text, str) else text:
        matcher.commit(token)
        if matcher.error is not None:
            return False
    return bool(matcher.masks([])[0][END // 32] >> END % 32 & 1)


def no_control(spelling: str) -> int | None:
    return None


def grammars(form: Format, tools: Tools, token_of: TokenOf = no_control) -> CallGrammar:
    return CallGrammar(form.frame, tools, token_of)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_required_calls(form: Format) -> None:
    several = grammars(form, offered()).calls()
    single = grammars(form, offered(parallel=False)).calls()
    named = grammars(form, offered({"type": "function", "function": {"name": "fs.read-file"}})).calls()
    write = form.frame.written
    for grammar in (several, single):
        assert allows(grammar, write([PARIS])) and allows(grammar, write([READ]))
        for wrong in ("", "hello", write([Call("other", "{}")]), write([PARIS])[:-1], write([PARIS]) + "x"):
            assert not allows(grammar, wrong)
        for arguments in ('{"days": 3}', '{"city": 3}', '{"city": "x", "more": 1}', "[]", "{}"):
            assert not allows(grammar, write([Call("get_weather", arguments)]))
    assert allows(several, write([PARIS, READ, PARIS])) and not allows(single, write([PARIS, READ]))
    assert allows(named, write([READ])) and not allows(named, write([PARIS]))
    assert not allows(named, write([READ, READ]))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_calls_or_an_answer_of_a_form(form: Format) -> None:
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"]}
    grammar = grammars(form, offered("auto")).calls_or_json(schema)
    assert allows(grammar, '{"sky": "blue"}') and allows(grammar, form.frame.written([PARIS, READ]))
    assert not allows(grammar, '{"sky": "red"}') and not allows(grammar, "It is sunny.")


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda f: f.name)
def test_strict_functions_are_called_exactly_or_not_at_all(form: Format) -> None:
    grammar = grammars(form, offered("auto", strict=True)).text_and_calls()
    write = form.frame.written
    for text in ("", "It is sunny.\n", "a < b [TOOL", write([PARIS]), "Look: " + write([PARIS, READ])):
        assert allows(grammar, text)
    for text in (
        write([PARIS])[:-1],
        write([Call("get_weather", "{}")]),
        write([PARIS]) + "x",
        write([Call("g", "{}")]),
    ):
        assert not allows(grammar, text)


def test_functions_that_are_not_strict_take_any_object() -> None:
    tools = read_tools([TOOLS[0], {"type": "function", "function": {"name": "f", "strict": True}}])
    assert tools is not None
    grammar = grammars(HERMES, tools).text_and_calls()
    assert allows(grammar, HERMES.frame.written([Call("get_weather", '{"town": 3}')]))
    assert not allows(grammar, HERMES.frame.written([Call("f", '{"town": 3}')]))


def test_without_a_mark_text_and_calls_cannot_be_told_apart() -> None:
    assert grammars(LLAMA3, offered("auto", strict=True)).text_and_calls() is None


def test_definitions_of_a_schema_are_found_from_within_a_call() -> None:
    """Where a call is JSON as a whole, the arguments are not the root of their schema."""
    parameters = {"properties": {"at": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"enum": ["Oslo"]}}}
    tools = read_tools([{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}])
    assert tools is not None
    grammar = grammars(LLAMA3, tools).calls_or_json({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}})
    assert allows(grammar, '{"name": "f", "parameters": {"at": "Oslo"}}') and allows(grammar, "3")
    assert not allows(grammar, '{"name": "f", "parameters": {"at": "Rome"}}')


@pytest.mark.parametrize("form", [HERMES, LLAMA3, PYTHONIC], ids=lambda f: f.name)
def test_a_schema_that_refers_to_itself_means_the_arguments(form: Format) -> None:
    parameters = {"properties": {"a": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["a"]}
    tools = read_tools([{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}])
    assert tools is not None
    grammar = grammars(form, tools).calls_or_json({"type": "integer"})
    assert allows(grammar, form.frame.written([Call("f", '{"a": 1, "next": {"a": 2}}')]))
    assert not allows(grammar, form.frame.written([Call("f", '{"a": 1, "next": {"b": 2}}')]))


@pytest.mark.parametrize("form", [HERMES, LLAMA3], ids=lambda f: f.name)
def test_guidance_of_a_schema_leaves_whitespace_bounded(form: Format) -> None:
    parameters = {"properties": {"a": {"type": "integer", "unknown": 1}}, "x-guidance": {"lenient": True}}
    tools = read_tools([{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}])
    assert tools is not None
    for grammar in (grammars(form, tools).calls(), grammars(form, tools).calls_or_json({})):
        assert allows(grammar, form.frame.written([Call("f", '{ "a": 1}')]))
        assert not allows(grammar, form.frame.written([Call("f", "{" + " " * 99 + '"a": 1}')]))


@pytest.mark.parametrize("form", [HERMES, LLAMA3], ids=lambda f: f.name)
def test_whitespace_that_was_asked_for_holds_for_an_answer_beside_tools(form: Format) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.templates["default"] = form.marks[0]
    use = ToolUse(tokenizer, offered("auto"))
    assert use.format is form
    asked = [StructuredOutputs(json={}, **given) for given in ({}, {"disable_any_whitespace": True})]
    asked.append(StructuredOutputs(json={}, whitespace_pattern="\\t"))
    found = [use.params(SamplingParams(structured_outputs=form)).structured_outputs.grammar for form in asked]
    for text, expected in (('{"a":1}', [1, 1, 1]), ('{"a": 1}', [1, 0, 0]), ('{"a":\t1}', [1, 0, 1])):
        assert [allows(grammar, text) for grammar in found] == expected, text


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_marks_that_are_control_tokens_are_those_tokens(choice: str) -> None:
    control: Callable[[str], int | None] = {"<tool_call>": 258, "</tool_call>": 259}.get
    made = grammars(HERMES, offered(choice, strict=True), control)
    grammar = made.calls() if choice == "required" else made.text_and_calls()
    body = list(json.dumps({"name": "fs.read-file", "arguments": {}}).encode())
    call = [258, 10, *body, 10, 259]
    assert allows(grammar, call) and allows(grammar, [*call, 10, *call])
    assert not allows(grammar, [258, *body, 259]) and not allows(grammar, [*call, 10])
    assert allows(grammar, HERMES.frame.written([READ])) == (choice == "auto")  # spelled out, it is text
