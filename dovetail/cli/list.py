"""`dovetail list`: the models on disk."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dovetail.cli.result import JsonOption, write_json


def command(
    everything: Annotated[bool, typer.Option("--all", help="Also the aliases that could be pulled.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Show the cached models, their sizes and places.

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

    models = hub.list_models()
    rows = [(model.name, format_size(model.size), str(model.path)) for model in models]
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
    write_json(json_file, {"models": listed, "aliases": list(ALIASES), "home": str(home())})
