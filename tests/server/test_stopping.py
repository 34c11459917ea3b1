"""Shutdown, failure of the engine, and a full queue."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.server import engine_thread, http_server
from dovetail.server.service import ServiceOptions
from tests.server.serving import NAME, SECONDS, Running, until

PROGRAM = "import sys; from dovetail.cli import main; sys.argv[0] = 'dovetail'; main()"


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def test_draining_refuses_new_work_and_finishes_the_old(start) -> None:
    running: Running = start()
    with ThreadPoolExecutor(2) as pool:
        with running.throttle.held():
            old = pool.submit(running.post, "/v1/completions", prompt="old", max_tokens=5, ignore_eos=True)
            assert running.throttle.inside.wait(SECONDS)
            running.drain()
            until(lambda: running.service.gate.draining)
            refused = running.post("/v1/completions", prompt="new")
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == 503
            assert httpx.get(f"{running.url}/health").status_code == 503
        answer = old.result(SECONDS)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
    assert running.join() == 0


def test_what_outlives_the_grace_period_ends_with_an_error(start) -> None:
    running: Running = start(ServiceOptions((NAME,), shutdown_timeout=0.05))
    with ThreadPoolExecutor(2) as pool:
        with running.throttle.held(lambda plan: len(plan.spans[0].request.output) == 3):
            fields = {"prompt": "old", "max_tokens": 400, "ignore_eos": True}
            stream = pool.submit(running.post, "/v1/completions", stream=True, **fields)
            whole = pool.submit(running.post, "/v1/completions", **fields)
            assert running.throttle.inside.wait(SECONDS)
            until(lambda: running.service.gate.requests == 2)
            running.drain()
            until(lambda: running.service.engine.pending > 0, "the abort")
        *_, error, done = events(stream.result(SECONDS))
        assert done == "[DONE]" and json.loads(error)["error"]["code"] == 503
        assert whole.result(SECONDS).status_code == 503
    assert running.join() == 0


def test_a_failing_engine_ends_streams_and_the_process(start) -> None:
    running: Running = start()
    with ThreadPoolExecutor(2) as pool:
        with running.throttle.held(lambda plan: len(plan.spans[0].request.output) == 2):
            fields = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
            stream = pool.submit(running.post, "/v1/completions", stream=True, **fields)
            assert running.throttle.inside.wait(SECONDS)
            whole = pool.submit(running.post, "/v1/completions", **fields)
            until(lambda: running.service.gate.requests == 2)
            running.throttle.error = RuntimeError("secret detail")
        *_, error, done = events(stream.result(SECONDS))
        assert done == "[DONE]" and json.loads(error)["error"]["type"] == "server_error"
        answer = whole.result(SECONDS)
        assert answer.status_code in (500, 503) and "secret" not in answer.text + error
    assert not running.service.engine.healthy
    assert running.join() == 1


def test_a_request_whose_logits_are_nan_fails_alone(start) -> None:
    running: Running = start()
    inner = running.throttle.inner.run

    def poisoned(plan):
        result = inner(plan)
        spans = [
            replace(r, tokens=(), error="NaN") if s.sample and s.request.prompt == list(b"bad") else r
            for s, r in zip(plan.spans, result.spans, strict=True)
        ]
        return replace(result, spans=spans)

    running.throttle.inner.run = poisoned
    answer = running.post("/v1/completions", prompt=["good", "bad"], max_tokens=5)
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "NaN"
    stream = running.post("/v1/completions", prompt="bad", max_tokens=5, stream=True)
    assert stream.text.count("[DONE]") == 1 and stream.text.count('"error"') == 1
    assert running.text("good", max_tokens=2)
    running.check_empty()


def test_a_full_queue(start) -> None:
    running: Running = start(ServiceOptions((NAME,), max_queue=1), max_num_seqs=2)
    assert running.post("/v1/completions", prompt="x", n=4).status_code == 400  # more than ever fits
    with ThreadPoolExecutor(2) as pool:
        with running.throttle.held():
            first = pool.submit(running.post, "/v1/completions", prompt="x", n=2, max_tokens=2)
            assert running.throttle.inside.wait(SECONDS)
            full = running.post("/v1/completions", prompt="x", n=2)
            assert full.status_code == 503 and full.headers["retry-after"] == "1"
        assert first.result(SECONDS).status_code == 200
    running.check_empty()


def end_of(answer: httpx.Response, choices: int) -> int:
    """How an answer ended: 200 if all its choices did, else the code of the error. It has no second end."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        found = answer.json()
        if answer.status_code == 200:
            assert [c["index"] for c in found["choices"] if c["finish_reason"]] == list(range(choices))
        return answer.status_code
    *parts, done = events(answer)
    assert done == "[DONE]" and "[DONE]" not in parts
    ended: list[int] = []
    for part in map(json.loads, parts[:-1]):
        (choice,) = part["choices"]
        assert choice["index"] not in ended, "nothing may come after an end"
        if choice["finish_reason"] is not None:
            ended.append(choice["index"])
    last = json.loads(parts[-1])
    if "error" in last:
        return last["error"]["code"]
    assert sorted([*ended, last["choices"][0]["index"]]) == list(range(choices))
    return 200


