"""The examples run as they are, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "says"),
    [("offline.py", "Once upon a time"), ("chat.py", "of them cached"), ("variant.py", "village")],
)
def test_example(tiny_model, name, says):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, tiny_model], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
