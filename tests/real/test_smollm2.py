"""Real weights: the default model against transformers, in float32."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dovetail import LLM, SamplingParams
from dovetail.checkpoint.export import export
from dovetail.models import open_checkpoint

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "Name three prime numbers.",
    "Translate 'good morning' to Spanish.",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "What is 7 times 8?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
]


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(smollm2, dtype="float32", max_model_len=1024, kv_memory=256 << 20, threads=1)


@pytest.mark.timeout(300)
def test_64_greedy_tokens_equal_transformers(llm: LLM, smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(open_checkpoint(smollm2), tmp_path / "hf", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    ours = llm.chat(chats, params, progress=False)
    for chat, output in zip(chats, ours, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert output.prompt_token_ids == list(ids)
        answer = output.outputs[0].token_ids
        with torch.no_grad():  # one pass over the answer: token i is right if all before it were
            theirs = model(torch.tensor([list(ids) + answer])).logits[0, len(ids) - 1 : -1].argmax(-1)
        assert len(answer) == 64
        assert answer == theirs.tolist()
    llm.engine.check()


def test_it_says_paris_however_it_is_run(llm: LLM, smollm2: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=32)
    chat = [{"role": "user", "content": "Name the capital of France."}]  # sure by more than int8's error
    plain = llm.chat(chat, params)[0].outputs[0]
    assert "Paris" in plain.text
    assert plain.finish_reason == "stop"
    for options in (
        {"use": ["ngram"]},
        {"activations": "exact"},
        {"activations": "int16"},
        {"kernels": "torch"},
        {"kernels": "avx2"},
        {"kv_cache_dtype": "int4"},
        {"kv_cache_dtype": "int8"},
        {"dtype": "bfloat16"},
        {"block_size": 1, "max_num_batched_tokens": 7},
        {"use": ["sink-window:window=512"], "block_size": 32},
    ):
        other = LLM(smollm2, max_model_len=512, kv_memory=128 << 20, threads=1, **options)
        assert "Paris" in other.chat(chat, params)[0].outputs[0].text, options
        other.engine.check()


def test_streaming_gives_the_same_text_in_pieces(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    prompt = llm.chat_tokens([{"role": "user", "content": QUESTIONS[5]}])
    whole = llm.generate([prompt], params)[0].outputs[0].text
    pieces = [o.outputs[0].text for o in llm.stream(prompt, params)]
    assert pieces[-1] == whole
    assert len(pieces) > 10
    assert all(b.startswith(a) for a, b in pairwise(pieces))


def test_leaving_a_stream_early_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", SamplingParams(temperature=0, max_tokens=200))
    next(stream)
    next(stream)
    stream.close()
    llm.engine.check()
    assert not llm.engine.busy


@pytest.mark.parametrize("activations", ["auto", "int16"])
def test_rounded_activations_give_the_same_text_under_any_schedule(
    activations: str, llm: LLM, smollm2: Path
) -> None:
    """int8 and bf16 KV, or int16: alone, together, in chunks, with drafts and with a warm prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=24)
    chats = [llm.chat_tokens([{"role": "user", "content": q}]) for q in QUESTIONS[:4]]
    options = dict(max_model_len=512, kv_memory=64 << 20, threads=2, activations=activations)
    alone = LLM(smollm2, **options, enable_prefix_caching=False)
    known = {("int8", "bf16"), ("int16", "float32"), ("exact", "float32")}
    assert (alone.config.activations, alone.config.kv_cache_dtype) in known
    want = [alone.generate([c], params)[0].outputs[0].token_ids for c in chats]
    for more in ({}, {"max_num_batched_tokens": 7}, {"use": ["ngram:min_n=1"]}):
        other = LLM(smollm2, **options, **more)
        for _ in range(2):  # the second time prompts are in the prefix cache
            assert [o.outputs[0].token_ids for o in other.generate(chats, params)] == want, more
        other.engine.check()


@pytest.mark.timeout(300)
def test_perplexity_equals_transformers(llm: LLM, smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from dovetail.evals.perplexity import Perplexity
    from dovetail.text.corpus import corpus

    result = Perplexity(window=512, windows=2).measure(llm, None)
    export(open_checkpoint(smollm2), tmp_path / "hf", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = llm.tokenizer.encode(corpus("pydoc").text)
    losses = []
    for i in (0, 512):
        text = torch.tensor([ids[i : i + 512]])
        with torch.inference_mode():
            losses.append(model(text, labels=text).loss.item())
    wanted = math.exp(sum(losses) / 2)
    assert result["perplexity"] == pytest.approx(wanted, rel=1e-4)


def test_a_required_call(llm: LLM) -> None:
    """The template knows no tools. The grammar makes even a small model call."""
    city = {"type": "string", "enum": ["Oslo", "Paris"]}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    chat = [{"role": "user", "content": "What is the weather in Paris?"}]
    params = SamplingParams(temperature=0, max_tokens=60)
    (output,) = llm.chat(chat, params, tools=tools, tool_choice="required", parallel_tool_calls=False)[0].outputs
    (call,) = output.message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in city["enum"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "21 degrees, sunny"}
    again = llm.chat([*chat, output.message, result], params)[0]
    assert "21 degrees, sunny" in llm.tokenizer.decode(again.prompt_token_ids)
    assert again.outputs[0].message == {"role": "assistant", "content": again.outputs[0].text}
