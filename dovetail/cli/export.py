"""`dovetail export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.result import JsonOption, write_json


class Dtype(enum.StrEnum):
    """Number formats that a folder is written in."""

    BFLOAT16 = "bf16"
    FLOAT32 = "float32"


NAMES = {Dtype.BFLOAT16: "bfloat16", Dtype.FLOAT32: "float32"}  # as checkpoints call them


def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; made if it is not there.")],
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.")] = Dtype.BFLOAT16,
    json_file: JsonOption = None,
) -> None:
    """Write MODEL as a Hugging Face folder for other programs.

    Quantized weights are dequantized. DIRECTORY must be empty or not there yet; a failed export leaves nothing.

    \b
    Example:
      dovetail export smollm2-135m ./smollm2 --dtype float32
    """
    from dovetail import hub
    from dovetail.checkpoint.export import export
    from dovetail.host.files import tree_bytes
    from dovetail.models import open_checkpoint

    export(open_checkpoint(hub.resolve(model)), directory, NAMES[dtype])
    print(directory)
    size = tree_bytes(directory)
    write_json(json_file, {"model": model, "path": str(directory), "dtype": dtype.value, "bytes": size})
