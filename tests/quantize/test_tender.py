"""A model with Tender's weights in the engine: chunks of rows are those of positions, whatever the batch is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import dovetail
from dovetail.core.errors import ModelError
from dovetail.models import open_checkpoint
from dovetail.ops import cpu
from dovetail.quantize.recipe import Recipe, resolved
from dovetail.quantize.run import quantize
from dovetail.text.corpus import Corpus
from tests.helpers.hf_models import save_model

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")

TEXT = Corpus("text", " ".join(f"the {i * 7919 % 997} quick brown foxes jump over {i} dogs" for i in range(400)))
CHUNK = 16
PROMPTS = [[(i * 7 + j * j) % 250 for j in range(n)] for i, n in enumerate((40, 3, 25, 61))]


@pytest.fixture(scope="module", params=[8, 4])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tender")
    save_model(folder / "plain", hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    checkpoint = open_checkpoint(folder / "plain")
    given = {"bits": request.param, "groups": 5, "chunk": CHUNK, "samples": 6, "length": 64}
    recipe = Recipe("tender", resolved("tender", given, checkpoint.config), TEXT, 0)
    quantize(checkpoint, folder / "made", recipe, progress=False)
    return folder / "made"


def answers(model: Path, prompts: Sequence[list[int]], **options: Any) -> list[tuple[Any, ...]]:
    """Tokens and their log-probabilities, in the bits that they have."""
    llm = dovetail.LLM(model, **{"kv_memory": "2MiB", "max_model_len": 128, "threads": 2, **options})
    params = dovetail.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=1)
    found = []
    for output in llm.generate(list(prompts), params, progress=False):
        answer = output.outputs[0]
        logs = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        found.append((tuple(answer.token_ids), tuple(logs)))
    return found


def test_text_depends_neither_on_the_batch_nor_on_how_prompts_are_cut(model: Path) -> None:
    alone = [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert answers(model, PROMPTS) == alone
    assert answers(model, PROMPTS, max_num_batched_tokens=16, enable_prefix_caching=False) == alone
    assert answers(model, PROMPTS[::-1], threads=1) == alone[::-1]


def test_text_does_not_depend_on_stored_prefixes(model: Path) -> None:
    again = [PROMPTS[0], PROMPTS[0], [*PROMPTS[0][:32], 9, 8, 7], PROMPTS[0]]
    assert answers(model, again, max_num_seqs=1) == answers(model, again, enable_prefix_caching=False)


def test_instruction_sets_agree(model: Path) -> None:
    tokens = [[tokens for tokens, _ in answers(model, PROMPTS, kernels=isa)] for isa in cpu.isas()]
    assert all(found == tokens[0] for found in tokens)


def test_the_reference_kernels_do_not_know_positions(model: Path) -> None:
    with pytest.raises(ModelError, match="leave out --kernels torch"):
        dovetail.LLM(model, kernels="torch", kv_memory="1MiB", max_model_len=64)
