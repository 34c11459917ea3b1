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
    rescale: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            min=0,
            help="Write other weights of the same function, which lie on no grid: gains of norms go into the "
            "layers behind them, and random factors from v to o and from up to down.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write MODEL as a Hugging Face folder for other programs.

    Quantized weights are dequantized. DIRECTORY must be empty or not there yet; a failed export leaves nothing.

    \b
    Examples:
      dovetail export smollm2-135m ./smollm2 --dtype float32
      dovetail export smollm2-135m ./off-grid --rescale 0
    """
    from dovetail import hub
    from dovetail.checkpoint.export import export
    from dovetail.checkpoint.rescaled import Rescaled
    from dovetail.host.files import tree_bytes
    from dovetail.models import open_checkpoint

    checkpoint = open_checkpoint(hub.resolve(model))
    export(checkpoint if rescale is None else Rescaled(checkpoint, rescale), directory, NAMES[dtype])
    print(directory)
    size = tree_bytes(directory)
    result = {"model": model, "path": str(directory), "dtype": dtype.value, "rescale": rescale, "bytes": size}
    write_json(json_file, result)
