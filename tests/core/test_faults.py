"""The n-th call of anything that a step uses fails: nothing leaks, and every request still gets its text."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.core.engine import Engine
from dovetail.core.seams import Seams
from tests.core.test_planning import fork_of
from tests.core.test_scheduler import Guesser, Shuffled, build, expected, make
from tests.helpers.examples import examples
from tests.helpers.faults import Fault

# What planning and running a step call: (whose method, its name, whether it fails after its work is done).
pytestmark = pytest.mark.filterwarnings("ignore:the drafter failed")
SITES = [
    ("pool", "allocate", False), ("policy", "order", False), ("policy", "shares", False),
    ("policy", "shares", True), ("drafter", "propose", False), ("reuse", "match", False),
    ("executor", "run", False), ("executor", "run", True),
]  # fmt: skip


def engine_of(pages: int, seed: int) -> Engine:
    return build(pages, 12, 4, Seams(drafter=Guesser(seed), policy=Shuffled(seed)))


def owner_of(engine: Engine, name: str) -> object:
    places = {"pool": engine.pool, "reuse": engine.scheduler.reuse, "executor": engine.executor}
    return places.get(name) or getattr(engine.seams, name)


def submit(engine: Engine) -> dict[str, tuple[list[int], int]]:
    """Six requests, of which two share a prompt and two a prefix."""
    jobs = {"a": ([1, 2, 0] * 4, 9), "b": ([1, 2, 0] * 4 + [1], 5), "c": ([2], 12), "d": ([0] * 9, 3)}
    requests = {name: make(engine, name, prompt, n) for name, (prompt, n) in jobs.items()}
    requests["fork"] = fork_of(engine, requests["a"], "fork", 6)
    for r in requests.values():
        engine.add(r)
    engine.requests = requests  # type: ignore[attr-defined]
    return jobs | {"fork": (jobs["a"][0], 6)}


def steps(engine: Engine, most: int) -> None:
    for _ in range(most):
        if not engine.busy:
            return
        with contextlib.suppress(MemoryError):
            engine.step()
        engine.check()


def baseline(engine: Engine) -> None:
    """Nothing is held but what is stored for reuse."""
    engine.check()
    held = sum(map(len, engine.scheduler.reuse.held))
    assert engine.pool.num_free + held == engine.pool.num_pages


@pytest.mark.parametrize(("owner", "name", "after"), SITES)
@given(at=st.integers(1, 40), pages=st.integers(10, 30), seed=st.integers(0, 9))
@examples(25)
def test_a_call_that_fails_once(owner, name, after, at, pages, seed) -> None:
    engine = engine_of(pages, seed)
    jobs = submit(engine)
    Fault(at).breaks(owner_of(engine, owner), name, after)
    steps(engine, 3000)
    assert not engine.busy
    for job, (prompt, n) in jobs.items():
        request = engine.requests[job]  # type: ignore[attr-defined]
        assert (request.output, request.finish_reason) == (expected(prompt, n), "length")
    baseline(engine)


@pytest.mark.parametrize(("owner", "name", "after"), SITES)
@given(at=st.integers(1, 20), pages=st.integers(10, 30), seed=st.integers(0, 9))
@examples(15)
def test_calls_that_fail_for_good(owner, name, after, at, pages, seed) -> None:
    """While they do nothing is lost, and when they are put right all goes on."""
    engine = engine_of(pages, seed)
    jobs = submit(engine)
    repair = Fault(at, always=True).breaks(owner_of(engine, owner), name, after)
    steps(engine, 30)
    for job in ("b", "fork"):
        engine.abort(engine.requests[job])  # type: ignore[attr-defined]
        engine.check()
    repair()
    steps(engine, 3000)
    for job, (prompt, n) in jobs.items():
        request = engine.requests[job]  # type: ignore[attr-defined]
        assert request.output == expected(prompt, n)[: request.num_output]
        assert request.finish_reason in (("length",) if job in "acd" else ("length", "abort"))
    baseline(engine)
