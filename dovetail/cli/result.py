"""How a command gives its result: text on stdout, and JSON where `--json` says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.core.errors import ConfigError
from dovetail.host.files import replacing


def _checked(destination: str | None) -> str | None:
    """`destination`. It is refused here, before any work is done, if the result could not be written to it."""
    if destination is None or destination == "-":
        return destination
    path = Path(destination).expanduser()
    why = None
    if path.is_dir():
        why = "it is a folder"
    elif not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "permission denied"
    if why is not None:
        raise ConfigError(f"--json {destination}: cannot be written: {why}")
    return destination


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", callback=_checked, help="Write the result as JSON; - prints it as the last line."
    ),
]


def write_json(destination: str | None, value: Mapping[str, Any]) -> None:
    """Write `value` to the file `destination`, whole or not at all; `-` is stdout, None nowhere."""
    if destination is None:
        return
    if destination == "-":
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
        return
    _checked(destination)  # again: the folder may have gone since the start
    path = Path(destination).expanduser()
    data = (json.dumps(value, indent=2) + "\n").encode()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # a device or a pipe is written to, never replaced
            return
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"--json {destination}: cannot be written: {error.strerror or error}") from error
