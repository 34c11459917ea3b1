# ruff: noqa: E501 (templates are not wrapped)
"""Messages as clients send them reach each kind of template in the form that it reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dovetail.core.errors import RequestError
from dovetail.text.byte_tokenizer import ByteTokenizer
from dovetail.text.chat import ChatTemplate
from dovetail.text.conversation import conversation

USER = {"role": "user", "content": "hi"}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def call(arguments: Any, identity: Any = "call_1", name: str = "f") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def render(source: str, *messages: dict[str, Any], **more: Any) -> str:
    tokenizer = ByteTokenizer()
    tokenizer.templates["default"] = source
    return tokenizer.render(messages, **more)


EACH = "{% for m in messages %}"
CALLS = EACH + "{% if m.tool_calls %}{% for c in m.tool_calls %}%s{% endfor %}{% endif %}{% endfor %}"
TOJSON = CALLS.replace("%s", "{{ c.function.arguments | tojson }}")
ITEMS = CALLS.replace("%s", "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}")
CONCATENATED = CALLS.replace("%s", "{{ '<' + c.function.arguments + '>' }}")
PRINTED = CALLS.replace("%s", "{{ c.function.arguments }}")
EITHER = CALLS.replace(
    "%s",
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}",
)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (TOJSON, '{"a": 3}'),
        (ITEMS, "a=3;"),
        (CONCATENATED, '<{"a": 3}>'),
        (PRINTED, '{"a": 3}'),
        (EITHER, '{"a": 3}'),
    ],
)
@pytest.mark.parametrize("arguments", ['{"a": 3}', {"a": 3}, '{"a":3}'])
def test_arguments_are_what_the_template_reads_whatever_the_client_sent(
    source: str, shown: str, arguments: Any
) -> None:
    text = render(source, USER, assistant(call(arguments)))
    assert text.replace('"a":3', '"a": 3') == shown


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    assert render(TOJSON, USER, assistant(call(arguments))) == "{}"


@pytest.mark.parametrize("arguments", ["{broken", '["a"]', "NaN"])
def test_broken_arguments_in_the_history_are_shown_as_they_are(arguments: str) -> None:
    assert render(PRINTED, USER, assistant(call(arguments))) == arguments


def test_broken_arguments_are_an_object_for_templates_that_read_nothing_else() -> None:
    """A client whose model broke a call can go on with the conversation."""
    assert render(ITEMS, USER, assistant(call("{broken"))) == "arguments={broken;"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{% for m in messages %}[{{ m.content }}]{{ m.tool_calls | length }}{% endfor %}", "[hi]0[]1"),
        ("{% for m in messages %}{% if m.content is none %}calls{{ m.tool_calls | length }}{% else %}{{ m.content }}{% endif %}{% endfor %}", "hicalls1"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "userhiassistant"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [None, "", []])
def test_null_beside_calls_is_nothing(source: str, shown: str, content: Any) -> None:
    """Also for templates that know a message with calls by its null."""
    assert render(source, USER, assistant(call({}), content=content)) == shown


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}, result(None)])
def test_null_content_prints_nothing(message: dict[str, Any]) -> None:
    assert render(EACH + "[{{ m.content }}]{% endfor %}", USER, message) == "[hi][]"


@pytest.mark.parametrize("field", ["tool_calls", "name", "refusal", "audio"])
def test_fields_that_are_null_are_left_out(field: str) -> None:
    source = EACH + "{% if '" + field + "' in m %}seen{% endif %}{{ m.content }}{% endfor %}"
    assert render(source, USER, {"role": "assistant", "content": "x", field: None}) == "hix"


def test_empty_tool_calls_are_left_out() -> None:
    assert render(EACH + "{{ 'tool_calls' in m }}{% endfor %}", USER, assistant(content="x")) == "FalseFalse"


def test_lists_reach_templates_that_read_lists() -> None:
    source = (
        EACH
        + "{% if m.content is string %}({{ m.content }}){% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    assert render(source, USER, {"role": "user", "content": PARTS}) == "(hi)[one][two]"


@pytest.mark.parametrize(
    "source",
    [
        EACH + "{{ m.content }}{% endfor %}",
        EACH + "{{ m.content | trim }}{% endfor %}",
        EACH + "{{ '' + m.content }}{% endfor %}",
        EACH + "{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
        EACH
        + "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}{% endfor %}",
    ],
)
@pytest.mark.parametrize(
    "parts",
    [
        PARTS,
        ["one", {"text": "two"}],
        [{"type": "input_text", "text": "one"}, {"type": "refusal", "refusal": "two"}],
    ],
)
def test_lists_are_joined_for_templates_that_read_text(source: str, parts: Any) -> None:
    assert render(source, {"role": "user", "content": parts}) == "one\ntwo"
    assert render(source, USER, result(parts)) == "hione\ntwo"


def test_text_reaches_templates_that_read_only_lists() -> None:
    source = (
        EACH + "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}{% endfor %}"
    )
    assert render(source, {"role": "system", "content": "s"}, USER) == "[s][hi]"


@pytest.mark.parametrize(
    "content",
    [
        3,
        {"type": "text"},
        [3],
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "text"}],
        [{"type": "text", "text": 3}],
    ],
)
def test_other_contents_are_refused(content: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.content") as caught:
        render(EACH + "{{ m.content }}{% endfor %}", USER, {"role": "user", "content": content})
    assert caught.value.status == 400


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    message = {"role": "developer", "content": "be brief"}
    assert render(EACH + "{{ m.role }}{% endfor %}", message, USER) == "systemuser"
    knows = EACH + "{% if m.role == 'developer' %}D{% else %}{{ m.role }}{% endif %}{% endfor %}"
    assert render(knows, message, USER) == "Duser"


@pytest.mark.parametrize("role", ["asistant", "function", "", "ipython"])
def test_unknown_roles_are_refused(role: str) -> None:
    with pytest.raises(RequestError, match="system, developer, user, assistant, tool") as caught:
        render(EACH + "{{ m.role }}{% endfor %}", USER, {"role": role, "content": "x"})
    assert (caught.value.status, caught.value.param) == (400, "messages[1].role")


def test_a_role_that_the_template_names_is_known() -> None:
    assert (
        render(
            EACH + "{{ 'I' if m.role == \"ipython\" else m.role }}{% endfor %}",
            {"role": "ipython", "content": "x"},
        )
        == "I"
    )


NINE = """{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('9') }}{% endif %}{{ c.id }}{% endfor %}{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('9') }}{% endif %}={{ m.tool_call_id }}{% endif %}{% endfor %}"""  # fmt: skip


@pytest.mark.parametrize(
    "identity", ["call_abc", "x", "chatcmpl-tool-0123456789", "aaaaaaaaé", 'a"b', "abcdefgh1", None]
)
def test_ids_are_of_nine_characters_where_the_template_wants_it(identity: Any) -> None:
    text = render(NINE, USER, assistant(call({}, identity)), result("r", tool_call_id=identity))
    first, _, second = text.partition("=")
    assert first == second and len(first) == 9 and first.isalnum() and first.isascii()
    if identity == "abcdefgh1":
        assert first == identity


def test_ids_and_names_that_are_missing_are_those_of_the_calls() -> None:
    source = (
        EACH
        + "{% for c in m.tool_calls or [] %}{{ c.id }}:{{ c.function.name }} {% endfor %}{% if m.role == 'tool' %}{{ m.tool_call_id }}:{{ m.name }} {% endif %}{% endfor %}"
    )
    chat = [USER, assistant(call({}, "a", "f"), call({}, "b", "g")), result("2", tool_call_id="b"), result("1")]
    assert render(source, *chat) == "a:f b:g b:g a:f "
    text = render(source, USER, assistant(call({}, None, "f"), call({}, None, "g")), result("1"), result("2"))
    one, two, first, second = text.split()
    assert one != two and (first, second) == (one, two)
    assert render(source, USER, result("1", name="h")) == ":h "


SINGLE = EACH + "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}{% endif %}c{{ m.tool_calls[0].id }}{{ m.content }} {% elif m.role == 'tool' %}r{{ m.content }} {% endif %}{% endfor %}"  # fmt: skip


def test_several_calls_reach_templates_that_show_the_first_one_only() -> None:
    source = (
        EACH
        + "{% if m.tool_calls %}c{{ m.tool_calls[0].function.name }} {% elif m.role == 'tool' %}r{{ m.content }} {% endif %}{% endfor %}"
    )
    chat = [USER, assistant(call({}, "a", "f"), call({}, "b", "g")), result("1"), result("2")]
    assert render(source, *chat) == "cf r1 cg r2 "


def test_several_calls_reach_templates_that_show_one_at_a_time() -> None:
    chat = [
        USER,
        assistant(call({}, "a"), call({}, "b"), content="!"),
        result("2", tool_call_id="b"),
        result("1", tool_call_id="a"),
        USER,
    ]
    assert render(SINGLE, *chat) == "ca! r1 cb r2 "


@pytest.mark.parametrize(
    "calls",
    ["f", {"function": {"name": "f"}}, [3], [{}], [{"function": {}}], [{"function": {"name": 3}}], [call({}, 3)]],
)
def test_malformed_calls_are_refused(calls: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.tool_calls"):
        render(TOJSON, USER, {"role": "assistant", "content": "x", "tool_calls": calls})
    with pytest.raises(RequestError, match="function_call"):
        render(
            TOJSON, USER, {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}
        )


def test_control_tokens_in_calls_and_results_stay_text() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.templates["default"] = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    ids = tokenizer.apply_chat_template([USER, assistant(call('{"<|eos|>": "<|bos|>"}')), result("<|im_end|>")])
    assert [t for t in ids if t >= 256] == [258] * 3
    assert tokenizer.decode(ids) == 'hi{"<|eos|>": "<|bos|>"}<|im_end|>'


def test_messages_are_not_changed() -> None:
    chat = [
        {"role": "developer", "content": PARTS},
        assistant(call('{"a": 3}')),
        result([{"type": "text", "text": "r"}]),
    ]
    before = json.dumps(chat)
    conversation(chat, ChatTemplate(TOJSON).traits)
    assert json.dumps(chat) == before
