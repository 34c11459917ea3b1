"""Text <-> token ids, chat templates included, over the `tokenizers` library."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from dovetail.core.errors import ModelError, RequestError
from dovetail.text.chat import ChatTemplate, Shield
from dovetail.text.conversation import Message, conversation
from dovetail.text.detokenizer import Detokenizer, Piece, Pieces, as_bytes, byte_fallback, byte_level
from dovetail.text.tokenizer_files import decoder_steps, guarded, read_files

__all__ = ["Detokenizer", "Tokenizer"]

_LOG = logging.getLogger(__name__)
_FALLBACK = ["Replace", "ByteFallback", "Fuse"]
# How published models spell the end of a turn or of a text.
_ENDS = frozenset({
    "</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>",
    "<|endoftext|>", "<|end_of_text|>", "<|EOT|>", "<EOT>", "[EOT]", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
    "[|endofturn|]", "<|endofturn|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
})  # fmt: skip


class Tokenizer:
    """A vocabulary with its rules and chat templates.

    `backend` does the work. `special_tokens` maps the names that templates use (bos_token, eos_token, ...) to
    text. `eos_ids` are ids that end a turn, besides those that `Tokenizer.eos_ids` finds. `templates` maps names
    to template source; "default" is the one used, "tool_use" replaces it when tools are given.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, Any] | None = None,
        eos_ids: Sequence[int] = (),
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.templates = dict(templates or {})
        self.bos_id = self.token_id("bos_token")
        self._named_ends = tuple(eos_ids)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.piece: Callable[[int], str | None] = backend.id_to_token
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def from_directory(cls, directory: str | Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template files."""
        found = read_files(Path(directory))
        return cls(found.backend, special_tokens=found.special, eos_ids=eos_ids, templates=found.templates)

    def token_id(self, name: str) -> int | None:
        """Id of a named special token ("bos_token", "pad_token", ...), None if there is none."""
        token = self.special_tokens.get(name)
        found: int | None = self.backend.token_to_id(token) if isinstance(token, str) else None
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which `decode` leaves out by default."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those that the files name, the token that the chat template puts after an
        assistant's message, and the added tokens that are spelled as published models spell their ends.
        """
        eos = self.token_id("eos_token")
        named = ([] if eos is None else [eos]) + list(self._named_ends)
        written = self._end_of_turn()
        if written is not None and written not in named:
            name = self.backend.id_to_token(written)
            _LOG.warning(
                "the chat template ends messages with %r, and no file names it as an end; it is one", name
            )
            named.append(written)
        added = self.backend.get_added_tokens_decoder().items()
        return tuple(dict.fromkeys(named + [i for i, token in sorted(added) if token.content in _ENDS]))

    def _end_of_turn(self) -> int | None:
        """The control token that the chat template puts after what an assistant says."""
        if self._special_pattern is None or "default" not in self.templates:
            return None
        said = "zebra"
        try:
            text = self.render(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}],
                add_generation_prompt=False,
            )
        except (RequestError, ModelError):  # a template may want other messages
            return None
        _, found, rest = text.rpartition(said)
        match = self._special_pattern.match(rest.lstrip()) if found else None
        token: int | None = self.backend.token_to_id(match.group()) if match else None
        return None if token == self.bos_id else token

    @cached_property
    def decoder(self) -> str:
        """How pieces become text: "bytes", "fallback", "fallback-strip", or "" for anything else."""
        steps = self._decoding
        kinds = [step["type"] for step in steps]
        if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return "bytes"
        if kinds[:3] == _FALLBACK and steps[0]["pattern"] == {"String": "\u2581"} and steps[0]["content"] == " ":
            if len(kinds) == 3:
                return "fallback"
            if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
                return "fallback-strip"
        return ""

    @cached_property
    def _decoding(self) -> list[dict[str, Any]]:
        """The decoder's steps in order, without sequences in sequences."""
        return decoder_steps(self.backend)

    @cached_property
    def pieces(self) -> Pieces:
        """What each id adds to a text that has begun. Added tokens are spelled in plain text."""
        kinds = {step["type"] for step in self._decoding}
        plain, meaning = self.special_ids, self._meaning
        if "ByteLevel" in kinds:
            plain, meaning = frozenset(self.backend.get_added_tokens_decoder()), byte_level
        elif self.decoder:
            meaning = byte_fallback
        return Pieces(self.piece, lambda token, piece: piece if token in plain else meaning(piece))

    def _meaning(self, piece: str) -> Piece:
        """What a piece adds with a decoder of no known kind."""
        found = byte_fallback(piece)
        if isinstance(found, bytes) and any(step["type"] == "ByteFallback" for step in self._decoding):
            return found
        if self.backend.decoder is None:
            return " " + piece
        before = "a"  # any text will do: only what comes first may lose its space
        text: str = self.backend.decoder.decode([before, piece])
        return text.removeprefix(before)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id adds to a text; a special token's are its spelling.

        They may be a part of a character. b"" for ids outside the vocabulary. What a tokenizer leaves out at the
        beginning of a text (a first space) is included.
        """
        return as_bytes(self.pieces[token])

    def token_name(self, token: int) -> str:
        r"""The text that an id adds, with its leading space; bytes that are no whole character as `\xf0\x9f`."""
        return self.token_bytes(token).decode(errors="backslashreplace")

    def encode(self, text: str | bytes, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens spelled in it are recognised; `add_special_tokens` adds BOS and the
        like where the model wants them. RequestError for invalid UTF-8 and lone surrogates."""
        return self._encode(self.backend, text, add_special_tokens)

    def _encode(self, backend: tokenizers.Tokenizer, text: str | bytes, add_special_tokens: bool) -> list[int]:
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            else:
                text.encode("utf-8")  # the backend reports a lone surrogate as a wrong argument type
        except UnicodeError as error:
            raise RequestError(f"the text is not valid Unicode: {str(error)[:200]}") from error
        # Unlike `encode`, this lets other threads run meanwhile. It keeps no offsets, which takes half the time.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary are skipped, bytes that are not UTF-8 become U+FFFD."""
        if not self.decoder:
            known = [token for token in ids if 0 <= token < 1 << 32]
            text: str = self.backend.decode(known, skip_special_tokens=skip_special_tokens)
            return text
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join([self.token_bytes(t) for t in ids if t not in skipped]).decode(errors="replace")
        return text.removeprefix(" ") if self.decoder == "fallback-strip" else text

    def detokenizer(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer, which streams the text of ids as they come."""
        return Detokenizer(self, skip_special_tokens, prompt_ids)

    def template(self, tools: Any = None) -> ChatTemplate:
        """The chat template for a conversation with these tools. RequestError if the model has none."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError(
                "this model has no chat template; use the completions API with a complete prompt",
                param="messages",
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.templates[name], self.special_tokens)
        return self._compiled[name]

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text for `messages`; `kwargs` are variables for the template.

        Messages are what the chat API takes (`text.conversation`). continue_final_message: end the prompt after
        the text of the last one. RequestError if there is no template, it rejects the messages, or they are
        malformed.
        """
        template = self.template(tools)
        found = conversation(messages, template.traits)
        return template.render(
            found,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=kwargs,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of the prompt for `messages`, as `render` gives it from the same arguments, without a second BOS.

        Control tokens come from the template only: one that is spelled inside a message stays plain text.
        """
        template = self.template(tools)
        found = conversation(messages, template.traits)

        def render(messages: Any, tools: Any, variables: Any) -> str:
            return template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                variables=variables,
            )

        text = render(found, tools, kwargs)
        if self._special_pattern is None:
            return self.encode(text, add_special_tokens=False)
        shield = Shield(self._special_pattern, text, found, tools, kwargs)
        if not shield.active:
            return self.encode(text, add_special_tokens=False)
        # Some templates look for tokens in the assistant's own words; then shield only what others wrote.
        for everything in (True, False):
            hidden = [shield.hide(m) if everything or m["role"] != "assistant" else m for m in found]
            shielded = render(hidden, shield.hide(tools), shield.hide(kwargs))
            if shield.restore(shielded) == text:
                ids = self._encode_shielded(shielded, shield)
                if ids is not None:
                    return ids
        _LOG.warning("the chat template depends on control tokens inside messages; they are encoded as such")
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        """Matches any control token as spelled; the longest of those that begin at a place."""
        added = self.backend.get_added_tokens_decoder().values()
        contents = sorted(
            (token.content for token in added if token.special and token.content), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, contents))) if contents else None

    def control_tokens_in(self, texts: Sequence[str]) -> dict[int, str]:
        """The control tokens that are spelled in any of the texts, by id."""
        if self._special_pattern is None:
            return {}
        found = {spelled for text in texts for spelled in self._special_pattern.findall(text)}
        if not found:
            return {}
        added = self.backend.get_added_tokens_decoder().items()
        return {i: token.content for i, token in added if token.special and token.content in found}

    @cached_property
    def _plain_backends(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Copies that read control tokens as text: for the beginning of a text, and for what follows later
        in it.
        """
        source = self.backend.to_str()

        def copy(text: str) -> tokenizers.Tokenizer:
            backend = guarded("the tokenizer cannot be copied", lambda: tokenizers.Tokenizer.from_str(text))
            backend.encode_special_tokens = True
            return backend

        first = copy(source)
        if '"prepend_scheme":"first"' not in source:
            return first, first
        return first, copy(source.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))

    def _encode_shielded(self, shielded: str, shield: Shield) -> list[int] | None:
        """Ids of a rendered text in which only the template's control tokens are spelled out.

        Control tokens cut a text into parts that are encoded independently, so each part can be encoded with
        its stand-ins restored. None if cutting here does not give what the backend gives for the shielded
        text.
        """
        added = {t.content: (i, t) for i, t in self.backend.get_added_tokens_decoder().items() if t.special}
        found = self._special_pattern.finditer(shielded) if self._special_pattern else ()
        spans = [(match.start(), match.end(), *added[match.group()]) for match in found]
        ids: list[int] = []
        check: list[int] = []
        at, strip_left = 0, False
        for start, stop, token_id, token in spans:
            part = shielded[at:start].lstrip() if strip_left else shielded[at:start]
            part = part.rstrip() if token.lstrip else part
            for found_ids, text in ((ids, shield.restore(part)), (check, part)):
                found_ids += self._encode(self._plain_backends[at > 0], text, False) if part else []
                found_ids.append(token_id)
            at, strip_left = stop, token.rstrip
        part = shielded[at:].lstrip() if strip_left else shielded[at:]
        if part:
            ids += self._encode(self._plain_backends[at > 0], shield.restore(part), False)
            check += self._encode(self._plain_backends[at > 0], part, False)
        return ids if check == self.encode(shielded, add_special_tokens=False) else None
