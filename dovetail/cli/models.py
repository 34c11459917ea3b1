"""`dovetail pull`, `dovetail list`, `dovetail rm`: the models on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.result import JsonOption, write_json

if TYPE_CHECKING:
    from dovetail.hub.models import CachedModel


def pull(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read an alias' file again and check it.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Fetch MODEL if it is not there yet, and print where it is.

    \b
    Examples:
      dovetail pull smollm2-135m
      dovetail pull HuggingFaceTB/SmolLM2-360M-Instruct
      dovetail pull org/name-GGUF:Q4_K_M
      dovetail pull org/name-GGUF:model.Q4_K_M.gguf
    """
    from dovetail import hub
    from dovetail.host.files import model_bytes

    started = time.perf_counter()
    path = hub.verify(model) if verify else hub.resolve(model, refresh=True)
    print(path)
    size = model_bytes(path)
    seconds = round(time.perf_counter() - started, 3)
    write_json(json_file, {"model": model, "path": str(path), "bytes": size, "seconds": seconds})


def show(
    everything: Annotated[bool, typer.Option("--all", help="Also the aliases that could be pulled.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Show the cached models and their packed weights.

    \b
    Examples:
      dovetail list
      dovetail list --all
      dovetail list --json -
    """
    from dovetail import hub
    from dovetail.host.files import home
    from dovetail.host.units import format_size
    from dovetail.hub.aliases import ALIASES
    from dovetail.hub.packed import packed_files, packed_home

    models, packed = hub.list_models(), packed_files(packed_home())
    rows = [(model.name, format_size(model.size), str(model.path)) for model in models]
    rows += [(f"packed weights of {model_of(p.model, models)}", format_size(p.size), str(p.path)) for p in packed]
    if everything:
        cached = {model.name for model in models}
        rows += [
            (alias.name, format_size(alias.size), f"not pulled: {alias.about}")
            for alias in ALIASES.values()
            if alias.name not in cached
        ]
    if not rows:
        print("No model is cached. Try: dovetail pull smollm2-135m", file=sys.stderr)
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    for name, size, place in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {place}")
    listed = [
        {"name": model.name, "path": str(model.path), "bytes": model.size, "source": model.source}
        for model in models
    ]
    kept = [{"model": p.model, "path": str(p.path), "bytes": p.size} for p in packed]
    write_json(json_file, {"models": listed, "packed": kept, "aliases": list(ALIASES), "home": str(home())})


def model_of(path: str, models: Sequence[CachedModel]) -> str:
    """The cached model that the file or folder `path` belongs to, with the file if it is one of several; else the
    path."""
    for model in models:
        if Path(path) == model.path:
            return model.name
        if Path(path).is_relative_to(model.path):
            return f"{model.name}:{Path(path).name}" if path.endswith(".gguf") else model.name
    return path or "no model"


def remove(
    model: Annotated[str, typer.Argument(help="Alias or Hugging Face id, as `dovetail list` shows it.")],
    packed: Annotated[
        bool, typer.Option("--packed", help="Only its packed weights; MODEL may also be a path of yours.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Delete MODEL from the cache; never a folder or file of yours.

    \b
    Examples:
      dovetail rm smollm2-135m
      dovetail rm HuggingFaceTB/SmolLM2-360M-Instruct
      dovetail rm --packed model.gguf

    Its packed weights, made from it for quicker starts, go with it.
    """
    from dovetail import hub
    from dovetail.core.errors import ModelError
    from dovetail.host.files import explaining
    from dovetail.host.units import format_size
    from dovetail.hub.packed import packed_home, remove_packed

    freed = 0 if packed else hub.remove(model)
    with explaining(packed_home(), 0, "changes"):
        of_model, of_gone = remove_packed(packed_home(), [hub.place(model)] if packed else [])
    freed += of_model if packed else of_gone
    if packed and not freed:
        raise ModelError(f"no packed weights of {model} are kept; `dovetail list` shows those that are")
    print(f"removed {'packed weights of ' if packed else ''}{model}, {format_size(freed)} freed")
    write_json(json_file, {"model": model, "freed_bytes": freed})
