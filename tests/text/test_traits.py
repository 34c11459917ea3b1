# ruff: noqa: E501 (templates are not wrapped)
"""Small conversations show what a template does, also one that is strict about everything it is given."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.text.chat import ChatTemplate

# Refuses whatever is not exactly as OpenAI's clients write it. CONTENT, ARGUMENTS and SHOWN vary.
STRICT = """
{%- macro no(what) %}{{ raise_exception(what) }}{% endmacro -%}
None of this type is shown.
{%- for t in tools or [] %}
{%- if t.type != 'function' or not t.function.name or t.function.description is not string or t.function.parameters.type != 'object' or t.function.parameters.properties is not mapping %}{{ no('tools') }}{% endif -%}
({{ t.function.name }})
{%- endfor %}
{%- for m in messages %}
{%- if m.content is not defined %}{{ no('content') }}{% endif %}
{%- if m.role == 'assistant' and m.tool_calls is defined %}
{%- set ns = namespace(ids=[]) %}
{%- for c in m.tool_calls %}
{%- if c.type != 'function' or not c.id %}{{ no('call') }}{% endif %}
{%- set ns.ids = ns.ids + [c.id] %}[{{ c.function.name }}ARGUMENTS]
{%- endfor %}
{%- if ns.ids | unique | list | length != ns.ids | length %}{{ no('ids') }}{% endif %}
{%- elif m.role == 'tool' %}
{%- if not m.tool_call_id or not m.name %}{{ no('tool') }}{% endif %}={{ CONTENT }}
{%- elif m.role in ['system', 'user', 'assistant'] %}{{ CONTENT }}
{%- else %}{{ no('role') }}{% endif %}
{%- endfor %}"""


def traits(
    content: str = "m.content", arguments: str = "{{ c.function.arguments | tojson }}", change: Any = ("", "")
) -> Any:
    source = STRICT.replace("CONTENT", content).replace("ARGUMENTS", arguments).replace(*change)
    return ChatTemplate(source).traits


def test_a_strict_template_that_knows_everything() -> None:
    found = traits()
    assert found.takes_system and found.takes_tools and found.shows_calls and found.shows_many_calls
    assert found.takes_null and found.takes_objects and found.takes_broken_arguments and not found.wants_nine
    for role in ("system", "user", "assistant", "tool"):
        assert found.reads_strings(role) and not found.reads_lists(role) and found.knows_role(role)
    assert not found.knows_role("developer")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("({{ t.function.name }})", ""), "takes_tools"),
        (("['system', 'user',", "['user',"), "takes_system"),
        (("[{{ c.function.name }}", "["), "shows_calls"),
        (("={{ m.content }}", "="), "shows_calls"),
        (("in m.tool_calls %}", "in m.tool_calls[:1] %}"), "shows_many_calls"),
        (("{%- set ns = namespace(ids=[]) %}", "{%- set ns = namespace(ids=[]) %}{{ m.content }}"), "takes_null"),
        (
            ("{%- set ns = namespace(ids=[]) %}", "{%- set ns = namespace(ids=[]) %}{{ m.content + '' }}"),
            "takes_null",
        ),
        (("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}"), "takes_objects"),
        (("{{ c.function.arguments | tojson }}", "{{ c.function.arguments + '' }}"), "takes_objects"),
        (
            ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments | items | list }}"),
            "takes_broken_arguments",
        ),
    ],
)
def test_each_thing_that_a_template_does_not_do(change: tuple[str, str], name: str) -> None:
    found = traits(change=change)
    assert getattr(found, name) is False
    others = {"takes_tools", "takes_system", "takes_null", "takes_objects"} - {name}
    assert all(getattr(found, other) for other in others)


def test_ids_of_nine() -> None:
    found = traits(
        change=("{%- set ns.ids", "{% if c.id | length != 9 %}{{ no('nine') }}{% endif %}{%- set ns.ids")
    )
    assert found.wants_nine and found.shows_many_calls and found.takes_objects and found.takes_null


LISTS = "(m.content if m.content is string else m.content | map(attribute='text') | join('|'))"
ONLY_LISTS = "(no('text') if m.content is string else m.content | map(attribute='text') | join('|'))"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_lists_are_read_in_some_roles(role: str) -> None:
    content = f"({LISTS} if m.role == '{role}' else m.content)"
    found = traits(content)
    for other in ("system", "user", "assistant", "tool"):
        assert found.reads_lists(other) == (other == role) and found.reads_strings(other)
    found = traits(content.replace(LISTS, ONLY_LISTS))
    assert found.reads_lists(role) and not found.reads_strings(role)


def test_a_template_that_refuses_whatever_comes_without_tools() -> None:
    found = traits(change=("None of", "{% if not tools %}{{ no('tools') }}{% endif %}"))
    assert found.takes_system and found.takes_tools and found.shows_calls and found.shows_many_calls
    assert found.reads_strings("user") and not found.wants_nine


def test_a_template_that_refuses_everything() -> None:
    found = ChatTemplate("{{ raise_exception('no') }}").traits
    assert not (found.takes_system or found.takes_tools or found.shows_calls or found.shows_many_calls)
    assert found.takes_objects and found.reads_strings("user") and not found.reads_lists("user")
