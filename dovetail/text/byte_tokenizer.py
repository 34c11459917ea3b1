"""A tokenizer of bytes, for trying things out with tiny models."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from dovetail.text.detokenizer import BYTE_ALPHABET
from dovetail.text.tokenizer import Tokenizer

_SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are the bytes of UTF-8; 256 begins a text, 257 ends it, 258 and 259 begin and end a chat
    message.

    `add_bos`: whether `encode` puts 256 first. Everything else is `Tokenizer`.
    """

    def __init__(self, add_bos: bool = False) -> None:
        vocabulary = dict(BYTE_ALPHABET)
        vocabulary.update({token: 256 + index for index, token in enumerate(_SPECIAL)})
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
        if add_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<|bos|>:0 $A:0", pair="<|bos|>:0 $A:0 $B:1", special_tokens=[("<|bos|>", 256)]
            )
        names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
        super().__init__(backend, special_tokens=names, eos_ids=(257, 259), templates={"default": _TEMPLATE})
