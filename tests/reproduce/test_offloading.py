"""Claims of the systems with a slow tier at sizes where nothing takes time: what is measured ran, and is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dovetail import LLM
from dovetail.bench.engine.limited import Batch
from dovetail.bench.verdict import Verdict
from dovetail.core.errors import RequestError
from dovetail.ops import cpu
from dovetail.reproduce import infinigen, shadowkv
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.limited import Limit, Side, compare
from dovetail.reproduce.needles import Found, Needles, Subject, experiment
from dovetail.reproduce.runner import measure

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")
SHADOWKV, INFINIGEN = "shadowkv:rank=4,budget=64,chunk=4,outliers=0", "infinigen:budget=64,skip_layers=1"


def limit(model: Path) -> Limit:
    return Limit(str(model), 600_000, 200, 4, rounds=1, steps=2, tokens=60)


def needles(model: Path) -> Needles:
    text = model.parent / "haystack.txt"
    text.write_text("The sea was calm. The ship went on. " * 20)
    return Needles(str(model), "200", "50", 1, str(text))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def check(claims: list[Claim]) -> dict[str, Claim]:
    for claim in claims:
        assert all((claim.setting, claim.paper, claim.ours, claim.why))
        assert ("emulated link" in claim.setting) == (claim.kind == "emulated")
    assert json.loads(json.dumps([claim.to_dict() for claim in claims]))
    return {claim.name: claim for claim in claims}


def test_shadowkv_claims(tiny_model: Path, home: None) -> None:
    effort = shadowkv.Effort(limit(tiny_model), needles(tiny_model), SHADOWKV)
    claims = check(measure(shadowkv.experiments(effort)))
    assert claims["KV on the device"].meets and claims["KV on the device"].kind == "simulated"
    assert claims["decoding under a memory limit"].bar is not None
    assert claims["decoding under a memory limit, from disk"].bar is None
    for each in shadowkv.EFFORTS.values():
        assert each.limit.link == 25 and each.limit.context >= 7000 and "budget=512" in each.use


def test_infinigen_claims(tiny_model: Path, home: None) -> None:
    effort = infinigen.Effort(limit(tiny_model), needles(tiny_model), INFINIGEN, 120, 16)
    claims = check(measure(infinigen.experiments(effort)))
    assert [name for name, claim in claims.items() if claim.bar is not None] == [
        "pages guessed right", "decoding with KV in slow memory", "KV fetched for a token"
    ]  # fmt: skip


def test_a_technique_that_does_nothing_is_no_measurement(tiny_model: Path, home: None) -> None:
    with pytest.raises(RuntimeError, match="shadowkv did nothing"):
        compare(limit(tiny_model), Side(()), Side(("shadowkv:budget=100000,rank=4,outliers=0",), "host"))
    with pytest.raises(RuntimeError, match="quest did nothing"):
        needles(tiny_model).found(["quest:budget=100000,skip_layers=0"])


def test_a_batch_that_runs_out_is_no_measurement(tiny_model: Path) -> None:
    batch = Batch(LLM(tiny_model), [[1, 2, 3], [4, 5]], 6)
    with pytest.raises(RequestError, match=r"requests decoded|have ended"):
        batch.decode(50)
    batch.close()


def test_the_bar_is_a_share_of_what_is_found_by_reading_everything() -> None:
    dense = found(96, 100)
    assert found(96, 100).bar(dense).meets
    assert found(92, 100).bar(dense).meets is None  # 89.8 to 98.4 %
    assert found(80, 100).bar(dense).meets is False
    assert found(0, 100).bar(found(0, 100)) is None


def test_only_needles_that_are_found_by_reading_everything_can_be_lost() -> None:
    """What is found beside them makes up for nothing."""
    dense, ours = Found((True,) * 90 + (False,) * 10), Found((True,) * 60 + (False,) * 30 + (True,) * 10)
    assert "after 90 trials" in ours.bar(dense).why and ours.bar(dense).meets is False


def found(correct: int, trials: int) -> Found:
    return Found((True,) * correct + (False,) * (trials - correct))


def test_needles_are_asked_of_everything_and_of_a_window_as_wide_as_the_budget(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def look(grid: Needles, use: Sequence[str] = (), slow_tier: bool = False) -> Found:
        asked.append((" ".join(use), slow_tier))
        return found(len(asked), 9)

    monkeypatch.setattr(Needles, "found", look)
    subject = Subject("quest:budget=80", "section 1", "so it is", True, {"the other": "quest:score=bound"})
    (claim,) = measure([experiment(needles(tiny_model), subject)])
    assert asked == [
        ("", False), ("quest:budget=80", True), ("quest:score=bound", False),
        ("sink-window:sink=16,window=64", False),
    ]  # fmt: skip
    assert claim.ours == "2 of 9, where reading everything finds 1 of 9, the other 3 of 9 and the window 4 of 9"
    assert "first 16 and last 64 tokens" in claim.setting and claim.verdict is Verdict.UNDECIDED


def test_a_token_takes_what_an_engine_gives_it(tiny_model: Path) -> None:
    config = LLM(tiny_model, kv_cache_dtype="bf16", kv_memory=600_000, block_size=16).config
    page = limit(tiny_model).token_bytes * 16
    assert config.num_kv_pages == 600_000 // page
