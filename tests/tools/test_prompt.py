# ruff: noqa: E501 (templates are not wrapped)
"""Templates that know no tools are told of them, and shown calls and results, in words."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.errors import RequestError
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.tools.request import read_tools
from dovetail.tools.use import ToolUse

EACH = "{% for m in messages %}"
PLAIN = EACH + "<{{ m.role }}>{{ m.content }}{% endfor %}"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + EACH +
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)  # fmt: skip
KNOWS = EACH + (
    "<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {"a": {}}}}}
]
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 3}'}}
HISTORY: list[Any] = [
    USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "r1"},
    {"role": "tool", "content": [{"type": "text", "text": "r2"}]},
]  # fmt: skip
WRITTEN = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
RESULTS = "<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response>"


def prompt(template: str, messages: list[Any], tools: Any = TOOLS, **more: Any) -> str:
    tokenizer = ByteTokenizer()
    tokenizer.templates["default"] = template
    return tokenizer.decode(
        ToolUse(tokenizer, read_tools(tools)).prompt(messages, **more), skip_special_tokens=False
    )


@pytest.mark.parametrize(
    ("messages", "start"),
    [
        ([USER], "<system># Tools"),
        ([{"role": "system", "content": "brief"}, USER], "<system>brief\n\n# Tools"),
        ([{"role": "developer", "content": "brief"}, USER], "<system>brief\n\n# Tools"),
        ([{"role": "system", "content": [{"type": "text", "text": "brief"}]}, USER], "<system>brief\n\n# Tools"),
    ],
)
def test_the_system_message_tells_of_tools(messages: list[Any], start: str) -> None:
    text = prompt(PLAIN, messages)
    assert text.startswith(start) and text.endswith("<user>hi")
    assert '{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}}' in text
    assert '<tool_call>\n{"name": "<name>", "arguments": <arguments, as a JSON object>}\n</tool_call>' in text


def test_the_user_tells_of_tools_where_there_is_no_system_message() -> None:
    text = prompt(STRICT, [USER])
    assert text.startswith("<user># Tools") and text.endswith("\n\nhi")


def test_calls_and_results_are_written_out() -> None:
    expected = f"<user>hi<assistant>{WRITTEN}\n{WRITTEN}<user>{RESULTS}"
    assert prompt(PLAIN, HISTORY, None) == expected
    assert prompt(STRICT, HISTORY, None) == expected
    assert prompt(STRICT, [*HISTORY, {"role": "user", "content": "and?"}], None) == expected + "\nand?"
    assert (
        prompt(PLAIN, [*HISTORY, {"role": "assistant", "content": "ok"}, USER], None)
        == expected + "<assistant>ok<user>hi"
    )
    said = [USER, {**HISTORY[1], "content": "I look."}, *HISTORY[2:]]
    assert prompt(PLAIN, said, None) == expected.replace("<assistant>", "<assistant>I look.\n")


def test_a_template_that_knows_tools_gets_them() -> None:
    assert prompt(KNOWS, HISTORY) == (
        '<user>hi<assistant>{"name": "f", "arguments": {"a": 3}}{"name": "f", "arguments": {"a": 3}}<tool>r1<tool>r2(f)'
    )
    assert prompt(KNOWS, [USER], None) == "<user>hi"


def test_a_form_of_messages_that_is_wrong_is_refused() -> None:
    for template in (PLAIN, STRICT, KNOWS):
        for messages in (None, [], "hi", [3], [{"role": "tool"}, 3], [{"role": "assistant", "tool_calls": [3]}]):
            with pytest.raises(RequestError):
                prompt(template, messages)  # type: ignore[arg-type]
