"""Tender's claims at sizes where nothing takes time: all of them are there, and the exact ones hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dovetail.ops import cpu
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.quantized import Text
from dovetail.reproduce.runner import measure
from dovetail.reproduce.tender import EFFORTS, Effort, experiments
from dovetail.reproduce.tender.chunks import NAME
from dovetail.reproduce.tender.models import DOWN, INT4, INT8, SUMS
from dovetail.reproduce.tender.products import EXACT

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")


@pytest.fixture(scope="module")
def claims(tiny_model: Path) -> dict[str, Claim]:
    tiny = Effort(Text(2, 32, 1, 32), True, 1, ((64, 3),), 1 << 14, str(tiny_model))
    return {claim.name: claim for claim in measure(experiments(tiny))}


def test_every_claim_says_everything(claims: dict[str, Claim]) -> None:
    assert list(claims) == [EXACT, "implicit requantization, K = 64, 3 rows", INT8, INT4, SUMS, DOWN, NAME]
    for claim in claims.values():
        assert all((claim.setting, claim.paper, claim.ours, claim.why)) and claim.kind == "run"
    assert json.loads(json.dumps([claim.to_dict() for claim in claims.values()]))


def test_integers_are_exact(claims: dict[str, Claim]) -> None:
    assert claims[EXACT].meets
    assert "equal" in claims[EXACT].ours and "have their bits" in claims[EXACT].ours


def test_perplexities_and_sums_are_measured(claims: dict[str, Claim]) -> None:
    for name in (INT8, INT4):
        before, after = map(float, claims[name].ours.split(" -> "))
        assert min(before, after) > 1
    assert re.findall(r"INT(\d): 0 of \d+ weights", claims[SUMS].ours) == ["8", "4"]


def test_the_paper_s_setting_is_the_default() -> None:
    assert (EFFORTS["full"].text.samples, EFFORTS["full"].text.length) == (128, 2048)
    assert all(4096 in [width for width, _ in effort.shapes] for effort in EFFORTS.values())


def test_groups_of_a_chunk_and_of_a_layer_are_the_same_with_one_chunk(claims: dict[str, Claim]) -> None:
    plain, chunk, layer = map(float, re.findall(r"[\d.]+", claims[NAME].ours))
    assert chunk == layer and plain == pytest.approx(chunk, rel=0.05)
