"""Settings of an engine that are compared, written in one line: `quest:budget=512+kv-cache-dtype=int8`.

A setting consists of parts joined by `+`. A part is a technique as in `--use`, an engine option as `key=value`,
`plain` (the given options and no technique) or `exact` (float32 arithmetic and KV, and no technique). A sweep
gives several values to some keys, as in `budget=128,256` or `budget=128..2048` (doubling), and means all
combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from dovetail.core.errors import ConfigError
from dovetail.host.units import parse_size
from dovetail.options import SIZES, Options
from dovetail.techniques import MODULES

if TYPE_CHECKING:
    from dovetail.llm import LLM

EXACT = {"dtype": "float32", "activations": "exact", "kv_cache_dtype": "float32"}
MOST = 1024  # settings in one sweep
_FIELDS = {f.name: f for f in fields(Options)}


@dataclass(frozen=True)
class Setting:
    """One setting: its `name` as it is shown, technique specs, and engine options."""

    name: str
    use: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)

    def load(self, model: str) -> LLM:
        """The model with this setting. Raises ModelError, ConfigError or CapacityError."""
        from dovetail.llm import LLM

        return LLM(model, use=self.use, **vars(self.options))


def parse_setting(text: str, base: Setting) -> Setting:
    """`text` added to `base`, whose techniques stay in use. ConfigError for unknown names."""
    found = parse_sweep(text, base)
    if len(found) != 1:
        raise ConfigError(f"'{text}' stands for {len(found)} settings, and here it must be one")
    return found[0]


def parse_sweep(text: str, base: Setting) -> list[Setting]:
    """All combinations of the values in `text`, each added to `base`, in the order written."""
    alternatives = [_part(part.strip(), text) for part in text.split("+")]
    count = 1
    for part in alternatives:
        count *= len(part)
    if count > MOST:
        raise ConfigError(f"'{text}' stands for {count} settings; at most {MOST} can be swept")
    return [_setting(choice, base) for choice in itertools.product(*alternatives)]


def _setting(parts: Sequence[str], base: Setting) -> Setting:
    use, options = list(base.use), dict[str, Any]()
    for part in parts:
        if part == "plain":
            continue
        if part == "exact":
            options |= EXACT
        elif _is_technique(part):
            use.append(part)
        else:
            options |= [_option(part)]
    return Setting("+".join(parts), tuple(use), replace(base.options, **options))


def _part(text: str, whole: str) -> list[str]:
    """A part of a sweep, once for each combination of its values."""
    if text in ("plain", "exact"):
        return [text]
    if not text:
        raise ConfigError(f"'{whole}' has an empty part; join parts as in ngram:tokens=4+kv-cache-dtype=int8")
    name, colon, rest = text.partition(":") if _is_technique(text) else ("", "", text)
    if not rest:
        return [text]
    keys = _values(rest, whole)
    combinations = itertools.product(*([f"{key}={value}" for value in values] for key, values in keys))
    return [name + colon + ",".join(choice) for choice in combinations]


def _values(text: str, whole: str) -> list[tuple[str, list[str]]]:
    """`a=1,2,b=x` -> [(a, [1, 2]), (b, [x])]. A piece without `=` is another value of the key before it."""
    found: list[tuple[str, list[str]]] = []
    for piece in text.split(","):
        key, equals, value = piece.partition("=")
        if equals:
            if any(key == k for k, _ in found):
                raise ConfigError(f"'{whole}': {key} is given twice")
            found.append((key, list(expanded(value, whole))))
        elif found and piece:
            found[-1][1].extend(expanded(piece, whole))
        else:
            raise ConfigError(f"'{whole}': '{piece}' is not key=value; {_KNOWN}")
    return found


def expanded(value: str, whole: str) -> Iterable[str]:
    """`128..1024` -> 128 256 512 1024; other text as it is."""
    low, dots, high = value.partition("..")
    if not dots:
        return [value]
    if not (low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
        inside = f" (in '{whole}')" if whole != value else ""
        raise ConfigError(
            f"'{value}'{inside} is not a range; write LOW..HIGH, whole numbers from low to high, as in 128..2048"
        )
    doubled = itertools.takewhile(lambda n: n <= int(high), (int(low) << i for i in itertools.count()))
    return [str(n) for n in doubled]


def _is_technique(part: str) -> bool:
    return ":" in part.partition("=")[0] or part in MODULES or "=" not in part


def _option(part: str) -> tuple[str, Any]:
    """`kv-cache-dtype=int8` -> the name and value of an engine option."""
    key, _, value = part.partition("=")
    name = key.replace("-", "_")
    if name not in _FIELDS:
        raise ConfigError(f"'{key}' is neither a technique nor an option of the engine; {_KNOWN}")
    kind = get_type_hints(Options)[name]
    kinds = get_args(kind) or (kind,)
    try:
        if name in SIZES:
            return name, parse_size(value)
        if bool in kinds:
            return name, {"true": True, "false": False}[value.lower()]
        number = next((k for k in (int, float) if k in kinds), str)
        return name, number(value)
    except (ValueError, KeyError):
        raise ConfigError(f"{key}: '{value}' is no value for this option") from None


_KNOWN = f"techniques: {', '.join(sorted(MODULES))}; options: {', '.join(n.replace('_', '-') for n in _FIELDS)}"
