from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx

from dovetail.core.sampling import SamplingParams
from dovetail.llm import LLM
from tests.server.serving import SECONDS, until

CLIENTS, TOKENS = 64, 12
PROMPTS = [f"{'shared start of it, ' * (i % 3)}client {i}" for i in range(CLIENTS)]


async def stream(client: httpx.AsyncClient, prompt: str) -> str:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    text, ends, done = "", 0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done += 1
            elif line:
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text += choice["text"]
                ends += choice["finish_reason"] is not None
    assert (ends, done) == (1, 1)
    return text


async def all_at_once(url: str) -> list[str]:
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        return await asyncio.gather(*(stream(client, p) for p in PROMPTS))


def test_a_short_request_is_answered_while_a_long_prompt_is_computed(start) -> None:
    running = start(max_num_batched_tokens=32)
    running.llm.engine.seams.policy.crowded = 8
    alone = running.text("short", max_tokens=4, ignore_eos=True)
    with ThreadPoolExecutor(2) as pool:
        with running.throttle.held(lambda plan: plan.spans[0].start == 64):
            long = pool.submit(running.text, "a long prompt " * 30, max_tokens=1)
            assert running.throttle.inside.wait(SECONDS)
            short = pool.submit(running.text, "short", max_tokens=4, ignore_eos=True)
            until(lambda: running.service.engine.pending > 0)
        assert short.result(SECONDS) == alone
        long.result(SECONDS)
    steps = [{len(s.request.prompt): s for s in plan.spans} for plan in running.throttle.plans]
    answered = next(i for i, spans in enumerate(steps) if 420 in spans and 5 in spans and spans[5].stop == 8)
    assert not any(spans[420].sample for spans in steps[: answered + 1] if 420 in spans)
    assert all(spans[420].num_rows <= 16 for spans in steps if 420 in spans and 5 in spans)


def test_64_streams_say_what_each_prompt_gives_alone(start, tiny_model) -> None:
    running = start(max_num_seqs=16, max_num_batched_tokens=48, kv_memory=200 * 4 * 512)
    texts = asyncio.run(all_at_once(running.url))
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    alone = LLM(tiny_model, dtype="float64", threads=1, enable_prefix_caching=False)
    assert texts == [alone.generate(p, params, progress=False)[0].outputs[0].text for p in PROMPTS]
    running.check_empty()
