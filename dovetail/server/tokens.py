"""Text to tokens and back: /tokenize, /detokenize and /tokenizer_info, in vLLM's and llama.cpp's shapes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from dovetail.checkpoint.export import tokenizer_settings
from dovetail.core.errors import RequestError
from dovetail.server.exchange import Reply
from dovetail.server.protocol import ChatRequest, Ints
from dovetail.server.service import Service

MAX_TEXT = 1 << 20  # characters; they are tokenized whole, and others wait
MAX_TOKENS = 1 << 20


class TokenizeRequest(BaseModel):
    """vLLM's `prompt` or `messages`, or llama.cpp's `content`; exactly one of them."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    tokens: Ints


class Tokens:
    """Answers of the three routes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.llm = service.llm
        self.tokenizer = service.llm.tokenizer

    async def tokenize(self, body: dict[str, Any], reply: Reply) -> None:
        request = TokenizeRequest.model_validate(body)
        self.service.check_model(request.model)
        known = TokenizeRequest.model_fields.keys() | ChatRequest.model_fields.keys()
        reply.ignored = sorted(body.keys() - known)
        await reply.json(await self.service.tokenizing(reply.received, self._tokenize, request, body))

    async def detokenize(self, body: dict[str, Any], reply: Reply) -> None:
        request = DetokenizeRequest.model_validate(body)
        self.service.check_model(request.model)
        reply.ignored = sorted(request.model_extra or ())
        if len(request.tokens) > MAX_TOKENS:
            raise RequestError(f"at most {MAX_TOKENS} tokens, got {len(request.tokens)}", param="tokens")
        size = self.llm.session.vocab_size
        for token in request.tokens:
            if not 0 <= token < size:
                raise RequestError(f"token id {token} is not in the vocabulary of {size}", param="tokens")
        text = await self.service.tokenizing(reply.received, self.tokenizer.decode, request.tokens, False)
        await reply.json({"prompt": text, "content": text})

    def info(self) -> dict[str, Any]:
        return tokenizer_settings(self.tokenizer, self.llm.checkpoint.config)

    def _tokenize(self, request: TokenizeRequest, body: dict[str, Any]) -> dict[str, Any]:
        given = [name for name in ("prompt", "messages", "content") if body.get(name) is not None]
        if len(given) != 1:
            raise RequestError("give a prompt, messages or content, and only one of them", param="prompt")
        if request.parse_special is False:
            raise RequestError("control tokens in a text are always taken as such", param="parse_special")
        if given == ["messages"]:
            chat = ChatRequest.model_validate(body)
            tools = self.service.intake.read(chat).tools
            assert tools is not None
            return self._reply(request, self.service.intake.conversation(chat, tools))
        text = request.prompt if request.prompt is not None else request.content
        assert text is not None
        if len(text) > MAX_TEXT:
            raise RequestError(f"at most {MAX_TEXT} characters, got {len(text)}", param=given[0])
        special = request.add_special_tokens is not False if given == ["prompt"] else bool(request.add_special)
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        if given == ["content"]:
            pieces = [{"id": i, "piece": self._piece(i)} for i in ids]
            return {"tokens": pieces if request.with_pieces else ids}
        return self._reply(request, ids)

    def _reply(self, request: TokenizeRequest, ids: list[int]) -> dict[str, Any]:
        names = [self.tokenizer.piece(i) or "" for i in ids] if request.return_token_strs else None
        limit = self.llm.config.max_model_len
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}

    def _piece(self, token: int) -> str | list[int]:
        """The text of a token, or its bytes where they are only a part of a character."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return list(data)
