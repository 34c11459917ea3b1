"""Dovetail's worker: sessions of the public API, with its scheduler, sampling and detokenization."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from workers.protocol import Engine, Event, Prompts, serve

from dovetail import LLM, SamplingParams, __version__

SHOWN = ("dtype", "activations", "kernels", "kv_cache_dtype", "threads", "use", "max_num_batched_tokens")


def load(setup: dict[str, Any]) -> Engine:
    llm = LLM(setup["model"], threads=setup["threads"], **setup["options"])
    getattr(llm, "keep_packed", lambda: None)()  # earlier versions keep none

    def run(prompts: Prompts, tokens: int) -> Iterator[Event]:
        session, params = llm.session, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        answers = [session.submit(session.prepare(prompt, params)) for prompt in prompts]
        while session.busy:
            session.step()
            yield time.perf_counter(), [len(a.streams[0].token_ids) for a in answers]

    versions = {"dovetail": __version__, "torch": torch.__version__, "python": platform.python_version()}
    config = llm.config.to_dict()
    settings = {name: config[name] for name in SHOWN}
    facts = {"versions": versions, "config": settings, "vocab_size": llm.checkpoint.config.vocab_size}
    ways = {"defaults" if not setup["options"] else "as asked": run}
    return Engine(ways, ways, facts, bandwidth())


def bandwidth() -> Callable[[int, int], float] | None:
    """How fast this machine reads memory just now, if this version can say."""
    try:
        from dovetail._native import read_bandwidth
    except ImportError:
        return None
    return lambda megabytes, threads: float(read_bandwidth(megabytes, threads))


if __name__ == "__main__":
    serve(load)
