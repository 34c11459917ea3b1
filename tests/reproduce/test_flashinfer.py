"""FlashInfer's claims at sizes where nothing takes time: what is counted is exact, what is timed is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.bench.engine.parallel import ParallelGeneration
from dovetail.bench.kernels.attention import Attention, Heads, Kernels, KVPool, Pages, Request, Unfused
from dovetail.core.errors import ConfigError
from dovetail.core.sampling import SamplingParams
from dovetail.core.seams import SlidingWindow
from dovetail.host.files import home
from dovetail.ops import cpu
from dovetail.ops.attention.kernel_variant import kernel_variant
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.flashinfer import Effort, experiments
from dovetail.reproduce.flashinfer.balance import busiest, loads
from dovetail.reproduce.flashinfer.effort import Prefix
from dovetail.reproduce.flashinfer.variants import compile_all
from dovetail.reproduce.runner import measure

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")
SMALL = Heads(4, 2, 16)
KERNELS = Kernels((cpu.isas() or ("",))[0], 2)


def tiny(model: Path) -> Effort:
    return Effort(
        rounds=1, generations=1, cold=1 << 16, streams=(1, 4), prompt_tokens=300, new_tokens=4,
        prefixes=(Prefix(SMALL, 256, 3),), context=64, page_heads=(SMALL,), shorten=64, model=str(model),
    )  # fmt: skip


@pytest.fixture(scope="module")
def claims(tiny_model: Path) -> dict[str, Claim]:
    return {claim.name: claim for claim in measure(experiments(tiny(tiny_model)))}


def test_every_claim_says_everything(claims: dict[str, Claim]) -> None:
    assert len(claims) == 10 + 1 + 4 + 4 + 5
    for claim in claims.values():
        assert all((claim.setting, claim.paper, claim.ours, claim.why))
        assert claim.kind == "run"
        assert "baseline: " in claim.setting
        assert (
            "section" in claim.paper
            or "table" in claim.paper
            or "appendix" in claim.paper
            or "not measured" in claim.paper
        )
        if claim.ratio is not None:
            assert 0 < claim.ratio.low <= claim.ratio.median <= claim.ratio.high
    assert json.loads(json.dumps([claim.to_dict() for claim in claims.values()]))


def test_what_is_counted_holds_at_any_size(claims: dict[str, Claim]) -> None:
    counted = ("shared prefix, 256 tokens, 3 requests, 4/2 d16", "parallel generation, KV read")
    for name in (*counted, "scattered pages, the same bits"):
        assert claims[name].meets is True, claims[name]
    once, each = 256 + 3 * 128, 3 * (256 + 128)
    assert f"{each / once:.2f} times fewer" in claims[counted[0]].ours


def test_bars_are_on_balance_pages_and_counts(claims: dict[str, Claim]) -> None:
    barred = {name for name, claim in claims.items() if claim.bar is not None}
    assert barred == {n for n in claims if n.startswith(("balance", "shared prefix"))} | {
        "parallel generation, KV read", "scattered pages, the same bits", "scattered pages of 16, decode, 4/2 d16",
        "scattered pages of 16, prefill, 4/2 d16",
    }  # fmt: skip
    faster = [n for n, claim in claims.items() if claim.bar is not None and claim.bar.needs == "faster"]
    assert faster == ["balance, one-long, per request"]


def test_published_ratios_follow_from_the_published_figures(claims: dict[str, Claim]) -> None:
    assert claims["balance, long, per request"].paper_ratio == pytest.approx((1.61, 1.61), abs=0.005)
    assert claims["parallel generation, n=4, each token"].paper_ratio == pytest.approx((1.159, 1.211), abs=0.001)
    assert claims["parallel generation, n=4, first token"].paper_ratio == pytest.approx((1.196, 1.296), abs=0.001)


def test_without_native_kernels_nothing_is_claimed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "isas", tuple)
    with pytest.raises(ConfigError, match="native kernels"):
        experiments(tiny(tiny_model))


def test_loads_are_the_papers() -> None:
    by_name = {load.name: load for load in loads(1)}
    assert set(by_name["constant"].lengths) == {1024}
    assert all(512 <= n <= 1024 for n in by_name["uniform"].lengths)
    assert sum(by_name["zipf"].lengths) / 16 == pytest.approx(1024, abs=1)
    assert max(by_name["zipf"].lengths) == pytest.approx(16 * min(by_name["zipf"].lengths), rel=0.01)
    assert all(4096 <= n <= 16384 for n in by_name["long"].lengths)
    assert [name for name, load in by_name.items() if load.skewed] == ["one-long"]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_the_busiest_thread_has_between_its_share_and_everything(pieces: list[int], threads: int) -> None:
    share = busiest(pieces, threads)
    assert 1 - 1e-9 <= share <= threads + 1e-9
    assert share >= max(pieces) * threads / sum(pieces) - 1e-9


@pytest.fixture(scope="module")
def generation(tiny_model: Path) -> ParallelGeneration:
    return ParallelGeneration(str(tiny_model), 300)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parallel_generation_reads_what_sharing_leaves(generation: ParallelGeneration, n: int) -> None:
    once, each = (generation.run(n, 5, cascade=cascade) for cascade in (True, False))
    assert len(once.each) == len(each.each) >= 3
    assert once.read == once.expected and each.read == each.expected == each.unshared == once.unshared
    saved = (n - 1) * 256 * len(once.each)  # two whole chunks of the prompt's 300 tokens
    assert once.unshared - once.read == saved


def test_both_executors_generate_the_same_text(generation: ParallelGeneration) -> None:
    texts = []
    for executor in generation.executors.values():
        generation.llm.engine.executor = executor
        params = SamplingParams(n=3, max_tokens=6, ignore_eos=True, seed=0)
        (answer,) = generation.llm.generate(generation.prompt, params, progress=False)
        texts.append([out.token_ids for out in answer.outputs])
    assert texts[0] == texts[1]


LAYOUTS = [Pages(), Pages(64), Pages(1, False), Pages(8, False)]


@pytest.mark.parametrize("pages", LAYOUTS, ids=str)
def test_the_step_in_torch_is_the_same_step(pages: Pages) -> None:
    """Unfused itself refuses kernels with another result."""
    torch.manual_seed(0)
    pool = KVPool(SMALL, "float32", 192, 1, pages=pages)
    count = 64 // pages.size
    requests = [Request(63, 64, range(i * count, (i + 1) * count)) for i in range(3)]
    variant = SlidingWindow(20)
    windowed = Attention(pool, requests, 192, KERNELS, variant=kernel_variant(variant, 4))
    Unfused(windowed, requests, variant).run()
    plain = Attention(pool, requests, 192, KERNELS)
    with pytest.raises(RuntimeError, match="off"):
        Unfused(plain, requests, variant)


def test_compiled_variants_come_from_an_empty_folder(tmp_path: Path) -> None:
    """And leave nothing in the cache of the user."""
    before = sorted(p.name for p in (home() / "kernels").glob("*.so"))
    builds = compile_all(tmp_path)
    assert len(builds.first) == len(builds.again) == 2 and set(builds.built) == {
        "soft cap",
        "ALiBi",
        "window of 1024",
    }
    assert len(list((tmp_path / "first").glob("*.so"))) == 2
    assert sorted(p.name for p in (home() / "kernels").glob("*.so")) == before
