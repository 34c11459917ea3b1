"""Keeps the results of a run until all of it is done, so that the same run can go on after an interrupt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from dovetail.core.errors import ConfigError
from dovetail.host.files import home


class Journal:
    """A file of finished results, one line each, named by what was asked (`key`).

    A line that a crash left half written is ignored. ConfigError if the file cannot be written.
    """

    def __init__(self, key: Mapping[str, Any], fresh: bool = False) -> None:
        text = json.dumps(key, sort_keys=True, default=str)
        self.path = home() / "evals" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"
        if fresh:
            self.remove()
        self.found = self._read()

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        self.found[name] = dict(result)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # A newline first, so that what a crash left becomes a line of its own.
                file.write(b"\n" + json.dumps([name, result]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"results cannot be kept in {self.path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the file: the run is complete."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return {}
        found = {}
        for line in filter(None, lines):
            with contextlib.suppress(ValueError, TypeError):
                name, result = json.loads(line)
                if isinstance(name, str) and isinstance(result, dict):
                    found[name] = result
        return found
