"""The n-th call of what a server uses fails: each request ends exactly once, and all else goes on."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.helpers.faults import Fault
from tests.server.serving import SECONDS, Running, until

FIELDS = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
PROMPTS = ["a short one", "a rather long prompt, which takes several steps " * 3, "two answers"]


def bodies() -> list[dict[str, Any]]:
    """A stream, a whole answer, and a stream of two choices."""
    more = [{"stream": True}, {}, {"stream": True, "n": 2}]
    return [{"prompt": prompt, **FIELDS, **fields} for prompt, fields in zip(PROMPTS, more, strict=True)]


def ends(response: httpx.Response, body: dict[str, Any]) -> str:
    """How a request ended: "whole" or "error". Asserts that it ended exactly once."""
    if response.status_code != 200 or not body.get("stream"):
        found = response.json()
        assert ("error" in found) == (response.status_code in (500, 503)), response.text
        if "error" in found:
            return "error"
        assert [c["finish_reason"] for c in found["choices"]] == ["length"] * body.get("n", 1)
        return "whole"
    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]" and "[DONE]" not in events
    found = [json.loads(event) for event in events if not event.startswith(":")]
    reasons = [c["finish_reason"] for e in found for c in e.get("choices", []) if c["finish_reason"]]
    errors = [e for e in found if "error" in e]
    if errors:
        assert len(errors) == 1 and found[-1] is errors[0] and len(reasons) < body.get("n", 1)
        return "error"
    assert reasons == ["length"] * body.get("n", 1)
    return "whole"


def text_of(response: httpx.Response, body: dict[str, Any]) -> list[str]:
    texts = [""] * body.get("n", 1)
    lines = response.text.split("\n\n") if body.get("stream") else ["data: " + response.text]
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    return texts


def together(running: Running, pool: ThreadPoolExecutor, *faults: Any) -> list[Future[httpx.Response]]:
    """The three requests, in the engine at the same time. From then on calls of what `faults` breaks count."""
    with running.throttle.held():
        first = pool.submit(running.post, "/v1/completions", **bodies()[0])
        assert running.throttle.inside.wait(SECONDS)
        others = [pool.submit(running.post, "/v1/completions", **body) for body in bodies()[1:]]
        until(lambda: running.service.engine.pending == 2)
        for fault, place in faults:
            fault.breaks(*place)
    return [first, *others]


def threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("dovetail"))


def descriptors() -> list[str]:
    """What is open besides models, which stay mapped as long as their tests hold them."""
    gc.collect()
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{number}").partition(":")[0])
    return sorted(link for link in links if "safetensors" not in link)


SITES = {
    "step": lambda running: (running.throttle.inner, "run"),
    "allocation": lambda running: (running.llm.engine.pool, "allocate"),
    "plan": lambda running: (running.llm.engine.scheduler, "schedule"),
    "commit": lambda running: (running.llm.engine.scheduler, "commit"),
    "metrics": lambda running: (running.service.metrics, "stepped"),
}


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_a_fault_in_the_loop_ends_every_request_once_and_the_server_with_1(start, site: str, always: bool) -> None:
    """At the first call, the second and so on, until a run goes to its end."""
    before = threads(), descriptors()
    at, most = 1, 60
    while at < most:
        running: Running = start(max_num_batched_tokens=32)
        fault = Fault(at, always)
        with ThreadPoolExecutor(3) as pool:
            answers = [a.result(SECONDS) for a in together(running, pool, (fault, SITES[site](running)))]
        found = [ends(a, body) for a, body in zip(answers, bodies(), strict=True)]
        assert all("on purpose" not in a.text for a in answers)
        if not fault.fired:
            assert found == ["whole"] * 3
            break
        assert "error" in found
        assert running.join() == 1
        at += 1 if at < 4 else 7
    running.stop()
    until(lambda: threads() == before[0], "the end of all threads")
    assert at > 3 and descriptors() == before[1]


def of_one_request(running: Running) -> dict[str, tuple[Any, str]]:
    """What is called for each request, outside of the engine's loop."""
    return {
        "tokenizer": (running.llm.tokenizer, "encode"),
        "preparation": (running.llm.session, "prepare"),
        "parameters": (running.llm, "default_params"),
        "grammar": (running.llm.session.grammars, "compile"),
        "queue": (running.service, "running"),
    }


@pytest.mark.parametrize("error", [MemoryError, OSError, TimeoutError, ZeroDivisionError])
@pytest.mark.parametrize("site", ["tokenizer", "preparation", "parameters", "grammar", "queue"])
def test_a_fault_in_one_request_is_its_own(shared: Running, site: str, error: type[Exception]) -> None:
    body = {"prompt": "beside a fault", **FIELDS}
    if site == "grammar":
        body["structured_outputs"] = {"regex": "a{12}b*"}
    alone = shared.complete(**body)["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool, shared.throttle.held():
        neighbour = pool.submit(shared.text, PROMPTS[0], **FIELDS)
        assert shared.throttle.inside.wait(SECONDS)
        fault = Fault(1, error=error)
        repair = fault.breaks(*of_one_request(shared)[site])
        try:
            broken = shared.post("/v1/completions", **body)
        finally:
            repair()
        shared.throttle.open.set()
        text = neighbour.result(SECONDS)
    assert fault.fired == 1
    assert broken.status_code == 500 and broken.json()["error"]["message"] == "internal error"
    assert text == shared.text(PROMPTS[0], **FIELDS)
    assert shared.complete(**body)["choices"][0]["text"] == alone
    shared.check_empty()


def children(word: str) -> list[int]:
    """Child processes that live and have a word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and word in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


def test_a_compiler_that_is_killed_is_started_again(shared: Running) -> None:
    form = {"regex": "b{3}(c|d)"}
    assert shared.text("x", max_tokens=9, structured_outputs=form) in ("bbbc", "bbbd")
    compilers = children("dovetail.structured.worker")
    assert compilers
    for process in compilers:
        os.kill(process, signal.SIGKILL)
    until(lambda: not children("dovetail.structured.worker"))
    assert shared.text("x", max_tokens=9, structured_outputs=form) in ("bbbc", "bbbd")  # it is known
    statuses = [
        shared.post("/v1/completions", prompt="x", structured_outputs={"regex": f"e{{{i}}}"}).status_code
        for i in (4, 5)
    ]
    assert statuses == [200, 200]
    shared.check_empty()


def test_logits_that_are_no_numbers_end_one_request_and_no_neighbour(start) -> None:
    """The logits of one request's rows become NaN in the middle of its answer."""
    running: Running = start(max_num_batched_tokens=32)
    alone = [text_of(running.post("/v1/completions", **body), body) for body in bodies()]
    model = running.throttle.inner.model
    logits, state = model.logits, {"bad": -1}
    running.throttle.hold_when = lambda plan: False

    def poisoned(hidden: Any) -> Any:
        found = logits(hidden)
        plan = running.throttle.plans[-1]
        rows = [(s.request, j) for s in plan.spans for j in range(s.sample)]
        for row, (request, _) in enumerate(rows):
            if request.prompt == list(PROMPTS[0].encode()) and request.num_output == 5:
                state["bad"] = row
                found[row] = np.nan
        return found

    model.logits = poisoned
    with ThreadPoolExecutor(3) as pool:
        answers = [a.result(SECONDS) for a in together(running, pool)]
    assert state["bad"] >= 0
    assert [ends(a, body) for a, body in zip(answers, bodies(), strict=True)] == ["error", "whole", "whole"]
    assert [text_of(a, body) for a, body in zip(answers[1:], bodies()[1:], strict=True)] == alone[1:]
    running.check_empty()
