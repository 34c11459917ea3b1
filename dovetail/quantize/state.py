"""What an interrupted `quantize` leaves: finished blocks beside the output folder, and the recipe they follow."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dovetail.checkpoint.safetensors_folder import SafetensorsFolder
from dovetail.checkpoint.safetensors_writer import Entry, sync_directory, write_file, write_json
from dovetail.core.errors import ConfigError
from dovetail.host.files import exclusive_or_not
from dovetail.host.json_file import read_json_object

RECIPE, REPORT = "recipe.json", "report.json"


class State:
    """A folder beside `out`, with one folder for each finished part: a safetensors file and a report."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.quantizing"

    @contextlib.contextmanager
    def opened(self, recipe: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder. ConfigError if it follows another recipe, or if another process holds it."""
        found = self._recipe()
        if found is not None and found != recipe and self._parts():
            differ = ", ".join(sorted(k for k in {*found, *recipe} if found.get(k) != recipe.get(k)))
            raise ConfigError(
                f"{self.path} has what an interrupted run with another recipe made (it differs in: {differ}); "
                "repeat that command to go on, or delete the folder to start anew"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive_or_not(self.path / ".lock") as mine:
            if not mine:
                raise ConfigError(f"another process is writing {self.out}")
            if found != recipe:
                write_json(self.path / RECIPE, recipe)
            try:
                yield
            finally:
                if not self._parts():
                    shutil.rmtree(self.path, ignore_errors=True)

    def _recipe(self) -> dict[str, Any] | None:
        file = self.path / RECIPE
        return read_json_object(file) if file.exists() else None

    def _parts(self) -> bool:
        """Whether anything is finished."""
        return any(self.path.glob("*/model.safetensors"))

    def has(self, part: str) -> bool:
        return (self.path / part).is_dir()

    def put(self, part: str, entries: Iterable[Entry], report: Mapping[str, Any]) -> None:
        """Keep a finished part, whole or not at all."""
        making = self.path / f".{part}.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        write_file(list(entries), making / "model.safetensors")
        write_json(making / REPORT, report)
        with open(making / "model.safetensors", "rb+") as file:
            os.fsync(file.fileno())
        sync_directory(making)
        os.rename(making, self.path / part)
        sync_directory(self.path)

    def folder(self, part: str) -> SafetensorsFolder:
        return SafetensorsFolder(self.path / part)

    def report(self, part: str) -> dict[str, Any]:
        return dict(json.loads((self.path / part / REPORT).read_text()))

    def entries(self, part: str) -> Iterator[Entry]:
        """The tensors of a part, as they are."""
        folder = self.folder(part)
        for name in folder.names():
            found = folder.find(name)
            yield Entry(name, found.dtype, found.shape, found.end - found.begin, partial(folder.data, name))

    def publish(self, made: Path) -> None:
        """Give the finished model its name, and remove everything else."""
        sync_directory(made)
        with contextlib.suppress(FileNotFoundError):
            self.out.rmdir()  # an empty folder
        os.rename(made, self.out)
        sync_directory(self.out.parent)
        shutil.rmtree(self.path, ignore_errors=True)
