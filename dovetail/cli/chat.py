"""`dovetail chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dovetail.cli import EXIT_INTERRUPTED, terminal
from dovetail.cli.engine_options import EngineOptions, SamplingOptions, spliced
from dovetail.core.errors import ConfigError, RequestError
from dovetail.host.process import since_start
from dovetail.show.progress import note

if TYPE_CHECKING:
    from dovetail.cli.conversation import Conversation

_HELP = """\
/clear          forget the conversation
/regen          write the latest answer again
/system [TEXT]  set the system message, or remove it
/stats          numbers of the latest answer and of the engine
/help           this list
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer. A message between two \"\"\" may have several lines."""
_QUOTES = '"""'
_COMMAND = re.compile(r"/[a-z?]*")  # so /usr/bin is a message, not a command


@spliced
def command(
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face id, folder or .gguf file.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show numbers after each answer.")] = False,
) -> None:
    """Talk with MODEL. Ctrl-C stops an answer, Ctrl-D leaves, /help lists what else there is.

    What is piped in is a conversation too: each line is a message, and the first that cannot be answered ends it.
    Answers end after 2048 tokens unless --max-tokens says otherwise.

    \b
    Examples:
      dovetail chat smollm2-135m
      dovetail chat smollm2-135m --system "Answer in French." --temperature 0
      printf 'My name is Ada.\\nWhat is my name?\\n' | dovetail chat smollm2-135m
    """
    from dovetail.cli.conversation import Conversation

    if "logprobs" in sampling.given:
        raise ConfigError("a chat has no place to show --logprobs; `dovetail run --json -` reports them")
    conversation = Conversation(terminal.load(model, engine), sampling, system)
    sampling.params(conversation.llm)  # an impossible value is better known before the first question
    person = sys.stdin.isatty()
    if person:
        note(f"{model}, ready after {since_start():.2f}s. /help lists the commands.")
    chat = Chat(conversation, person, stats)
    for said in messages(person):
        if not chat.take(said):
            break
    terminal.warn_idle(conversation.llm)


class Said(NamedTuple):
    """A message; `quoted` ones are never commands."""

    text: str
    quoted: bool = False


class Chat:
    """Commands and messages of one conversation. With a `person`, errors are notes; else they end the program."""

    def __init__(self, conversation: Conversation, person: bool, stats: bool) -> None:
        self.conversation = conversation
        self.person = person
        self.stats = stats

    def take(self, said: Said) -> bool:
        """Act on a message or a command. Ctrl-C stops it. False means: leave."""
        word, _, rest = ("" if said.quoted else said.text.strip()).partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return False
        try:
            with interrupts() as seen:
                if _COMMAND.fullmatch(word):
                    self._command(word, rest.strip(), seen)
                else:
                    self._show(self.conversation.ask(said.text, lambda: bool(seen)), seen)
        except RequestError as error:
            if not self.person:
                raise
            note(f"dovetail: {error}")
        return True

    def _command(self, word: str, rest: str, seen: list[int]) -> None:
        conversation = self.conversation
        if word == "/clear":
            conversation.clear()
            note("the conversation is forgotten")
        elif word == "/regen":
            self._show(conversation.again(lambda: bool(seen)), seen)
        elif word == "/system":
            conversation.system = rest or None
            note("the system message is set" if rest else "there is no system message now")
        elif word == "/stats":
            self._numbers()
            note(terminal.engine_report(conversation.llm))
        elif word in ("/help", "/?"):
            note(_HELP)
        else:
            raise RequestError(f"{word} is no command; /help lists them")

    def _show(self, pieces: Iterator[str], seen: list[int]) -> None:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if seen:
            note("(stopped)")
        if why := self.conversation.cut():
            note(f"({why})")
        if self.stats:
            self._numbers()

    def _numbers(self) -> None:
        last = self.conversation.last
        if last is not None:
            note(terminal.summary(last))
        note(f"context: {self.conversation.used} of {self.conversation.llm.config.max_model_len} tokens")


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it in the middle of a step, which the engine must finish."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def messages(person: bool) -> Iterator[Said]:
    """Messages: a line each, or several lines between two triple quotes. They end with stdin, or with Ctrl-C
    twice."""
    interrupted = False
    while True:
        try:
            said = _said(person)
        except KeyboardInterrupt:
            if interrupted or not person:
                raise typer.Exit(EXIT_INTERRUPTED) from None
            interrupted = True
            note("\n(Ctrl-C again or Ctrl-D leaves)")
            continue
        except EOFError:
            if person:
                note("")
            return
        interrupted = False
        if said.text.strip():
            yield said


def _said(person: bool) -> Said:
    line = _line(">>> ", person)
    if not line.lstrip().startswith(_QUOTES):
        return Said(line)
    lines = [line.lstrip()[len(_QUOTES) :]]
    while not lines[-1].rstrip().endswith(_QUOTES):
        try:
            lines.append(_line("... ", person))
        except EOFError:
            raise RequestError('the message that began with """ has no closing """', param="messages") from None
    lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
    return Said("\n".join(lines).strip("\n"), quoted=True)


def _line(prompt: str, person: bool) -> str:
    """The next line of stdin. EOFError at its end, RequestError if it is not UTF-8."""
    if person and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # importing it gives input() its editing
        try:
            return input(prompt)
        except UnicodeDecodeError:
            note("dovetail: that is not valid UTF-8")
            return ""
    if person:
        note(prompt.rstrip())
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not valid UTF-8: {error}", param="messages") from error
