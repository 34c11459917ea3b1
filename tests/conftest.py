"""Fixtures that several folders use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# Before anybody imports torch. A worker per core leaves no core for threads that spin while they wait for others:
# a test that takes 6 seconds of one core took 50 of two, and minutes beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # where nobody asks for more
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests write nothing into the user's cache. Those of packed weights take a folder of their own.
os.environ["DOVETAIL_PACKED_CACHE"] = "off"

# `make check` takes --hypothesis-profile=fast: a fifth of the examples, the same ones every time.
# scripts/mutate.py takes the same, and does not look for a simpler one.
settings.register_profile("full", deadline=None)
settings.register_profile("fast", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("mutants", settings.get_profile("fast"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("full")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random llama of two layers, a byte tokenizer and a chat template; 4096 tokens of context."""
    from tests.helpers.hf_models import save_model

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory, num_hidden_layers=2, max_position_embeddings=4096)
    return directory
