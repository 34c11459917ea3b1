"""`dovetail rm`: delete a model from the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from dovetail.cli.result import JsonOption, write_json


def command(
    model: Annotated[str, typer.Argument(help="Alias or Hugging Face id, as `dovetail list` shows it.")],
    json_file: JsonOption = None,
) -> None:
    """Delete MODEL from the cache; never a folder or file of yours.

    \b
    Examples:
      dovetail rm smollm2-135m
      dovetail rm HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from dovetail import hub
    from dovetail.host.units import format_size

    freed = hub.remove(model)
    print(f"removed {model}, {format_size(freed)} freed")
    write_json(json_file, {"model": model, "freed_bytes": freed})
