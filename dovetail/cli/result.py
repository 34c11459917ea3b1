"""How a command hands over its result: text on stdout, and JSON where `--json` says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.core.errors import ConfigError
from dovetail.files import replacing

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints it as the last line."),
]


def write_json(destination: str | None, value: Mapping[str, Any]) -> None:
    """Write `value` to the file `destination`, whole or not at all; `-` is stdout, None nowhere."""
    if destination is None:
        return
    if destination == "-":
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
        return
    try:
        with replacing(Path(destination).expanduser()) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--json {destination}: cannot be written: {error.strerror or error}") from error
