"""The order in which what is compared runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(sides: Sequence[T], number: int) -> Sequence[T]:
    """The sides in the order of round `number`: each is first in every other one."""
    return sides if number % 2 == 0 else sides[::-1]
