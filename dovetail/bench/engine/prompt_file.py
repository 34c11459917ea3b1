"""A file of prompts: text, a prompt a line, or JSON lines with `prompt` or `messages`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.batch.rows import MAX_LINE, lines
from dovetail.core.errors import ConfigError, RequestError

FIELDS = ("prompt", "messages", "max_tokens")


@dataclass(frozen=True)
class Line:
    """A line with a prompt: text or token ids in `prompt`, or else a conversation in `messages`.

    unknown: fields that have no meaning here. error: why there is no prompt.
    """

    number: int
    prompt: Any = None
    messages: Any = None
    max_tokens: int | None = None
    unknown: tuple[str, ...] = ()
    error: RequestError | None = None


def read(path: Path) -> Iterator[Line]:
    """The lines in order, blank ones left out. ConfigError if the file cannot be read.

    They are JSON if the name ends in .jsonl or the first one begins with {.
    """
    try:
        with open(path, "rb") as file:
            as_json = path.suffix == ".jsonl"
            for count, (number, line) in enumerate(lines(file)):
                as_json = as_json or (count == 0 and line.startswith(b"{"))
                try:
                    yield _json_line(number, line) if as_json else Line(number, _text(line))
                except RequestError as error:
                    yield Line(number, error=error)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error


def _text(line: bytes) -> str:
    if len(line) >= MAX_LINE:
        raise RequestError(f"the line is longer than {MAX_LINE} bytes")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the line is not valid UTF-8: {error}") from error


def _json_line(number: int, line: bytes) -> Line:
    from dovetail.host.json_file import json_object

    if len(line) >= MAX_LINE:
        raise RequestError(f"the line is longer than {MAX_LINE} bytes")
    value: Mapping[str, Any] = {k: v for k, v in json_object(line, "line").items() if v is not None}
    prompt, messages, most = (value.get(name) for name in FIELDS)
    if (prompt is None) == (messages is None):
        raise RequestError("a line has either prompt or messages", param="prompt")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise RequestError("prompt must be a string or a list of token ids", param="prompt")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise RequestError(f"max_tokens must be a whole number of at least 1, got {most!r}", param="max_tokens")
    return Line(number, prompt, messages, most, tuple(name for name in value if name not in FIELDS))
