"""Atom's claims at sizes where nothing takes time: all of them are there, and what is counted holds."""

from __future__ import annotations

import json
import re

import pytest

from dovetail.ops import cpu
from dovetail.reproduce.atom import EFFORTS, Effort, batches, experiments
from dovetail.reproduce.atom.products import BITS
from dovetail.reproduce.atom.quality import ABLATION, LOSS
from dovetail.reproduce.claim import Claim
from dovetail.reproduce.quantized import Text
from dovetail.reproduce.runner import measure
from tests.helpers.hf_models import save_model

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Claim]:
    path = tmp_path_factory.mktemp("atom") / "model"
    save_model(path, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=64)
    tiny = Effort(Text(4, 64, 1, 48), 16, 1, 1, 32, ((256, 3),), 1 << 14, str(path), 24)
    return {claim.name: claim for claim in measure(experiments(tiny))}


def test_every_claim_says_everything(claims: dict[str, Claim]) -> None:
    assert list(claims) == [BITS, "mixed product, K = 256, 3 rows", LOSS, ABLATION, *batches.NAMES]
    for claim in claims.values():
        assert all((claim.setting, claim.paper, claim.ours, claim.why)) and claim.kind == "run"
    assert json.loads(json.dumps([claim.to_dict() for claim in claims.values()]))


def test_bits_are_counted(claims: dict[str, Claim]) -> None:
    assert claims[BITS].meets and claims[BITS].ours.startswith("4.19 bits")


def test_steps_are_in_the_published_order(claims: dict[str, Claim]) -> None:
    found = re.findall(r"([A-Z\w ]+?) ([\d.e+]+)(?:, |$)", claims[ABLATION].ours)
    assert [name for name, _ in found] == ["RTN", "INT8 outliers", "groups", "clipping", "GPTQ", "KV4"]
    after = float(claims[LOSS].ours.split("; ")[0].split(" -> ")[1])
    assert after == pytest.approx(float(found[-1][1]), rel=1e-3)


def test_fewer_bytes_hold_more_requests(claims: dict[str, Claim]) -> None:
    counts = [re.findall(r"of (\d+) requests", claims[name].ours) for name in batches.NAMES]
    atom, plain = map(int, counts[0])
    assert atom > int(counts[1][1]) > plain >= 1 and counts[1][0] == counts[0][0]


def test_the_paper_s_calibration_is_the_full_one() -> None:
    assert (EFFORTS["full"].text.samples, EFFORTS["full"].text.length) == (128, 2048)
