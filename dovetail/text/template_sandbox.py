"""The sandbox of chat templates: no attribute of Python's own, and templates end."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
from jinja2.exceptions import SecurityError

TURNS = 1 << 21  # turns of loops in a rendering
CALL = 16  # turns that a call counts for
LARGEST = 1 << 24  # characters or items that a product makes, and the number that a method of a text takes


class _Left(threading.local):
    """What the rendering of a thread may still do. A template cannot reach it, as it could a variable."""

    turns = 0


_LEFT = _Left()


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a rendering takes no more than TURNS turns of loops. Calls count as turns, too.

    It is a bound for templates by mistake or by malice. It does not bound memory: a template may still join texts
    until there is none.
    """

    intercepted_binops = frozenset({"*", "**"})

    def compiled(self, source: str) -> jinja2.Template:
        """A template whose turns are counted. Raises what jinja2 raises for one that is wrong."""
        self.filters["_counted"] = _counted
        tree = self.parse(source)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            counted = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno).set_environment(self)
        return self.from_string(tree)

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        _spend(CALL)
        if isinstance(getattr(__obj, "__self__", None), str):  # center, ljust, zfill and their like
            large = [a for a in (*arguments, *named.values()) if isinstance(a, int) and a > LARGEST]
            if large:
                raise SecurityError(f"a text of {large[0]} characters")
        if isinstance(__obj, jinja2.runtime.LoopContext):  # the next level of a recursive loop
            arguments = (_counted(arguments[0]), *arguments[1:])
        return super().call(__context, __obj, *arguments, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and max(_size(left), _size(right)) > 1024:
            raise SecurityError("a power of large numbers")
        if operator == "*":
            for item, count in ((left, right), (right, left)):
                if hasattr(item, "__len__") and len(item) * _size(count) > LARGEST:
                    raise SecurityError(f"a product of more than {LARGEST} characters or items")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> float:
    return abs(value) if isinstance(value, int | float) else 0


def begin() -> None:
    """A rendering begins in this thread."""
    _LEFT.turns = TURNS


def _spend(turns: int) -> None:
    _LEFT.turns -= turns
    if _LEFT.turns < 0:
        raise SecurityError(f"more than {TURNS} turns of loops and calls")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(1)
        yield item
