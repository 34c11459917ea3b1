"""Plots as files. Matplotlib is optional, and is imported only when a plot was asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.core.errors import ConfigError

KINDS = (".png", ".svg", ".pdf")


def checked_destination(destination: Path | None) -> Path | None:
    """`destination`, refused before any work is done for a plot that could not be drawn or written."""
    if destination is None:
        return None
    if destination.suffix.lower() not in KINDS:
        raise ConfigError(f"--plot {destination}: the name must end in {', '.join(KINDS)}")
    folder = destination.expanduser().parent
    if not folder.is_dir():
        raise ConfigError(f"--plot {destination}: there is no folder {folder}")
    figure()
    return destination.expanduser()


PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE.png", callback=checked_destination, help="Draw the result as a png, svg or pdf."
    ),
]


def figure(width: float = 7.0, height: float = 4.2) -> Any:
    """An empty matplotlib Figure, `width` x `height` inches. ConfigError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'dovetail-llm[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, destination: Path) -> None:
    """Write a Figure to `destination`, whole or not at all. ConfigError where that is impossible."""
    from dovetail.host.files import replacing

    data = io.BytesIO()
    drawn.savefig(data, format=destination.suffix.lower()[1:], dpi=150)
    try:
        with replacing(destination) as file:
            file.write(data.getvalue())
    except OSError as error:
        raise ConfigError(f"--plot {destination}: cannot be written: {error.strerror or error}") from error
