"""Decides whether an answer is right: by its whole text, a number, a letter, or what a pattern finds."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dovetail.core.errors import ConfigError, RequestError

KINDS = "exact, contains, number, choice or regex:PATTERN"

# 1,234.5 or 1234.5 or .5, with or without a dollar. A minus is a sign only if it does not stand between two terms.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)%])[-−])?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_MARKS = (("####", ""), ("\\boxed{", "}"))  # of final answers, and where these end
_LETTER = re.compile(r"(?<![^\W_])[A-E](?![^\W_])")


@dataclass(frozen=True)
class Scorer:
    """`read` extracts what counts from an answer, and `expect` from the right answer; None if there is nothing.
    `agree(expected, found)` says whether they are the same. `what` names it in words."""

    what: str
    read: Callable[[str], Any]
    expect: Callable[[str], Any]
    agree: Callable[[Any, Any], bool] = operator.eq

    def expected(self, right: str) -> Any:
        """What an answer must contain. RequestError if even the right answer does not contain it."""
        value = self.expect(right)
        if value is None:
            raise RequestError(f"the answer has no {self.what}: '{right[-60:]}'")
        return value

    def correct(self, answer: str, right: str) -> bool:
        found = self.read(answer)
        return found is not None and self.agree(self.expected(right), found)


def scorer(name: str) -> Scorer:
    """The scorer called `name`. ConfigError if there is none.

    exact: the same text, without white space around it. contains: the right answer occurs in the answer; case does
    not count. number: the same last number (see `last_number`). choice: the same letter, the first of A to E that
    stands alone. regex:PATTERN: the same text in the first group (or all) of the pattern's last match. If the
    pattern does not match in the right answer, the right answer itself is looked for.
    """
    kind, _, pattern = name.partition(":")
    if kind == "regex":
        find = _finder(pattern)
        return Scorer("text", find, lambda right: find(right) or _text(right))
    if name not in _PLAIN:
        raise ConfigError(f"--scorer '{name}' is unknown; it is one of {KINDS}")
    return _PLAIN[name]


def last_number(text: str) -> Decimal | None:
    """The number behind the last ####, as in GSM8K, or in the last \\boxed{}, else the last number of the text.
    Commas between thousands and dollar signs are ignored."""
    found = None
    for mark, end in _MARKS:
        _, marked, after = text.rpartition(mark)
        if marked and found is None:
            found = _NUMBER.search(after.partition(end)[0] if end else after)
    if found is None:
        found = next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None:
        return None
    value = Decimal(found["digits"].replace(",", ""))
    return value.copy_negate() if found["sign"] else value


def first_letter(text: str) -> str | None:
    """The first capital letter from A to E with no letter or digit beside it."""
    found = _LETTER.search(text)
    return found[0] if found else None


def _text(text: str) -> str | None:
    return text.strip() or None


def _folded(text: str) -> str | None:
    return text.strip().casefold() or None


def _finder(pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--scorer regex: '{pattern}' is no pattern: {error}") from None
    if not pattern:
        raise ConfigError("--scorer regex: give the pattern after the colon, as in 'regex:answer is (.*)'")

    def find(text: str) -> str | None:
        found = next(reversed(list(compiled.finditer(text))), None)
        return _text((found[1] if compiled.groups else found[0]) or "") if found else None

    return find


_PLAIN = {
    "exact": Scorer("text", _text, _text),
    "contains": Scorer("text", _folded, _folded, lambda expected, found: expected in found),
    "number": Scorer("number", last_number, last_number),
    "choice": Scorer("letter from A to E", first_letter, first_letter),
}
