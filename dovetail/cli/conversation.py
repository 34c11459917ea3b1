"""A conversation with a model: messages so far, and the answer that is being written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from dovetail.cli import terminal
from dovetail.core.errors import RequestError

if TYPE_CHECKING:
    from dovetail.cli.engine_options import SamplingOptions
    from dovetail.llm import LLM
    from dovetail.outputs import Answer, RequestOutput

MAX_TOKENS = 2048


class Conversation:
    """Messages, the system message apart. `last` is the latest answer's output."""

    def __init__(self, llm: LLM, sampling: SamplingOptions, system: str | None = None) -> None:
        self.llm = llm
        self.sampling = sampling
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.last: RequestOutput | None = None

    def ask(self, text: str, stopped: Callable[[], bool]) -> Iterator[str]:
        """Add the user's `text` and yield the answer piece by piece until it ends or `stopped()`.

        What was written stays in the conversation. RequestError, and nothing kept, if it does not fit the context.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            answer, pieces = self._submit()
        except RequestError:
            self.messages.pop()
            raise
        yield from self._follow(answer, pieces, stopped)

    def again(self, stopped: Callable[[], bool]) -> Iterator[str]:
        """Replace the latest answer, as `ask` does. RequestError if there is none."""
        if not self.messages:
            raise RequestError("there is no answer to write again")
        old = self.messages.pop()
        try:
            answer, pieces = self._submit()
        except RequestError:
            self.messages.append(old)
            raise
        yield from self._follow(answer, pieces, stopped)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.last = [], None

    @property
    def used(self) -> int:
        """Tokens of the context that the latest exchange took."""
        last = self.last
        return len(last.prompt_token_ids) + len(last.outputs[0].token_ids) if last else 0

    def cut(self) -> str | None:
        """Why the latest answer ended before its end, and what to do; None if it did not."""
        if self.last is None or self.last.outputs[0].finish_reason != "length":
            return None
        limit = self.llm.config.max_model_len
        if self.used >= limit:
            return f"the context of {limit} tokens is full, the answer was cut; /clear starts over"
        return f"cut after {len(self.last.outputs[0].token_ids)} tokens; --max-tokens allows longer answers"

    def _submit(self) -> tuple[Answer, Generator[str]]:
        """Queue the conversation as it stands, for the model to go on: the answer, and its text step by step."""
        from dovetail.outputs import text_of

        llm = self.llm
        system = [{"role": "system", "content": self.system}] if self.system else []
        ids = terminal.chat_ids(llm, system + self.messages, "`dovetail run --raw` continues plain text")
        limit = llm.config.max_model_len
        if len(ids) >= limit:
            raise RequestError(
                f"the conversation would have {len(ids)} tokens and the context holds {limit}, so your message "
                f"was not added; /clear starts over, a larger --max-model-len holds more",
                param="messages",
            )
        params = terminal.params_for(llm, ids, self.sampling, MAX_TOKENS)
        if params.max_tokens is not None:  # what fits shrinks from turn to turn
            params = replace(params, max_tokens=min(params.max_tokens, limit - len(ids)))
        answer = llm.session.prepare(ids, params)
        return answer, llm.session.follow(answer, text_of)

    def _follow(self, answer: Answer, pieces: Generator[str], stopped: Callable[[], bool]) -> Iterator[str]:
        try:
            with closing(pieces):  # also where the reader stops reading
                for piece in pieces:
                    yield piece
                    if stopped():  # text that was held back still comes
                        self.llm.session.abort(answer)
        finally:
            self.last = answer.output()
            self.messages.append({"role": "assistant", "content": self.last.outputs[0].text})
        if self.last.error is not None:
            raise RequestError(f"the answer could not be finished: {self.last.error}")
