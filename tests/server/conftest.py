from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.serving import Running, save_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared(tiny_model: Path) -> Iterator[Running]:
    """A server for tests that leave nothing behind."""
    running = Running(tiny_model)
    yield running
    running.check_empty()
    running.stop()
    assert running.code == 0


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers with options of their own."""
    servers: list[Running] = []

    def begin(*arguments, **options) -> Running:
        servers.append(Running(tiny_model, *arguments, **options))
        return servers[-1]

    yield begin
    for running in servers:
        running.stop()
