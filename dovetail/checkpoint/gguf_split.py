"""A GGUF model that is cut into several files: `model-00001-of-00003.gguf` and its like, read as one."""

from __future__ import annotations

import os

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.core.errors import ModelError
from dovetail.host.files import FilePart, file_part
from dovetail.ops.stored import StoredTensor


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """A GGUF file, with the other parts of its model if it is the first of several.

    ModelError for what `GGUFFile` refuses, a part that is not the first, and parts that are missing or do not
    belong together.
    """
    file = GGUFFile(path)
    count = file.metadata.read("split.count", int, 0)
    return SplitGGUF(file, count) if count > 1 else file


class SplitGGUF(GGUFFile):
    """All parts of a model as one `GGUFFile`. Metadata are those of the first part; tensors lie in any part.

    `path` is the first part's; `bytes` counts all parts.
    """

    def __init__(self, first: GGUFFile, count: int) -> None:
        # Not the constructor of GGUFFile: the first part is open already.
        self.path, self.version, self.alignment, self.metadata = (
            first.path, first.version, first.alignment, first.metadata,
        )  # fmt: skip
        parts = [first, *(_open_part(first, name) for name in _other_names(first, count))]
        self._owners: dict[str, GGUFFile] = {}
        for number, part in enumerate(parts):
            _check_part(part, first, number, count)
            for name in part.tensors:
                if name in self._owners:
                    raise ModelError(f"{part.path}: tensor {name!r} is also in {self._owners[name].path.name}")
                self._owners[name] = part
        self.files = tuple(part.path for part in parts)
        self.bytes = sum(part.bytes for part in parts)
        self.tensors = {name: part.tensors[name] for name, part in self._owners.items()}
        total = first.metadata.read("split.tensors.count", int)
        if total is None:
            raise ModelError(f"{first.path}: split.tensors.count is missing")
        if total != len(self.tensors):
            raise ModelError(
                f"{first.path}: split.tensors.count is {total}, but the {count} parts hold {len(self.tensors)} "
                "tensors; they do not belong together, fetch them again"
            )

    def tensor(self, name: str) -> StoredTensor:
        """See `GGUFFile.tensor`."""
        owner = self._owners.get(name)
        if owner is None:
            raise ModelError(f"{self.path}: none of its parts has a tensor {name!r}")
        return owner.tensor(name)

    def release(self, name: str) -> None:
        """See `GGUFFile.release`."""
        self._owners[name].release(name)


def _other_names(first: GGUFFile, count: int) -> list[str]:
    """The names of the parts behind the first; ModelError if the file's own name does not say which they are."""
    part, number = file_part(first.path.name), first.metadata.read("split.no", int, 0)
    here = FilePart("...", number + 1, count, ".gguf")
    if part is None or part.total != count:
        raise ModelError(
            f"{first.path}: is part {number + 1} of {count} (split.no, split.count); the other parts can only be "
            f"found if its name ends in {here.name(number + 1)[3:]}, so give the parts their names back"
        )
    if number != 0:
        raise ModelError(f"{first.path}: is part {number + 1} of {count}; give the first, {part.name(1)}")
    return part.names()[1:]


def _open_part(first: GGUFFile, name: str) -> GGUFFile:
    path = first.path.with_name(name)
    if not path.is_file():
        raise ModelError(f"{first.path}: its part {name} is missing in {path.parent}")
    return GGUFFile(path)


def _check_part(part: GGUFFile, first: GGUFFile, number: int, count: int) -> None:
    """Whether a file is what its name says."""
    found = part.metadata.read("split.no", int), part.metadata.read("split.count", int)
    if found != (number, count):
        raise ModelError(
            f"{part.path}: split.no is {found[0]} and split.count {found[1]}, its name says {number} of {count}; "
            "parts are mixed up, fetch them again"
        )
    name = part.metadata.read("general.architecture", str)
    wanted = first.metadata.read("general.architecture", str)
    if name not in (None, wanted):
        raise ModelError(
            f"{part.path}: is of a {str(name)[:64]!r} model, the first part of a {str(wanted)[:64]!r}"
        )
