"""`dovetail bench compare`: two results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli.result import JsonOption, write_json
from dovetail.show.table import table

SHOWN_NAMES = 8  # of figures that only one of the results has


def command(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result.", exists=True, dir_okay=False)],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.", exists=True, dir_okay=False)],
    json_file: JsonOption = None,
) -> None:
    """Compare two results, figure by figure.

    A and B are what --json of bench, eval or bench/peers.py wrote. First comes what is different about
    their machines, versions, commits, configurations and measurements, then every figure that both have. A figure
    with * differs by more than its rounds do: the ranges do not touch.

    \b
    Example:
      dovetail bench compare before.json after.json
    """
    from dovetail.bench.compare import compare, load

    found = {"a": str(a), "b": str(b), **compare(load(a), load(b))}
    _show(found)
    write_json(json_file, found)


def _show(found: dict[str, Any]) -> None:
    if not found["same_machine"]:
        print("These are different machines: what differs may be theirs.")
    origin = [
        (f"{part}.{name}" if name else part, *map(_text, pair))
        for part, names in found["differs"].items()
        for name, pair in names.items()
    ]
    if origin:
        print(table(("different", found["a"], found["b"]), origin), end="\n\n")
    else:
        print("The same machine, versions, commit, configuration and measurement.", end="\n\n")
    headers = ("figure", "a", "b", "b/a", "", "spread of a", "spread of b")
    rows = [
        (
            name,
            f["a"],
            f["b"],
            f["ratio"],
            "*" if f["beyond"] else "",
            _range(f["spread_a"]),
            _range(f["spread_b"]),
        )
        for name, f in found["figures"].items()
    ]
    print(table(headers, rows))
    for side in ("a", "b"):
        if names := found[f"only_{side}"]:
            more = ", ..." if len(names) > SHOWN_NAMES else ""
            print(f"only in {side}: {len(names)} figures: {', '.join(names[:SHOWN_NAMES])}{more}")


def _range(spread: tuple[float, float] | None) -> str:
    return "-" if spread is None else f"{_number(spread[0])} to {_number(spread[1])}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)
