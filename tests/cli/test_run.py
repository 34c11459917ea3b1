import json
import re
import shutil
import signal
from dataclasses import fields

import pytest

from dovetail.cli import engine_options
from dovetail.core.sampling import SamplingParams
from tests.helpers.program import SMALL, call, start


def run(model, *arguments, **settings):
    return call("run", model, *arguments, *SMALL, **settings)


def answer(model, *arguments, **settings):
    result = run(model, *arguments, "--json", "-", **settings)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_text_goes_to_stdout_and_numbers_to_stderr(tiny_model, tmp_path):
    result = run(tiny_model, "Hi", "--max-tokens", 8, "--ignore-eos", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.stderr
    written = json.loads((tmp_path / "a.json").read_text())
    assert result.stdout == written["text"] + "\n"
    assert result.stderr.count("\n") == 1
    assert "8 completion tokens" in result.stderr
    assert "finished: length" in result.stderr


def test_json_is_all_of_stdout(tiny_model):
    found = answer(tiny_model, "Hi", "--max-tokens", 8, "--ignore-eos", "--use", "ngram:tokens=2")
    assert list(found) == [
        "text", "token_ids", "prompt_tokens", "completion_tokens", "cached_tokens", "ttft_s", "tokens_per_s",
        "finish_reason", "model", "use",
    ]  # fmt: skip
    assert found["completion_tokens"] == len(found["token_ids"]) == 8
    assert found["finish_reason"] == "length"
    assert found["model"] == str(tiny_model)
    assert found["use"] == ["ngram:tokens=2,min_n=2,max_n=4"]


def test_template_raw_system_and_stdin(tiny_model):
    raw = answer(tiny_model, "Hi", "--raw", "--max-tokens", 4)
    plain = answer(tiny_model, "Hi", "--max-tokens", 4)
    system = answer(tiny_model, "Hi", "--system", "Be brief.", "--max-tokens", 4)
    assert raw["prompt_tokens"] == 2
    assert raw["prompt_tokens"] < plain["prompt_tokens"] < system["prompt_tokens"]
    assert answer(tiny_model, "-", "--max-tokens", 4, stdin="Hi")["token_ids"] == plain["token_ids"]


def test_the_seed_decides(tiny_model):
    one, same, other = (
        answer(tiny_model, "Hi", "--temperature", 1, "--seed", seed, "--max-tokens", 12)["token_ids"]
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_an_answer_ends_at_512_tokens_or_with_the_context(tiny_model):
    most = answer(tiny_model, "Hi", "--raw", "--ignore-eos", "--temperature", 0)
    assert (most["completion_tokens"], most["finish_reason"]) == (512, "length")
    short = answer(tiny_model, "Hi", "--raw", "--ignore-eos", "--temperature", 0, "--max-model-len", 64)
    assert short["completion_tokens"] == 62


def test_hints_stats_and_idle_techniques(tiny_model):
    result = run(tiny_model, "ab", "--raw", "--max-tokens", 1, "--hints", "--stats", "--use", "ngram")
    assert "dovetail chat" in result.stderr
    assert "steps:" in result.stderr
    assert "ngram was in use but never acted" in result.stderr
    options = ("--raw", "--ignore-eos", "--stats", "--use", "smartspec:drafter=ngram,fixed=2,min_n=1")
    result = run(tiny_model, "abcabcabcabc", "--max-tokens", 60, *options)
    assert re.search(r"tokens for each step of a request: \d\.\d+ \(lengths of drafts: \d+ of 0, ", result.stderr)
    assert "smartspec predicted seconds:" in result.stderr


def test_logprobs(tiny_model):
    found = answer(tiny_model, "Hi", "--max-tokens", 3, "--ignore-eos", "--logprobs", 2)
    assert len(found["logprobs"]) == 3
    assert all(2 <= len(entry) <= 3 for entry in found["logprobs"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--use", "nonsense"], "the known ones are"),
        (["--use", "ngram:speed=9"], "tokens, min_n, max_n"),
        (["--use", "ngram", "--use", "ngram"], "ngram is given twice"),
        (["--use", "quest", "--use", "sink-window"], "both fill"),
        (["--use", "ngram,sink-window"], "repeat --use to combine"),
        (["--use", "ngram:tokens=4,sink-window"], "repeat --use to combine"),
        (["--use", "ngram:tokens=x"], "tokens must be an int"),
        (["--use", f"quest:budget={10**20}"], "budget must be at most 2147483647"),
        (["more", "words"], "put the prompt in quotes"),
        (["--temperature", "nan"], "temperature must be between"),
        (["--top-p", "1.5"], "top_p must be between"),
        (["--max-tokens", "0"], "max_tokens must be between"),
        (["--max-tokens", "9000"], "the context holds"),
        (["--kv-memory", "5 parsecs"], "is not a size"),
        (["--kv-memory", "1KiB"], "raise --kv-memory"),
        (["--dtype", "float3"], "the known ones are"),
        (["--block-size", "0"], "block_size must be"),
        (["--logprobs", "2"], "add --json"),
        (["--raw", "--system", "x"], "--system is part of the chat template"),
        (["--nonsense", "1"], "No such option"),
    ],
)
def test_bad_options_say_what_is_wrong(tiny_model, arguments, says):
    result = call("run", tiny_model, "Hi", *SMALL, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_bad_prompts(tiny_model):
    for arguments, stdin, says in [
        (["x" * 5000], None, "the context holds 4096"),
        (["", "--raw"], None, "the prompt is empty"),
        (["  "], None, "the prompt is empty"),
        (["-"], "\n", "the prompt is empty"),
        (["\udcff"], None, "the prompt is not valid UTF-8"),
        (["-"], b"\xff\xfe", "stdin is not valid UTF-8"),
    ]:
        result = run(tiny_model, *arguments, stdin=stdin)
        assert result.exit_code == 2
        assert says in result.stderr


def test_chat_has_no_place_for_logprobs(tiny_model):
    result = call("chat", tiny_model, "--logprobs", 2)
    assert result.exit_code == 2
    assert "--json" in result.stderr


@pytest.mark.parametrize("command", [["run", "no-such-model", "Hi"], ["chat", "no-such-model"]])
@pytest.mark.parametrize("option", [("--max-tokens", "0"), ("--temperature", "-1"), ("--stop", "")])
def test_sampling_is_checked_before_the_model_is_loaded(command, option):
    result = call(*command, *option)
    assert result.exit_code == 2
    assert option[0].strip("-").replace("-", "_") in result.stderr
    assert "no-such-model" not in result.stderr


def test_a_model_without_a_template_needs_raw(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    result = run(tmp_path / "m", "Hi")
    assert result.exit_code == 2
    assert "--raw" in result.stderr
    assert run(tmp_path / "m", "Hi", "--raw", "--max-tokens", 2).exit_code == 0


def test_interrupted(tiny_model):
    process = start("run", tiny_model, "Hi", "--ignore-eos", "--max-tokens", 4000, "--temperature", 1, *SMALL)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors


def test_options_are_those_of_the_python_api():
    known = {p.name for p in engine_options.SamplingOptions.parameters()}
    assert known <= {f.name for f in fields(SamplingParams)}
    names = {f.name for f in fields(engine_options.Options)} | {"use"}
    assert {p.name for p in engine_options.EngineOptions.parameters()} == names


def test_a_schema_in_a_file_gives_the_form_of_the_answer(tiny_model, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                                "additionalProperties": False}))  # fmt: skip
    found = answer(tiny_model, "Hi", "--json-schema", file, "--max-tokens", 100)
    assert json.loads(found["text"])["ok"] in (True, False)
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not a JSON text"), ('{"type": "banana"}', "banana"), ("[]", "an object or a boolean"), (None, "read")],
)
def test_a_schema_that_cannot_be_used_says_so(tiny_model, tmp_path, text, words):
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_text(text)
    result = run(tiny_model, "Hi", "--json-schema", file)
    assert result.exit_code == 2
    assert words in result.stderr and "Traceback" not in result.stderr
