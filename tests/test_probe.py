"""Probes: what a measurement sees is what the serving path computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail import LLM, Probe, RequestError, SamplingParams

TEXT = [int(t) for t in np.random.default_rng(5).integers(0, 250, 90)]
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
WINDOW = "sink-window:sink=0,window=8"


@pytest.fixture(scope="module", params=["auto", "torch"])
def llm(request: pytest.FixtureRequest, tiny_model: Path) -> LLM:
    return LLM(tiny_model, kernels=request.param, block_size=16, max_num_batched_tokens=32)


def logprobs(llm: LLM, probe: Probe, text: list[int] = TEXT) -> list[float | None]:
    (output,) = llm.generate(text, SCORED, probes=probe)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(text)
    return [entry[t].logprob if entry else None for entry, t in zip(output.prompt_logprobs, text, strict=True)]


def test_logits_are_shown_once_for_every_row_that_is_scored(llm: LLM):
    rows = torch.full((len(TEXT), 260), float("nan"))

    def keep(first: int, logits: torch.Tensor) -> None:
        assert rows[first : first + len(logits)].isnan().all()
        rows[first : first + len(logits)] = torch.from_numpy(logits.copy())

    scores = logprobs(llm, Probe(score_from=20, observe=keep))
    assert scores[:20] == [None] * 20
    assert rows[:19].isnan().all() and rows[-1].isnan().all()
    for i in range(20, len(TEXT)):
        assert scores[i] == pytest.approx(float(torch.log_softmax(rows[i - 1], -1)[TEXT[i]]), abs=1e-5)


def test_scoring_the_end_of_a_text_may_take_the_rest_from_the_cache(llm: LLM):
    whole = logprobs(llm, Probe())
    cached = llm.engine.scheduler.stats.cached_tokens
    assert logprobs(llm, Probe(score_from=70))[70:] == whole[70:]
    assert llm.engine.scheduler.stats.cached_tokens - cached == 64  # whole pages before row 69
    cached = llm.engine.scheduler.stats.cached_tokens
    assert logprobs(llm, Probe()) == whole
    assert llm.engine.scheduler.stats.cached_tokens == cached


def test_rows_after_dense_until_run_through_the_technique(tiny_model: Path):
    plain, windowed = LLM(tiny_model), LLM(tiny_model, use=WINDOW)
    exact = logprobs(plain, Probe())
    assert logprobs(windowed, Probe())[1:] == pytest.approx(exact[1:], abs=1e-5)  # a prompt is dense in serving
    assert windowed.activity() == {"sink-window": 0}
    scores = logprobs(windowed, Probe(dense_until=40))
    assert windowed.activity()["sink-window"] > 0
    assert scores[1:41] == pytest.approx(exact[1:41], abs=1e-5)
    assert all(abs(a - b) > 1e-5 for a, b in zip(scores[64:], exact[64:], strict=True))


def test_what_is_scored_through_a_technique_is_what_it_generates(tiny_model: Path):
    llm = LLM(tiny_model, use=WINDOW)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=0)
    (output,) = llm.generate(TEXT[:40], params)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    generated = [entry[t].logprob for entry, t in zip(answer.logprobs, answer.token_ids, strict=True)]
    forced = logprobs(llm, Probe(dense_until=40, score_from=40), TEXT[:40] + answer.token_ids)[40:]
    assert forced == pytest.approx(generated, abs=1e-5)


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (Probe(dense_until=-2), "dense_until"),
        (Probe(score_from=0), "between 1 and"),
        (Probe(score_from=len(TEXT) + 1), "between 1 and"),
    ],
)
def test_impossible_probes_are_refused(tiny_model: Path, probe: Probe, why: str):
    with pytest.raises(RequestError, match=why):
        LLM(tiny_model).generate(TEXT, SCORED, probes=probe)


def test_an_observer_without_scores_is_refused(tiny_model: Path):
    llm = LLM(tiny_model)
    with pytest.raises(RequestError, match="prompt_logprobs=0"):
        llm.generate(TEXT, probes=Probe(observe=print))
    with pytest.raises(RequestError, match="1 prompts but 2 probes"):
        llm.generate([TEXT], probes=[Probe(), Probe()])
