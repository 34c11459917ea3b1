"""OpenVINO GenAI's worker. Both its pipelines read the GGUF file themselves, or a folder in OpenVINO's own format.

`LLMPipeline` answers one request and reports tokens to a streamer; `ContinuousBatchingPipeline` answers any number
in steps. Both get token ids and give token ids, so that counts are exact and no text is made on this side.
Everything not named in a setting is the library's default: weights in the file's groups, activations quantized to
8 bits in groups of 32, KV in u8. Left out, because never the fastest: the SDPA backend of `LLMPipeline`,
activations in full, wider groups of them with a GGUF file, and prompts in chunks of the default 256 tokens.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from workers.protocol import Engine, Event, Prompts, Run, build, serve

# The name's end -> properties. KV of 16 bits takes more memory than the default u8 but has been the faster one,
# most of all behind long prompts.
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    ", bf16 KV": {"KV_CACHE_PRECISION": "bf16"},
    ", f16 KV": {"KV_CACHE_PRECISION": "f16"},
}
# With weights in groups of 128, which folders of int4 weights have.
WIDE = {", f16 KV, groups of 128": {**SETTINGS[", f16 KV"], "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}}
BATCHING = "ContinuousBatchingPipeline"
BATCHED_TOKENS = 8192  # in a step: whole prompts


class Times(genai.StreamerBase):
    """Notes when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        count = (self.events[-1][1][0] if self.events else 0) + (len(token) if isinstance(token, list) else 1)
        self.events.append((time.perf_counter(), [count]))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load(setup: dict[str, Any]) -> Engine:
    model, threads = setup["converted"] or setup["model"], {"INFERENCE_NUM_THREADS": setup["threads"]}
    kinds: dict[str, Callable[[str, dict[str, Any]], Run]] = {"LLMPipeline": alone, BATCHING: batching}
    ways = {
        f"{kind}{name}": partial(make, model, {**properties, **threads})
        for name, properties in {**SETTINGS, **(WIDE if setup["converted"] else {})}.items()
        for kind, make in kinds.items()
    }
    built = build(ways, setup)
    several = {name: run for name, run in built.items() if name.startswith(BATCHING)}
    versions = {
        "openvino": openvino.get_version(),
        "openvino-genai": genai.get_version(),
        "python": platform.python_version(),
    }
    return Engine(built, several, {"versions": versions, "file": model})


def alone(model: str, properties: dict[str, Any]) -> Run:
    pipeline = genai.LLMPipeline(model, "CPU", **properties)

    def run(prompts: Prompts, tokens: int) -> Iterable[Event]:
        times = Times()
        pipeline.generate(tensor(prompts[0]), greedy(tokens), times)
        return times.events

    return run


def batching(model: str, properties: dict[str, Any]) -> Run:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = BATCHED_TOKENS
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def run(prompts: Prompts, tokens: int) -> Iterator[Event]:
        config = greedy(tokens)
        handles = [pipeline.add_request(i, tensor(prompt), config) for i, prompt in enumerate(prompts)]
        counts = [0] * len(prompts)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    counts[i] += sum(len(output.generated_ids) for output in handle.read().values())
            yield time.perf_counter(), list(counts)

    return run


def tensor(prompt: list[int]) -> openvino.Tensor:
    return openvino.Tensor(np.array([prompt], np.int64))


def greedy(tokens: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
    return config


if __name__ == "__main__":
    serve(load)
