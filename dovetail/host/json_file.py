"""JSON that others wrote, read with limits: files of a model directory, and lines and bodies of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dovetail.core.errors import ModelError, RequestError

_PIECE = 1 << 20  # bytes of a file that are read at a time


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object strictly: valid Unicode, no key twice in an object, no NaN or Infinity. ModelError
    otherwise.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelError(f"{source}: key {twice[:64]!r} appears twice")
        return result

    def constant(name: str) -> Any:
        raise ModelError(f"{source}: {name} is not a JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
        if b"\\ud" in text or b"\\uD" in text:  # maybe half of a character, which Python's parser lets through
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{source}: must be a JSON object, it is a {type(value).__name__}")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file; ModelError if it cannot be read or is longer than `limit` bytes."""
    parts, size = [], 0
    try:
        with open(
            path, "rb"
        ) as file:  # in pieces: reading takes memory for what it is asked for, and pipes have no size
            while size <= limit and (part := file.read(min(limit + 1 - size, _PIECE))):
                parts.append(part)
                size += len(part)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if size > limit:
        raise ModelError(f"{path}: is longer than {limit} bytes")
    return b"".join(parts)


def read_json_object(path: Path, limit: int = 4 << 20) -> dict[str, Any]:
    """The JSON object in `path`, a file of at most `limit` bytes; ModelError for anything else."""
    return parse_json_object(read_bytes(path, limit), str(path))


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """`data` as a JSON object: proper numbers, Unicode text, bounded nesting. RequestError names `what`."""
    from pydantic_core import from_json

    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the {what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the {what} must be a JSON object")
    return value
