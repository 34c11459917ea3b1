"""A client that leaves stops its own work, whatever the state of it, and nobody else's."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from tests.server.serving import SECONDS, Running, until

LONG = "a long prompt " * 20


@pytest.fixture
def running(start) -> Running:
    return start(max_num_seqs=2, max_num_batched_tokens=16)


def body(prompt: str, stream: bool, **fields) -> bytes:
    fields = {"max_tokens": 100, "temperature": 0, "ignore_eos": True, **fields}
    return json.dumps({"prompt": prompt, "stream": stream, **fields}).encode()


def leave(running: Running, connection: socket.socket) -> None:
    """Close it while a step is held, and wait until the engine's thread has been told."""
    connection.close()
    until(lambda: running.service.engine.pending > 0, "the abort")


@pytest.mark.parametrize("stream", [False, True])
def test_in_prefill(running: Running, stream: bool) -> None:
    with running.throttle.held(lambda plan: plan.spans[0].start == 64):
        connection = running.raw(body(LONG, stream))
        assert running.throttle.inside.wait(SECONDS)
        leave(running, connection)
        steps = len(running.throttle.plans)
    running.check_empty()
    assert len(running.throttle.plans) == steps  # the held step was its last


@pytest.mark.parametrize("stream", [False, True])
def test_in_decode(running: Running, stream: bool) -> None:
    with running.throttle.held(lambda plan: len(plan.spans[0].request.output) == 5):
        connection = running.raw(body("short", stream, n=2))
        assert running.throttle.inside.wait(SECONDS)
        leave(running, connection)
        steps = len(running.throttle.plans)
    running.check_empty()
    assert len(running.throttle.plans) == steps


@pytest.mark.parametrize("stream", [False, True])
def test_in_the_queue(running: Running, stream: bool) -> None:
    with running.throttle.held():
        one, two = (running.raw(body(p, False, max_tokens=20)) for p in ("one", "two"))
        assert running.throttle.inside.wait(SECONDS)
        third = running.raw(body("three", stream))
        until(lambda: running.service.gate.requests == 3)
        until(lambda: running.service.engine.pending > 0)
        third.close()
        until(lambda: running.service.gate.requests == 2)
    for connection in (one, two):
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()
    assert not any(s.request.prompt == list(b"three") for plan in running.throttle.plans for s in plan.spans)
    running.check_empty()


def test_neighbours_do_not_notice(running: Running) -> None:
    alone = running.text("a neighbour", max_tokens=40, ignore_eos=True)
    with running.throttle.held(lambda plan: len(plan.spans) == 2):
        stays = running.raw(body("a neighbour", False, max_tokens=40))
        goes = running.raw(body(LONG, True))
        assert running.throttle.inside.wait(SECONDS)
        leave(running, goes)
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        data += stays.recv(65536)
    stays.close()
    assert json.loads(data.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == alone
    running.check_empty()


def test_while_the_prompt_is_tokenized(running: Running) -> None:
    connection = running.raw(body("left at once", False))
    connection.close()
    assert running.text("next", max_tokens=2)
    running.check_empty()


def test_small_requests_do_not_wait_for_large_ones_to_be_tokenized(running: Running, monkeypatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    encode = running.llm.tokenizer.encode

    def slow(text, *arguments, **options):
        if len(text) == 500:
            inside.set()
            assert leave.wait(SECONDS)
        return encode(text, *arguments, **options)

    monkeypatch.setattr(running.llm.tokenizer, "encode", slow)
    large = [running.raw(body("x" * 500, False, user="x" * 300_000)) for _ in range(3)]
    assert inside.wait(SECONDS)
    assert running.text("small", max_tokens=2)
    leave.set()
    for connection in large:
        assert connection.recv(20).startswith(b"HTTP/1.1 400")  # with 100 tokens more than the context
        connection.close()
    running.check_empty()


def test_a_slow_reader_gets_merged_deltas(shared: Running) -> None:
    import asyncio

    from dovetail.core.sampling import SamplingParams
    from dovetail.outputs import Delta
    from dovetail.server.job import Job

    answer = shared.llm.session.prepare("x", SamplingParams(n=2))

    def delta(index: int, text: str, ids: list[int], reason: str | None = None) -> Delta:
        return Delta(answer, index, text, ids, [], reason, None, 0.0)

    async def scenario() -> list[list[Delta]]:
        job = Job([answer], True, 0.0)
        job.accept()
        for i in range(1000):
            job.put(delta(i % 2, "ab"[i % 2], [i]))
        job.put(delta(0, "!", [], "stop"))
        assert not job.ended
        job.put(delta(1, "", [], "length"))
        assert job.ended
        job.fail(RuntimeError("late"))
        job.put(delta(0, "late", []))
        await job.accepted()
        return [batch async for batch in job.deltas()]

    ((first, second),) = asyncio.run(scenario())
    assert first.text == "a" * 500 + "!" and second.text == "b" * 500
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert len(second.token_ids) == 500
