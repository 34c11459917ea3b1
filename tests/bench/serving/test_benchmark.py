"""The command against servers that a test controls, and against the real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dovetail.bench.serving.client import Client
from tests.bench.serving.fake_server import FakeServer, chunk, event, ordinary, stream, usage, whole
from tests.helpers.program import SMALL, argv, call

FAST = ("--rate", "200", "--requests", "12", "--input-tokens", "5:9", "--output-tokens", "3:4", "--warmup", "0")


def serve(target: str, *options: object, code: int = 0) -> tuple[dict[str, Any], Any]:
    """Run the command; its JSON and its whole result."""
    result = call("bench", "serve", target, *options, "--json", "-")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout.splitlines()[-1]), result


def refused(*arguments: object) -> str:
    result = call("bench", "serve", *arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture
def fake():
    with FakeServer() as server:
        yield server


def test_an_ordinary_load(fake, tmp_path) -> None:
    records = tmp_path / "records.jsonl"
    found, result = serve(fake.url + "/v1/", *FAST, "--slo", "ttft=20s", "--records", records)
    (point,) = found["points"]
    assert found["suite"] == "serve" and {"machine", "versions", "commit", "date"} <= found.keys()
    assert found["targets"][0]["model"] == "fake" and not found["targets"][0]["started_here"]
    assert found["slo"] == {"ttft_ms": 20000.0} and found["ended_early"] is None
    assert (point["requests"], point["completed"], point["errors"]) == (12, 12, {})
    asked = [b["max_tokens"] for b in fake.bodies]
    assert point["output_tokens"] == point["max_tokens"] == sum(asked) and set(asked) == {3, 4}
    assert point["input_tokens"] == sum(len(b["prompt"].split()) for b in fake.bodies)
    assert (point["tokens_counted_by"], point["slo_attainment"], point["cached_tokens"]) == ("usage", 1.0, None)
    assert all(point[f"{name}_ms"]["p99"] >= point[f"{name}_ms"]["p50"] > 0 for name in ("ttft", "tpot", "e2e"))
    assert "achieved/s" in result.stdout and "12 of 12 answered" in result.stderr
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["request"] for line in lines] == list(range(12))
    assert sum(line["output_tokens"] for line in lines) == sum(asked)
    assert all(a["arrival_s"] <= b["arrival_s"] for a, b in pairwise(lines))
    body = fake.bodies[0]
    assert body["stream"] is body["ignore_eos"] is body["stream_options"]["include_usage"] is True
    assert (body["model"], body["temperature"]) == ("fake", 0)


def test_chat_keys_and_names(fake) -> None:
    options = ("--endpoint", "chat", "--api-key", "secret", "--model", "mine", "--no-ignore-eos")
    found, _ = serve(fake.url, *FAST, *options)
    assert found["points"][0]["completed"] == 12
    assert found["points"][0]["output_tokens"] == sum(b["max_tokens"] for b in fake.bodies)
    body = fake.bodies[0]
    assert body["messages"][0]["role"] == "user" and body["model"] == "mine" and "ignore_eos" not in body
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(found)


def test_ids_are_those_of_the_tokenizer(fake, tiny_model) -> None:
    serve(fake.url, *FAST, "--tokenizer", tiny_model, "--prompts", "ids")
    assert all(type(token) is int and 0 <= token < 256 for b in fake.bodies for token in b["prompt"])
    assert all(5 <= len(b["prompt"]) <= 9 for b in fake.bodies)


def test_usage_is_not_needed() -> None:
    async def without(server, number, request, body):
        return await stream(request, [e for e in whole(body) if b'"prompt_tokens"' not in e])

    with FakeServer(without) as server:
        point = serve(server.url, *FAST)[0]["points"][0]
        assert point["tokens_counted_by"] == "chunks"
        assert point["output_tokens"] == sum(b["max_tokens"] for b in server.bodies)


def test_odd_streams_are_understood() -> None:
    """CRLF, comments, events cut and glued, characters cut in two, no [DONE], no blank line at the end."""

    async def odd(server, number, request, body):
        events = [b": ping\r\n\r\n", event({"choices": []}), event(chunk("")), event(chunk("\u00e9\u00fc"))]
        events += [event(chunk(" b", finish_reason="length")), event(usage(7, 2))[:-2]]
        data = b"".join(events).replace(b"\n", b"\r\n" if number % 2 else b"\n")
        size = number + 1
        return await stream(request, [data[i : i + size] for i in range(0, len(data), size)])

    with FakeServer(odd) as server:
        point = serve(server.url, *FAST)[0]["points"][0]
    assert (point["completed"], point["output_tokens"], point["input_tokens"]) == (12, 24, 84)


ANSWERS: dict[str, Any] = {
    "HTTP 503": lambda request: web.json_response({"error": {"message": "too busy"}}, status=503),
    "HTTP 400": lambda request: web.Response(text="what?", status=400),
    "no stream": lambda request: web.json_response({"choices": [{"text": "x"}]}),
    "cut off": lambda request: stream(request, [event(chunk("x"))]),
    "bad event": lambda request: stream(request, [event(b"{"), event(b"[DONE]")]),
    "error event": lambda request: stream(
        request, [event({"error": {"message": "engine failed"}}), event(b"[DONE]")]
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_failed_requests_are_counted_by_kind_and_stop_nothing(kind) -> None:
    async def every_third(server, number, request, body):
        if number % 3:
            return await ordinary(server, number, request, body)
        answer = ANSWERS[kind](request)
        return await answer if asyncio.iscoroutine(answer) else answer

    with FakeServer(every_third) as server:
        found, result = serve(server.url, *FAST)
    (point,) = found["points"]
    assert point["completed"] == 8
    assert {name: error["count"] for name, error in point["errors"].items()} == {kind: 4}
    assert f"4 {kind}: " in result.stdout


def test_requests_that_take_too_long_are_given_up() -> None:
    async def never(server, number, request, body):
        await server.gate.wait()
        return web.Response()

    with FakeServer(never) as server:
        found, _ = serve(server.url, *FAST, "--timeout", "50ms", code=1)
        server.loop.call_soon_threadsafe(server.gate.set)
    assert found["points"][0]["errors"]["timeout"]["count"] == 12


def test_a_server_that_stops_in_the_middle() -> None:
    async def mortal(server, number, request, body):
        if number < 20:
            return await ordinary(server, number, request, body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event(chunk("half")))
        if number == 24:
            await server.die()
        await server.gate.wait()
        return response

    with FakeServer(mortal) as server:
        options = ("--rate", "100,200", "--requests", "400", "--output-tokens", "3", "--input-tokens", "3")
        found, result = serve(server.url, *options, "--warmup", "0", code=1)
    (point,) = found["points"]  # the second rate is not tried
    assert point["completed"] == 20 and found["ended_early"] == "server gone"
    errors = {name: error["count"] for name, error in point["errors"].items()}
    assert errors["connection lost"] >= 5 and errors["not sent"] > 100
    assert 20 + sum(errors.values()) == 400
    assert "server is gone" in result.stderr and "not sent" in result.stdout


def test_a_server_that_is_gone_at_the_end_is_noticed() -> None:
    async def mortal(server, number, request, body):
        await server.die()
        return web.Response()

    with FakeServer(mortal) as server:
        found, _ = serve(server.url, "--requests", "1", "--rate", "max", "--warmup", "0", code=1)
    assert found["ended_early"] == "server gone"


def test_all_at_once_and_limited_concurrency() -> None:
    async def gather(server, number, request, body):
        # Only an open loop gets all twelve here before the first is answered.
        if number == 11:
            server.gate.set()
        await server.gate.wait()
        return await ordinary(server, number, request, body)

    base = ("--rate", "max", "--requests", "12", "--output-tokens", "3", "--input-tokens", "3", "--warmup", "0")
    with FakeServer(gather) as server:
        point = serve(server.url, *base)[0]["points"][0]
    assert (point["rate"], point["offered_rate"], point["peak_concurrency"]) == ("max", None, 12)
    with FakeServer() as server:
        point = serve(server.url, *base, "--max-concurrency", "3")[0]["points"][0]
    assert (point["completed"], point["peak_concurrency"]) == (12, 3)


def named(name: str, turns: list[str]) -> Any:
    """Answers that note in `turns` whose they are."""

    async def answer(server, number, request, body):
        turns.append(name)
        return await ordinary(server, number, request, body)

    return answer


def test_two_targets_get_the_same_load_in_turns(tmp_path) -> None:
    turns: list[str] = []
    plot = tmp_path / "plot.svg"
    with FakeServer(named("a", turns)) as a, FakeServer(named("b", turns)) as b:
        options = ("--rate", "100..200", "--requests", "5", "--input-tokens", "9", "--output-tokens", "3")
        found, result = serve(a.url, *options, "--against", b.url, "--plot", plot, "--warmup", "1")
    assert "".join(turns) == "ab" + "aaaaabbbbb" + "bbbbbaaaaa"
    assert [row["rate"] for row in found["ratios"]] == [100.0, 200.0]
    assert a.bodies == b.bodies
    prompts = [body["prompt"] for body in a.bodies]
    assert len(set(prompts)) == 11
    assert [(p["target"], p["rate"]) for p in found["points"]] == [
        (server.url, rate) for rate in (100.0, 200.0) for server in (a, b)
    ]
    assert f"{a.url} against {b.url}" in result.stdout
    assert plot.read_text().count("offered requests per second") == 1


def test_rounds_alternate_and_ratios_have_a_spread(tmp_path) -> None:
    turns: list[str] = []
    records = tmp_path / "records.jsonl"
    with FakeServer(named("a", turns)) as a, FakeServer(named("b", turns)) as b:
        options = ("--rate", "200", "--requests", "3", "--input-tokens", "9", "--output-tokens", "3")
        options += ("--rounds", "3", "--warmup", "0", "--records", records)
        found, _ = serve(a.url, *options, "--against", b.url)
    assert "".join(turns) == "aaabbb" + "bbbaaa" + "aaabbb"
    assert a.bodies == b.bodies and len({body["prompt"] for body in a.bodies}) == 9
    assert found["rounds"] == 3 and [p["target"] for p in found["points"]] == [a.url, b.url]
    for point in found["points"]:
        low, high = point["spread"]["ttft_ms"]["p50"]
        assert low <= point["ttft_ms"]["p50"] <= high and point["completed"] == 3
    (row,) = found["ratios"]
    for ratio in (row["achieved_rate"], row["ttft_ms"]["p50"], row["e2e_ms"]["p50"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert sorted((line["round"], line["request"]) for line in lines if line["target"] == a.url) == [
        (number, request) for number in range(3) for request in range(3)
    ]


def test_a_rate_without_an_arrival_is_left_out(fake) -> None:
    short = ("--duration", "100ms", "--input-tokens", "3", "--output-tokens", "3", "--warmup", "0")
    found, result = serve(fake.url, "--rate", "0.01,200", *short)
    assert [p["rate"] for p in found["points"]] == [200.0]
    assert "rate 0.01 is left out: no request arrives within --duration" in result.stderr
    assert "no request arrives within --duration at any rate" in refused(fake.url, "--rate", "0.01", *short)


def test_a_rate_that_nobody_named(fake) -> None:
    async def slow(server, number, request, body):
        async with server.lock:
            await asyncio.sleep(0.02)  # its capacity: at most 50 requests per second
        return await ordinary(server, number, request, body)

    fake.lock = asyncio.Lock()
    fake.answer = slow
    options = ("--rate", "auto", "--requests", "20", "--input-tokens", "3", "--output-tokens", "3")
    found, result = serve(fake.url, *options)
    rates = [p["rate"] for p in found["points"]]
    doubled = [rate for rate in rates if rate in (rates[0] * 2**i for i in range(16))]
    assert doubled == sorted(doubled) and 1 <= len(doubled) <= len(rates) <= len(doubled) + 2
    assert [p["saturated"] for p in found["points"][: len(doubled)]] == [False] * (len(doubled) - 1) + [True]
    assert "highest rate that it keeps up with" in result.stdout


def test_a_trace_is_replayed_faster(fake, tmp_path) -> None:
    trace = tmp_path / "azure.csv"
    lines = [f"2023-11-16 18:15:{46 + i},{10 + i},{1 + i}" for i in range(5)]
    trace.write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", "broken", *lines, "2023-11-16 18:15:59,900,9"])
    )
    fake.context = 100
    found, result = serve(fake.url, "--trace", trace, "--speed", "100", "--warmup", "0")
    (point,) = found["points"]
    assert (point["rate"], point["requests"], point["completed"]) == ("trace", 5, 5)
    assert point["offered_rate"] == pytest.approx(5 / 0.04)
    assert [len(b["prompt"].split()) for b in fake.bodies] == [10, 11, 12, 13, 14]
    described = found["workload"]["trace"]
    assert (described["kind"], described["broken"], described["skipped"]) == ("azure", 1, 1)
    assert "1 broken" in result.stderr and "1 requests are longer" in result.stderr


def test_mooncakes_shared_blocks_are_shared_text(fake, tmp_path) -> None:
    trace = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 1200, "output_length": 100, "hash_ids": [0, 1, 2 + i]}
        for i in range(3)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    options = ("--trace", trace, "--rate", "100", "--scale-lengths", "0.05", "--warmup", "0")
    found, _ = serve(fake.url, *options)
    prompts = [b["prompt"].split() for b in fake.bodies]
    block = round(512 * 0.05)
    assert found["workload"]["trace"]["block_tokens"] == block
    assert all(p[: 2 * block] == prompts[0][: 2 * block] for p in prompts)
    assert len({tuple(p[2 * block : 2 * block + 3]) for p in prompts}) == 3
    assert {b["max_tokens"] for b in fake.bodies} == {5}


def test_sharegpt_prompts_are_sent_as_they_are(fake, tmp_path) -> None:
    trace = tmp_path / "s.json"
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "x" * 40}]
    trace.write_text(json.dumps([{"conversations": turns}] * 3))
    found, _ = serve(fake.url, "--trace", trace, "--rate", "100", "--warmup", "0")
    assert [(b["prompt"], b["max_tokens"]) for b in fake.bodies] == [("What is it?", 10)] * 3
    assert found["workload"]["trace"]["lengths"] == "estimated"


def test_each_load_has_prompts_of_sharegpt_that_no_load_before_had(fake, tmp_path) -> None:
    trace = tmp_path / "s.json"
    answer = {"from": "gpt", "value": "x" * 40}
    said = [f"What is {i}?" for i in range(7)]
    trace.write_text(json.dumps([{"conversations": [{"from": "human", "value": text}, answer]} for text in said]))
    options = ("--trace", trace, "--requests", "3", "--warmup", "1")
    _, result = serve(fake.url, *options, "--rate", "100,200")
    assert [b["prompt"] for b in fake.bodies[:1]] == said[:1]
    assert sorted(b["prompt"] for b in fake.bodies[1:4]) == said[1:4]
    assert sorted(b["prompt"] for b in fake.bodies[4:]) == said[4:]
    assert "they repeat from here on" not in result.stderr
    fake.bodies.clear()
    _, result = serve(fake.url, *options, "--rate", "100,200,300")
    assert sorted(b["prompt"] for b in fake.bodies[7:]) == said[:3]
    assert result.stderr.count("they repeat from here on") == 1


def test_a_failed_warm_up_says_what_the_server_said() -> None:
    async def picky(server, number, request, body):
        return web.json_response({"error": {"message": "unknown field ignore_eos"}}, status=400)

    with FakeServer(picky) as server:
        message = refused(server.url)
    assert "warm-up" in message and "HTTP 400: unknown field ignore_eos" in message


def test_a_running_server_gets_new_prompts_each_time_and_one_started_here_the_same() -> None:
    with FakeServer() as server:
        runs = [serve(server.url, *FAST)[0]["workload"] for _ in range(2)]
    assert runs[0]["salt"] != runs[1]["salt"]
    assert len({body["prompt"] for body in server.bodies}) == 24
    lengths = [(len(b["prompt"].split()), b["max_tokens"]) for b in server.bodies]
    assert sorted(lengths[:12]) == sorted(lengths[12:])


def test_prompts_that_the_server_knows_are_noticed(fake) -> None:
    async def cached(server, number, request, body):
        events = whole(body)
        events[-2] = event(usage(8, body["max_tokens"], prompt_tokens_details={"cached_tokens": 6}))
        return await stream(request, events)

    fake.answer = cached
    found, result = serve(fake.url, *FAST)
    assert found["points"][0]["cached_tokens"] == 72
    assert "72 of 96 prompt tokens were in its prefix cache" in result.stderr


def test_answers_that_end_early_are_noticed(fake) -> None:
    async def short(server, number, request, body):
        return await stream(request, whole(body | {"max_tokens": 1}))

    fake.answer = short
    _, result = serve(fake.url, *FAST)
    assert "answers had 12 of the" in result.stderr


def test_a_load_that_is_late_is_said_to_be(fake, monkeypatch) -> None:
    send = Client.send

    async def late(self, body, record, clock):
        await send(self, body, record, clock)
        record.sent += 1.0

    monkeypatch.setattr(Client, "send", late)
    found, result = serve(fake.url, *FAST)
    assert found["points"][0]["lateness_ms"]["max"] >= 1000
    assert "not open loop" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--kv-memory", "1GiB"), "--kv-memory sets up an engine"),
        (("--use", "ngram"), "--use sets up an engine"),
        (("--rate", "0"), "--rate 0"),
        (("--rate", "max", "--duration", "5s"), "--requests"),
        (("--rate", "max", "--plot", "x.png"), "--plot"),
        (("--rate", "auto", "--warmup", "0"), "--warmup"),
        (("--duration", "soon"), "--duration"),
        (("--duration", "0"), "--duration"),
        (("--timeout", "0s"), "--timeout"),
        (("--cv", "3"), "--arrivals bursty"),
        (("--arrivals", "bursty", "--cv", "0"), "--cv 0"),
        (("--speed", "2"), "--speed"),
        (("--scale-lengths", "0.5"), "--trace"),
        (("--max-input-tokens", "5"), "--trace"),
        (("--input-tokens", "x"), "--input-tokens x"),
        (("--prompts", "ids"), "--tokenizer"),
        (("--prompts", "ids", "--endpoint", "chat"), "--endpoint completions"),
        (("--slo", "speed=1s"), "--slo"),
        (("--api-key", " "), "--api-key"),
        (("--records", "/nowhere/x.jsonl"), "--records"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_asked(fake, options, says) -> None:
    assert says in refused(fake.url, *options)
    assert fake.bodies == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--input-tokens", "5"), "exclude each other"),
        (("--arrivals", "poisson"), "--arrivals needs --rate"),
        (("--rate", "2", "--speed", "2"), "--speed"),
        (("--speed", "0"), "above 0"),
        (("--scale-lengths", "2"), "at most 1"),
        (("--max-input-tokens", "3"), "--scale-lengths"),
    ],
)
def test_wrong_usage_of_a_trace(fake, tmp_path, options, says) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n")
    assert says in refused(fake.url, "--trace", trace, *options)
    assert fake.bodies == []


def test_targets_that_are_none(fake, tmp_path) -> None:
    assert "begins with http://" in refused("localhost:8000")
    assert "is not the address" in refused("http://")
    assert "is a server running there" in refused("http://127.0.0.1:1")
    assert "are the same server" in refused(fake.url, "--against", fake.url + "/v1")
    assert "unknown model" in refused("no-such-model")
    assert "is for a server that runs already" in refused(tmp_path, "--model", "x")
    fake.context = 100
    assert "context holds 100" in refused(fake.url)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = argv(["bench", "serve", *arguments])
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_reports_what_was_measured(number, tmp_path) -> None:
    records = tmp_path / "records.jsonl"

    async def answer(server, number, request, body):
        if number >= 8:
            await server.gate.wait()
        return await ordinary(server, number, request, body)

    with FakeServer(answer) as server:
        options = ("--rate", "200", "--requests", "9999", "--input-tokens", "3", "--output-tokens", "3")
        options += ("--slo", "ttft=60s", "--records", records)
        process = start(server.url, *options, "--warmup", "0", "--json", "-")
        server.wait_for(12)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        server.loop.call_soon_threadsafe(server.gate.set)
    assert process.returncode == 130, err
    found = json.loads(out.splitlines()[-1])
    (point,) = found["points"]
    assert found["ended_early"] == "interrupted" and 1 <= point["completed"] <= 8
    # What was open or not due yet says nothing of the server.
    assert (point["requests"], point["errors"], point["slo_attainment"]) == (point["completed"], {}, 1.0)
    errors = [json.loads(line)["error"] for line in records.read_text().splitlines()]
    assert len(errors) == 9999 and errors.count("interrupted") >= 4
    assert set(errors) == {None, "interrupted", "not sent"}
    assert "Traceback" not in err


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_real_server(tiny_model, tmp_path) -> None:
    """Two rates on a server of its own, with an engine option; nothing runs afterwards."""
    rows = [
        {"timestamp": i, "input_length": 1100, "output_length": 60, "hash_ids": [0, 1, 2 + i]} for i in range(4)
    ]
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    options = ("--trace", trace, "--scale-lengths", "0.25", "--rate", "20,max", "--requests", "4", *SMALL)
    found, _ = serve(str(tiny_model), *options)
    (target,) = found["targets"]
    assert target["started_here"] and target["context"] == 4096
    assert found["workload"]["salt"] == ""
    assert target["options"] == ["--threads", "1", "--kv-memory", str(4 << 20)]
    assert found["workload"]["prompts"] == "ids"
    for point in found["points"]:
        assert (point["completed"], point["errors"], point["tokens_counted_by"]) == (4, {}, "usage")
        assert (point["input_tokens"], point["output_tokens"]) == (4 * (256 + 19), 4 * 15)
    # Each point's blocks are new, and shared within it: at rate 20 a request finds what those before it left.
    assert found["points"][0]["cached_tokens"] >= 256
    with pytest.raises(OSError):
        import urllib.request

        urllib.request.urlopen(target["url"] + "/health", timeout=5)


def test_techniques_and_the_configuration_are_in_the_result(tiny_model) -> None:
    options = ("--rate", "max", "--requests", "2", "--output-tokens", "24", "--input-tokens", "16", *SMALL)
    use = ("--use", "ngram:tokens=4,min_n=1", "--use", "sink-window:window=4000")
    found, result = serve(str(tiny_model), *options, *use, code=1)
    (target,) = found["targets"]
    assert target["activity"]["ngram"] > 0 and target["activity"]["sink-window"] == 0
    assert [spec.partition(":")[0] for spec in target["config"]["use"]] == ["ngram", "sink-window"]
    assert target["config"]["threads"] == 1
    assert "sink-window was in use but never acted" in result.stderr and "ngram was" not in result.stderr


def test_a_model_that_cannot_be_served(tiny_model) -> None:
    message = refused(tiny_model, "--max-model-len", "999999999")
    assert "ended before it was ready" in message and "999999999" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_leaves_no_server(tiny_model, number) -> None:
    process = start(tiny_model, "--rate", "0.01", *SMALL)
    assert process.stderr is not None
    with contextlib.suppress(ProcessLookupError):
        for line in process.stderr:
            if "starting a server" in line:
                break
    kids: list[int] = []
    while not kids:
        kids = children(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    for kid in kids:
        with pytest.raises(ProcessLookupError):
            os.kill(kid, 0)


def test_one_file_cannot_hold_records_and_result(tmp_path):
    same = tmp_path / "same.json"
    result = call("bench", "serve", "http://127.0.0.1:9", "--json", same, "--records", same)
    assert result.exit_code == 2 and "different files" in result.stderr
    assert not same.exists()
