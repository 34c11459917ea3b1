"""Several threads on one engine, and a forked child that has none."""

from __future__ import annotations

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dovetail import LLM, ForkError, SamplingParams
from dovetail.host.turns import Turns

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [f"thread {i} says " + "abc" * i for i in range(4)]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, dtype="float32", threads=1, kv_memory="1MiB")


class Watched:
    """The engine's methods, which note when two threads are in them at once."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.most = 0, 0
        for owner, name in ((llm.engine, "add"), (llm.engine, "abort"), (llm.engine.executor, "run")):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, call):
        def watched(*args):
            self.inside += 1
            self.most = max(self.most, self.inside)
            for _ in range(20):
                time.sleep(0)  # every other thread may go on
            self.most = max(self.most, self.inside)
            try:
                return call(*args) if self.most == 1 else pytest.fail("two threads are in the engine")
            finally:
                self.inside -= 1

        return watched


def complete(llm: LLM, prompt: str) -> list[int]:
    return llm.generate(prompt, PARAMS)[0].outputs[0].token_ids


def follow(llm: LLM, prompt: str) -> list[int]:
    return list(llm.stream(prompt, PARAMS))[-1].outputs[0].token_ids


def test_threads_get_what_they_would_get_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = [complete(llm, p) for p in PROMPTS]
    watched = Watched(llm, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        for call in (complete, follow):
            assert list(pool.map(lambda p, call=call: call(llm, p), PROMPTS)) == want
        assert list(pool.map(lambda p: complete(llm, p), PROMPTS * 2)) == want * 2
    assert watched.most == 1
    assert not llm.session.busy
    llm.engine.check()


def test_a_step_advances_everybody(llm: LLM) -> None:
    """What several threads ask for runs in one batch."""
    answers = [llm.session.submit(llm.session.prepare(p, PARAMS)) for p in PROMPTS]
    thread = threading.Thread(target=complete, args=(llm, "something else"))
    thread.start()
    thread.join()
    assert all(a.finished for a in answers)


def test_turns_are_taken_in_order() -> None:
    turns, order, ready = Turns(), [], threading.Semaphore(0)

    def take(name: int) -> None:
        ready.release()
        with turns:
            order.append(name)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(4)]
    with turns:
        for i, thread in enumerate(threads):
            thread.start()
            ready.acquire()
            while turns.queued < i + 2:
                time.sleep(0)
        with pytest.raises(RuntimeError, match="already"), turns:
            pass
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]
    assert turns.queued == 0 and not turns.mine
    with turns:
        assert turns.queued == 1 and turns.mine


def test_an_abandoned_stream_may_be_collected_in_the_midst_of_a_step(llm: LLM) -> None:
    class Knot:
        pass

    run = llm.engine.executor.run
    knot = Knot()
    knot.stream, knot.self = llm.stream("abandoned", PARAMS), knot
    next(knot.stream)

    def collecting(plan):
        nonlocal knot
        knot = None
        gc.collect()
        return run(plan)

    llm.engine.executor.run = collecting
    try:
        assert len(complete(llm, "hello")) == 12
    finally:
        llm.engine.executor.run = run
    assert not llm.session.busy and not llm.session.answers
    llm.engine.check()


def test_a_forked_child_is_told_so(llm: LLM) -> None:
    complete(llm, "before")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was raised"
        try:
            complete(llm, "after")
        except ForkError as error:
            said = str(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert f"made in process {os.getpid()}" in said and "'spawn'" in said
