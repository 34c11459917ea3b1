"""Allocations and reads that the system refuses, from opening a model to its answer: an error, and no harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.checkpoint.export import export
from dovetail.checkpoint.random_model import write_random
from dovetail.core.model import ModelConfig
from dovetail.models import MODELS, open_checkpoint
from dovetail.ops.cpu import isas

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ALLOCATIONS, READS = 1, 2
CONFIG = ModelConfig(
    architecture="llama", vocab_size=264, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_position_embeddings=128,
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not isas(), reason="the native kernels were not built"),
    pytest.mark.skipif(not shutil.which("gcc") or sys.platform != "linux", reason="there is no gcc, or no Linux"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "failing_system.so"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "failing_system.c", "-ldl"]
    subprocess.run(build, check=True)
    return path


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_random(MODELS["llama"], CONFIG, path, format="Q8_0")
    return path if request.param == "gguf" else export(open_checkpoint(path), path.with_suffix(""), "float32")


@pytest.mark.parametrize("always", [0, 1])
@pytest.mark.parametrize(("kind", "step"), [(ALLOCATIONS, 37), (READS, 1)])
def test_what_the_system_refuses_is_an_error_and_does_no_harm(
    library: Path, model: Path, kind: int, step: int, always: int
) -> None:
    """The n-th call fails, for n = 1, 1 + step and so on until a run goes to its end. Afterwards the same process
    gives the right answer. (With a step of 1, allocations take a minute: for changes of what allocates.)"""
    command = [sys.executable, HERE / "failing_system.py", model, kind, 1, step, always]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    right, *outcomes = map(json.loads, done.stdout.splitlines())
    assert not [o for o in outcomes if "wrong" in o], done.stderr
    *failed, last = outcomes
    assert len(failed) >= 2 and all(o["failed"] for o in failed)
    assert (last["failed"], last["answer"]) == (0, right["right"])
    for o in failed:  # a failure may go unnoticed where there is another way
        assert o.get("answer", o.get("again")) == right["right"]
        assert "raised" not in o or kind == ALLOCATIONS or o["raised"].startswith("ModelError"), o
