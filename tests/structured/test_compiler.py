"""Grammars are tried where they can harm nobody."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.core.errors import RequestError
from dovetail.core.structured import StructuredOutputs
from dovetail.structured.compiler import AT_ONCE, WAITING, Compiler, listen
from dovetail.structured.grammar import GrammarError
from dovetail.structured.vocabulary import Vocabulary
from dovetail.structured.worker import MEMORY
from tests.helpers.forms import CALL, END, TOKENS, vocabulary

GOOD = StructuredOutputs(regex="[ab]{2}")
LONG = StructuredOutputs(
    json={"type": "string", "allOf": [{"pattern": f"^(.*a.{{{i}}}b.*|c)$"} for i in range(40)]}
)
RULES = "\n".join(f'r{i}: r{i + 1} r{i + 1} | "x{i}"' for i in range(20_000))
DEEP = StructuredOutputs(grammar=f'start: r0\n{RULES}\nr20000: "a"')  # overflows llguidance's stack


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    _others.update(all_workers())  # of servers that other tests share
    made = Compiler(vocabulary())
    yield made
    made.close()
    assert not children()


_others: set[int] = set()


def children() -> list[int]:
    """Processes that this module's compilers run."""
    return [pid for pid in all_workers() if pid not in _others]


def all_workers() -> list[int]:
    """Processes of this one that run the worker."""
    found = [int(p) for t in Path("/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
    return [p for p in found if b"dovetail.structured.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def check(compiler: Compiler) -> None:
    """The canary: what is good is still good."""
    assert compiler.try_out(GOOD)["source"] == compiler.try_out(GOOD)["source"]


def nested(depth: int, before: str, inner: str, after: str) -> str:
    return before * depth + inner + after * depth


def together(count: int) -> dict[str, Any]:
    """A schema whose plain form has 2^count alternatives."""
    either = lambda i: [{"properties": {f"{n}{i}": {"type": "null"}}} for n in "pq"]  # noqa: E731
    return {"allOf": [{"anyOf": either(i)} for i in range(count)]}


# What has stopped or filled other servers: CVE-2025-48943, -48944, -57809, -58446, CVE-2026-25048, and reports of
# NUL bytes, of empty repetitions, and of compilations that nobody could end.
TROUBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a huge enum": ({"json": {"enum": [f"x{i:06}" for i in range(90_000)]}}, "too big"),
    "a huge enum of numbers": ({"json": {"enum": list(range(100_000))}}, "too big"),
    "many properties": ({"json": {"properties": {f"p{i}": {"type": "null"} for i in range(20_000)}}}, "too large"),
    "2^20 alternatives": ({"json": together(20)}, "too large"),
    "deep schemas": ({"json": nested(127, '{"items":', "{}", "}")}, "recursion limit"),
    "deep expressions": ({"regex": nested(400_000, "(", "a", ")")}, "regex"),
    "deep grammars": ({"grammar": "start: " + nested(400_000, "(", '"a"', ")")}, "nested"),
    "deep options": ({"grammar": "start: " + nested(400_000, "[", '"a"', "]")}, "nested"),
    "deep GBNF": ({"grammar": "root ::= " + nested(400_000, "(", '"a"', ")")}, "GBNF"),
    "a repeated anchor": ({"regex": "^+"}, "no answer but the empty one"),
    "a reference to itself": ({"json": {"$ref": "#"}}, "no answer but the empty one"),
    "references in a circle": (
        {"json": {"$ref": "#/$defs/a", "$defs": {n: {"$ref": f"#/$defs/{m}"} for n, m in ("ab", "ba")}}},
        "no answer but the empty one",
    ),
    "itself among others": ({"json": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}, "no answer"),
    "an unknown type": ({"json": {"type": "banana"}}, "banana"),
    "a bad pattern": ({"json": {"type": "string", "pattern": "("}}, "unclosed"),
    "a pattern that repeats nothing": ({"json": {"type": "string", "pattern": "*a"}}, "repetition"),
    "a large factor": ({"json": {"type": "integer", "multipleOf": 999_999_937}}, "fuel"),
    "another host": ({"json": {"$ref": "http://169.254.169.254/latest"}}, "169.254"),
    "a file": ({"json": {"$ref": "file:///etc/passwd"}}, "passwd"),
    "a bound beyond 64 bits": ({"json": {"type": "integer", "minimum": 10**30}}, "minimum is 1000000"),
    "a bound of draft 4": (
        {"json": {"properties": {"a": {"type": "integer", "minimum": 3, "exclusiveMinimum": True}}}}, "draft 4",
    ),
    "a long substring": ({"grammar": 'start: %regex {"substring_chars": "' + "abcdef" * 30_000 + '"}'}, "too big"),
}  # fmt: skip

HARMLESS: dict[str, dict[str, Any]] = {
    "a property that is named as a bound": {"json": {"type": "object", "properties": {"minimum": True}}},
    "a constant that has a bound's name": {"json": {"const": {"minimum": 10**30, "exclusiveMinimum": True}}},
    "nested repetitions": {"regex": "(?:(?:a{0,10000}){0,10000}){0,10000}"},
    "a NUL": {"regex": "a\0?b"},
    "a NUL in a schema": {"json": {"enum": ["\0", "a"]}},
    "a NUL in a pattern": {"json": {"type": "string", "pattern": "^\0?a$"}},
    "a schema within itself": {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
    "2^30 leaves": {
        "json": {
            "$ref": "#/$defs/a0",
            "$defs": {
                **{
                    f"a{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}
                    for i in range(30)
                },
                "a30": {"type": "null"},
            },
        }
    },
    "10^9 characters": {"json": {"type": "string", "minLength": 10**9}},
    "10^9 items": {"json": {"type": "array", "minItems": 10**9}},
    "2^30 states": {"regex": "(a|b)*a(a|b){30}"},
    "an ambiguous grammar": {"grammar": 'start: e\ne: e e | e e e | "a" | ""'},
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_refused_and_harms_nobody(compiler: Compiler, name: str) -> None:
    form, words = TROUBLE[name]
    with pytest.raises(GrammarError, match=words) as caught:
        compiler.try_out(StructuredOutputs(**form))
    assert len(str(caught.value)) < 600
    check(compiler)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_like_trouble_and_is_none(compiler: Compiler, name: str) -> None:
    tried = compiler.try_out(StructuredOutputs(**HARMLESS[name]))
    assert 0 < tried["bytes"] < 1 << 20
    check(compiler)


@pytest.mark.parametrize(("asked", "words"), [(LONG, "more than 1 seconds"), (DEEP, "nested too deeply")])
def test_what_cannot_be_ended_from_within_is_killed(compiler: Compiler, asked: Any, words: str) -> None:
    pids = children()
    with pytest.raises(GrammarError, match=words):
        compiler.try_out(asked)
    check(compiler)
    assert not pids or children() == pids  # the process itself goes on


def test_grammars_that_take_long_wait_for_each_other_and_delay_nobody(compiler: Compiler) -> None:
    with ThreadPoolExecutor(AT_ONCE + WAITING) as pool:
        slow = [pool.submit(compiler.try_out, LONG) for _ in range(2)]
        check(compiler)
        assert not any(s.done() for s in slow)
        for s in slow:
            with pytest.raises(GrammarError, match="more than 1 seconds"):
                s.result()


def test_only_so_many_that_take_long_may_wait(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.structured.compiler.WAITING", 1)
    own = Compiler(compiler.vocabulary)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(own.try_out, LONG) for _ in range(2)]
        errors = [b.exception() for b in both]
    own.close()
    kinds = sorted(type(e).__name__ for e in errors)
    assert kinds == ["GrammarError", "RequestError"]
    (busy,) = [e for e in errors if isinstance(e, RequestError)]
    assert busy.status == 503 and "try again later" in str(busy)


def test_large_grammars_come_and_go_at_the_same_time(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions and results are larger than pipes, so the process waits for its reader while others write."""
    monkeypatch.setattr("dovetail.structured.compiler.WALL_SECONDS", 600.0)  # to wait for ever is a failure
    forms = [StructuredOutputs(json={"enum": [i], "description": "x" * 500_000}) for i in range(24)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sources = [result["source"] for result in pool.map(compiler.try_out, forms)]
    assert [json.loads(s)["grammars"][0]["json_schema"]["enum"] for s in sources] == [[i] for i in range(24)]


def test_a_process_that_was_killed_is_replaced(compiler: Compiler) -> None:
    check(compiler)
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    check(compiler)
    assert len(children()) == 1 and children() != [pid]


def test_the_end_of_a_process_that_is_killed_while_it_answers_is_noticed() -> None:
    told: list[Any] = []
    owner = SimpleNamespace(put=told.append, lose=lambda: told.append("lost"))
    listen(io.BytesIO(b'{"number": 4}\n{"number": 5, "sou'), lambda: owner)  # type: ignore[arg-type, return-value]
    assert told == [{"number": 4}, "lost"]


def test_who_waits_when_the_process_is_killed_is_served_by_the_next(compiler: Compiler) -> None:
    check(compiler)
    (pid,) = children()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(compiler.try_out, LONG)
        while not Path(f"/proc/{pid}/task/{pid}/children").read_text():
            threading.Event().wait(0.001)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(GrammarError, match="more than 1 seconds"):
            slow.result()
    check(compiler)


def test_nothing_leaks(compiler: Compiler) -> None:
    check(compiler)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for i in range(20):
        compiler.try_out(StructuredOutputs(regex=f"a{{{i + 1}}}"))
        with pytest.raises(GrammarError):
            compiler.try_out(StructuredOutputs(regex="(" * (i + 1)))
    (pid,) = children()
    assert not Path(f"/proc/{pid}/task/{pid}/children").read_text()
    assert len(os.listdir(f"/proc/{pid}/fd")) <= 8
    os.kill(pid, signal.SIGKILL)
    check(compiler)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compiler = Compiler(vocabulary())
    with pytest.raises(RequestError, match="cannot be kept running") as caught:
        compiler.try_out(GOOD)
    assert caught.value.status == 503
    monkeypatch.setattr(sys, "executable", "/no/such/file")
    with pytest.raises(RequestError, match="cannot be kept running"):
        compiler.try_out(GOOD)
    monkeypatch.undo()
    check(compiler)
    compiler.close()


def test_memory_is_limited() -> None:
    code = f"""
import signal
from dovetail.structured.worker import limit
limit()
bytearray({MEMORY - (64 << 20)})
try:
    bytearray({MEMORY + (64 << 20)})
except MemoryError:
    signal.setitimer(signal.ITIMER_PROF, 0.01)
    while True: pass
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGPROF


def test_what_was_compiled_is_measured(compiler: Compiler) -> None:
    small, large = (compiler.try_out(StructuredOutputs(choice=[f"{i:05}" for i in range(n)])) for n in (10, 5000))
    assert 10_000 < small["bytes"] < large["bytes"] / 5
    assert small["seconds"] < large["seconds"] < 1


def test_a_vocabulary_goes_over_a_pipe() -> None:
    file = io.BytesIO()
    vocabulary().write(file)
    file.write(b"next")
    file.seek(0)
    found = Vocabulary.read(file)
    assert (found.tokens, found.special) == (TOKENS, [END, CALL])
    assert file.read() == b"next"
    for cut in (3, 8, 100, len(file.getvalue()) - 5):
        with pytest.raises(EOFError):
            Vocabulary.read(io.BytesIO(file.getvalue()[:cut]))
