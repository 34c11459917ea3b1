"""The claims of "Give Me BF16 or Give Me Death?" at sizes where nothing takes time: all of them are there."""

from __future__ import annotations

import json
import re

import pytest

from dovetail.advise.workload import synthetic
from dovetail.ops import cpu
from dovetail.reproduce.bf16 import Effort, experiments
from dovetail.reproduce.bf16.formats import RECOVERY
from dovetail.reproduce.quantized import Text
from dovetail.reproduce.runner import measure
from tests.helpers.hf_models import save_model


@pytest.mark.skipif(not cpu.isas(), reason="the native kernels were not built")
def test_formats_are_ranked_by_measurement(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bf16") / "model"
    save_model(path, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=64)
    workloads = synthetic(16, 4, 1, "one"), synthetic(16, 4, 3, "three")
    found = measure(experiments(Effort(Text(4, 64, 2, 64), 1, workloads, 32, str(path))))
    assert [claim.name for claim in found] == [RECOVERY, "the best format, one", "the best format, three"]
    for claim in found:
        assert all((claim.setting, claim.paper, claim.ours, claim.why))
    assert re.findall(r"(w\S+) [+-][\d.]+%", found[0].ours) == ["w8a8-fp8", "w8a8-int8", "w4a16"]
    for claim in found[1:]:
        ratios = {name: float(r) for name, r in re.findall(r"(w\S+) ([\d.]+)(?=[,;])", claim.ours)} | {"bf16": 1.0}
        best = claim.ours.split()[0]
        assert ratios[best] == max(ratios.values()) and claim.ratio is not None
    assert json.loads(json.dumps([claim.to_dict() for claim in found]))
