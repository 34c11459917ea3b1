"""What a result says of its origin."""

import json
from pathlib import Path

from dovetail import LLM, __version__
from dovetail.provenance import provenance


def test_a_result_names_machine_versions_commit_and_configuration(tiny_model: Path):
    found = provenance(LLM(tiny_model, threads=1))
    assert json.loads(json.dumps(found)) == found
    assert found["machine"]["cpu"] and found["machine"]["threads"] >= 1
    assert found["versions"]["dovetail"] == __version__ and "torch" in found["versions"]
    assert found["config"]["threads"] == 1
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 12
