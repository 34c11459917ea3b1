"""From the fields of a request to answers, tokenized and checked. Server and batch both use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dovetail.core.errors import RequestError
from dovetail.core.sampling import SamplingParams
from dovetail.llm import LLM
from dovetail.outputs import Answer
from dovetail.server.params import (
    Prompt,
    chat_params,
    completion_params,
    prompts,
    template_variables,
)
from dovetail.server.protocol import ChatRequest, CompletionRequest
from dovetail.server.structured import asking_field, renamed
from dovetail.session import mix
from dovetail.structured.grammar import Grammar
from dovetail.text.chat import strings
from dovetail.tools.request import read_tools
from dovetail.tools.use import ToolUse


@dataclass(frozen=True)
class Asked:
    """What a request asks for. A conversation has no `prompts`: the chat template makes its one prompt."""

    request: ChatRequest | CompletionRequest
    params: SamplingParams
    prompts: Sequence[Prompt] = ()
    tools: ToolUse | None = None

    @property
    def choices(self) -> int:
        return self.params.n * max(1, len(self.prompts))


class Intake:
    """Reads requests to one model. RequestError names the field that is wrong."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        pieces = llm.tokenizer.backend.get_vocab(with_added_tokens=True)
        self._longest_piece = max(map(len, pieces), default=1)

    def read(self, request: ChatRequest | CompletionRequest) -> Asked:
        """The parameters and prompts of a request whose common fields are checked."""
        if isinstance(request, ChatRequest):
            tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls)
            use = ToolUse(self.llm.tokenizer, tools)
            return Asked(request, use.params(chat_params(request, self.llm.default_params)), tools=use)
        params = completion_params(request, self.llm.default_params)
        return Asked(request, params, prompts(request.prompt))

    def compile(self, asked: Asked) -> Grammar | None:
        """The form that the answers must have, compiled; None if they may be anything. It may take seconds.

        While the result is held, `answers` finds it. RequestError if the form is wrong or too expensive.
        """
        form = asked.params.structured_outputs
        if form is None:
            return None
        try:
            return self.llm.session.grammars.compile(form)
        except RequestError as error:
            by_tools = asked.tools is not None and asked.tools.tools is not None
            raise renamed(error, "tools" if by_tools else asking_field(asked.request)) from None

    def answers(self, asked: Asked, name: str, seed: int | None = None) -> list[Answer]:
        """An answer for each prompt, with ids made from `name`. Nothing is queued. Long prompts take a while.

        Choices are numbered prompt by prompt: choice i belongs to prompt i // n. `seed` is used if the request has
        none; each prompt gets its own seed, made from it.
        """
        request, found = asked.request, []
        grammar = self.compile(asked)  # held, so that it need not be compiled for each prompt
        given = asked.prompts
        if isinstance(request, ChatRequest) and asked.tools is not None:
            given = [self.conversation(request, asked.tools)]
        for i, prompt in enumerate(given):
            self._check_length(prompt)
            params = asked.params
            if params.seed is None and seed is not None:
                params = replace(params, seed=mix(seed, i))
            ids = prompt
            if isinstance(prompt, str) and request.add_special_tokens is False:
                ids = self.llm.tokenizer.encode(prompt, add_special_tokens=False)
            answer = self.llm.session.prepare(ids, params, f"{name}-{i}")
            answer.prompt = prompt if isinstance(prompt, str) else None
            answer.first_choice = i * params.n
            answer.tools = asked.tools
            for stream in answer.streams:
                stream.request.salt = request.cache_salt or ""
            found.append(answer)
        del grammar
        return found

    def conversation(self, request: ChatRequest, tools: ToolUse) -> list[int]:
        """The tokens of a conversation: up to the model's turn, or within its last message."""
        goes_on = bool(request.continue_final_message)
        if goes_on and request.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt begins a message, continue_final_message goes on with the last one; "
                "choose one of them",
                param="continue_final_message",
            )
        said = [[m.get("content"), m.get("tool_calls")] for m in request.messages]
        self._check_size(sum(map(len, strings(said))), "messages")
        if tools.tools is not None:
            self._check_size(sum(map(len, strings(tools.tools.shown()))), "tools")
        return tools.prompt(
            request.messages,
            add_generation_prompt=not goes_on and request.add_generation_prompt is not False,
            continue_final_message=goes_on,
            **template_variables(request),
        )

    def _check_length(self, prompt: Prompt) -> None:
        """Refuse a prompt that cannot fit, before it is tokenized or copied."""
        if isinstance(prompt, str):
            self._check_size(len(prompt), "prompt")
        elif len(prompt) > (limit := self.llm.config.max_model_len):
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the context holds {limit}", param="prompt"
            )

    def _check_size(self, characters: int, field: str) -> None:
        """Refuse a text of so many characters if it cannot fit whatever it says."""
        limit = self.llm.config.max_model_len
        if characters > limit * self._longest_piece:
            raise RequestError(
                f"{field}: {characters} characters, but the context holds {limit} tokens", param=field
            )
