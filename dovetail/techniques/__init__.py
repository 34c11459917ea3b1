"""Techniques by name, and the text that switches them on: `name:key=value,key=value`. Imports no model;
imported by what builds an engine, and by evals, reproduce and cli."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_origin

from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.core.technique import Technique

# The module of each, whose factory has its name; or module.factory.
MODULES = {
    "draft": "draft",
    "infinigen": "infinigen",
    "ngram": "ngram",
    "quest": "quest",
    "self-draft": "draft.self_draft",
    "shadowkv": "shadowkv",
    "sink-window": "sink_window",
    "smartspec": "smartspec",
    "suffix": "suffix",
    "w4a16": "rounded.w4a16",
    "w4a8": "rounded.w4a8",
    "w8a8-fp8": "rounded.w8a8_fp8",
    "w8a8-int8": "rounded.w8a8_int8",
}
WRAPPED = "suffix"  # by a wrapper, if nothing is said
MOST = 2**31 - 1  # of a whole number: more tokens than any sequence has


def technique(spec: str) -> Technique:
    """The technique that a `--use` text names. ConfigError lists the known names, or the technique's options.

    A wrapper has an option that names other techniques, joined by "+": `smartspec:drafter=ngram`. Options that the
    wrapper does not have are theirs: `tokens=4` goes to each that has it, `ngram.tokens=4` to that one.
    """
    name, _, rest = spec.partition(":")
    factory, known = _factory(name)
    pairs = [part.partition("=") for part in filter(None, rest.split(","))]
    wrappers = [key for key, p in known.items() if get_origin(p.annotation) is tuple]
    pairs += [(key, "=", WRAPPED) for key in wrappers if all(key != k for k, _, _ in pairs)]
    inner = {n: _factory(n)[1] for key, _, value in pairs if key in wrappers and value for n in value.split("+")}
    passed: dict[str, list[str]] = {n: [] for n in inner}
    options: dict[str, Any] = {}
    for key, equals, value in pairs:
        takers = (
            {} if key in known else {n: part for n in inner if (part := key.removeprefix(f"{n}.")) in inner[n]}
        )
        if not equals or not (takers or key in known):
            wanted = f"write key=value with {', '.join([*known, *(k for n in inner for k in inner[n])])}"
            part = key + equals + value
            raise ConfigError(f"'{part}' is no option of {'+'.join([name, *inner])}; {wanted}{_several(part)}")
        if key in options:
            raise ConfigError(f"{name}: {key} is given twice")
        for n, part in takers.items():
            passed[n].append(f"{part}={value}")
        if not takers:
            options[key] = value if key in wrappers else _parse(name, key, value, known[key].annotation)
    for key in options.keys() & set(wrappers):
        options[key] = tuple(technique(f"{n}:{','.join(passed[n])}") for n in options[key].split("+"))
    if missing := [key for key, p in known.items() if p.default is p.empty and key not in options]:
        raise ConfigError(f"{name} needs {missing[0]}; write {name}:{missing[0]}=...")
    built: Technique = factory(**options)
    return built


def _factory(name: str) -> tuple[Callable[..., Technique], Mapping[str, inspect.Parameter]]:
    """What makes the technique `name`, and its options."""
    if name not in MODULES:
        known_names = f"the known ones are {', '.join(sorted(MODULES))}"
        raise ConfigError(f"technique '{name}' is unknown; {known_names}{_several(name)}")
    module, _, function = MODULES[name].partition(".")
    factory = getattr(importlib.import_module(f"dovetail.techniques.{module}"), function or module)
    return factory, inspect.signature(factory, eval_str=True).parameters


def _several(text: str) -> str:
    """Advice for a text that joins techniques by a comma, which separates options."""
    named = any(part.partition(":")[0] in MODULES for part in text.split(","))
    return "; repeat --use to combine techniques" if named else ""


def _parse(name: str, key: str, value: str, kind: type) -> Any:
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