def test_a_second_signal_ends_everything_with_an_error_though_the_engine_is_in_a_step(start) -> None:
    running: Running = start()
    with ThreadPoolExecutor(3) as pool:
        with running.throttle.held(lambda plan: len(plan.spans[0].request.output) == 3):
            fields = {"max_tokens": 400, "ignore_eos": True}
            begun = pool.submit(running.post, "/v1/completions", prompt="x", stream=True, **fields)
            assert running.throttle.inside.wait(SECONDS)
            waits = pool.submit(running.post, "/v1/completions", prompt="y", stream=True, n=3, **fields)
            whole = pool.submit(running.post, "/v1/completions", prompt="x", **fields)
            half = running.raw(b"", promised=10)  # its body does not come
            until(lambda: running.service.gate.requests == 4)
            running.drain()
            until(lambda: running.service.gate.draining)
            running.drain()
            assert [end_of(f.result(SECONDS), 1) for f in (begun, waits, whole)] == [503] * 3
            assert half.recv(65536).startswith(b"HTTP/1.1 503")
            half.close()
        assert running.join() == 130


REQUESTS = st.fixed_dictionaries({
    "prompt": st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=3),
    "n": st.integers(1, 3), "max_tokens": st.integers(1, 12), "stream": st.booleans(),
})  # fmt: skip


FAULTS = st.sampled_from(["none", "fail", "drain", "drain twice", "nan"])


@given(st.lists(REQUESTS, min_size=1, max_size=5), FAULTS, st.integers(0, 10))
@settings(max_examples=12, deadline=None)
def test_every_request_ends_exactly_once(tiny_model, requests: list[dict], fault: str, step: int) -> None:
    """Whatever happens in a step of the engine: its failure, signals, or logits that are no numbers."""
    running = Running(tiny_model, ServiceOptions((NAME,), shutdown_timeout=0.01))
    inner, steps = running.throttle.inner.run, itertools.count()

    def run(plan):
        here = next(steps) == step
        for _ in range({"drain": 1, "drain twice": 2}.get(fault, 0) if here else 0):
            running.drain()
        if here and fault == "fail":
            raise RuntimeError("no")
        result = inner(plan)
        if not (here and fault == "nan"):
            return result
        return replace(result, spans=[replace(r, tokens=(), error="NaN") if r.tokens else r for r in result.spans])

    running.throttle.inner.run = run
    admitted, request = [], running.service.gate.request

    @contextmanager
    def counted():
        with request():
            admitted.append(1)
            yield

    running.service.gate.request = counted
    try:
        with ThreadPoolExecutor(5) as pool:
            sent = [pool.submit(attempt, running, {"ignore_eos": True, "seed": 1, **r}) for r in requests]
            answers = [future.result(SECONDS) for future in sent]
        assert sum(answer is not None for answer in answers) >= len(admitted)
        for answer, asked in zip(answers, requests, strict=True):
            code = end_of(answer, asked["n"] * len(asked["prompt"])) if answer is not None else 503
            assert code in {"none": (200,), "nan": (200, 500), "fail": (200, 500, 503)}.get(fault, (200, 503)), (
                code
            )
            assert answer is not None or fault not in ("none", "nan")
        if next(steps) > step and fault in ("fail", "drain", "drain twice"):
            assert running.join() == {"fail": 1, "drain": 0, "drain twice": 130}[fault]
    finally:
        running.stop()


