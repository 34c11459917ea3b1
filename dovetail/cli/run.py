"""`dovetail run`: one prompt, one answer."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli import terminal
from dovetail.cli.engine_options import EngineOptions, SamplingOptions, spliced
from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError, ModelError, RequestError
from dovetail.host.process import since_start
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.core.sampling import SamplingParams
    from dovetail.core.structured import StructuredOutputs
    from dovetail.llm import LLM
    from dovetail.outputs import RequestOutput

MAX_TOKENS = 512


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as it is; no chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, put before PROMPT.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON schema; the answer is JSON that is valid by it.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show the engine's counters after the answer.")] = False,
    hints: Annotated[
        bool | None, typer.Option(help="Show what to try next. Default: on a terminal.", show_default=False)
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Answer PROMPT with MODEL, streaming the answer to stdout.

    The answer ends after 512 tokens unless --max-tokens says otherwise. With --json - stdout holds the JSON only.

    \b
    Examples:
      dovetail run smollm2-135m "Name the capital of France." --temperature 0
      dovetail run smollm2-135m "Once upon a time" --raw --max-tokens 100
      git diff | dovetail run smollm2-135m - --system "Summarise this change." --json answer.json
      dovetail run smollm2-135m "Who wrote Faust?" --json-schema person.json
    """
    if raw and system is not None:
        raise ConfigError("--system is part of the chat template, which --raw leaves out; write it into PROMPT")
    if "logprobs" in sampling.given and json_file is None:
        raise ConfigError("--logprobs are part of the JSON result; add --json - or --json FILE")
    form = None if json_schema is None else _form(json_schema)
    text = read_prompt() if prompt == "-" else _utf8("prompt", prompt)
    if not (text if raw else text.strip()):
        raise RequestError("the prompt is empty", param="prompt")
    if system is not None:
        _utf8("system message", system)
    llm = terminal.load(model, engine)
    if raw:
        ids = llm.tokenizer.encode(text)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        ids = terminal.chat_ids(llm, messages, "use --raw to continue PROMPT as it is")
    params = replace(terminal.params_for(llm, ids, sampling, MAX_TOKENS), structured_outputs=form)
    ready = since_start()
    output = _answer(llm, ids, params, quiet=json_file == "-")
    note(f"{terminal.summary(output)}, ready after {ready:.2f}s")
    terminal.warn_idle(llm)
    if stats:
        note(terminal.engine_report(llm))
    if sys.stderr.isatty() if hints is None else hints:
        _show_hints(model)
    write_json(json_file, _result(llm, model, output))


def _form(path: Path) -> StructuredOutputs:
    """The schema in a file as the form of an answer. Raises ConfigError naming the file."""
    from dovetail.core.structured import MAX_BYTES, StructuredOutputs
    from dovetail.host.json_file import read_bytes

    try:
        return StructuredOutputs(json=read_bytes(path, MAX_BYTES).decode("utf-8-sig"))
    except (ModelError, RequestError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json-schema {path}: {error}") from None


def read_prompt() -> str:
    """All of stdin as text. Raises RequestError if it is not UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not valid UTF-8: {error}", param="prompt") from error


def _utf8(what: str, text: str) -> str:
    """`text` of the command line, where bytes that are not UTF-8 come as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the {what} is not valid UTF-8", param="prompt") from error
    return text


def _answer(llm: LLM, ids: list[int], params: SamplingParams, quiet: bool) -> RequestOutput:
    from dovetail.outputs import text_of

    answer, shown = llm.session.prepare(ids, params), False
    try:
        for text in llm.session.follow(answer, text_of):
            if text and not quiet:
                sys.stdout.write(text)
                sys.stdout.flush()
                shown = True
    finally:
        if shown:
            sys.stdout.write("\n")
            sys.stdout.flush()
    output = answer.output()
    if output.error is not None:
        raise RequestError(f"the answer could not be finished: {output.error}")
    return output


def _result(llm: LLM, model: str, output: RequestOutput) -> dict[str, object]:
    answer = output.outputs[0]
    result: dict[str, object] = {"text": answer.text, "token_ids": answer.token_ids}
    result |= terminal.numbers(output) | {"model": model, "use": list(llm.config.use)}
    if answer.logprobs is not None:
        result["logprobs"] = [
            [{"id": i, "logprob": p.logprob, "rank": p.rank, "text": p.decoded_token} for i, p in entry.items()]
            for entry in answer.logprobs
        ]
    return result


def _show_hints(model: str) -> None:
    program = "dovetail" if shutil.which("dovetail") or not sys.argv[0].endswith("dovetail") else sys.argv[0]
    note(
        f"\nNext:\n"
        f"  {program} chat {model}\n"
        f'  {program} run {model} "Write a limerick about bytes" --temperature 0.7 --use ngram\n'
        f"  {program} serve {model}\n"
        f"  {program} doctor"
    )
