"""Two results side by side: figures that both have, and what else is different about them.

A result is what `bench model`, `bench serve`, `bench offline`, `eval` and bench/peers.py write: a JSON object with
`machine` and `versions`, figures as numbers anywhere below it, and in `spread` the range of a figure's rounds.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from dovetail.bench.rounds import Path, at
from dovetail.bench.verdict import Interval
from dovetail.core.errors import ConfigError, ModelError
from dovetail.host.json_file import parse_json_object, read_bytes

MAX_BYTES = 64 << 20
ORIGIN = ("machine", "versions", "commit", "config")
# Numbers that say what was asked for. Texts and yes-or-no values always do.
ASKED = {
    *("rounds", "workload", "slo", "sampling", "threads", "seed", "trials", "limit"),
    *("window", "windows", "dense", "needles", "shots"),
}
# Not figures either: the result's origin, single answers, and the readings from which figures were made.
_NOT_FIGURES = ASKED | {
    *(*ORIGIN, "date", "targets", "spread", "samples", "facts", "settings", "items", "refusals"),
}
_SALT = "salt"  # of a workload: new each time, so that a running server gets new prompts
_OF_TARGETS = ("target", "model", "context", "version", "options", "config")
_NAMES = ("setting", "name", "target", "rate", "length", "depth")  # by which the objects of a list are told apart


def load(path: pathlib.Path) -> dict[str, Any]:
    """The result in a file, or in the last line of what a command printed. ConfigError if there is none."""
    try:
        data = read_bytes(path, MAX_BYTES)
        try:
            found = parse_json_object(data, str(path))
        except ModelError:
            last = data.rstrip().rpartition(b"\n")[2]
            if not last.startswith(b"{"):
                raise
            found = parse_json_object(last, f"{path}, last line")
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if missing := [name for name in ("machine", "versions") if not isinstance(found.get(name), dict)]:
        raise ConfigError(f"{path}: is no result of a measurement: it has no {' and no '.join(missing)}")
    return found


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """In what two results differ, and the figures that both have.

    same_machine: whether both say so. differs: [a's value, b's value] by place, for the results' origins and for
    what was `asked`. figures: `a`, `b`, `ratio` (b / a, None where a is 0), `spread_a`, `spread_b`, and `beyond`,
    which says that the spreads do not touch. only_a, only_b: names of figures that only one has. ConfigError if
    they have no figure in common.
    """
    ours, theirs = dict(figures(a)), dict(figures(b))
    common = [place for place in ours if place in theirs]
    if not common:
        raise ConfigError(
            f"the two results have no figure in common: {_some(ours)} in one, {_some(theirs)} in the other"
        )
    differs = {name: _differences(_origin(a, name), _origin(b, name)) for name in ORIGIN}
    differs["asked"] = _differences(_asked(a), _asked(b))
    return {
        "same_machine": _same_machine(a["machine"], b["machine"]),
        "differs": {name: found for name, found in differs.items() if found},
        "figures": {".".join(place): _pair(place, (a, b), (ours[place], theirs[place])) for place in common},
        "only_a": [".".join(place) for place in ours if place not in theirs],
        "only_b": [".".join(place) for place in theirs if place not in ours],
    }


def figures(value: Any, place: Path = ()) -> Iterator[tuple[Path, float]]:
    """Every finite number in objects and in lists of objects, by its place. Lists of numbers are readings, not
    figures."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NOT_FIGURES:
                yield from figures(inner, (*place, key))
    elif isinstance(value, list) and all(isinstance(inner, Mapping) for inner in value):
        for name, inner in _named(value).items():
            yield from figures(inner, (*place, name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield place, value


def spread(result: Mapping[str, Any], place: Path) -> tuple[float, float] | None:
    """The range of a figure's rounds, from the `spread` of any object around it, or None."""
    for depth in range(len(place)):
        around: Any = result
        for name in place[:depth]:
            around = (around if isinstance(around, Mapping) else _named(around)).get(name)
        if found := _range(at(around, ("spread", *place[depth:]))):
            return found
    if "peer" in result and len(place) == 2:  # bench/peers.py names the figure first, and then whose it is
        whose, figure = {"ratios": "ratio"}.get(place[0], place[0]), place[1]
        return _range(at(result, ("spread", figure, whose)))
    return None


def _pair(place: Path, results: tuple[Mapping[str, Any], ...], values: tuple[float, float]) -> dict[str, Any]:
    a, b = values
    spread_a, spread_b = (spread(result, place) for result in results)
    beyond = None
    if spread_a and spread_b:
        beyond = Interval(*spread_a).apart(Interval(*spread_b))
    ratio = b / a if a else None
    return {"a": a, "b": b, "ratio": ratio, "spread_a": spread_a, "spread_b": spread_b, "beyond": beyond}


def _range(value: Any) -> tuple[float, float] | None:
    """[lowest, highest] as a pair, None for anything else."""
    if not isinstance(value, list) or len(value) != 2 or any(type(v) not in (int, float) for v in value):
        return None
    low, high = value
    return (low, high) if low <= high else None


def _names(objects: list[Mapping[str, Any]]) -> list[str]:
    """A name for each object of a list: its own name if all are different, else its number."""
    targets = {str(inner.get("target")) for inner in objects}
    telling = [key for key in _NAMES if key != "target" or len(targets) > 1]
    own = ["/".join(str(inner[key]) for key in telling if key in inner) for inner in objects]
    return own if all(own) and len(set(own)) == len(own) else [str(number) for number in range(len(objects))]


def _origin(result: Mapping[str, Any], name: str) -> Any:
    if name == "config" and "peer" in result:
        return at(result, ("facts", "ours", "config"))
    return result.get(name)


def _asked(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says about the measurement: texts, numbers of rounds, and its input."""
    found: dict[str, Any] = {}
    for name, value in result.items():
        if name in (*ORIGIN, "date"):
            continue
        if name in ASKED or isinstance(value, (str, bool)):
            found[name] = value
        elif name == "results":  # several settings of an evaluation, each with its own configuration
            found[name] = {key: _asked(one) | _config(one) for key, one in _named(value).items()}
        elif name == "against" and isinstance(value, Mapping):
            found[name] = _asked(value) | _config(value)
        elif name == "targets":
            found[name] = {
                key: {word: one.get(word) for word in _OF_TARGETS} for key, one in _named(value).items()
            }
    if isinstance(workload := found.get("workload"), Mapping):
        found["workload"] = {name: value for name, value in workload.items() if name != _SALT}
    return found


def _config(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": result["config"]} if "config" in result else {}


def _same_machine(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether both describe the same machine."""
    return all(a[name] == b[name] for name in a if name in b)


def _differences(a: Any, b: Any, name: str = "") -> dict[str, list[Any]]:
    """Everything in which two values differ, by its place. None means that one of them does not have it."""
    if not any(isinstance(value, Mapping) and value for value in (a, b)):
        return {} if a == b else {name: [a, b]}
    ours, theirs = (value if isinstance(value, Mapping) else {"": value} for value in (a or {}, b or {}))
    found: dict[str, list[Any]] = {}
    for key in {**ours, **theirs}:
        inner = ".".join(filter(None, (name, key)))
        found |= _differences(ours.get(key), theirs.get(key), inner)
    return found


def _named(value: Any) -> dict[str, Any]:
    """The objects of a list by their names. Empty for anything but a list of objects."""
    objects = value if isinstance(value, list) and all(isinstance(inner, Mapping) for inner in value) else []
    return dict(zip(_names(objects), objects, strict=True))


def _some(found: Mapping[Path, float]) -> str:
    names = [".".join(place) for place in found]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "none"
