"""Rows of a data file, one a line. Rows that cannot be used are left out, and the result names them."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dovetail.core.errors import ConfigError, RequestError

T = TypeVar("T")
U = TypeVar("U")

NAMED = 5  # refused lines whose reasons a result keeps
TOLD = 3  # refused lines whose reasons are shown to people


@dataclass(frozen=True)
class Refusal:
    """Line `line` of a file, counted from 1, cannot be used, and why."""

    line: int
    why: str


@dataclass(frozen=True)
class Rows(Generic[T]):
    """The values of a file's lines in order, each with its line number, and the lines that were refused.

    `digest` tells two files of one name apart.
    """

    name: str
    digest: str
    rows: tuple[tuple[int, T], ...]
    refused: tuple[Refusal, ...] = ()

    @property
    def values(self) -> list[T]:
        return [value for _, value in self.rows]

    def map(self, turn: Callable[[T], U]) -> Rows[U]:
        """`turn` applied to each value. A row for which it raises RequestError is refused. RequestError if no row
        is left."""
        kept: list[tuple[int, U]] = []
        refused = list(self.refused)
        for line, value in self.rows:
            try:
                kept.append((line, turn(value)))
            except RequestError as error:
                refused.append(Refusal(line, str(error)))
        refused.sort(key=lambda r: r.line)
        if not kept:
            why = told([vars(r) for r in refused], len(refused)) or "it is empty"
            raise RequestError(f"{self.name} has no row that can be used: {why}")
        return Rows(self.name, self.digest, tuple(kept), tuple(refused))

    def zip(self, others: Iterable[U]) -> Rows[tuple[T, U]]:
        """Pairs of each value and its counterpart in `others`, which has the same length."""
        rows = tuple((line, (value, other)) for (line, value), other in zip(self.rows, others, strict=True))
        return Rows(self.name, self.digest, rows, self.refused)

    def first(self, count: int | None) -> Rows[T]:
        """The first `count` rows, or all. Refused lines behind them are not reported."""
        if count is None or count >= len(self.rows):
            return self
        last = self.rows[count - 1][0]
        return replace(self, rows=self.rows[:count], refused=tuple(r for r in self.refused if r.line < last))

    def split(self, count: int) -> tuple[list[T], Rows[T]]:
        """The values of the first `count` rows, and the other rows. ConfigError if no other row is left."""
        if count >= len(self.rows):
            raise ConfigError(
                f"--shots {count}: {self.name} has {len(self.rows)} usable rows, and one must be left to be scored"
            )
        return self.values[:count], replace(self, rows=self.rows[count:])

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says about the rows that were refused."""
        return {"refused": len(self.refused), "refusals": [vars(r) for r in self.refused[:NAMED]]}


def told(refusals: Sequence[dict[str, Any]], count: int) -> str:
    """One line for people that says why lines were refused: `count` in all, of which `refusals` are the first."""
    named = [f"line {r['line']}: {r['why']}" for r in refusals[:TOLD]]
    more = count - len(named)
    return "; ".join([*named, f"and {more} more"] if more else named)


def left_out(result: dict[str, Any]) -> str:
    """The end of a result's text if rows were refused."""
    count = result["refused"]
    return f"\n{count} left out: {told(result['refusals'], count)}" if count else ""


def given_file(suite: str, data: Path | None) -> Path:
    """The file of rows that a suite was given as --data. ConfigError if there is none."""
    if data is None or not data.expanduser().is_file():
        found = "nothing was given" if data is None else f"{data} is none"
        raise ConfigError(f"the suite {suite} needs a file of rows as --data FILE.jsonl; {found}")
    return data.expanduser()


def read_lines(path: Path) -> Rows[bytes]:
    """The lines of a file that are not blank. A file whose name ends in .gz is unpacked. ConfigError if it cannot
    be read."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    rows = tuple((number, line.strip()) for number, line in lines if line.strip())
    return Rows(str(path), hashlib.sha256(data).hexdigest()[:12], rows)


def read_text(path: Path) -> Rows[str]:
    """The lines of a text. ConfigError if it cannot be read, RequestError if no line is UTF-8."""
    return read_lines(path).map(_utf8)


def read_jsonl(path: Path) -> Rows[dict[str, Any]]:
    """The JSON objects of a file. ConfigError if it cannot be read, RequestError if it has none."""
    from dovetail.host.json_file import json_object

    return read_lines(path).map(lambda line: json_object(line, "line"))


def _utf8(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the line is not UTF-8: {error.reason}") from error
