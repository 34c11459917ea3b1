"""A call of a function as a model wrote it, and the parts of an answer that contains calls."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """name: the function's. arguments: the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class TextPart:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallPart:
    """A part of call number `index`. The first one has its id and name; the arguments of all joined are JSON."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Part = TextPart | CallPart


def new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def dumps(value: Any) -> str | None:
    """A value as JSON that can be sent. None if JSON cannot say it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if _sendable(text) else json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return None


def named(name: Any, arguments: str | None) -> Call | None:
    """A call, if the name can be one."""
    if not isinstance(name, str) or not name.strip() or arguments is None or not _sendable(name):
        return None
    return Call(name, arguments)


def _sendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from an escape
        return False
    return True
