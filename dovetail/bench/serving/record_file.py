"""A file with a line of JSON for each request of a benchmark."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dovetail.bench.serving.load import Run
from dovetail.core.errors import ConfigError


@contextlib.contextmanager
def record_file(path: Path | None) -> Iterator[Callable[[str, Any, int, Run], None]]:
    """A function that appends the records of a target's load at a rate in a round; without a path it does nothing.

    ConfigError if the file cannot be opened or written.
    """
    if path is None:
        yield lambda target, rate, number, run: None
        return
    with _explained(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below

    def keep(target: str, rate: Any, number: int, run: Run) -> None:
        with _explained(path):
            for index, record in enumerate(run.records):
                line = {"target": target, "rate": rate, "round": number, "request": index, **record.to_dict()}
                file.write(json.dumps(line) + "\n")
            file.flush()

    with file:
        yield keep


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--records {path}: cannot be written: {error.strerror or error}") from error
