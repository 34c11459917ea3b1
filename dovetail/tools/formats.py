"""How families of models write calls of functions, and which family a chat template is of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dovetail.tools import escaped_calls, json_calls, python_calls
from dovetail.tools.call import Call
from dovetail.tools.frame import Frame
from dovetail.tools.python_calls import Parameters
from dovetail.tools.source import Read, Source

Found = tuple[list[Call], int] | None  # calls and their end, or None: no call begins here
Reader = Callable[[Source, int, Parameters], Read[Found]]


@dataclass(frozen=True)
class Format:
    """A way to write calls.

    frame: how a call is written exactly. marks: spellings that may be control tokens, which are shown to the
    readers only. readers: by the text with which a call begins, what reads from there on. That text counts
    anywhere if it is a mark, and at the beginning of a line otherwise.
    """

    name: str
    frame: Frame
    marks: tuple[str, ...] = ()
    readers: Mapping[str, Sequence[Reader]] = field(default_factory=dict)


def _tagged(source: Source, at: int, known: Parameters, opening: str, closing: str) -> Read[Found]:
    """JSON between two tags. Models forget the closing one, or write one brace too many before it."""
    start = yield from source.after_space(at + len(opening))
    found = yield from json_calls.read(source, start)
    if found is None:
        return None
    calls, end = found
    after = yield from source.after_space(end)
    if (yield from source.char(after)) == "}":
        after = yield from source.after_space(after + 1)
    return calls, after + len(closing) if (yield from source.starts(after, closing)) else end


def _bare(source: Source, at: int, known: Parameters) -> Read[Found]:
    """JSON without any mark: only calls of known functions, which may be separated by semicolons."""
    calls: list[Call] = []
    end = at
    while (yield from json_calls.looks_like_calls(source, at)):
        found = yield from json_calls.read(source, at)
        if found is None or not json_calls.has_arguments(source.text[at : found[1]]):
            break
        if any(call.name not in known for call in found[0]):
            break
        calls += found[0]
        end = found[1]
        at = yield from source.after_space(end)
        if (yield from source.char(at)) != ";":
            break
        at = yield from source.after_space(at + 1)
    return (calls, end) if calls else None


def _marked(source: Source, at: int, known: Parameters, mark: str, closing: str = "") -> Read[Found]:
    """JSON or a list of Python calls after a mark, and before another."""
    start = yield from source.after_space(at + len(mark))
    for read in (json_calls.read, partial(python_calls.read_list, known=known)):
        found = yield from read(source, start)
        if found is not None:
            calls, end = found
            return calls, end + len(closing) * (yield from source.starts(end, closing))
    return None


def _mistral(source: Source, at: int, known: Parameters) -> Read[Found]:
    """[TOOL_CALLS] and a list of objects, or a name and arguments: name[CALL_ID]id[ARGS]{...}."""
    at = yield from source.after_space(at + len("[TOOL_CALLS]"))
    if (yield from source.char(at)) in ("[", "{"):
        return (yield from json_calls.read(source, at))
    end = yield from source.after_word(at, ".-")
    name, at = source.text[at:end], end
    if (yield from source.starts(at, "[CALL_ID]")):
        at = yield from source.after_word(at + len("[CALL_ID]"))
    if (yield from source.starts(at, "[ARGS]")):
        at += len("[ARGS]")
    at = yield from source.after_space(at)
    if not name or (yield from source.char(at)) != "{":
        return None
    stop = yield from json_calls.value_end(source, at)
    call = None if stop is None else json_calls.call_of(name, source.text[at:stop])
    return None if call is None or stop is None else ([call], stop)


def _fenced(source: Source, at: int, known: Parameters) -> Read[Found]:
    """A Markdown fence with JSON calls or Python calls in it, and nothing else."""
    start = at + 3
    end = yield from source.after_word(start)
    language = source.text[start:end]
    at = yield from source.after_space(end)
    if language in ("tool_code", "python"):
        found = yield from _statements(source, at, known)
    elif language in ("json", "tool_call", ""):
        found = yield from _bare(source, at, known)
    else:
        return None
    if found is None:
        return None
    at = yield from source.after_space(found[1])
    if (yield from source.starts(at, "```")):
        return found[0], at + 3
    return found if source.text[at : at + 1] == "" else None


def _statements(source: Source, at: int, known: Parameters) -> Read[Found]:
    """Python calls on lines of their own; each may be printed, or assigned to a variable."""
    calls: list[Call] = []
    end = at
    while True:
        at = yield from source.after_space(at)
        printed = yield from source.starts(at, "print(")
        if printed:
            at = yield from source.after_space(at + len("print("))
        else:
            word = yield from source.after_word(at)
            equals = yield from source.after_space(word)
            if word > at and (yield from source.char(equals)) == "=":
                at = yield from source.after_space(equals + 1)
        found = yield from python_calls.read_call(source, at, known)
        if found is None:
            break
        at = found[1]
        if printed:
            at = yield from source.after_space(at)
            if (yield from source.char(at)) != ")":
                break
            at += 1
        calls.append(found[0])
        end = at
        at = yield from source.after_space(at)
        if (yield from source.char(at)) in (";", ","):
            at += 1
    return (calls, end) if calls else None


def _gemma_function(source: Source, at: int, known: Parameters) -> Read[Found]:
    """<start_function_call>call:name{key:<escape>text<escape>,number:3}<end_function_call>"""
    at += len("<start_function_call>")
    if not (yield from source.starts(at, "call:")):
        return None
    found = yield from escaped_calls.read_call(source, at + len("call:"))
    if found is None:
        return None
    call, end = found
    closed = yield from source.starts(end, "<end_function_call>")
    return [call], end + len("<end_function_call>") * closed


_UNMARKED: Mapping[str, Sequence[Reader]] = {"{": (_bare,), "[": (_bare,), "```": (_fenced,)}

HERMES = Format(
    "hermes",
    Frame('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    ("<tool_call>", "</tool_call>"),
    {
        "<tool_call>": (partial(_tagged, opening="<tool_call>", closing="</tool_call>"),),
        "<tools>": (partial(_tagged, opening="<tools>", closing="</tools>"),),  # Qwen2.5-Coder confuses the two
        **_UNMARKED,
    },
)
LLAMA3 = Format(
    "llama3",
    Frame('{"name": "', '", "parameters": ', "}", "; "),
    ("<|python_tag|>",),
    {"<|python_tag|>": (partial(_marked, mark="<|python_tag|>"),), **_UNMARKED},
)
MISTRAL = Format(
    "mistral",
    Frame('{"name": "', '", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]"),
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    {"[TOOL_CALLS]": (_mistral,), **_UNMARKED},
)
MISTRAL_ARGS = Format(
    "mistral-args",
    Frame("[TOOL_CALLS]", "[ARGS]", "", ""),
    MISTRAL.marks,
    MISTRAL.readers,
)
PYTHONIC = Format(
    "pythonic",
    Frame('{"name": "', '", "parameters": ', "}", ", ", "[", "]"),
    ("<|python_tag|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    {
        "<|python_tag|>": (partial(_marked, mark="<|python_tag|>"),),
        "<|tool_call_start|>": (partial(_marked, mark="<|tool_call_start|>", closing="<|tool_call_end|>"),),
        "{": (_bare,),
        "[": (python_calls.read_list, _bare),
        "```": (_fenced,),
    },
)
GEMMA = Format(
    "gemma",
    Frame('```json\n{"name": "', '", "parameters": ', "}\n```"),
    readers={**_UNMARKED, "[": (python_calls.read_list, _bare)},
)
FUNCTION_GEMMA = Format(
    "function-gemma",
    Frame("<start_function_call>call:", "", "<end_function_call>", ""),
    ("<start_function_call>", "<end_function_call>", "<escape>"),
    {"<start_function_call>": (_gemma_function,), **_UNMARKED},
)
FORMATS = (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PYTHONIC, GEMMA, FUNCTION_GEMMA)

# Templates say how to write calls, in instructions or where they show earlier ones.
_SIGNS: Sequence[tuple[str, Format]] = (
    (r"(?s)\[TOOL_CALLS\].*\[ARGS\]", MISTRAL_ARGS),
    (r"\[TOOL_CALLS\]", MISTRAL),
    (r"<tool_call>", HERMES),
    (r"<start_function_call>", FUNCTION_GEMMA),
    (r"<\|tool_call_start\|>|\[\w*func\w*\(", PYTHONIC),
    (r"(?s)<\|python_tag\|>|<\|start_header_id\|>.*\"parameters\": ", LLAMA3),
    (r"<start_of_turn>", GEMMA),
)


def format_of(template: str) -> Format:
    """The format of a template's family. A template that names none is told to use that of hermes."""
    return next((found for sign, found in _SIGNS if re.search(sign, template)), HERMES)
