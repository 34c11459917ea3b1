"""Answers of a given form from real weights and a real vocabulary."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dovetail import LLM, SamplingParams, StructuredOutputs

PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 40},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2000},
        "languages": {"type": "array", "items": {"enum": ["German", "English", "Français"]}, "maxItems": 3},
        "married": {"type": "boolean"},
    },
    "required": ["full_name", "born", "languages", "married"],
    "additionalProperties": False,
}
CHAT = [{"role": "user", "content": "Tell me about the author of Faust, as JSON."}]


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> LLM:
    return LLM(smollm2, max_model_len=1024, kv_memory=256 << 20, threads=1)


def answer(llm: LLM, **more: Any) -> Any:
    params = SamplingParams(**{"max_tokens": 200, "temperature": 0, **more})
    return llm.chat(CHAT, params, progress=False)[0].outputs


def test_json_is_valid_by_its_schema_and_written_as_the_model_would(plain: LLM) -> None:
    form = StructuredOutputs(json=PERSON)
    outputs = [*answer(plain, structured_outputs=form)]
    for seed in range(4):
        outputs += answer(plain, structured_outputs=form, temperature=1.0, seed=seed, n=2)
    for output in outputs:
        assert output.finish_reason == "stop"
        Draft202012Validator(PERSON).validate(json.loads(output.text))
        assert plain.tokenizer.decode(output.token_ids) == output.text
    pieces = [plain.tokenizer.token_bytes(t) for t in outputs[0].token_ids]
    at = pieces.index(b"full")
    assert pieces[at : at + 3] == [b"full", b"_", b"name"]  # as the tokenizer cuts it


def test_keys_cost_no_steps_of_their_own(plain: LLM) -> None:
    const = {"a_rather_long_name": ["which", "is", "given", "word", "for", "word"]}
    form = StructuredOutputs(json={"const": const}, disable_any_whitespace=True)
    before = plain.engine.steps
    (output,) = answer(plain, structured_outputs=form)
    assert output.text == '{"a_rather_long_name":["which","is","given","word","for","word"]}'
    assert plain.engine.steps - before < len(output.token_ids) / 3


def test_drafts_change_no_text(plain: LLM, smollm2: Path) -> None:
    drafting = LLM(smollm2, use="ngram", max_model_len=1024, kv_memory=256 << 20, threads=1)
    for form in (
        {"json": PERSON}, {"regex": r"[A-Z][a-z]+( [A-Z][a-z]+)*, \d{4}"}, {"choice": ["Goethe", "Schiller"]},
        {"grammar": 'start: "- " item ("\\n- " item)*\nitem: /[A-Z][a-z ]{3,20}/'},
    ):  # fmt: skip
        texts = [[(o.text, o.token_ids) for o in answer(m, structured_outputs=form)] for m in (plain, drafting)]
        assert texts[0] == texts[1]
    assert drafting.engine.scheduler.stats.accepted > plain.engine.scheduler.stats.accepted


def test_an_expression_and_a_choice(plain: LLM) -> None:
    (date,) = answer(plain, structured_outputs={"regex": r"\d{4}-\d{2}-\d{2}"})
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.text)
    (who,) = answer(plain, structured_outputs={"choice": ["Johann Wolfgang von Goethe", "Friedrich Schiller"]})
    assert who.text in ("Johann Wolfgang von Goethe", "Friedrich Schiller") and who.finish_reason == "stop"
