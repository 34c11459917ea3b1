"""The requests of a batch file: one JSON object a line, with custom_id, method, url and body."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dovetail.core.errors import RequestError

URLS = ("/v1/chat/completions", "/v1/completions")
MAX_LINE = 32 << 20  # bytes


@dataclass(frozen=True)
class Row:
    """A request, or the `error` that says why it is not one.

    `key` is made from the line and the settings it runs under: the same row of the same run has the same key,
    wherever it stands in the file.
    """

    key: str
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    error: RequestError | None = None


def count(path: Path) -> int:
    """How many rows there are."""
    with open(path, "rb") as file:
        return sum(1 for _ in lines(file))


def read(path: Path, settings: str) -> Iterator[Row]:
    """The rows in order. A line that is not a valid request becomes a row with an error. Blank lines are
    skipped."""
    seen: set[str] = set()
    with open(path, "rb") as file:
        for number, line in lines(file):
            key = hashlib.sha256(settings.encode() + b"\0" + line).hexdigest()[:24]
            value: dict[str, Any] = {}
            try:
                value = _parse(line)
                yield _row(value, key, seen)
            except RequestError as error:
                # Identical bad lines are different rows.
                key = hashlib.sha256(f"{number}\0{key}".encode()).hexdigest()[:24]
                name = value.get("custom_id")
                message = RequestError(f"line {number}: {error}", param=error.param)
                yield Row(key, name if isinstance(name, str) else None, error=message)


def lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1. A line that is too long is cut just above the limit."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            pass
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            yield number, line


def _parse(line: bytes) -> dict[str, Any]:
    from dovetail.host.json_file import json_object

    if len(line) >= MAX_LINE:
        raise RequestError(f"the line is longer than {MAX_LINE} bytes")
    return json_object(line, "line")


def _row(value: dict[str, Any], key: str, seen: set[str]) -> Row:
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("custom_id must be a string that is not empty", param="custom_id")
    if custom_id in seen:
        raise RequestError(f"custom_id '{custom_id[:100]}' is used by an earlier row", param="custom_id")
    seen.add(custom_id)
    if value.get("method") != "POST":
        raise RequestError("method must be POST", param="method")
    if url not in URLS:
        raise RequestError(f"url must be one of {', '.join(URLS)}", param="url")
    if not isinstance(body, dict):
        raise RequestError("body must be an object", param="body")
    return Row(key, custom_id, url, body)