def attempt(running: Running, body: dict) -> httpx.Response | None:
    """The answer; None if the server had ended before it saw the request. Once it has begun, it must end."""
    with ExitStack() as stack:
        try:
            url = f"{running.url}/v1/completions"
            answer = stack.enter_context(httpx.stream("POST", url, json=body, timeout=SECONDS))
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return None
        answer.read()
        return answer


def test_a_job_that_cannot_be_submitted_ends_with_the_engine(start, monkeypatch: pytest.MonkeyPatch) -> None:
    running: Running = start()

    def broken(answer, arrival=None):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(running.llm.session, "submit", broken)
    answer = running.post("/v1/completions", prompt="x")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert running.join() == 1


def test_a_stuck_engine_reads_as_dead_and_ends_the_process_with_an_error(start, monkeypatch) -> None:
    running: Running = start(ServiceOptions((NAME,), shutdown_timeout=0.01))
    engine = running.service.engine
    assert engine.patience == engine_thread.FIRST_STALL_SECONDS
    running.text("x", max_tokens=4)
    health = f"{running.url}/health"
    assert httpx.get(health).status_code == 200
    assert engine_thread.STALL_SECONDS <= engine.patience != engine_thread.FIRST_STALL_SECONDS
    for name in ("STALL_SECONDS", "STALL_FACTOR", "STOP_SECONDS"):
        monkeypatch.setattr(engine_thread, name, 0.01)
    monkeypatch.setattr(http_server, "LAST_SECONDS", 0.01)
    with ThreadPoolExecutor(1) as pool, running.throttle.held():
        stream = pool.submit(running.post, "/v1/completions", prompt="x", stream=True)
        assert running.throttle.inside.wait(SECONDS)
        until(lambda: httpx.get(health).status_code == 503)
        running.drain()
        assert end_of(stream.result(SECONDS), 1) == 503
        assert running.join() == 1


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm(tiny_model, times: int) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(tiny_model), "--port", "0", "--threads", "1"]
    command += ["--served-model-name", NAME, "--shutdown-timeout", "20s", "--kv-memory", "4MiB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or "Serving" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        address = lines[-1].split()[-1]
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 1 if times == 1 else 64}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=SECONDS) as response:
            stream = response.iter_text()
            text = next(stream)
            os.kill(process.pid, signal.SIGTERM)
            if times == 2:
                until(lambda: httpx.get(f"{address}/health").status_code == 503)
                os.kill(process.pid, signal.SIGTERM)
            text += "".join(stream)
        assert text.endswith("data: [DONE]\n\n") and ('"error"' in text) == (times == 2)
        assert process.wait(SECONDS) == (0 if times == 1 else 130)
    finally:
        process.kill()
        process.communicate()
    assert any("max_model_len" in line for line in lines)


def test_a_port_in_use_is_known_at_once(tiny_model, shared: Running) -> None:
    port = str(shared.listener.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "serve", str(tiny_model), "--port", port], capture_output=True, text=True
    )
    assert done.returncode == 2 and "cannot listen" in done.stderr and "Traceback" not in done.stderr
