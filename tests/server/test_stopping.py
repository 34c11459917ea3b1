"""Shutdown, failure of the engine, and a full queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

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
    from dataclasses import replace

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
                assert process.wait(SECONDS) == 130
            else:
                text += "".join(stream)
                assert text.endswith("data: [DONE]\n\n") and '"length"' in text
                assert process.wait(SECONDS) == 0
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
