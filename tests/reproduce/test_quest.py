"""Quest's claims at sizes where nothing takes time: what is timed is what is said, and it is all there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.bench.kernels.attention import Attention, Heads, Kernels, KVPool, Request
from dovetail.bench.kernels.sparse_attention import Choosing, SparseAttention, drift
from dovetail.core.errors import ConfigError
from dovetail.ops import cpu
from dovetail.ops.memory import as_tensor
from dovetail.ops.pages import KINDS, page_scores, pick, summary, unpacked
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.needles import Needles
from dovetail.reproduce.quest import EFFORTS, Effort, experiments
from dovetail.reproduce.runner import measure
from dovetail.runtime.store import store_type

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")
SMALL = Heads(6, 2, 16)
KERNELS = Kernels((cpu.isas() or ("",))[0], 2)


def tiny(model: Path) -> Effort:
    text = model.parent / "haystack.txt"
    text.write_text("The sea was calm. The ship went on. " * 20)
    return Effort(
        rounds=1, contexts=(1024, 2048), decode_rounds=1, new_tokens=4, attention_budget=256, cold=1 << 18,
        heads=SMALL, decode_context=200, decode_budget=64, skip_layers=1, model=str(model),
        needles=Needles(str(model), "200", "50", 1, str(text)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def claims(tiny_model: Path) -> dict[str, Claim]:
    return {claim.name: claim for claim in measure(experiments(tiny(tiny_model)))}


def test_every_claim_says_everything(claims: dict[str, Claim]) -> None:
    assert len(claims) == 2 * 2 + 1 + 1 + 1
    for claim in claims.values():
        assert all((claim.setting, claim.paper, claim.ours, claim.why))
        assert claim.kind == "run" and "baseline: " in claim.setting and "section" in claim.paper
    assert json.loads(json.dumps([claim.to_dict() for claim in claims.values()]))


def test_bars_are_on_the_published_setting_and_on_decoding(claims: dict[str, Claim]) -> None:
    barred = [name for name, claim in claims.items() if claim.bar is not None]
    assert barred == ["decoding behind 200 tokens"]  # this model finds no needle, so that there is nothing to lose
    for effort in EFFORTS.values():
        assert 32 * 1024 in effort.contexts and effort.attention_budget == 2048
        assert str(effort.heads) == "32/8 d128" and effort.cold > 512 << 20
        assert effort.decode_context >= 7500 and effort.decode_budget == 512


def test_the_bytes_are_those_of_the_pages_read_and_of_all_summaries(claims: dict[str, Claim]) -> None:
    pages, listed = 2048 // 16, 256 // 16
    summaries = (pages - 1) / 16  # the current page is not eligible; a summary is a sixteenth of its page
    assert f"of {pages / (listed + summaries):.2f} that the bytes allow" in claims["self-attention, 2K"].ours


def test_without_native_kernels_nothing_is_claimed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "isas", tuple)
    with pytest.raises(ConfigError, match="native kernels"):
        experiments(tiny(tiny_model))


SHAPES = [Heads(6, 2, 16), Heads(7, 1, 32), Heads(2, 2, 48)]


@settings(max_examples=60, deadline=None, derandomize=True)  # scores may differ in the last bit
@given(
    st.sampled_from(KINDS), st.sampled_from(["float32", "bf16"]), st.integers(3, 90), st.integers(0, 15),
    st.integers(2, 90), st.sampled_from(SHAPES),
)  # fmt: skip
def test_the_step_reads_what_the_definitions_choose(
    kind: str, dtype: str, pages: int, more: int, listed: int, heads: Heads
) -> None:
    """Any number of pages and of tokens in the last one; and equal scores, since some pages are copies."""
    torch.manual_seed(pages)
    tokens = pages * 16
    pool = KVPool(heads, dtype, tokens, 1)
    drift(pool)
    copies = pool.k.data[10:30]
    copies.copy_(pool.k.data[: len(copies)].clone())
    stop = tokens - more
    order = torch.randperm(pages)
    step = SparseAttention(
        pool, [Request(stop - 1, stop, order.tolist())], tokens, KERNELS, choosing=Choosing(listed * 16, kind)
    )
    k, v = (
        store.read(0, torch.arange(tokens)).float().unflatten(0, (pages, 16))[order] for store in (pool.k, pool.v)
    )
    q = step.q[..., : heads.dim] * heads.dim**-0.5
    q = q.to(torch.bfloat16).float() if dtype == "bf16" else q
    eligible = max(0, stop - 16) // 16
    summaries = as_tensor(step.summaries, store_type(dtype)[1])
    found = summaries[order][None, ..., : heads.dim].double()
    if kind == "codes":
        found = unpacked(summaries[order], heads.dim, 16)[None].double()
    torch.testing.assert_close(
        found[0].float(), summary(k.to(summaries.dtype), kind, 16).float(), rtol=0.01, atol=1e-5
    )
    count = torch.tensor([max(0, listed - (-(-stop // 16) - eligible))])
    chosen = pick(page_scores(q.double(), found, kind).float(), torch.tensor([eligible]), count)[0]
    readable = torch.zeros(heads.kv, tokens, dtype=torch.bool)
    readable[:, eligible * 16 : stop] = True
    for head, some in enumerate(chosen):
        for page in some[some >= 0].tolist():
            readable[head, page * 16 : page * 16 + 16] = True
    k, v = (x.flatten(0, 1).transpose(0, 1) for x in (k, v))
    scores = q[0].unflatten(0, (heads.kv, -1)) @ k.transpose(1, 2)
    weights = torch.softmax(scores.masked_fill(~readable[:, None], -torch.inf), -1)
    wanted = (weights @ v).flatten(0, 1)
    torch.testing.assert_close(step.first_layer()[0], wanted, rtol=0.02, atol=0.02 if dtype == "bf16" else 1e-4)


def test_everything_within_the_budget_is_dense_attention() -> None:
    torch.manual_seed(0)
    pool = KVPool(SMALL, "bf16", 512, 1)
    requests = [Request(500, 501, range(32))]
    dense = Attention(pool, requests, 512, KERNELS)
    sparse = SparseAttention(pool, requests, 512, KERNELS, choosing=Choosing(512))
    assert torch.equal(dense.first_layer(), sparse.first_layer())
    assert not torch.equal(
        dense.first_layer(), SparseAttention(pool, requests, 512, KERNELS, choosing=Choosing(64)).first_layer()
    )


def test_no_two_pages_of_drifting_keys_are_alike() -> None:
    pool = KVPool(SMALL, "bf16", 4096, 1)
    drift(pool)
    pages = pool.k.data.flatten(1).float()
    apart = torch.cdist(pages, pages) + 1e9 * torch.eye(len(pages))
    assert apart.min() > 1
    near, far = apart.diagonal(1).mean(), apart.diagonal(64).mean()
    assert near < 0.9 * far
