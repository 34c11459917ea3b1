from __future__ import annotations

import asyncio
import json

import httpx

from dovetail.core.sampling import SamplingParams
from dovetail.llm import LLM
from tests.server.serving import SECONDS

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


def test_64_streams_say_what_each_prompt_gives_alone(start, tiny_model) -> None:
    running = start(max_num_seqs=16, max_num_batched_tokens=48, kv_memory=200 * 4 * 512)
    texts = asyncio.run(all_at_once(running.url))
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    alone = LLM(tiny_model, dtype="float64", threads=1, enable_prefix_caching=False)
    assert texts == [alone.generate(p, params, progress=False)[0].outputs[0].text for p in PROMPTS]
    running.check_empty()
