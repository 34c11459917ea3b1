"""Transformers' worker: `generate` on a Hugging Face folder, several prompts of one length as one batch."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import transformers
from workers.protocol import Engine, Event, Prompts, Run, build, serve

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Times(transformers.StoppingCriteria):
    """Notes when each step's tokens came; `generate` takes a streamer for one request only. Stops nothing."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.events: list[Event] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows, length = input_ids.shape
        self.events.append((time.perf_counter(), [length - self.prompt] * rows))
        return torch.zeros(rows, dtype=torch.bool)


def load(setup: dict[str, Any]) -> Engine:
    torch.set_num_threads(setup["threads"])
    ways = build({name: partial(batch, setup["hf"], dtype) for name, dtype in DTYPES.items()}, setup)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Engine(ways, ways, {"versions": versions})


def batch(folder: str, dtype: torch.dtype) -> Run:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # Without an end token every row runs to its last token, as everywhere in this comparison.
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def run(prompts: Prompts, tokens: int) -> Iterable[Event]:
        ids = torch.tensor(prompts)
        times = Times(ids.shape[1])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            max_new_tokens=tokens,
            stopping_criteria=transformers.StoppingCriteriaList([times]),
        )
        return times.events

    model.generation_config = config
    return run


if __name__ == "__main__":
    serve(load)
