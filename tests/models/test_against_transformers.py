"""Each architecture, tiny and random, against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dovetail.checkpoint import Checkpoint
from dovetail.core.sampling import SamplingParams
from dovetail.core.types import Span
from dovetail.models import open_checkpoint
from dovetail.ops.cpu import isas
from dovetail.runtime.executor import ModelExecutor
from dovetail.runtime.native import NativeExecutor
from tests.helpers.ggufs import write_model
from tests.tiny import VOCAB, make_request, run_all, tiny_engine

SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.25,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LOCAL_AND_GLOBAL = {
    "full_attention": dict(rope_type="linear", factor=4.0, rope_theta=5e5),
    "sliding_attention": dict(rope_type="default", rope_theta=500.0),
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
T = transformers
CASES = {
    "llama": T.LlamaConfig(**SHAPE, rms_norm_eps=1e-5),
    "llama-tied-biased": T.LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-mha-head-dim": T.LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, head_dim=32),
    "llama-linear": T.LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "llama-3.1": T.LlamaConfig(**SHAPE, rope_parameters=LLAMA3 | dict(rope_theta=5e5)),
    "llama-yarn": T.LlamaConfig(**SHAPE, rope_parameters=YARN | dict(rope_theta=1e4)),
    "smollm2": T.LlamaConfig(
        **SHAPE, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5)
    ),
    "mistral": T.MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": T.MistralConfig(**SHAPE, sliding_window=11),
    "qwen2": T.Qwen2Config(**SHAPE),
    "qwen2-window": T.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": T.Qwen3Config(**SHAPE, head_dim=24),
    "gemma3": T.Gemma3TextConfig(
        **SHAPE, head_dim=24, sliding_window=9, sliding_window_pattern=2, query_pre_attn_scalar=40
    ),
    "gemma3-linear": T.Gemma3TextConfig(
        **{**SHAPE, "num_key_value_heads": 1},
        head_dim=16,
        sliding_window=11,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters=LOCAL_AND_GLOBAL,
    ),
    "smollm3": T.SmolLM3Config(**{**SHAPE, "num_hidden_layers": 5}),
    "smollm3-window": T.SmolLM3Config(
        **SHAPE, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=7, attention_bias=True
    ),
    "qwen3-tied": T.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}


def save(config: transformers.PretrainedConfig, directory: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    model = T.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


# Every architecture on the reference and on the best kernels, two on every instruction set.
RUNS = [(name, kernels) for name in sorted(CASES) for kernels in ("torch", *isas()[:1])] + [
    (name, kernels) for name in ("llama-tied-biased", "qwen3") for kernels in isas()[1:]
]


@pytest.mark.parametrize(("name", "kernels"), RUNS)
def test_logits_and_greedy_tokens(name: str, kernels: str, tmp_path: Path) -> None:
    model = save(CASES[name], tmp_path)
    compare(model, open_checkpoint(tmp_path), kernels)


# The same from GGUF files: what they leave out, and the order of rows.
GGUFS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (T.LlamaConfig(**SHAPE), {"rope.freq_base": 10000.0}),
    "qwen2": (T.Qwen2Config(**SHAPE), {"rope.freq_base": 10000.0}),
    "qwen3": (T.Qwen3Config(**SHAPE, head_dim=24), {"rope.freq_base": 10000.0}),
    "gemma3": (
        T.Gemma3TextConfig(
            **{**SHAPE, "num_hidden_layers": 7}, head_dim=24, sliding_window=9, query_pre_attn_scalar=24
        ),
        {"rope.freq_base": 1e6, "attention.sliding_window": 9},
    ),
    "smollm3": (T.SmolLM3Config(**{**SHAPE, "num_hidden_layers": 5}), {"rope.freq_base": 2e6}),
    "gemma3-pattern": (
        T.Gemma3TextConfig(
            **SHAPE, head_dim=16, sliding_window=5, sliding_window_pattern=3, query_pre_attn_scalar=16,
            rope_parameters=LOCAL_AND_GLOBAL,
        ),
        {
            "rope.freq_base": 5e5, "rope.freq_base_swa": 500.0, "rope.scale_linear": 4.0,
            "attention.sliding_window": 5, "attention.sliding_window_pattern": [True, True, False],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", *isas()[:1]])
@pytest.mark.parametrize("name", sorted(GGUFS))
def test_gguf_logits_and_greedy_tokens(name: str, kernels: str, tmp_path: Path) -> None:
    config, keys = GGUFS[name]
    model = save(config, tmp_path / "hf")
    path = write_model(tmp_path / "m.gguf", model, name.partition("-")[0], **keys)
    compare(model, open_checkpoint(path), kernels)


def compare(model: transformers.PreTrainedModel, checkpoint: Checkpoint, kernels: str) -> None:
    """Logits of prompts of mixed lengths, and 64 greedy tokens after each."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (1, 2, 17, 40, 33)]

    page_size = 4 if kernels == "torch" else 16
    engine = tiny_engine(
        checkpoint=checkpoint, dtype="float32", kv_cache_dtype="float32", pages=200, kernels=kernels,
        page_size=page_size, threads=1 if kernels == "torch" else 2,
    )  # fmt: skip
    kind, see = (ModelExecutor, logits_of_every_row) if kernels == "torch" else (NativeExecutor, native_logits)
    assert isinstance(engine.executor, kind)
    seen = see(engine, prompts)
    outputs = run_all(engine, prompts, SamplingParams(temperature=0, max_tokens=64))
    for prompt, ours, output in zip(prompts, seen, outputs, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([prompt + output])).logits[0]
        torch.testing.assert_close(ours, theirs[: len(prompt)], atol=1e-4, rtol=0)
        # What they would choose after each prefix of the output is its next token, so it is what they would write.
        assert output == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


def logits_of_every_row(engine, prompts) -> list[torch.Tensor]:
    """One mixed-length batch, by the executor's own parts."""
    executor = engine.executor
    requests = [make_request(engine, str(i), p, SamplingParams(max_tokens=4)) for i, p in enumerate(prompts)]
    for r in requests:
        r.table.grow(0, len(r.prompt))
    with torch.inference_mode():
        batch = executor.builder.build([Span(r, 0, len(r.prompt)) for r in requests])
        hidden = executor.model.program[0](executor.model.embed(batch.tokens), batch, executor.kv)
        logits = executor.model.logits(hidden).split([len(p) for p in prompts])
    for r in requests:
        r.table.clear()
    return list(logits)


def native_logits(engine, prompts) -> list[torch.Tensor]:
    """The same by the recorded program."""
    program = engine.executor.program
    requests = [make_request(engine, str(i), p, SamplingParams(max_tokens=4)) for i, p in enumerate(prompts)]
    for r in requests:
        r.table.grow(0, len(r.prompt))
    program.clear()
    for r in requests:
        program.add(0, len(r.prompt), r.tokens, [], r.table.ids, 0, len(r.prompt))
    program.plan()
    program.run(0, program.mark())
    rows = sum(map(len, prompts))
    logits = torch.from_numpy(program.view(engine.executor.logits, rows)[:, :VOCAB].copy())
    for r in requests:
        r.table.clear()
    return list(logits.split([len(p) for p in prompts]))
