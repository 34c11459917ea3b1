"""`dovetail serve`: the OpenAI API over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.engine_options import EngineOptions, spliced
from dovetail.core.errors import ConfigError
from dovetail.host.units import format_size, parse_duration
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.config import Config
    from dovetail.llm import LLM
    from dovetail.server.service import ServiceOptions

# The engine's thread needs the interpreter between two operators, and must not wait long for the event loop.
SWITCH_SECONDS = 0.0005


def _seconds(text: str | float) -> float:
    if isinstance(text, float):
        return text
    try:
        return parse_duration(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The keys of the command line, or of the variable, and those of a file. ConfigError if one cannot be sent."""
    found = list(given)
    if file is not None:
        found += [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {file} has no key")
    for key in found:
        if not (key.isascii() and key.isprintable() and key == key.strip() and key):
            raise ConfigError("an API key must be printable ASCII, not empty, and without spaces around it")
    return tuple(found)


def _check_origins(origins: Sequence[str]) -> None:
    """ConfigError for what no browser says of a page."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ConfigError(
                f"--allowed-origins {origin}: an origin is written as https://chat.example, without a path"
            )


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    engine: EngineOptions,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that clients ask for instead of MODEL. Repeat for several.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DOVETAIL_API_KEY",
            help="Key that clients must send, except to /health. Repeat for several. Others can read a command "
            "line, but not the variable or a file.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File of more keys, one a line.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Web page that may call, as https://chat.example; * is every page. Repeat for several."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Most answers that wait; further requests get 503.")
    ] = 1024,
    shutdown_timeout: Annotated[
        float,
        typer.Option(parser=_seconds, metavar="DURATION", help="Time after SIGTERM for open requests, as in 1m."),
    ] = 30.0,
) -> None:
    """Serve MODEL over HTTP with the OpenAI API.

    It answers /v1/chat/completions, /v1/completions and /v1/models, and /tokenize, /detokenize, /tokenizer_info,
    /health, /metrics (Prometheus), /version and /docs, which lists every field of a request. The first Ctrl-C or
    SIGTERM finishes open requests; a second one ends them with an error.

    \b
    Examples:
      dovetail serve smollm2-135m
      dovetail serve ./my-model --port 9000 --served-model-name tiny --api-key-file keys.txt --max-num-seqs 32
    """
    from dovetail.server.connections import raise_descriptor_limit
    from dovetail.server.http_server import listen, url
    from dovetail.server.service import ServiceOptions

    keys = _keys(api_key or [], api_key_file)
    _check_origins(allowed_origins or ())
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what clients do wrong is no news
    names = tuple(served_model_name or [model])
    options = ServiceOptions(names, keys, tuple(allowed_origins or ()), max_queue, shutdown_timeout)
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    with listen(host, port) as listener:  # before the model is loaded: a port in use is known at once
        code = asyncio.run(_serve(engine.load(model), options, listener, url(listener)))
    if code:
        raise typer.Exit(code)


async def _serve(llm: LLM, options: ServiceOptions, listener: Any, address: str) -> int:
    from dovetail.server.http_server import HTTPServer, serve
    from dovetail.server.service import Service

    server = HTTPServer(Service(llm, options), lambda: _ready(llm, options, address))
    code = await serve(server, listener)
    if server.interrupted or server.service.engine.stuck:
        os._exit(code)  # the engine's thread may be in the middle of a long step
    return code


def settings_text(config: Config) -> str:
    """The resolved configuration for people, a value a line."""
    shown = {"use": " ".join(config.use) or "none", "kv_memory": format_size(config.kv_memory)}
    return "\n".join(f"{name}: {value}" for name, value in (config.to_dict() | shown).items())


def _ready(llm: LLM, options: ServiceOptions, address: str) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if options.api_keys else ""
    # Small models answer this and stop.
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    body = {"model": options.names[0], "messages": messages, "max_tokens": 64, "temperature": 0}
    note(
        f"{settings_text(llm.config)}\n\n{defaults_text(llm)}\n\nServing {options.names[0]} at {address}\n\n"
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
    )


def defaults_text(llm: LLM) -> str:
    """What holds for requests that do not say it."""
    from dovetail.server.params import DEFAULT_COMPLETION_TOKENS

    params = llm.default_params()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    shown = ", ".join(f"{name} {getattr(params, name):g}" for name in names)
    return (
        f"defaults of requests: {shown}; max_tokens {DEFAULT_COMPLETION_TOKENS} for completions, for chats all "
        f"that the context of {llm.config.max_model_len} leaves"
    )
