"""What the commands of `dovetail bench` share: settings in turns, tables of figures, the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from dovetail.bench.rounds import at
from dovetail.cli.engine_options import EngineOptions
from dovetail.show.progress import note
from dovetail.show.table import table

if TYPE_CHECKING:
    from dovetail.setting import Setting

AGAINST_HELP = (
    "Measure a second setting in turns: techniques as in --use and engine options as in kv-cache-dtype=int8, "
    "joined by +, or plain. It has this command's other options, and none of its techniques."
)
ROUNDS_HELP = "How often everything is measured."

Shown = Mapping[str, tuple[str, str, float]]
"""For each figure: its words, its unit, and how many of that unit one is."""


def settings(engine: EngineOptions, against: str | None) -> list[Setting]:
    """What to measure: the given options, and the setting that they are compared with.

    ConfigError for a bad SPEC or an unknown technique.
    """
    from dovetail.setting import Setting, parse_setting
    from dovetail.techniques import technique

    found = [Setting("+".join(engine.use) or "plain", engine.use, engine.options)]
    if against is not None:
        found.append(parse_setting(against, Setting("plain", (), engine.options)))
    for setting in found:
        for spec in setting.use:
            technique(spec)  # known before a model is loaded
    return found


def show(found: Mapping[str, Any], shown: Shown) -> None:
    """The result's origin in two lines, and its figures as a table."""
    config, machine = found["config"], found["machine"]
    print(f"{found['model']}, {machine['cpu']}, {_count(config['threads'], 'thread')}, {_rounds(found['rounds'])}")
    kinds = (config[name] for name in ("dtype", "activations", "kv_cache_dtype", "kernels"))
    arithmetic = "{}, {} activations, {} KV, {} kernels".format(*kinds)
    print(f"{arithmetic}, techniques: {', '.join(found['use']) or 'none'}")
    rows = _beside(found, found["against"], shown) if "against" in found else _alone(found, shown)
    print(table(rows[0], rows[1:]))


def _alone(found: Mapping[str, Any], shown: Shown) -> list[tuple[Any, ...]]:
    """Rows of a table, the first of which has the headings."""
    rows: list[tuple[Any, ...]] = [("figure", "unit", "median", "lowest", "highest")]
    for path, label, unit, scale in _figures(found, shown):
        rows.append((label, unit, *_triple(found, path, scale)))
    return rows


def _beside(found: Mapping[str, Any], against: Mapping[str, Any], shown: Shown) -> list[tuple[Any, ...]]:
    """The same of two settings and their ratio."""
    ours = "+".join(found["use"]) or "plain"
    rows: list[tuple[Any, ...]] = [("figure", "unit", ours, against["setting"], "ratio", "lowest", "highest")]
    for path, label, unit, scale in _figures(found, shown):
        pair = (None if value is None else value * scale for value in (at(found, path), at(against, path)))
        rows.append((label, unit, *pair, *_triple(found, ("ratio", *path), 1.0)))
    return rows


def finish(found: Mapping[str, Any]) -> None:
    """Exit with 1 if a technique in use never acted, because then the figures are not what was asked for."""
    from dovetail.bench.engine.side import idle

    names = idle(found)
    for name in names:
        note(f"{name} was in use but never acted; the figures are the plain engine's")
    if names:
        raise typer.Exit(1)


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"medians of {count} rounds"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _figures(found: Mapping[str, Any], shown: Shown) -> Iterator[tuple[tuple[str, ...], str, str, float]]:
    for name, (words, unit, scale) in shown.items():
        value = found.get(name)
        if isinstance(value, Mapping):
            yield from (((name, size), f"{words} {size}", unit, scale) for size in value)
        elif value is not None:
            yield (name,), words, unit, scale


def _triple(found: Mapping[str, Any], path: tuple[str, ...], scale: float) -> tuple[float | None, ...]:
    """Median, lowest and highest; None for what is absent."""
    values = (at(found, path), *(at(found, ("spread", *path)) or (None, None)))
    return tuple(None if value is None else value * scale for value in values)
