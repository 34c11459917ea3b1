"""Connections that say nothing, half of something, or too many: they end, and the others are served."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest

from dovetail.server import connections, exchange
from tests.server.serving import NAME, SECONDS, Running, until

HALF = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def connect(running: Running, data: bytes = b"") -> socket.socket:
    found = socket.create_connection(running.listener.getsockname()[:2], timeout=SECONDS)
    found.sendall(data)
    return found


def rest(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    connection.close()
    return data


def test_silent_and_half_sent_heads_end(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.05)
    running: Running = start()
    silent, half = connect(running), connect(running, HALF)
    assert rest(silent) == b""
    late = rest(half)
    assert late.startswith(b"HTTP/1.1 408") and json.loads(late.partition(b"\r\n\r\n")[2])["error"]["code"] == 408
    second = connect(running, HEALTH + HALF)  # the head of a second request
    assert rest(second).startswith(b"HTTP/1.1 200")
    kept = connect(running, HEALTH)
    assert rest(kept).startswith(b"HTTP/1.1 200")
    until(lambda: not running.server.server_state.connections)


def test_a_head_that_drips_does_not_move_its_deadline(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    running: Running = start()
    connection = connect(running, HALF)
    connection.settimeout(0.005)
    late = b""
    while not late:
        with suppress(TimeoutError):
            late = connection.recv(65536)
        with suppress(OSError):
            connection.sendall(b"x")
    connection.close()
    assert late.startswith(b"HTTP/1.1 408")


def test_an_answer_that_nobody_reads_is_given_up(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FLUSH_SECONDS", 0.05)
    running: Running = start()
    body = json.dumps({"tokens": [97] * 1_000_000}).encode()
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which connections inherit
    connection = running.raw(body, "/detokenize")
    until(lambda: running.server.server_state.total_requests == 1)
    until(lambda: not running.server.server_state.connections)
    connection.close()
    assert running.text("x", max_tokens=1) is not None


def test_a_stream_that_nobody_reads_is_given_up(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(exchange, "WRITE_SECONDS", 0.05)
    running: Running = start()
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    fields = {"prompt": "x", "n": 32, "max_tokens": 200, "ignore_eos": True, "logprobs": 5, "stream": True}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(running.listener.getsockname()[:2])
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: running.service.gate.requests == 1)
        until(lambda: not running.server.server_state.connections)
    running.check_empty()


def test_the_longest_idle_makes_room(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "GRACE_SECONDS", 0.0)
    running: Running = start(connections=8)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(running)) for _ in range(20)]
        until(lambda: len(running.server.server_state.connections) == 8)
        assert running.text("x", max_tokens=1) is not None
        assert [c.recv(1) for c in idle[:13]] == [b""] * 13
        assert idle[-1].sendall(HEALTH) is None and idle[-1].recv(12) == b"HTTP/1.1 200"


def test_busy_ones_stay_and_the_next_are_told(start) -> None:
    running: Running = start(connections=3, max_num_seqs=8)
    body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        with running.throttle.held():
            busy = [pool.submit(running.post, "/v1/completions", **body) for _ in range(3)]
            until(lambda: running.service.gate.requests == 3)
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models")):
                refused = httpx.request(method, running.url + path, json=body, timeout=SECONDS)
                assert refused.status_code == 503 and refused.json()["error"]["type"] == "unavailable_error"
                assert refused.headers["connection"] == "close" and "retry-after" in refused.headers
        assert [future.result(SECONDS).status_code for future in busy] == [200] * 3
    assert running.post("/v1/completions", **body).status_code == 200


def test_accepting_pauses_while_descriptors_are_missing(start, monkeypatch, caplog) -> None:
    monkeypatch.setattr(connections, "PAUSE_SECONDS", 0.05)
    running: Running = start()
    tried, accept = [], running.loop.sock_accept

    async def failing(listener):
        tried.append(1)
        if len(tried) <= 3:
            raise OSError(24, "Too many open files")
        return await accept(listener)

    monkeypatch.setattr(running.loop, "sock_accept", failing)
    assert httpx.get(f"{running.url}/health").status_code == 200  # was being waited for already
    assert running.text("x", max_tokens=1) is not None
    assert len(tried) >= 4 and caplog.text.count("Too many open files") == 3


PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 160))
from dovetail.cli import main
sys.argv[0] = "dovetail"
main()
"""


def test_more_clients_than_descriptors(tiny_model) -> None:
    """300 silent connections to a server that may open 160 files; requests beside them are answered."""
    command = [sys.executable, "-c", PROGRAM, "serve", str(tiny_model), "--port", "0", "--threads", "1"]
    command += ["--served-model-name", NAME, "--kv-memory", "4MiB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    try:
        while not log or "Serving" not in log[-1]:
            log.append(process.stderr.readline())
            assert log[-1], "".join(log)
        host, _, port = log[-1].split()[-1].removeprefix("http://").rpartition(":")
        with ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=SECONDS))
            body = {"prompt": "x", "max_tokens": 1}
            address = f"http://{host}:{port}/v1/completions"
            until(lambda: httpx.post(address, json=body, timeout=SECONDS).status_code == 200)
        process.terminate()
        log += process.communicate(timeout=SECONDS)[1].splitlines()
        assert process.returncode == 0 and len(log) < 100, log[-5:]
    finally:
        process.kill()
    assert any("open files allow" in line for line in log)


def test_limits_of_this_process() -> None:
    soft, hard = connections.resource.getrlimit(connections.resource.RLIMIT_NOFILE)
    assert connections.MIN_CONNECTIONS <= connections.connection_limit() <= max(soft, 8)
    code = (
        "import resource as r; from dovetail.server.connections import *\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, (100, {min(hard, 500)})); raise_descriptor_limit()\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0], connection_limit())"
    )
    raised, places = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(raised) == min(hard, 500) and int(raised) - 100 < int(places) < int(raised) - connections.RESERVE
