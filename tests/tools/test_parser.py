# ruff: noqa: E501 (texts of models are not wrapped)
"""Calls are found in every format, whole or in pieces; what is no call stays text, whatever it looks like."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.tools.call import Call, Part, TextPart
from dovetail.tools.formats import FORMATS, Format, format_of
from dovetail.tools.message import delta, message
from dovetail.tools.parser import Parser, parser_for
from dovetail.tools.request import Tools, read_tools

NAMES = ("get_weather", "f", "fs.read-file", "find")
TOOLS = [
    {"type": "function", "function": {"name": n, "parameters": {"properties": {"city": {}, "days": {}}}}}
    for n in NAMES
]
OFFERED = read_tools(TOOLS)
REQUIRED = read_tools(TOOLS, "required")
assert OFFERED is not None and REQUIRED is not None

Spoken = tuple[str, dict[str, Any]]


def hermes(calls: Sequence[Spoken]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': n, 'arguments': a}, ensure_ascii=False)}\n</tool_call>"
        for n, a in calls
    )


def llama3(calls: Sequence[Spoken]) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


def llama3_tagged(calls: Sequence[Spoken]) -> str:
    return "<|python_tag|>" + json.dumps(
        [{"type": "function", "name": n, "parameters": a} for n, a in calls], indent=1
    )


def mistral(calls: Sequence[Spoken]) -> str:
    return "[TOOL_CALLS] " + json.dumps([{"name": n, "arguments": a, "id": "abcdef123"} for n, a in calls])


def mistral_args(calls: Sequence[Spoken]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[CALL_ID]abc123def[ARGS]{json.dumps(a)}" for n, a in calls)


def pythonic(calls: Sequence[Spoken]) -> str:
    return "[" + ", ".join(python_call(n, a) for n, a in calls) + "]"


def tool_code(calls: Sequence[Spoken]) -> str:
    lines = [python_call(n, a) for n, a in calls]
    return "```tool_code\n" + "\n".join([f"print({lines[0]})", *(f"x = {line}" for line in lines[1:])]) + "\n```"


def fenced(calls: Sequence[Spoken]) -> str:
    return "```json\n" + json.dumps([{"name": n, "parameters": a} for n, a in calls], indent=2) + "\n```"


def function_gemma(calls: Sequence[Spoken]) -> str:
    return "".join(f"<start_function_call>call:{n}{escaped(a)}<end_function_call>" for n, a in calls)


def python_call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def escaped(value: Any) -> str:
    if isinstance(value, str):
        return f"<escape>{value}<escape>"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{escaped(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(escaped, value)) + "]"
    return json.dumps(value)


BY_NAME = {f.name: f for f in FORMATS}
JSON_KEYS, PYTHON_KEYS = st.text(max_size=6), st.from_regex("[a-z_]{1,6}", fullmatch=True)
WRITERS: dict[str, tuple[str, Callable[[Sequence[Spoken]], str], bool]] = {
    "hermes": ("hermes", hermes, False),
    "llama3": ("llama3", llama3, False),
    "llama3 with its tag": ("llama3", llama3_tagged, False),
    "mistral": ("mistral", mistral, False),
    "mistral with arguments": ("mistral-args", mistral_args, False),
    "pythonic": ("pythonic", pythonic, True),
    "pythonic behind a tag": ("pythonic", lambda calls: "<|python_tag|>" + pythonic(calls), True),
    "gemma's code": ("gemma", tool_code, True),
    "gemma's JSON": ("gemma", fenced, False),
    "function gemma": ("function-gemma", function_gemma, True),
}
MARKS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "```", "```json\n",
    "```tool_code\n", "<start_function_call>", "<end_function_call>", "<|tool_call_start|>",
]  # fmt: skip
NASTY = st.lists(
    st.one_of(
        st.text(max_size=4),
        st.sampled_from([*MARKS, '"', "'", "\\", "{", "}", "[", "]", "(", ")", "\n", "'''", "\\n"]),
    )
).map("".join)
VALUES = st.recursive(
    st.one_of(NASTY, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(JSON_KEYS, VALUES, max_size=3)), min_size=1, max_size=3
)
PLAIN_VALUES = st.recursive(
    st.one_of(st.text("ab{}[]:,\"'\\\n é", max_size=6), st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(PYTHON_KEYS, inner, max_size=3)),
    max_leaves=6,
)
BESIDE = st.text("ab <[`.\n", max_size=8).filter(lambda text: "```" not in text)  # a fence would be the call's


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    at = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in pairwise(at)]


def run(parser: Parser, pieces: Sequence[str]) -> list[Part]:
    return [part for piece in pieces for part in parser.push(piece)] + parser.finish()


def seen(parts: Sequence[Part]) -> tuple[str, list[Call]]:
    found = message(parts)
    calls = [Call(c["function"]["name"], c["function"]["arguments"]) for c in found.get("tool_calls", [])]
    return found["content"] or "", calls


def read(form: Format, text: str, cuts: Sequence[int] = (), tools: Tools = OFFERED) -> tuple[str, list[Call]]:
    """What an answer says. It is the same for the whole text, for its characters, and for these pieces."""
    whole = seen(run(parser_for(form, tools), [text]))
    assert seen(run(parser_for(form, tools), list(text))) == whole
    assert seen(run(parser_for(form, tools), pieces_of(text, cuts))) == whole
    return whole


@pytest.mark.parametrize("how", WRITERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_calls_are_found_in_every_format_and_in_any_pieces(how: str, data: st.DataObject) -> None:
    name, write, python = WRITERS[how]
    keys, values = (PYTHON_KEYS, VALUES) if python else (JSON_KEYS, VALUES)
    if name == "function-gemma":
        values = PLAIN_VALUES
    calls = data.draw(
        st.lists(
            st.tuples(st.sampled_from(NAMES), st.dictionaries(keys, values, max_size=3)), min_size=1, max_size=3
        )
    )
    before, after = data.draw(BESIDE), data.draw(BESIDE)
    if before.strip():
        before += "\n"
    after = after and "\n" + after
    text, found = read(BY_NAME[name], before + write(calls) + after, data.draw(st.lists(st.integers(0, 999))))
    assert [(c.name, json.loads(c.arguments)) for c in found] == [(n, json.loads(json.dumps(a))) for n, a in calls]
    assert text == (
        before + after.lstrip() if after.strip() and before.strip() else before.rstrip() + after.lstrip()
    )


FRAGMENTS = st.lists(
    st.one_of(
        st.sampled_from([
            *MARKS, '{"name": ', '"f"', ', "arguments": ', "{}", "}", "{", "[", "]", "f(", "city=", "1", ")", "; ", "\n",
            " ", '"', "'", "\\", "call:f{", "<escape>", ",", ":", "print(", "x = ", "```", "true", "-", "get_weather",
        ]),
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(max_examples=250, deadline=None)
@given(text=FRAGMENTS, cuts=st.lists(st.integers(0, 99)))
def test_any_text_is_read_without_an_error_and_stays_if_it_has_no_call(
    form: Format, text: str, cuts: list[int]
) -> None:
    for tools in (OFFERED, REQUIRED):
        shown, calls = read(form, text, cuts, tools)
        if not calls:
            assert shown == text
        for call in calls:
            assert call.name and (tools.required or isinstance(json.loads(call.arguments), dict))


def test_a_call_without_a_name_is_text() -> None:
    text = "[TOOL_CALLS][ARGS]<tool_call>"
    for form in FORMATS:
        assert read(form, text, [], REQUIRED) == (text, [])


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(max_examples=60, deadline=None)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 999)), length=st.integers(0, 10_000))
def test_constrained_calls_are_read_as_they_come(
    form: Format, calls: list[Spoken], cuts: list[int], length: int
) -> None:
    """What has come of a call that is cut is shown, and counts as broken."""
    written = [Call(n, json.dumps(a)) for n, a in calls]
    text = form.frame.written(written)
    assert read(form, text, cuts, REQUIRED) == ("", written)
    cut = text[: length % len(text)]
    shown, found = read(form, cut, cuts, REQUIRED)
    assert not (shown and found)  # the beginning of a further call is no text
    for got, whole in zip(found, written, strict=False):
        assert got.name == whole.name and whole.arguments.startswith(got.arguments)
    parser = parser_for(form, REQUIRED)
    run(parser, [cut])
    assert parser.broken or "".join(c.arguments for c in found) == "".join(
        c.arguments for c in written[: len(found)]
    )


def test_arguments_of_a_constrained_call_come_in_pieces() -> None:
    parser = parser_for(BY_NAME["hermes"], REQUIRED)
    text = BY_NAME["hermes"].frame.written([Call("f", '{"city": "a\\\\b", "days": [1]}')])
    parts = [delta(part) for char in text for part in parser.push(char)] + [delta(p) for p in parser.finish()]
    first, *rest = [part["tool_calls"][0] for part in parts]
    assert first["index"] == 0 and first["type"] == "function" and first["id"].startswith("call_")
    assert first["function"] == {"name": "f", "arguments": ""}
    assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in rest)
    assert (
        len(rest) > 20 and "".join(p["function"]["arguments"] for p in rest) == '{"city": "a\\\\b", "days": [1]}'
    )


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', '{"a": 1}'),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "{}"),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "{}"),
        ('<tool_call>{"name": "f"}</tool_call>', "{}"),
        ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', "{}"),
        (
            '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}</tool_call>',
            '{"a": 1}',
        ),
        ('<tool_call>{"function": "f", "arguments": {"a": 1}}</tool_call>', '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', '{"a": "x\\ny"}'),
        ('<tool_call>{"name": "f", "arguments": {"a": 1.50, "b": 1e400}}</tool_call>', '{"a": 1.50, "b": 1e400}'),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', '{"a": "\\ud800"}'),
        ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', "{}"),
        ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('\n  {"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('[{"name": "f", "arguments": {"a": 1}}]', '{"a": 1}'),
        ('{{"name": "f", "arguments": {"a": 1}}}', '{"a": 1}'),
        ('<tools>\n{"name": "f", "arguments": {"a": 1}}\n</tools>', '{"a": 1}'),
        ('<tool_call>\n{{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', '{"a": 1}'),
    ],
)
def test_what_models_do_to_the_format_of_hermes(text: str, arguments: str) -> None:
    assert read(BY_NAME["hermes"], text) == ("", [Call("f", arguments)])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>{'name': 'f'}</tool_call>",
        "<tool_call>f(a=1)</tool_call>",
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001 + "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}</tool_call>",
        '{"name": "Ada", "arguments": {"a": 1}}',
        '{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}',
        '<tools>\n{"name": "f", "description": "", "parameters": {"type": "object"}}\n</tools>',
        '{"name": "f"}',
        '{"steps": [{"name": "f", "arguments": {}}]}',
        'I would call {"name": "f", "arguments": {}} here.',
        '```python\nprint("f(a=1)")\n```',
        "function f() { return [1, 2]; }",
        "- [link](x)\n- [ ] todo\n",
        "   ",
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read(BY_NAME["hermes"], text) == (text, [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("[f('Oslo', days=3)]", {"city": "Oslo", "days": 3}),
        ("[f('Oslo', 3)]", {"city": "Oslo", "days": 3}),
        ('[f(city="""a "b"\nc""")]', {"city": 'a "b"\nc'}),
        ("[f(a=(1, 2,), b={'x': true}, c=null, d=-1.5e3, e=.5,)]", {"a": [1, 2], "b": {"x": True}, "c": None, "d": -1500.0, "e": 0.5}),
        (r"[f(a='\x41\u00e9\U0001F600\q\'')]", {"a": "Aé😀\\q'"}),
        ("[ f ( a = 1 ) ]", None),
        ("[f(a = 1)]", {"a": 1}),
        ("[f()]", {}),
    ],
)  # fmt: skip
def test_python_literals(text: str, arguments: dict[str, Any] | None) -> None:
    shown, calls = read(BY_NAME["pythonic"], text)
    if arguments is None:
        assert (shown, calls) == (text, [])
    else:
        assert (shown, [json.loads(c.arguments) for c in calls]) == ("", [arguments])


@pytest.mark.parametrize(
    "text",
    ["[f(a=b)]", "[f(a=1 + 1)]", "[f(1, 2, 3)]", "[f(1, city=2)]", "[g(a=1)]", "[f(a=1), 3]", "[f(a=__import__('os'))]",
     "[f(a=" + "[" * 500 + "]" * 500 + ")]", "[f(a=" + "9" * 5000 + ")]", "[f(a='x)]", "[f(a=1", "[1, 2]", "[]",
     "[f(a={1: 2})]", "[f(a=1e999)]", r"[f(a='\U00110000')]", r"[f(a='\x4')]", "[f(a=1) g()]"],
)  # fmt: skip
def test_python_that_is_no_literal_stays_text(text: str) -> None:
    assert read(BY_NAME["pythonic"], text) == (text, [])


ONE = [Call("f", '{"a": 1}')]


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("mistral", '[TOOL_CALLS]f{"a": 1}', ONE),
        ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"a": 1}}', ONE),
        ("mistral", '[TOOL_CALLS] f [ARGS]{"a": 1}', None),
        ("mistral-args", '[TOOL_CALLS]f[ARGS] {"a": 1}', ONE),
        ("mistral-args", '[TOOL_CALLS]f[ARGS]{"a": 1', None),
        ("mistral-args", '[TOOL_CALLS]f[ARGS]{"a": x}', None),
        ("mistral-args", '[TOOL_CALLS]f[ARGS]["a"]', None),
        ("mistral-args", '[TOOL_CALLS][ARGS]{"a": 1}', None),
        ("mistral-args", "[TOOL_CALLS]", None),
        ("llama3", '<|python_tag|>{"name": "other", "parameters": {"a": 1}}', [Call("other", '{"a": 1}')]),
        ("llama3", "<|python_tag|>[f(a=1)]", ONE),
        ("llama3", '<|python_tag|>print("x")', None),
        ("llama3", '{"name": "f", "parameters": {"a": 1}} ; {"name": "f", "parameters": {"a": 1}}', ONE * 2),
        ("gemma", "```tool_code\nf(a=1)\n```", ONE),
        ("gemma", "```tool_code\nf(a=1)", ONE),
        ("gemma", "```tool_code\nf(a=1); print( f(a=1) ), x = f(a=1)\nf(a=1)```", ONE * 4),
        ("gemma", "```tool_code\nprint(f(a=1)\n```", None),
        ("gemma", "```tool_code\nprint(f(a=1), 2)\n```", None),
        ("gemma", "```tool_code\nx = 3\n```", None),
        ("gemma", "```text\nf(a=1)\n```", None),
        ("gemma", "```tool_code\nf(a=1)\n``", None),
        ("gemma", '```\n{"name": "f", "parameters": {"a": 1}}\n```', ONE),
        ("gemma", "[f(a=1)]", ONE),
        ("function-gemma", '<start_function_call>call:f{"a": 1}<end_function_call>', ONE),
        ("function-gemma", "<start_function_call>call:f{a:1}", ONE),
        ("function-gemma", "<start_function_call>call:f{<escape>a<escape>:1}<end_function_call>", ONE),
        (
            "function-gemma",
            "<start_function_call>call:f{a:x y,b:[<escape>,<escape>,{}]}<end_function_call>",
            [Call("f", '{"a": "x y", "b": [",", {}]}')],
        ),
        ("function-gemma", '<start_function_call>call:f{"a": x}<end_function_call>', None),
        ("function-gemma", "<start_function_call>call:f{a:}<end_function_call>", None),
        ("function-gemma", "<start_function_call>call:f{a}<end_function_call>", None),
        ("function-gemma", "<start_function_call>call:f{a:[1}}<end_function_call>", None),
        ("function-gemma", "<start_function_call>call:f{a:<escape>x}<end_function_call>", None),
        ("function-gemma", "<start_function_call>call:f(a=1)<end_function_call>", None),
        ("function-gemma", "<start_function_call>f{a:1}<end_function_call>", None),
        ("function-gemma", "<start_function_call>call:f{a:" + "[" * 500, None),
        ("pythonic", '[{"name": "f", "parameters": {"a": 1}}, {"name": "f", "parameters": {"a": 1}}]', ONE * 2),
        ("pythonic", "<|tool_call_start|>[f(a=1)]<|tool_call_end|>", ONE),
    ],
)
def test_the_ways_of_each_format(name: str, text: str, calls: list[Call] | None) -> None:
    assert read(BY_NAME[name], text) == (text if calls is None else "", calls or [])


def test_only_one_call_where_one_is_wanted() -> None:
    one = read_tools(TOOLS, parallel_tool_calls=False)
    assert one is not None
    text = hermes([("f", {"a": 1}), ("find", {})]) + "\nDone."
    assert read(BY_NAME["hermes"], text, tools=one) == ("Done.", [Call("f", '{"a": 1}')])


def test_marks_that_are_control_tokens_are_not_shown() -> None:
    parser = parser_for(BY_NAME["mistral"], OFFERED, ["[TOOL_CALLS]", "[ARGS]"])
    assert message(run(parser, list("so [TOOL_CALLS]broken[ARGS] it is"))) == {
        "role": "assistant", "content": "so broken it is",
    }  # fmt: skip


def test_ids_differ_and_content_is_null_beside_calls() -> None:
    found = message(run(parser_for(BY_NAME["hermes"], OFFERED), [hermes([("f", {}), ("f", {})])]))
    assert found["content"] is None
    assert len({call["id"] for call in found["tool_calls"]}) == 2
    assert message([TextPart("hi")]) == {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}{{ '[ARGS]' }}", "mistral-args"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|start_header_id|>' }}{{ '\"parameters\": ' }}", "llama3"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("put it as [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ '<start_of_turn>' }}", "gemma"),
        ("{{ '<start_of_turn>' }}{{ '<start_function_call>' }}", "function-gemma"),
        ("{{ '<|start_header_id|>' }}", "hermes"),
        ("{{ '<|im_start|>' }}", "hermes"),
    ],
)
def test_the_format_is_that_of_the_template(template: str, name: str) -> None:
    assert format_of(template).name == name
