"""The fuzzer of model files: no mutant does harm, and it finds what does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "scripts/fuzz.py"


def fuzz(*arguments: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(FUZZ), *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_no_mutant_of_a_model_file_does_harm(tmp_path: Path) -> None:
    code, said = fuzz("--seconds", 10, "--out", tmp_path / "found")
    assert code == 0, said
    ran, opened = map(int, re.search(r"(\d+) cases, (\d+) opened, 0 failures", said).groups())
    assert ran > 50 and ran // 20 < opened < ran  # enough of them pass the readers to reach what comes after
    assert not (tmp_path / "found").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", "KeyError instead of a ModelError"),
        ("aborts", "ended by SIGABRT"),
        ("exits", "ended in the middle of a case"),
        ("allocates", "bytes allocated for files of"),
        ("takes_all", "bytes of address space"),
        ("computes", "1.1 s of CPU time"),
    ],
)
def test_a_loader_with_a_fault_is_found_and_its_files_are_kept(fault: str, words: str, tmp_path: Path) -> None:
    load = ("--kinds", "index,config", "--load", f"tests.helpers.loaders:{fault}")
    code, said = fuzz("--seconds", 3, "--most", 1, "--out", tmp_path, *load)
    assert code == 1 and re.search(f"index:0: .*{words}", said), said
    assert (tmp_path / "index-0" / "model.safetensors.index.json").is_file()
    if fault == "raises":
        again, said = fuzz("--case", "index:0", *load)
        assert again == 1 and "block_count" in said


def test_a_loader_that_refuses_all_passes(tmp_path: Path) -> None:
    code, said = fuzz("--seconds", 1, "--kinds", "index", "--load", "tests.helpers.loaders:refuses")
    assert code == 0 and ", 0 opened, 0 failures" in said
