"""The native path imports no torch, also where it is installed. (tests/light proves it where there is none.)"""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from dovetail.checkpoint.random_model import write_random
from dovetail.core.errors import ConfigError
from dovetail.host import lazy_torch
from dovetail.models.shapes import shape
from dovetail.ops.cpu import isas

pytestmark = pytest.mark.skipif(not isas(), reason="not built")

PROGRAM = """
import sys
from dovetail import LLM, SamplingParams

model, use, kv, offload = sys.argv[1:]
options = dict(kv_offloading_size="16MiB", kv_offloading_backend="host") if offload else {}
llm = LLM(model, use=[use] if use else [], kv_memory="64MiB", kv_cache_dtype=kv, max_model_len=1024, **options)
prompt = [i * 7 % 251 for i in range(300)]
ways = [
    SamplingParams(temperature=0, max_tokens=40, logprobs=3, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, max_tokens=40, seed=1, ignore_eos=True),
    SamplingParams(temperature=1, presence_penalty=1, repetition_penalty=1.1, logit_bias={3: 2.0}, max_tokens=40,
                   ignore_eos=True),
]
outputs = llm.generate([prompt, prompt[:200], prompt[:7]], ways, progress=False)
assert [len(o.outputs[0].token_ids) for o in outputs] == [40] * 3
assert outputs[0].outputs[0].logprobs and outputs[0].prompt_logprobs
assert "torch" not in sys.modules
print(llm.activity())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_random(*shape("llama", None, {}), path, format="Q8_0", seed=0)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "kv", "offload"),
    [
        ("", "auto", False),
        ("", "int8", False),
        ("ngram", "auto", False),
        ("quest:budget=64,skip_layers=0", "auto", False),
        ("quest:budget=64,skip_layers=0", "int4", False),
        ("quest:budget=64,skip_layers=0,score=bound", "auto", True),
        ("sink-window:sink=4,window=32", "auto", False),
        ("shadowkv:rank=8,budget=160,chunk=4,outliers=2", "auto", True),
        ("infinigen:budget=64,skip_layers=1", "auto", True),
    ],
)
def test_generating_imports_no_torch(model: Path, tmp_path: Path, use: str, kv: str, offload: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), use, kv, "yes" if offload else ""],
        capture_output=True, text=True, timeout=110, env={"DOVETAIL_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not use or "0}" not in done.stdout, done.stdout


def test_writing_random_weights_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from dovetail.cli import main\ntry:\n main()\nfinally:\n assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "random", "qwen3", str(tmp_path / "m.gguf"), "--format", "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "broken", ["raise ImportError('libtorch.so is missing')", "import ctypes; ctypes.CDLL('/no/such')", "1 / 0"]
)
def test_a_torch_that_does_not_load_is_nobody_s_business_but_the_reference_s(
    model: Path, tmp_path: Path, broken: str
) -> None:
    package = tmp_path / "broken" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(broken)
    env = {"DOVETAIL_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{package.parent}:{Path.cwd()}"}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "dovetail",
            "run",
            str(model),
            "hello",
            "--raw",
            "--max-tokens",
            "2",
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)

    assert run().returncode == 0
    done = run("--kernels", "torch")
    assert done.returncode == 2
    assert "torch is installed but does not load" in done.stderr and "dovetail-llm[torch]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_whose_torch_does_not_load_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libcudart is missing")

    monkeypatch.setattr(lazy_torch, "DRIVERS", (__file__,))
    monkeypatch.setattr(lazy_torch, "import_module", fails)
    with pytest.warns(UserWarning, match=r"left alone.*libcudart is missing"):
        assert lazy_torch.cuda_devices() == 0


def test_a_folder_that_torch_left_behind_is_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_torch, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(lazy_torch, "import_module", ModuleType)
    assert not lazy_torch.installed()
    with pytest.raises(ConfigError, match="not installed"):
        lazy_torch.torch.nobody_asks_for_this  # noqa: B018
