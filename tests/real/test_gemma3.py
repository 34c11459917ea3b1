"""Real weights of Gemma 3 270M, a pretrained model in blocks of 4 to 8 bits, against transformers in float32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dovetail import LLM, SamplingParams
from dovetail.checkpoint.export import export
from dovetail.evals.perplexity import Perplexity
from dovetail.models import open_checkpoint
from dovetail.text.corpus import corpus

WINDOW = 640  # tokens: more than local layers read
PROMPT = "Paris is the capital of France. Rome is the capital of Italy. Madrid is the capital of"


@pytest.mark.timeout(300)
def test_perplexity_and_greedy_tokens_equal_transformers(gemma3: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llm = LLM(gemma3, dtype="float32", max_model_len=1024, kv_memory=64 << 20, threads=1)
    result = Perplexity(window=WINDOW, windows=1).measure(llm, None)
    answer = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=32), progress=False)[0]
    assert answer.outputs[0].text.startswith(" Spain")

    export(open_checkpoint(gemma3), tmp_path / "hf", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = llm.tokenizer.encode(corpus("pydoc").text)[:WINDOW]
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, :-1]
        losses = [  # the vocabulary has 262144 tokens, so logits of a few rows at a time
            torch.nn.functional.cross_entropy(model.lm_head(rows), following, reduction="sum").item()
            for rows, following in zip(hidden.split(64), torch.tensor(ids[1:]).split(64), strict=True)
        ]
        whole = torch.tensor([answer.prompt_token_ids + answer.outputs[0].token_ids])
        theirs = model(whole).logits[0, len(answer.prompt_token_ids) - 1 : -1].argmax(-1)
    assert answer.outputs[0].token_ids == theirs.tolist()
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / (WINDOW - 1)), rel=1e-3)
