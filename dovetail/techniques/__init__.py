"""Techniques by name, and the text that switches them on: `name:key=value,key=value`. Imports no model;
imported by what builds an engine, and by evals, reproduce and cli."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.core.technique import Technique

# The module of each, whose factory has its name; or module.factory.
MODULES = {
    "infinigen": "infinigen",
    "ngram": "ngram",
    "quest": "quest",
    "shadowkv": "shadowkv",
    "sink-window": "sink_window",
    "suffix": "suffix",
    "w4a16": "rounded.w4a16",
    "w4a8": "rounded.w4a8",
    "w8a8-fp8": "rounded.w8a8_fp8",
    "w8a8-int8": "rounded.w8a8_int8",
}
MOST = 2**31 - 1  # of a whole number: more tokens than any sequence has


def technique(spec: str) -> Technique:
    """The technique that a `--use` text names. ConfigError lists the known names, or the technique's options."""
    name, _, rest = spec.partition(":")
    if name not in MODULES:
        known_names = f"the known ones are {', '.join(sorted(MODULES))}"
        raise ConfigError(f"technique '{name}' is unknown; {known_names}{_several(name)}")
    module, _, function = MODULES[name].partition(".")
    factory = getattr(importlib.import_module(f"dovetail.techniques.{module}"), function or module)
    known = inspect.signature(factory, eval_str=True).parameters
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            wanted = f"write key=value with {', '.join(known)}"
            raise ConfigError(f"'{part}' is no option of {name}; {wanted}{_several(part)}")
        if key in options:
            raise ConfigError(f"{name}: {key} is given twice")
        options[key] = _parse(name, key, value, known[key].annotation)
    built: Technique = factory(**options)
    return built


def _several(text: str) -> str:
    """Advice for a text that joins techniques by a comma, which separates options."""
    named = any(part.partition(":")[0] in MODULES for part in text.split(","))
    return "; repeat --use to combine techniques" if named else ""


def _parse(name: str, key: str, value: str, kind: type) -> Any:
    from dovetail.core.technique import (
        Technique,  # here, because `--help` reads this module and that one needs numpy
    )

    if kind is Technique:
        return technique(value)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        found = kind(value)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: {key} must be {_article(kind.__name__)}, got '{value}'") from None
    if kind is int and abs(found) > MOST:
        raise ConfigError(f"{name}: {key} must be at most {MOST}, got {value}")
    return found


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
