"""Compiled grammars are kept within a fixed number of bytes."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.errors import RequestError
from dovetail.core.structured import StructuredOutputs
from dovetail.structured.cache import ENTRY, Grammars
from dovetail.structured.grammar import GrammarError, source
from tests.helpers.examples import examples
from tests.helpers.forms import vocabulary


class Fake:
    """A compiler that says that a grammar has as many kilobytes as its text has characters."""

    def __init__(self) -> None:
        self.vocabulary = vocabulary()
        self.asked: list[str] = []
        self.raises: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.closed = 0

    def try_out(self, asked: StructuredOutputs) -> dict[str, Any]:
        self.asked.append(asked.text)
        assert self.open.wait(20)
        if self.raises is not None:
            raise self.raises
        return {"source": source(asked), "bytes": 1000 * len(asked.text), "seconds": 0.0}

    def close(self) -> None:
        self.closed += 1


def made(limit: int = 1 << 20) -> tuple[Grammars, Fake]:
    fake = Fake()
    return Grammars(lambda: fake, limit), fake  # type: ignore[arg-type, return-value]


def form(count: int) -> StructuredOutputs:
    return StructuredOutputs(regex="a" * count)


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(0, 40))
@examples(60)
def test_those_not_asked_for_longest_go_first(asked: list[int], kilobytes: int) -> None:
    grammars, fake = made(kilobytes * 1000)
    kept: OrderedDict[int, int] = OrderedDict()
    want = []
    for n in asked:
        grammars.compile(form(n))
        if n in kept:
            kept.move_to_end(n)
        else:
            want.append("a" * n)
            if 1000 * n + ENTRY <= grammars.limit:
                kept[n] = 1000 * n + ENTRY
        while sum(kept.values()) > grammars.limit:
            kept.popitem(last=False)
        assert fake.asked == want
        assert grammars.bytes == sum(kept.values()) <= grammars.limit


def test_many_schemas_stay_within_the_limit() -> None:
    grammars, fake = made(50_000)
    for i in range(2000):
        grammars.compile(StructuredOutputs(json={"const": i}))
        assert grammars.bytes <= 50_000
    assert len(fake.asked) == 2000
    fake.raises = GrammarError("x" * 500)
    for i in range(2000):
        with pytest.raises(RequestError):
            grammars.compile(StructuredOutputs(regex=f"a{i}"))
        assert grammars.bytes <= 50_000


def test_what_is_held_is_found_though_it_has_no_room() -> None:
    grammars, fake = made(2000)
    first = grammars.compile(form(5))
    assert grammars.bytes == 0
    assert grammars.compile(form(5)) is first and len(fake.asked) == 1
    del first
    gc.collect()
    grammars.compile(form(5))
    assert len(fake.asked) == 2


def test_who_asks_at_the_same_time_waits_for_the_same() -> None:
    grammars, fake = made()
    fake.open.clear()
    with ThreadPoolExecutor(8) as pool:
        several = [pool.submit(grammars.compile, form(3)) for _ in range(8)]
        fake.open.set()
        found = {id(s.result()) for s in several}
    assert len(found) == 1 and fake.asked == ["aaa"]


def test_a_refusal_is_kept_and_a_failure_is_not() -> None:
    grammars, fake = made()
    fake.raises = RequestError("busy", status=503)
    for _ in range(2):
        with pytest.raises(RequestError, match="busy"):
            grammars.compile(form(3))
    assert len(fake.asked) == 2 and grammars.bytes == 0
    fake.raises = GrammarError("is wrong")
    for _ in range(3):
        with pytest.raises(RequestError, match="structured_outputs: regex: is wrong") as caught:
            grammars.compile(form(3))
        assert (caught.value.status, caught.value.param) == (400, "structured_outputs")
    assert len(fake.asked) == 3
    fake.raises = MemoryError()
    with pytest.raises(MemoryError):
        grammars.compile(form(4))
    fake.raises = None
    grammars.compile(form(4))  # nobody waits for the one that failed


def test_forms_differ_by_all_that_they_say() -> None:
    grammars, fake = made()
    for asked in (
        StructuredOutputs(regex="true"),
        StructuredOutputs(json="true"),
        StructuredOutputs(json=True, disable_any_whitespace=True),
        StructuredOutputs(json=True, whitespace_pattern=" "),
    ):
        grammars.compile(asked)
        grammars.compile(asked)
    assert len(fake.asked) == 4


def test_closing_ends_the_compiler_and_the_next_grammar_makes_another() -> None:
    grammars, fake = made()
    grammars.close()
    grammars.compile(form(1))
    grammars.close()
    grammars.close()
    assert fake.closed == 1
    grammars.compile(form(1))
    grammars.compile(form(2))
