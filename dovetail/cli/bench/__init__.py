"""`dovetail bench`: measurements of speed, each a module here. Imported by the command line only."""

from __future__ import annotations

from importlib import import_module

import typer

COMMANDS = ("model", "serve", "offline", "compare")

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure speed.

    \b
    Examples:
      dovetail bench model smollm2-135m --quick
      dovetail bench serve smollm2-135m --rate 1..8
    """


for _name in COMMANDS:
    app.command(_name)(import_module(f"dovetail.cli.bench.{_name}").command)
