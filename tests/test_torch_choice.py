import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def choice():
    spec = importlib.util.spec_from_file_location("torch_choice", ROOT / "scripts/torch_choice.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_requirement_is_the_projects(choice):
    assert choice.requirement(ROOT / "pyproject.toml").startswith("torch>=")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)",
            "a torch wheel of 527 MB",
        ),
        (
            "  Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl (1.2 GB)",
            "a torch wheel of 1200 MB",
        ),
        ("Collecting nvidia-cublas==13.1.1.3.* (from cuda-toolkit)", "nvidia-cublas"),
        ("Collecting cuda-bindings<14,>=13.0.3 (from torch)", "cuda-bindings"),
        ("  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (31 kB)", None),
        ("Processing torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", None),
        ("  Downloading torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl (190.2 MB)", None),
        ("Collecting networkx>=2.5.1 (from torch)", None),
    ],
)
def test_pips_output(choice, line, found):
    assert choice.cuda_in_log(["Looking in indexes", line]) == found


def test_pips_report(choice):
    def report(*names):
        return {"install": [{"metadata": {"name": name}} for name in names]}

    assert choice.cuda_in_report(report("torch", "sympy")) is None
    assert choice.cuda_in_report(report("torch", "nvidia-cudnn-cu13")) == "nvidia-cudnn-cu13"


@pytest.mark.parametrize(("found", "status"), [(None, 0), ("nvidia-cublas", 3)])
def test_only_a_machine_without_a_gpu_must_choose(choice, monkeypatch, capsys, found, status):
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    monkeypatch.delenv("CUDA", raising=False)
    monkeypatch.setattr(choice, "has_gpu", lambda: False)
    monkeypatch.setattr(choice, "ask_pip", lambda wanted: found)
    assert choice.main("test") == status
    assert ("make test CUDA=1" in capsys.readouterr().err) == bool(found)
    monkeypatch.setenv("CUDA", "1")
    assert choice.main("test") == 0


def test_a_named_index_is_used(choice, monkeypatch):
    asked = []
    monkeypatch.setenv("TORCH_INDEX_URL", "file:///wheels")
    monkeypatch.setattr(choice, "install_from", lambda index, wanted: asked.append(index) or 0)
    assert choice.main("run") == 0
    assert asked == ["file:///wheels"]
