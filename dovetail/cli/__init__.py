"""The command line: `dovetail COMMAND`. May import everything; nothing imports it.

A command is a typed, documented function. COMMANDS names its module; the function is `command`, or the name behind
a colon. A command with commands of its own (`dovetail bench model`) is a module with a typer `app`. These files
import numpy, fastapi and the like inside the function, because `--help` reads all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TextIO, cast

import typer
from typer.core import TyperCommand, TyperGroup

from dovetail.core.errors import DovetailError

_OWN_MODULES = (
    "run",
    "chat",
    "serve",
    "batch",
    "export",
    "quantize",
    "random",
    "doctor",
    "eval",
    "bench",
    "advise",
    "reproduce",
)
COMMANDS = {
    "pull": "models:pull",
    "list": "models:show",
    "rm": "models:remove",
    **{name: name for name in _OWN_MODULES},
}

_PACKED_CACHE = "dovetail.checkpoint.packed_cache"  # which a command may have imported

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Reports errors raised on purpose in one line; everything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # At interpreter exit, a reader that has left could no longer be told from a failure.
            sys.stdout.flush()
            if (cache := sys.modules.get(_PACKED_CACHE)) is not None:
                cache.finish(progress=True)
            return result
        except BrokenPipeError:
            _abandon_stdout()
            raise SystemExit(EXIT_OK) from None
        except DovetailError as error:
            raise _failure(str(error)) from None
        except KeyboardInterrupt:
            if (cache := sys.modules.get(_PACKED_CACHE)) is not None:
                cache.abandon()  # what is written would hold up the end
            print("\ndovetail: interrupted", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None


class _PromptCommand(TyperCommand):
    """A command whose last argument is a prompt, which the shell splits unless it is quoted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if rest:
            usage = f'{ctx.command_path} MODEL "..."'
            ctx.fail(f"there is more than MODEL and PROMPT; put the prompt in quotes: {usage}")
        return rest


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with the commands `names`."""
    app = typer.Typer(
        name="dovetail",
        cls=_Commands,
        help="Run language models from Hugging Face and GGUF checkpoints.",
        epilog='Start with: dovetail run smollm2-135m "Name the capital of France."',
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in names:
        found = command(name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, cls=_PromptCommand if name == "run" else None)(found)
    return app


def command(name: str) -> Callable[..., None] | typer.Typer:
    """The function of a command, or the application of one that has commands of its own."""
    place, _, function = COMMANDS[name].partition(":")
    module = import_module(f"dovetail.cli.{place}")
    found: Callable[..., None] | typer.Typer = getattr(
        module, function or ("app" if hasattr(module, "app") else "command")
    )
    return found


def main() -> None:
    """Entry point of the `dovetail` script: exit 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    # None if the program was started with stdout closed.
    if cast("TextIO | None", sys.stdout) is None:
        raise _failure("stdout is closed")
    try:
        try:
            # Only the command's own module is imported to run it. Help and mistyped names need all of them.
            build([first] if first in COMMANDS else COMMANDS)()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _abandon_stdout()
        raise SystemExit(EXIT_OK) from None
    except OSError:
        why = _stdout_trouble()
        if why is None:
            raise
        _abandon_stdout()
        raise _failure(f"stdout cannot be written: {why}") from None


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


def _failure(message: str) -> SystemExit:
    print(f"dovetail: {message}", file=sys.stderr)
    return SystemExit(EXIT_BAD_INPUT)


def _stdout_trouble() -> str | None:
    # Only trying tells whether it was stdout that failed: the error itself does not name its file.
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _abandon_stdout() -> None:
    # Whoever read the output has left; the interpreter's flush at exit must not complain about it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
