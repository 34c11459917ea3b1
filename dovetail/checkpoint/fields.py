"""Typed access to what a model's files say about it; whatever is missing or wrong is a ModelError naming it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.geometry import LIMIT
from dovetail.core.errors import ModelError

if TYPE_CHECKING:
    from dovetail.checkpoint.gguf import GGUFFile


class Fields:
    """A JSON object. `source` names the file in errors."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def wrong(self, name: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"{self.source}: {name} must be {wanted}, it is {str(value)[:64]!r}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.source}: {name} is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 <= value < LIMIT:
            raise self.wrong(name, value, "an integer from 0 to 2^31 - 1")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; () where it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(name, value, "a list of strings")
        return tuple(value)

    def object(self, name: str) -> Fields | None:
        """A JSON object, or None where it is missing, null or {}."""
        value = self.values.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self.source}: {name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list, or null; -1 has been used for "none"."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not -1 <= token < LIMIT:
                raise self.wrong(name, value, "a token id or a list of them")
        return tuple(token for token in ids if token >= 0)


class Keys:
    """A GGUF file's metadata under the architecture's prefix: `integer("block_count")` is `llama.block_count`."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file, self.prefix, self.metadata = file, prefix, file.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        key = f"{self.prefix}.{name}"
        value = self.metadata.read(key, int, default)
        if value is None:
            raise ModelError(f"{self.file.path}: {key} is missing")
        if value >= LIMIT:
            raise ModelError(f"{self.file.path}: {key} is {value}, not below 2^31")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.metadata.read(f"{self.prefix}.{name}", float, default)
        if value is None:
            raise ModelError(f"{self.file.path}: {self.prefix}.{name} is missing")
        return float(value)

    def per_layer(self, name: str, default: int | None = None) -> int:
        """An integer, or an array with the same integer for every layer."""
        key = f"{self.prefix}.{name}"
        if self.metadata.is_array(key):
            numbers = self.metadata.numbers(key)
            if (
                numbers is None
                or not len(numbers)
                or numbers.dtype.kind not in "iu"
                or (numbers != numbers[0]).any()
            ):
                raise ModelError(f"{self.file.path}: {key} differs by layer, which is not supported")
            if not 0 <= int(numbers[0]) < LIMIT:
                raise ModelError(f"{self.file.path}: {key} is {int(numbers[0])}")
            return int(numbers[0])
        return self.integer(name, default)
