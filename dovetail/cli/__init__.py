"""The command line: `dovetail COMMAND`.

A command is a file `dovetail/cli/<name>.py` with a typed, documented function `command`, listed in COMMANDS.
Such files import torch, fastapi and the like inside the function: `--help` reads all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from dovetail.core.errors import DovetailError

COMMANDS = ("pull", "list", "rm", "run", "chat", "serve", "batch", "export", "doctor")

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Reports errors raised on purpose in one line; everything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # Here, and not at interpreter exit, a reader that has left can still be told from a failure.
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _abandon_stdout()
            raise SystemExit(EXIT_OK) from None
        except DovetailError as error:
            print(f"dovetail: {error}", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            print("\ndovetail: interrupted", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with the commands `names`."""
    app = typer.Typer(
        name="dovetail",
        cls=_Commands,
        help="Run language models from Hugging Face and GGUF checkpoints.",
        epilog='Start with: dovetail run smollm2-135m "What is the capital of France?"',
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in names:
        app.command(name)(import_module(f"dovetail.cli.{name}").command)
    return app


def main() -> None:
    """Entry point of the `dovetail` script: exit 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        # One command's imports are enough to run it; help and mistyped names need them all.
        build([first] if first in COMMANDS else COMMANDS)()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from dovetail import __version__

        print(f"dovetail {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options before the command."""


def _abandon_stdout() -> None:
    # Whoever read the output has left; the interpreter's flush at exit must not complain about it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
