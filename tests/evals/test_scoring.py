"""Scores of given tokens, against transformers and against the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dovetail import LLM, RequestError
from dovetail.core.errors import ConfigError
from dovetail.evals.divergence import Divergence, divergence
from dovetail.evals.perplexity import Perplexity
from dovetail.evals.scoring import score
from dovetail.text.corpus import corpus

EXACT = {"dtype": "float32", "kv_cache_dtype": "float32"}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, **EXACT)


@pytest.fixture(scope="module")
def peer(tiny_model: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def by_transformers(peer, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = peer(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("first", [1, 2, 40, 63])
def test_scores_are_transformers(llm: LLM, peer, first: int):
    ids = np.random.default_rng(1).integers(0, 250, 64).tolist()
    (found,) = score(llm, [ids], [first], [0])
    assert found == pytest.approx(by_transformers(peer, ids)[first - 1 :].tolist(), abs=1e-4)


def test_a_text_may_fill_the_context(tiny_model: Path, peer):
    llm = LLM(tiny_model, max_model_len=64, **EXACT)
    ids = np.random.default_rng(2).integers(0, 250, 64).tolist()
    (found,) = score(llm, [ids], [1], [0])
    assert found == pytest.approx(by_transformers(peer, ids).tolist(), abs=1e-4)
    with pytest.raises(RequestError, match="the context holds 64"):
        score(llm, [[*ids, 1]], [1], [0])


def test_texts_that_leave_nothing_to_score_are_refused(llm: LLM):
    for ids, first in (([1], 1), ([1, 2], 2), ([1, 2], 0)):
        with pytest.raises(RequestError, match="cannot be scored"):
            score(llm, [ids], [first], [0])


def test_perplexity_is_the_mean_of_the_windows_means(llm: LLM, peer, tmp_path: Path):
    text = tmp_path / "corpus.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 6)
    ids = llm.tokenizer.encode(text.read_text())
    result = Perplexity(corpus=str(text), window=100, windows=3).measure(llm, None)
    losses = [-float(by_transformers(peer, ids[i : i + 100]).mean()) for i in (0, 100, 200)]
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    assert (result["tokens"], result["windows"], result["window"]) == (297, 3, 100)
    later = [-float(by_transformers(peer, ids[i : i + 100])[25:].mean()) for i in (0, 100, 200)]
    assert result["dense"] == 25
    assert result["perplexity_after_dense"] == pytest.approx(math.exp(sum(later) / 3), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"window": 400}, "less than one window"),
        ({"window": 100, "windows": 4}, "3 windows of 100 tokens"),
        ({"window": 1}, "--window must be at least 2"),
        ({"window": 9999}, "--window must be between 2"),
        ({"window": 100, "dense": 99}, "--dense must leave"),
        ({"window": 100, "windows": 0}, "--windows must be at least 1"),
    ],
)
def test_impossible_windows_are_refused(llm: LLM, tmp_path: Path, options: dict, why: str):
    text = tmp_path / "corpus.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 6)
    with pytest.raises(ConfigError, match=why):
        Perplexity(corpus=str(text), **options).measure(llm, None)


def test_divergence_is_defined_over_the_whole_vocabulary():
    generator = np.random.default_rng(3)
    p, q = (generator.normal(0, 3, (5, 50)).astype(np.float32) for _ in "pq")
    kl, same = divergence(p, q)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    assert kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).numpy(), rel=1e-9)
    assert same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    p[:, 3] = -np.inf
    assert np.isfinite(divergence(p, q)[0]).all()


def test_an_engine_does_not_diverge_from_itself_and_does_from_another(tiny_model: Path, tmp_path: Path):
    text = tmp_path / "corpus.txt"
    text.write_text("".join(map(chr, np.random.default_rng(4).integers(32, 120, 600))))
    suite = Divergence(corpus=str(text), window=50, windows=3, tokens=20)
    reference = suite.refer(LLM(tiny_model, **EXACT))
    again = suite.measure(LLM(tiny_model, **EXACT, max_num_batched_tokens=33), reference)
    assert (again["kl_mean"], again["kl_max"], again["top1_agreement"], again["tokens"]) == (0, 0, 1, 60)
    other = suite.measure(LLM(tiny_model, use="sink-window:sink=0,window=16"), reference)
    assert other["kl_max"] >= other["kl_p99"] >= other["kl_median"] > 0
    assert len(reference.texts) == 3 and all(len(t) == 70 for t in reference.texts)
    sooner, same = (
        replace(suite, dense=dense).measure(LLM(tiny_model, use="sink-window:sink=0,window=16"), reference)
        for dense in (20, 50)
    )
    assert (sooner["dense"], other["dense"], same["dense"]) == (20, 50, 50)
    assert sooner["kl_mean"] != other["kl_mean"] == same["kl_mean"]


@pytest.mark.parametrize("options", [{"window": 4000, "tokens": 96}, {"tokens": 0}, {"window": 0}])
def test_divergence_must_fit_the_context(llm: LLM, options: dict):
    with pytest.raises(ConfigError, match="must be at least 1"):
        Divergence(**options).refer(llm)
    with pytest.raises(ConfigError, match="--dense must be from 0 to the prompt's 40 tokens, got 41"):
        Divergence(window=40, tokens=8, dense=41).refer(llm)


def test_corpora_by_name_and_by_file(tmp_path: Path):
    assert len(corpus("pydoc").text) > 100_000
    (tmp_path / "wikitext2-valid.txt").write_text("wiki")
    (tmp_path / "wiki.valid.raw").write_text("raw")
    assert corpus("wikitext2", tmp_path).text == "wiki"
    assert corpus("wikitext2-raw", tmp_path).text == "raw"
    assert corpus("wikitext2", tmp_path).digest != corpus("pydoc").digest
    for name, data, why in (
        ("shakespeare", None, "--data DIR"),
        ("shakespeare", tmp_path, "has none of"),
        ("missing.txt", None, "no such file"),
        ("pydoc", tmp_path, "--data is where"),
        (str(tmp_path / "wiki.valid.raw"), tmp_path, "--data is where"),
    ):
        with pytest.raises(ConfigError, match=why):
            corpus(name, data)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        corpus(str(tmp_path / "bytes"))
