"""llama.cpp's worker: its C interface as llama-cpp-python binds it, which is how it answers several requests.

The package's own class answers one request at a time, by the same calls. Prompts go in as one batch, then each
step decodes one token of every request and takes the likeliest by llama.cpp's greedy sampler. KV is f16.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import llama_cpp as c
from workers.protocol import Engine, Event, Prompts, Run, build, serve

FLASH = {"flash attention": 1, "no flash attention": 0}
WARNING = 3
STREAMS, ALONE_CONTEXT, SHARED_CONTEXT, BATCH = 32, 8192, 256, 8192
"""Most requests at once; tokens of context for one alone and for each of several; tokens that a call may take."""


@c.llama_log_callback
def log(level: int, text: bytes, user_data: Any) -> None:
    """Warnings and errors; what it says besides fills megabytes."""
    if level >= WARNING:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def load(setup: dict[str, Any]) -> Engine:
    c.llama_log_set(log, None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(setup["model"].encode(), c.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {setup['model']}")
    threads = setup["threads"]
    single, several = (
        build({name: partial(way, model, threads, flash, *size) for name, flash in FLASH.items()}, setup)
        for size in ((1, ALONE_CONTEXT), (STREAMS, SHARED_CONTEXT))
    )
    versions = {"llama-cpp-python": c.__version__, "python": platform.python_version()}
    facts = {"versions": versions, "built for": c.llama_print_system_info().decode()}
    return Engine(single, several, facts)


def way(model: Any, threads: int, flash: int, streams: int, length: int) -> Run:
    params = c.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = streams * length, streams, False
    params.n_batch, params.n_threads, params.n_threads_batch = BATCH, threads, threads
    params.flash_attn_type = flash
    context = c.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    batch = c.llama_batch_init(BATCH, 0, 1)
    sampler = c.llama_sampler_init_greedy()

    def decode(pieces: Prompts, position: int) -> list[int]:
        """Run `pieces`, one for each request, from `position` on; the likeliest next token of each."""
        last = fill(batch, pieces, position)
        if status := c.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode answered {status}")
        return [c.llama_sampler_sample(sampler, context, row) for row in last]

    def run(prompts: Prompts, tokens: int) -> Iterator[Event]:
        c.llama_memory_clear(c.llama_get_memory(context), False)
        chosen = decode(prompts, 0)
        yield time.perf_counter(), [1] * len(prompts)
        for done in range(1, tokens):
            chosen = decode([[token] for token in chosen], len(prompts[0]) + done - 1)
            yield time.perf_counter(), [done + 1] * len(prompts)

    return run


def fill(batch: Any, pieces: Prompts, position: int) -> list[int]:
    """Put `pieces` into the batch; the rows that end one, which are those that need an answer."""
    last, row = [], 0
    for sequence, piece in enumerate(pieces):
        for offset, token in enumerate(piece):
            batch.token[row], batch.pos[row] = token, position + offset
            batch.seq_id[row][0], batch.n_seq_id[row] = sequence, 1
            batch.logits[row] = offset == len(piece) - 1
            row += 1
        last.append(row - 1)
    batch.n_tokens = row
    return last


if __name__ == "__main__":
    serve(load)
