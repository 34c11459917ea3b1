"""Tiny random Hugging Face model directories, written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from dovetail.text.byte_tokenizer import ByteTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def save_model(directory: Path, kind: str = "llama", shard: str = "5GB", **changes: Any) -> Any:
    """Save a random model of `kind` with a byte tokenizer; returns the transformers model (float32)."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if not parameter.any():  # biases, and weights of norms that are stored less 1
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, max_shard_size=shard)
    ByteTokenizer().backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object file; None deletes."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))
