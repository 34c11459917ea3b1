"""The tokenizer that a GGUF file describes in its metadata, rebuilt for the `tokenizers` library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_config import ENDS, gguf_ids
from dovetail.core.errors import ModelError
from dovetail.text.detokenizer import looks_byte_level
from dovetail.text.tokenizer import Tokenizer
from dovetail.text.tokenizer_files import TEKKEN, cased_words, guarded

_LOG = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


@dataclass(frozen=True)
class _Family:
    """How a byte-level BPE cuts text into words: digits one by one first, then by `cuts` one after the other, each
    within the parts that the ones before it left, then by a regex ("": GPT-2's own, unless there are cuts).
    """

    regex: str = ""
    names: tuple[str, ...] = ()
    split_digits: bool = False
    cuts: tuple[str, ...] = ()
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _words(letters: str, digits: str, tail: str = r"\p{L}\p{N}") -> str:
    return rf"{_SHORT}|{_LEAD}{letters}+|{digits}| ?[^\s{tail}]+[\r\n]*|{_SPACES}"


_EAST_ASIAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")
_CASED_WORDS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_SIGNS = r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LLM = (r"[\r\n]", _CASED_WORDS, _SIGNS, r"\s+$", _EAST_ASIAN, r"\p{N}")
_LLAMA3 = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
)
_DIGITS = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
_FAMILIES = (
    _Family(_words(r"\p{L}", r"\p{N}{1,3}"), _LLAMA3, ignore_merges=True, add_bos=True),
    _Family(_words(r"\p{L}", r"\p{N}"), ("qwen2", "deepseek-r1-qwen"), nfc=True),
    _Family(_words(r"\p{L}", r"\p{N}"), ("stablelm2", "hunyuan", "solar-open", "grok-2")),
    _Family(_words(r"[\p{L}\p{M}]", r"\p{N}", r"\p{L}\p{M}\p{N}"), ("qwen35",), nfc=True),
    _Family("", ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2")),
    _Family("", _DIGITS, split_digits=True),
    _Family(cased_words(_SHORT + "?", r"\p{N}{1,3}"), ("gpt-4o", "minimax-m2")),
    _Family(TEKKEN, ("tekken",), ignore_merges=True, add_bos=True),
    _Family("", ("deepseek-coder",), cuts=_DEEPSEEK_CODER, add_bos=True),
    _Family("", ("deepseek-llm",), cuts=_DEEPSEEK_LLM, add_bos=True),
)
FAMILIES: dict[str, _Family] = {name: family for family in _FAMILIES for name in family.names}


@dataclass
class _Vocabulary:
    """The token arrays, checked against each other. `ids` maps every token to its id."""

    tokens: list[str]
    kinds: np.ndarray
    ids: dict[str, int] = field(default_factory=dict)


def _vocabulary(file: GGUFFile, vocab_size: int) -> _Vocabulary:
    tokens = file.metadata.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens is missing or empty")
    if len(tokens) > vocab_size:
        raise ModelError(f"{file.path}: {len(tokens)} tokens for a vocabulary of {vocab_size}")
    kinds = file.metadata.numbers("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = np.full(len(tokens), NORMAL)
    if len(kinds) != len(tokens):
        raise ModelError(
            f"{file.path}: {len(kinds)} entries in tokenizer.ggml.token_type for {len(tokens)} tokens"
        )
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens has {twice[:64]!r} twice")
    return _Vocabulary(tokens, kinds, ids)


def _byte_level(file: GGUFFile, vocabulary: _Vocabulary, family: _Family) -> Backend:
    merges = file.metadata.strings("tokenizer.ggml.merges")
    if merges is None:
        raise ModelError(f"{file.path}: tokenizer.ggml.merges is missing")
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    ids = vocabulary.ids
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise ModelError(
                f"{file.path}: tokenizer.ggml.merges[{index}] {merges[index][:64]!r} is not a pair of tokens"
            )
    backend = Backend(models.BPE(vocab=ids, merges=pairs, ignore_merges=family.ignore_merges))
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if family.split_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    cuts = (*family.cuts, family.regex) if family.regex else family.cuts
    steps += [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cuts))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return backend


def _score_merges(vocabulary: _Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """The merges that SentencePiece's rule implies: join the neighbours whose union scores best."""
    joinable = np.isin(vocabulary.kinds, (NORMAL, USER_DEFINED))
    ids = {token: index for token, index in vocabulary.ids.items() if joinable[index]}
    # Higher scores first; equal scores keep the vocabulary's order.
    order = np.argsort(-scores, kind="stable").tolist()
    merges = []
    for index in order:
        token = vocabulary.tokens[index]
        if len(token) > 1 and joinable[index]:
            splits = [
                (ids[token[:at]], ids[token[at:]], at)
                for at in range(1, len(token))
                if token[:at] in ids and token[at:] in ids
            ]
            merges += [(token[:at], token[at:]) for _, _, at in sorted(splits)]
    return merges


def _sentencepiece(file: GGUFFile, vocabulary: _Vocabulary) -> Backend:
    raw = file.metadata.numbers("tokenizer.ggml.scores")
    if raw is None or len(raw) != len(vocabulary.tokens):
        count = 0 if raw is None else len(raw)
        raise ModelError(
            f"{file.path}: {count} entries in tokenizer.ggml.scores for {len(vocabulary.tokens)} tokens"
        )
    scores = raw.astype(np.float64)
    if not np.isfinite(scores).all():
        raise ModelError(
            f"{file.path}: tokenizer.ggml.scores[{int(np.argmin(np.isfinite(scores)))}] is not a number"
        )
    unknown: int | None = file.metadata.read("tokenizer.ggml.unknown_token_id", int, 0)
    if unknown is not None and unknown >= len(vocabulary.tokens):
        if not all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.unknown_token_id is {unknown}, there are {len(vocabulary.tokens)} "
                "tokens, and characters without a token or bytes need it"
            )
        unknown = None
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_score_merges(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    prefix = file.metadata.read("tokenizer.ggml.add_space_prefix", bool, True)
    # A normalizer works on each stretch between control tokens, as SentencePiece does when it is called for
    # each.
    marks = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), marks]) if prefix else marks
    steps: list[decoders.Decoder] = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _add_tokens(backend: Backend, vocabulary: _Vocabulary) -> None:
    """Tell the backend which tokens are matched as a whole in the text, before everything else."""
    special = np.flatnonzero(np.isin(vocabulary.kinds, (CONTROL, UNKNOWN)))
    plain = np.flatnonzero(vocabulary.kinds == USER_DEFINED)
    backend.add_special_tokens([AddedToken(vocabulary.tokens[i], special=True, normalized=False) for i in special])
    backend.add_tokens([AddedToken(vocabulary.tokens[i], special=False, normalized=False) for i in plain])


