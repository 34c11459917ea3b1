"""What an answer must be: the form that a user asks for, and what the loop asks of it in each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from dovetail.core.errors import RequestError

MAX_BYTES = 1 << 20  # of a schema, an expression, a grammar, or all choices together
MAX_DEPTH = 128  # of objects and lists within each other in a JSON schema
FORMS = ("json", "regex", "choice", "grammar", "json_object")
# What may stand between the parts of JSON that a grammar holds a model to. Small models that may write any number
# of spaces and newlines never stop.
JSON_WHITESPACE = r"[ \t]{1,2}|(\r?\n){1,2}[ \t]{0,32}"
Array = Any  # of numpy; core never looks inside


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of an answer. Exactly one of the first five fields is given. Names are vLLM's.

    json: a JSON schema, as a mapping, a boolean or its text. regex: an expression that the whole answer matches.
    choice: texts, of which the answer is one. grammar: a grammar in llguidance's Lark syntax, or in GBNF.
    json_object: any JSON object. disable_any_whitespace: JSON has no whitespace between its parts.
    whitespace_pattern: an expression for the whitespace between the parts of JSON.

    `form` names the field that is given, and `text` is its content as text. Raises RequestError for anything else,
    and for what is larger than MAX_BYTES or nested deeper than MAX_DEPTH. Whether it makes sense shows later, when
    it is compiled.
    """

    json: str | bool | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    form: str = field(init=False, default="")
    text: str = field(init=False, default="")

    def __post_init__(self) -> None:
        given = [name for name in FORMS if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise _wrong(f"exactly one of {', '.join(FORMS)} must be given, got {found}")
        form = given[0]
        text = _TEXTS[form](getattr(self, form))
        _check_text(form, text)
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", _text("whitespace_pattern", self.whitespace_pattern))
        spaced = self.disable_any_whitespace or self.whitespace_pattern is not None
        if spaced and form not in ("json", "json_object"):
            raise _wrong(f"disable_any_whitespace and whitespace_pattern are about JSON, and this is a {form}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise _wrong("disable_any_whitespace and whitespace_pattern exclude each other")
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "choice", None if self.choice is None else tuple(self.choice))

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two that ask for the same."""
        return self.form, self.text, self.disable_any_whitespace, self.whitespace_pattern

    @classmethod
    def parse(cls, value: Any, param: str = "structured_outputs") -> StructuredOutputs:
        """From a mapping of the fields, or as it is. RequestError names a field that there is not."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(f"it must be StructuredOutputs or a mapping of its fields, got {type(value).__name__}")
        known = {f.name for f in fields(cls) if f.init}
        given = {name: v for name, v in value.items() if v is not None}
        if unknown := sorted(map(str, given.keys() - known)):
            raise RequestError(
                f"{param}.{unknown[0][:64]} is not supported; the fields are {', '.join(sorted(known))}",
                param=f"{param}.{unknown[0][:64]}",
            )
        return cls(**given)


class Constraint(Protocol):
    """What one answer may still say. It follows the tokens of its request, whatever happens to their KV.

    error: why nothing more can be said about the answer, None while all is well.
    drafts: what to draft: the tokens that must come next, if there are any, else what may come of `guesses`.
    masks: the tokens that may follow the committed tokens, and those that may follow each of `drafts`, all of them
    allowed. uint32 [1 + len(drafts), words]: token t is bit t % 32 of word t // 32.
    commit: take a token that the answer gained. True if the answer is complete and nothing can follow.
    """

    @property
    def error(self) -> str | None: ...

    def drafts(self, guesses: list[int]) -> list[int]: ...
    def masks(self, drafts: Sequence[int]) -> Array: ...
    def commit(self, token: int) -> bool: ...


def _wrong(message: str) -> RequestError:
    return RequestError(f"structured_outputs: {message}", param="structured_outputs")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(f"{name} must be text that is not empty, got {str(value)[:100]!r}")
    return value


def _check_text(name: str, text: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _wrong(f"{name} is not valid Unicode: {error.reason}") from None
    if size > MAX_BYTES:
        raise _wrong(f"{name} has {size} bytes, and at most {MAX_BYTES} are allowed; ask for something simpler")


def _schema(value: object) -> str:
    """A JSON schema as text. What is given as text is read once, so that its depth is known."""
    if isinstance(value, str):
        _check_text("json", value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"json is not a JSON text: {str(error)[:200]}") from None
    if not isinstance(value, (bool, Mapping)):
        raise _wrong(f"json must be a JSON schema, which is an object or a boolean, got {type(value).__name__}")
    _check_depth(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise _wrong(f"json cannot be written as JSON: {str(error)[:200]}") from None


def _check_depth(value: object) -> None:
    layer, depth = [value], 0
    while layer:
        if depth > MAX_DEPTH:
            raise _wrong(f"json is nested deeper than {MAX_DEPTH} levels; use $defs and $ref, or ask for less")
        parts = [
            v.values() if isinstance(v, Mapping) else v for v in layer if isinstance(v, (Mapping, list, tuple))
        ]
        layer, depth = [item for part in parts for item in part], depth + 1


def _choices(value: object) -> str:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _wrong(f"choice must be a list of texts, got {type(value).__name__}")
    if not value:
        raise _wrong("choice has no texts; give at least one")
    return json.dumps(list(dict.fromkeys(_text("choice", v) for v in value)), ensure_ascii=False)


def _any_object(value: object) -> str:
    if value is not True:
        raise _wrong(f"json_object must be true or false, got {str(value)[:100]!r}")
    return '{"type":"object"}'


_TEXTS = {
    "json": _schema,
    "regex": lambda value: _text("regex", value),
    "choice": _choices,
    "grammar": lambda value: _text("grammar", value),
    "json_object": _any_object,
}
