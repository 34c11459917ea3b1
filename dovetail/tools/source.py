"""Text that arrives in pieces, for readers that wait for the next piece where they need it."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

# A reader yields where it needs more text, and returns what it has found.
Read = Generator[None, None, T]


class Source:
    """The text so far. `closed`: nothing more comes. Positions count from the beginning of `text`."""

    def __init__(self) -> None:
        self.text = ""
        self.closed = False

    def char(self, at: int) -> Read[str]:
        """The character at a position, "" behind the end."""
        while at >= len(self.text) and not self.closed:
            yield
        return self.text[at : at + 1]

    def after_space(self, at: int) -> Read[int]:
        """The position of the first character from `at` that is no white space."""
        while (yield from self.char(at)).isspace():
            at += 1
        return at

    def after_word(self, at: int, more: str = "") -> Read[int]:
        """The end of the run of letters, digits, "_" and characters of `more` that begins at `at`."""
        while (char := (yield from self.char(at))) and (char.isalnum() or char == "_" or char in more):
            at += 1
        return at

    def starts(self, at: int, literal: str) -> Read[bool]:
        """Whether the text goes on with `literal`."""
        while True:
            there = self.text[at : at + len(literal)]
            if there == literal:
                return True
            if self.closed or not literal.startswith(there):
                return False
            yield

    def find(self, literal: str, at: int) -> Read[int]:
        """The position of `literal`, or -1 if the text ends without it."""
        while True:
            found = self.text.find(literal, at)
            if found >= 0 or self.closed:
                return found
            at = max(at, len(self.text) - len(literal) + 1)
            yield