def _post_processor(
    vocabulary: _Vocabulary, bos: int | None, eos: int | None
) -> processors.TemplateProcessing | None:
    first = [] if bos is None else [vocabulary.tokens[bos]]
    last = [] if eos is None else [vocabulary.tokens[eos]]
    if not first and not last:
        return None
    tokens = [(vocabulary.tokens[token], token) for token in dict.fromkeys((bos, eos)) if token is not None]
    single = [*(f"{token}:0" for token in first), "$A:0", *(f"{token}:0" for token in last)]
    pair = [*single, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _special_tokens(file: GGUFFile, vocabulary: _Vocabulary, needed: Sequence[str]) -> dict[str, int]:
    """Ids by the names that templates use. `needed`: keys of tokens that are put into every text."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {}
    for key in (*names, "eot", "eom"):
        token = file.metadata.read(f"tokenizer.ggml.{key}_token_id", int)
        if token is not None and token >= len(vocabulary.tokens):
            why = f"tokenizer.ggml.{key}_token_id is {token}, there are {len(vocabulary.tokens)} tokens"
            if key in needed:
                raise ModelError(f"{file.path}: {why}, and tokenizer.ggml.add_{key}_token asks for it")
            _LOG.warning("%s: %s; it is not used", file.path, why)
        elif token is not None and key in names:
            found[names[key]] = token
    return found


def build_tokenizer(file: GGUFFile, vocab_size: int) -> Tokenizer:
    """The tokenizer of `file`, whose model has `vocab_size` rows in its embedding.

    ModelError for a tokenizer model other than gpt2 (byte-level BPE) and llama (SentencePiece BPE), and for
    token arrays that are missing or contradict each other. An unknown `tokenizer.ggml.pre` is used as
    GPT-2's, with a warning: the text is then split differently from how the model was trained.
    """
    metadata = file.metadata
    model = metadata.read("tokenizer.ggml.model", str, "none")
    if model not in ("gpt2", "llama"):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.model {model[:64]!r} is not supported, only gpt2 and llama are"
        )
    vocabulary = _vocabulary(file, vocab_size)
    if model == "llama" and looks_byte_level(vocabulary.ids.get):
        _LOG.warning("%s: tokenizer.ggml.model is llama, but the tokens are gpt2's; read as gpt2", file.path)
        model = "gpt2"
    family = _family(file) if model == "gpt2" else _Family(add_bos=True)
    backend = guarded(
        f"{file.path}: tokenizer",
        lambda: _byte_level(file, vocabulary, family) if model == "gpt2" else _sentencepiece(file, vocabulary),
    )
    guarded(f"{file.path}: tokenizer", lambda: _add_tokens(backend, vocabulary))
    asked = {
        "bos": metadata.read("tokenizer.ggml.add_bos_token", bool, family.add_bos),
        "eos": metadata.read("tokenizer.ggml.add_eos_token", bool, False),
    }
    special = _special_tokens(file, vocabulary, [key for key, wanted in asked.items() if wanted])
    bos, eos = (special.get(f"{key}_token") if wanted else None for key, wanted in asked.items())
    processor = _post_processor(vocabulary, bos, eos)
    if processor is not None:
        backend.post_processor = processor
    prefix = "tokenizer.chat_template"
    templates = {
        key[len(prefix) + 1 :]: metadata.read(key, str) for key in metadata if key.startswith(prefix + ".")
    }
    if prefix in metadata:
        templates["default"] = metadata.read(prefix, str)
    texts = {name: vocabulary.tokens[token] for name, token in special.items()}
    ends = gguf_ids(file, ENDS, len(vocabulary.tokens))
    return Tokenizer(backend, special_tokens=texts, eos_ids=ends, templates=templates)


def _family(file: GGUFFile) -> _Family:
    pre = file.metadata.read("tokenizer.ggml.pre", str, "default")
    if pre not in FAMILIES:
        _LOG.warning("%s: tokenizer.ggml.pre %r is not known, splitting text as GPT-2 does", file.path, pre[:64])
    return FAMILIES.get(pre, _Family())
