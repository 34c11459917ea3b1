"""Faults on purpose: the n-th call of something fails, once or from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Fault:
    """Counts calls of the methods that it breaks, over all of them. `fired`: how many failed."""

    def __init__(self, at: int, always: bool = False, error: type[BaseException] = MemoryError) -> None:
        self.at, self.always, self.error = at, always, error
        self.calls = self.fired = 0

    def hit(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.always and self.calls > self.at):
            self.fired += 1
            raise self.error("a fault on purpose")

    def breaks(self, owner: Any, name: str, after: bool = False) -> Callable[..., Any]:
        """Let `owner.name` fail, before it does its work or after it. Returns what puts it right again."""
        method = getattr(owner, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            if not after:
                self.hit()
            result = method(*arguments, **options)
            if after:
                self.hit()
            return result

        setattr(owner, name, failing)
        return lambda: setattr(owner, name, method)
