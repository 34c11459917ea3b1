"""`dovetail pull`: fetch a model into the cache."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dovetail.cli.result import JsonOption, write_json


def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read an alias' file again and check it.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Fetch MODEL if it is not there yet, and print where it is.

    \b
    Examples:
      dovetail pull smollm2-135m
      dovetail pull HuggingFaceTB/SmolLM2-360M-Instruct
      dovetail pull org/name:model.Q4_K_M.gguf
    """
    from dovetail import hub
    from dovetail.host.files import tree_bytes

    started = time.perf_counter()
    path = hub.verify(model) if verify else hub.resolve(model, refresh=True)
    print(path)
    size = path.stat().st_size if path.is_file() else tree_bytes(path)
    seconds = round(time.perf_counter() - started, 3)
    write_json(json_file, {"model": model, "path": str(path), "bytes": size, "seconds": seconds})
