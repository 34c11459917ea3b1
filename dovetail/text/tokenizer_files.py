"""The files that describe a tokenizer in a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from dovetail.core.errors import ModelError
from dovetail.host.json_file import read_bytes, read_json_object
from dovetail.text.detokenizer import looks_byte_level

_LOG = logging.getLogger(__name__)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MAX_GAP = 1 << 20  # ids that no token has

T = TypeVar("T")


def guarded(what: str, build: Callable[[], T]) -> T:
    """Run `build`, turning whatever the tokenizers library raises (its panics are BaseException) into
    ModelError.
    """
    try:
        return build()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, ModelError):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {str(error)[:300]}") from error


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say: the vocabulary and its rules, named tokens, and chat templates by name."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    templates: dict[str, str]


def read_files(directory: Path) -> TokenizerFiles:
    """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template files.

    ModelError for a file that is broken, or where there is no tokenizer.json. Where files disagree about a token,
    a warning says so.
    """
    source, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not source.is_file():
        raise ModelError(f"{directory}: no tokenizer.json; convert the tokenizer to it first")
    data = read_bytes(source, 256 << 20)
    backend = guarded(str(source), lambda: tokenizers.Tokenizer.from_buffer(data))
    _check_ids(backend, source)
    backend.no_truncation()
    backend.no_padding()
    settings: dict[str, Any] = {}
    for path in (directory / "special_tokens_map.json", config):
        if path.is_file():
            settings.update((k, v) for k, v in read_json_object(path, 64 << 20).items() if v is not None)
    special = {name: text for name in _NAMES if isinstance(text := _text_of(settings.get(name)), str)}
    guarded(str(config), lambda: _add_listed(backend, settings.get("added_tokens_decoder"), str(config)))
    _add_named(backend, [*special.values(), *_others(settings)])
    _check_decoder(backend, str(source))
    _check_cuts(backend, str(source))
    return TokenizerFiles(backend, special, _directory_templates(directory, settings.get("chat_template")))


def _check_ids(backend: tokenizers.Tokenizer, source: Path) -> None:
    """ModelError if an id is so large that what walks over all ids would not end."""
    size = backend.get_vocab_size(with_added_tokens=True)
    if all(backend.id_to_token(i) is not None for i in range(size)):
        return  # as many tokens as ids, from 0 on without a gap
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number >= size + MAX_GAP:
            raise ModelError(f"{source}: token {token[:64]!r} has id {number}, in a vocabulary of {size} tokens")


def _add_listed(backend: tokenizers.Tokenizer, listed: Any, source: str) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder, with its flags, as transformers does.

    tokenizer.json need not know that they are matched as a whole.
    """
    tokens = (
        [_listed_token(key, value, source) for key, value in listed.items()] if isinstance(listed, dict) else []
    )
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    end = backend.get_vocab_size()
    new: list[tokenizers.AddedToken] = []
    for wanted, token in sorted(tokens, key=lambda item: item[0]):
        found = backend.token_to_id(token.content)
        if wanted != (end if found is None else found):
            where = "does not have it there" if found is None else f"has it at {found}"
            _LOG.warning(
                "%s: %r is token %d, tokenizer.json %s and is right", source, token.content, wanted, where
            )
        elif repr(token) not in known:
            new.append(token)
            end += found is None
    for special, group in groupby(new, lambda token: token.special):  # all at once: each call costs all tokens
        (backend.add_special_tokens if special else backend.add_tokens)(list(group))


def _listed_token(key: str, value: Any, source: str) -> tuple[int, tokenizers.AddedToken]:
    try:
        flags = {name: bool(value.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
        normalized = bool(value.get("normalized", not flags["special"]))
        return int(key), tokenizers.AddedToken(value["content"], normalized=normalized, **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{source}: added_tokens_decoder[{key[:32]!r}] describes no token: {error}") from error


def _add_named(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Tokens with a name are control tokens, if the vocabulary has them."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [text for text in dict.fromkeys(texts) if text not in added and backend.token_to_id(text) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in new])


def _others(settings: Mapping[str, Any]) -> list[str]:
    """Control tokens that files list without a name."""
    found: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(name)
        found += values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [text for value in found if isinstance(text := _text_of(value), str)]


def _text_of(value: Any) -> Any:
    """A token as files give it: its text, or an object with its flags."""
    return value.get("content") if isinstance(value, dict) else value


def decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """What the backend's decoder does, in order, without sequences in sequences."""
    return [] if backend.decoder is None else _steps(json.loads(backend.decoder.__getstate__()))


def _steps(rule: dict[str, Any]) -> list[dict[str, Any]]:
    if rule["type"] != "Sequence":
        return [rule]
    return [step for inner in rule["decoders"] for step in _steps(inner)]


def cased_words(suffix: str, digits: str) -> str:
    """The regex of tokenizers that cut words where lower case turns to upper case."""
    return (
        rf"{_LEAD}{_UPPER}*{_LOWER}+{suffix}|{_LEAD}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


TEKKEN = cased_words("", r"\p{N}")  # Mistral's


def _check_cuts(backend: tokenizers.Tokenizer, source: str) -> None:
    """Say so if a file of Mistral's byte-level vocabulary cuts text as other models do; several converters wrote
    such files. transformers does what they say.
    """
    if (
        backend.get_vocab_size() < 100_000
        or backend.token_to_id("[INST]") is None
        or backend.pre_tokenizer is None
    ):
        return
    rule = json.loads(backend.pre_tokenizer.__getstate__())
    cuts = [step["pattern"].get("Regex") for step in rule.get("pretokenizers", [rule]) if step["type"] == "Split"]
    if cuts and TEKKEN not in cuts:
        _LOG.warning(
            "%s: cuts text into other words than Mistral's models were trained on, and is followed", source
        )


def _check_decoder(backend: tokenizers.Tokenizer, source: str) -> None:
    """Repair files whose decoder was made for SentencePiece while the vocabulary spells bytes."""
    if looks_byte_level(backend.token_to_id) and all(s["type"] != "ByteLevel" for s in decoder_steps(backend)):
        _LOG.warning("%s: its tokens spell bytes, but its decoder is another; they are read as bytes", source)
        backend.decoder = tokenizers.decoders.ByteLevel()


def _directory_templates(directory: Path, configured: Any) -> dict[str, str]:
    """Template sources by name: files win over tokenizer_config.json's text or list of {name, template}."""
    templates: dict[str, str] = {}
    if isinstance(configured, str):
        templates["default"] = configured
    elif isinstance(configured, list):
        for entry in configured:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                templates[str(entry.get("name"))] = entry["template"]
    extra = directory / "additional_chat_templates"
    files = sorted(extra.glob("*.jinja")) if extra.is_dir() else []
    for path, name in [
        (directory / "chat_template.jinja", "default"),
        *((path, path.stem) for path in files),
    ]:
        if path.is_file():
            try:
                templates[name] = read_bytes(path, 4 << 20).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ModelError(f"{path}: is not UTF-8") from error
    return templates
