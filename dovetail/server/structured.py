"""The form of an answer, as requests ask for it: response_format, structured_outputs, and older names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.structured import StructuredOutputs
from dovetail.server.protocol import GenerationRequest

# vLLM's names until 0.12. It ignores them now; here they still mean what they meant.
OLDER_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}
_FORMAT_FIELDS = {"text": {"type"}, "json_object": {"type", "schema"}, "json_schema": {"type", "json_schema"}}
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


def structured_outputs(request: GenerationRequest) -> StructuredOutputs | None:
    """The form that a request asks for, by whichever field. RequestError if it asks in two ways."""
    return next(iter(_asked(request).values()), None)


def asking_field(request: GenerationRequest) -> str:
    """The field by which a request asks for a form."""
    return next(iter(_asked(request)), "structured_outputs")


def _asked(request: GenerationRequest) -> dict[str, StructuredOutputs]:
    """At most one field and its form."""
    found: dict[str, StructuredOutputs] = {}
    if request.structured_outputs is not None:
        found["structured_outputs"] = _form("structured_outputs", request.structured_outputs)
    if request.response_format is not None:
        asked = _response_format(request.response_format)
        if asked is not None:
            found["response_format"] = _form("response_format", asked)
    older = {name: getattr(request, name) for name in OLDER_NAMES if getattr(request, name) is not None}
    if older:
        found[min(older)] = _form(min(older), {OLDER_NAMES[name]: value for name, value in older.items()})
    if len(found) > 1:
        raise RequestError(
            f"{' and '.join(found)} both say what form the answer has; leave one of them out",
            param=next(iter(found)),
        )
    return found


def _form(param: str, fields: Mapping[str, Any]) -> StructuredOutputs:
    """The fields as a form. Errors name the field that the client wrote."""
    try:
        return StructuredOutputs.parse(fields)
    except RequestError as error:
        raise renamed(error, param) from None


def renamed(error: RequestError, param: str) -> RequestError:
    """An error of structured_outputs that names the field that the client wrote."""
    name = (error.param or "").replace("structured_outputs", param, 1)
    message = str(error).replace("structured_outputs", param, 1)
    return RequestError(message, param=name, status=error.status, type=error.type)


def _response_format(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """OpenAI's response_format as fields of StructuredOutputs; None for text."""
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _FORMAT_FIELDS:
        raise _refused("type", f"must be one of {', '.join(_FORMAT_FIELDS)}, got {str(kind)[:64]!r}")
    _check_fields(value, _FORMAT_FIELDS[kind], "")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's way to name a schema
        return {"json_object": True} if schema is None else {"json": schema}
    described = value.get("json_schema")
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), (Mapping, bool)):
        raise _refused("json_schema", "must be an object with a name and a schema, and the schema an object")
    _check_fields(described, _SCHEMA_FIELDS, "json_schema.")
    return {"json": described["schema"]}


def _check_fields(value: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in value:
        if name not in known and value[name] is not None:
            raise _refused(f"{where}{name[:64]}", f"is not supported; the fields are {', '.join(sorted(known))}")


def _refused(field: str, message: str) -> RequestError:
    return RequestError(f"response_format.{field} {message}", param=f"response_format.{field}")
