"""Techniques by name, and the text that switches them on: `name:key=value,key=value`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from dovetail.core.errors import ConfigError
from dovetail.core.technique import Technique

MODULES = {"ngram": "ngram", "sink-window": "sink_window"}


def technique(spec: str) -> Technique:
    """The technique that a `--use` text names. ConfigError lists the known names, or the technique's options."""
    name, _, rest = spec.partition(":")
    if name not in MODULES:
        raise ConfigError(f"technique '{name}' is unknown; the known ones are {', '.join(sorted(MODULES))}")
    factory = getattr(importlib.import_module(f"dovetail.techniques.{MODULES[name]}"), MODULES[name])
    known = inspect.signature(factory, eval_str=True).parameters
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise ConfigError(f"'{part}' is no option of {name}; write key=value with {', '.join(known)}")
        if key in options:
            raise ConfigError(f"{name}: {key} is given twice")
        options[key] = _parse(name, key, value, known[key].annotation)
    built: Technique = factory(**options)
    return built


def _parse(name: str, key: str, value: str, kind: type) -> Any:
    if kind is Technique:
        return technique(value)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: {key} must be a {kind.__name__}, got '{value}'") from None
