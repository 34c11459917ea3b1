"""`dovetail quantize`: a model in a low-precision format, as a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli.result import JsonOption, write_json


def _option(text: str, *, low: int | None = None) -> Any:
    return typer.Option(help=text, show_default=False, min=low)


def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not be there yet, or be empty.")],
    format: Annotated[str, typer.Option(help="w8a8-fp8, w8a8-int8, w4a16, w4a8, atom or tender.")],
    calibration: Annotated[
        str, typer.Option(help="Text to calibrate on: pydoc, wikitext2, wikitext2-raw, shakespeare, or a file.")
    ] = "pydoc",
    data: Annotated[Path | None, typer.Option(help="Folder that holds the texts that go by name.")] = None,
    samples: Annotated[int | None, _option("Samples of text (128; tender 32).", low=1)] = None,
    length: Annotated[int | None, _option("Tokens of a sample (512; tender 2048).", low=16)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the samples.")] = 0,
    head: Annotated[str | None, _option("Output head: asis (default), or int8 per channel.")] = None,
    dtype: Annotated[
        str | None, _option("Of everything that is not quantized: bfloat16 (default) or float32.")
    ] = None,
    method: Annotated[str | None, _option("gptq (default), or rtn: to nearest. Not for w8a8-fp8, tender.")] = None,
    group: Annotated[
        int | None,
        _option("w4a16, w4a8, atom: inputs that share a scale: 128 (default), 64, 32; atom: 0 for all."),
    ] = None,
    observer: Annotated[
        str | None, _option("w4a16, w4a8, w8a8-int8: scales by mse or minmax (default: mse for 4 bits).")
    ] = None,
    smoothquant: Annotated[float | None, _option("w8a8-int8: SmoothQuant's strength, 0 (default) to 1.")] = None,
    damping: Annotated[float | None, _option("GPTQ: of the Hessian's diagonal (0.01).")] = None,
    outliers: Annotated[
        int | None, _option("atom: inputs of 8 bits (128 for a width of 4096, and in proportion).", low=0)
    ] = None,
    activation_clip: Annotated[float | None, _option("atom: of groups of activations (0.9).")] = None,
    weight_clip: Annotated[float | None, _option("atom: of groups of weights (0.85).")] = None,
    bits: Annotated[int | None, _option("tender: 8 (default) or 4.")] = None,
    groups: Annotated[int | None, _option("tender: groups of channels (8).")] = None,
    chunk: Annotated[int | None, _option("tender: rows that share statistics (256).")] = None,
    rounding: Annotated[str | None, _option("tender: scales go up (default) or down.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Write MODEL with weights of few bits, calibrated on text.

    It goes block by block and needs torch. The same command goes on where an interrupted one stopped. Quantized
    Hugging Face folders are refused; a GGUF file is dequantized first, and its losses add.

    \\b
    Examples:
      dovetail quantize ./smollm2 ./smollm2-w4 --format w4a16 --group 64
      dovetail quantize ./smollm2 ./smollm2-int8 --format w8a8-int8 --smoothquant 0.5 --head int8
      dovetail quantize ./smollm2 ./smollm2-atom --format atom --group 64 --calibration text.txt
    """
    given = dict(
        samples=samples, length=length, head=head, dtype=dtype, method=method, group=group, observer=observer,
        smoothquant=smoothquant, damping=damping, outliers=outliers, activation_clip=activation_clip,
        weight_clip=weight_clip, bits=bits, groups=groups, chunk=chunk, rounding=rounding,
    )  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    _run(model, out, (format, options, calibration, data, seed), json_file)


def _run(
    model: str, out: Path, asked: tuple[str, dict[str, Any], str, Path | None, int], json_file: str | None
) -> None:
    """asked: the format, its options, the text and where it is, and the seed."""
    format, given, calibration, data, seed = asked
    started = time.perf_counter()

    from dovetail import hub
    from dovetail.core.model import PLAIN_FORMATS
    from dovetail.models import open_checkpoint
    from dovetail.quantize.recipe import Recipe, needs_text, resolved
    from dovetail.quantize.run import quantize
    from dovetail.show.progress import note
    from dovetail.text.corpus import corpus

    checkpoint = open_checkpoint(hub.resolve(model))
    options = resolved(format, given, checkpoint.config)
    text = corpus(calibration, data) if needs_text(format, options) else None
    stored = {checkpoint.format(name) for name in checkpoint.names()}
    if stored - PLAIN_FORMATS.keys() and checkpoint.path.is_file():
        note(f"{model} is quantized ({', '.join(sorted(stored - PLAIN_FORMATS.keys()))}): losses add")
    report = quantize(checkpoint, out, Recipe(format, options, text, seed))
    _show(report)
    print(out)
    result = {
        "model": model, "path": str(out), "recipe": report.recipe, "layers": report.layers,
        "measured_on": "outputs" if report.measured else "weights", "resumed": report.resumed,
        "bytes": report.bytes, "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    write_json(json_file, result)


def _show(report: Any) -> None:
    """A table of relative errors, with a row for each block."""
    from dovetail.show.table import table

    by_block: dict[str, dict[str, float]] = {}
    for layer in report.layers:
        prefix, _, name = layer["name"].rpartition(".")
        by_block.setdefault(prefix.split(".")[2], {})[name.removesuffix("_proj")] = layer["error"]
    names = list(dict.fromkeys(name for errors in by_block.values() for name in errors))
    print(f"relative error of {'outputs on the calibration text' if report.measured else 'weights'}")
    print(table(("block", *names), [(block, *(e.get(n) for n in names)) for block, e in by_block.items()]))
