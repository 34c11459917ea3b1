"""Traces of production load: when requests came, and how long prompts and answers were.

Three formats are read. Azure's CSV: TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake's JSON lines: timestamp
(ms), input_length, output_length, and hash_ids, which name the prompt's blocks of 512 tokens; equal ids are equal
text. ShareGPT's JSON: a list of objects with `conversations`, a list of turns {"from", "value"}; it has no times.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from dovetail.core.errors import RequestError

BLOCK = 512  # tokens that one of Mooncake's hash ids stands for
MAX_TOKENS = 10_000_000  # a line with more tokens than this is broken
_COLUMNS = ("timestamp", "contexttokens", "generatedtokens")


class Kind(enum.StrEnum):
    """Formats of traces."""

    AZURE = "azure"
    MOONCAKE = "mooncake"
    SHAREGPT = "sharegpt"

    @property
    def timed(self) -> bool:
        """Whether it says when requests came."""
        return self is not Kind.SHAREGPT


_SUFFIXES = {".csv": Kind.AZURE, ".jsonl": Kind.MOONCAKE, ".json": Kind.SHAREGPT}


@dataclass(frozen=True)
class TraceRequest:
    """Lengths are in tokens, `arrival` in seconds on the trace's clock. blocks: the prompt's hash ids. prompt: its
    text, if the trace has it.
    """

    input_tokens: int
    output_tokens: int
    arrival: float = 0.0
    blocks: tuple[int, ...] = ()
    prompt: str | None = None


class Trace:
    """A trace file. Iterating reads it. Broken lines are left out and counted.

    count: gives the number of tokens of a text. broken: lines that were left out so far; reason: why the first one
    was. RequestError for a file that is not a trace.
    """

    def __init__(self, path: Path, count: Callable[[str], int]) -> None:
        self.path = path
        self.count = count
        self.broken = 0
        self.reason: str | None = None
        self.kind = _kind(path)

    def __iter__(self) -> Iterator[TraceRequest]:
        self.broken, self.reason = 0, None
        readers = {Kind.AZURE: self._azure, Kind.MOONCAKE: self._mooncake, Kind.SHAREGPT: self._sharegpt}
        yield from readers[self.kind]()

    def _azure(self) -> Iterator[TraceRequest]:
        columns: list[str] = []
        for place, line in _lines(self.path):
            cells = [cell.strip().strip('"') for cell in line.decode(errors="replace").split(",")]
            if not columns:
                columns = [cell.lower() for cell in cells]
                if missing := set(_COLUMNS) - set(columns):
                    raise RequestError(f"{self.path}: the first line has no column {', '.join(sorted(missing))}")
                continue
            try:
                yield _azure_row(dict(zip(columns, cells, strict=True)))
            except (ValueError, OverflowError) as error:
                self._skip(place, error)

    def _mooncake(self) -> Iterator[TraceRequest]:
        for place, line in _lines(self.path):
            try:
                yield _mooncake_row(_json(line))
            except (ValueError, OverflowError, RecursionError) as error:
                self._skip(place, error)

    def _sharegpt(self) -> Iterator[TraceRequest]:
        for place, value in self._elements():
            try:
                yield _sharegpt_row(value, self.count)
            except ValueError as error:
                self._skip(place, error)

    def _elements(self) -> Iterator[tuple[str, Any]]:
        """The elements of the file's JSON list, up to the first that is not valid JSON."""
        text = _read(self.path).decode(errors="replace").removeprefix("\ufeff")
        decoder = json.JSONDecoder()
        at, number = _after(text, 0), 0
        if text[at : at + 1] != "[":
            raise RequestError(f"{self.path}: a ShareGPT trace is a JSON list, and this does not begin with [")
        at = _after(text, at + 1)
        while text[at : at + 1] not in ("]", ""):
            number += 1
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                self._skip(f"conversation {number}", ValueError(f"{error}; nothing after it was read"))
                return
            yield f"conversation {number}", value
            at = _after(text, at)
            if text[at : at + 1] == ",":
                at = _after(text, at + 1)

    def _skip(self, place: str, error: Exception) -> None:
        self.broken += 1
        if self.reason is None:
            self.reason = f"{place}: {str(error)[:200]}"


def _kind(path: Path) -> Kind:
    """By the file's name, else by how it begins."""
    if found := _SUFFIXES.get(path.suffix.lower()):
        return found
    start = _read(path, 4096).decode(errors="replace").removeprefix("\ufeff").lstrip()
    if start[:1] in ("[", "{"):
        return Kind.SHAREGPT if start[0] == "[" else Kind.MOONCAKE
    if "contexttokens" in start.partition("\n")[0].lower():
        return Kind.AZURE
    raise RequestError(
        f"{path}: no trace is recognised in it; it reads Azure's .csv, Mooncake's .jsonl and ShareGPT's .json"
    )


def _azure_row(cells: dict[str, str]) -> TraceRequest:
    at = datetime.fromisoformat(cells["timestamp"])
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return TraceRequest(
        _length(int(cells["contexttokens"])), _length(int(cells["generatedtokens"])), at.timestamp()
    )


def _mooncake_row(value: Any) -> TraceRequest:
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    at, blocks = value.get("timestamp"), value.get("hash_ids")
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at):
        raise ValueError("timestamp must be a number of milliseconds")
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise ValueError("hash_ids must be a list of whole numbers")
    lengths = _length(value.get("input_length")), _length(value.get("output_length"))
    return TraceRequest(*lengths, at / 1000, tuple(blocks))


def _sharegpt_row(value: Any, count: Callable[[str], int]) -> TraceRequest:
    """The first human turn is the prompt, the turn after it the answer."""
    turns = value.get("conversations") if isinstance(value, dict) else None
    if not isinstance(turns, list):
        raise ValueError("conversations must be a list")
    said = [(turn.get("from"), turn.get("value")) for turn in turns if isinstance(turn, dict)]
    for (speaker, prompt), (answerer, answer) in pairwise(said):
        if speaker in ("human", "user") and answerer in ("gpt", "assistant"):
            if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip()):
                raise ValueError("a turn's value must be text")
            return TraceRequest(_length(count(prompt)), _length(count(answer)), prompt=prompt)
    raise ValueError("no human turn is followed by an answer")


def _length(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"a length must be 1 to {MAX_TOKENS} tokens, not {str(value)[:40]}")
    return value


def _json(line: bytes) -> Any:
    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(line.decode(), parse_constant=constant)


def _after(text: str, at: int) -> int:
    """The first place from `at` on that is not white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, with their places."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield f"line {number}", line
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
