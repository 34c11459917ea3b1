"""`dovetail random`: a model with random weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError

_FORMATS = "F32, F16, BF16, Q8_0, Q4_0, Q2_K, Q3_K, Q4_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4"
_SIZES = {
    "hidden": "hidden_size", "intermediate": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocab": "vocab_size", "context": "max_position_embeddings",
}  # fmt: skip


def _size(what: str) -> object:
    return typer.Option(min=1, metavar="N", help=f"{what} (default: the shape's).")


def command(
    arch: Annotated[str, typer.Argument(help="llama, mistral, qwen2, qwen3, gemma3 or smollm3.")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write; it must not be there yet.")],
    like: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A published model's sizes: smollm2-135m, smollm2-360m, llama-2-7b, llama-3-8b, mistral-7b, "
            "qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b, qwen3-0.6b, qwen3-8b, gemma3-270m, gemma3-1b or smollm3-3b "
            "(default: a small model).",
        ),
    ] = None,
    format: Annotated[str, typer.Option(help=f"Of matrices: {_FORMATS} or the mixture Q4_K_M.")] = "Q4_K",
    seed: Annotated[int, typer.Option(min=0, help="The same seed and sizes give the same bytes.")] = 0,
    layers: Annotated[int | None, _size("Layers")] = None,
    hidden: Annotated[int | None, _size("Width of a row")] = None,
    intermediate: Annotated[int | None, _size("Width of the MLP")] = None,
    heads: Annotated[int | None, _size("Query heads")] = None,
    kv_heads: Annotated[int | None, _size("KV heads")] = None,
    head_dim: Annotated[int | None, _size("Width of a head")] = None,
    vocab: Annotated[int | None, _size("Tokens of the vocabulary, 260 or more")] = None,
    context: Annotated[int | None, _size("Longest context in tokens")] = None,
    json_file: JsonOption = None,
) -> None:
    """Write a GGUF file with random weights.

    Its text means nothing, but every command runs on it, as fast as on a real model of the same shape and format.

    \b
    Examples:
      dovetail random llama tiny.gguf
      dovetail random llama 8b.gguf --like llama-3-8b
      dovetail random qwen3 two-layers.gguf --like qwen3-8b --layers 2 --format Q4_K_M
    """
    given = dict(
        hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocab=vocab, context=context,
    )  # fmt: skip
    _check_target(out)
    started = time.perf_counter()

    from dovetail.checkpoint.random_model import MIXED, write_random
    from dovetail.models.shapes import shape
    from dovetail.show.progress import note

    record, config = shape(arch, like, {_SIZES[name]: size for name, size in given.items() if size is not None})
    written = write_random(record, config, out, format=format, seed=seed)
    others = [f"{n} in {kind}" for kind, n in written.formats.items() if kind not in ("F32", format)]
    if others and format not in MIXED:
        note(f"rows that do not divide into {format}'s blocks are in another format: {', '.join(others)}")
    print(out)
    result = {
        "path": str(out), "architecture": arch, "like": like, "format": format, "seed": seed,
        "layers": config.num_layers, "parameters": written.parameters, "formats": written.formats,
        "bytes": written.bytes, "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    write_json(json_file, result)


def _check_target(out: Path) -> None:
    """Refuse, before any work, what must not be overwritten or could not be read as a model."""
    if out.suffix != ".gguf":
        raise ConfigError(f"{out}: the file's name must end in .gguf")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists; delete it, or choose another name")
