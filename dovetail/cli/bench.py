"""`dovetail bench`: how fast a model runs here."""

from __future__ import annotations

import typer

from dovetail.cli import bench_compare, bench_model, bench_offline

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Measure how fast a model runs here.

\b
Examples:
  dovetail bench model smollm2-135m --quick
  dovetail bench compare before.json after.json
""",
)
app.command("model")(bench_model.command)
app.command("offline")(bench_offline.command)
app.command("compare")(bench_compare.command)
