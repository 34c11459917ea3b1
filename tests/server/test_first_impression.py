"""What `dovetail serve` prints, and the command that it prints, run in a shell."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dovetail.cli.serve import defaults_text
from dovetail.llm import LLM
from tests.helpers.program import SMALL, argv, call
from tests.server.serving import NAME, SECONDS


@contextmanager
def serving(model: Path, *more: str, **environment: str) -> Iterator[str]:
    """All that a server prints until it is ready, while it runs."""
    command = argv(["serve", model, "--port", 0, "--served-model-name", NAME, *SMALL, *more])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        lines: list[str] = []
        while not lines or not lines[-1].startswith("curl"):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield "".join(lines)
        process.terminate()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_command_that_is_printed_ends(tiny_model: Path) -> None:
    with serving(tiny_model) as text:
        assert "defaults of requests: temperature" in text
        done = subprocess.run(text.splitlines()[-1], shell=True, capture_output=True, text=True, timeout=SECONDS)
        found = json.loads(done.stdout)
        assert found["choices"][0]["finish_reason"] and 0 < found["usage"]["completion_tokens"] <= 64


def test_keys_come_from_the_environment_and_from_a_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("third\n\n fourth \n")
    with serving(tiny_model, "--api-key-file", str(tmp_path / "keys"), DOVETAIL_API_KEY="first second") as text:
        command = text.splitlines()[-1]
        for key in ("first", "second", "third", "fourth"):
            done = subprocess.run(
                command, shell=True, capture_output=True, env=os.environ | {"KEY": key}, text=True
            )
            assert json.loads(done.stdout)["usage"], key
        address = text.split("Serving")[1].split()[2]
        assert httpx.get(f"{address}/v1/models", headers={"x-api-key": "fifth"}).status_code == 401
        assert "first" not in text and "third" not in text


@pytest.mark.parametrize("text", ["", " \n", "two words\nümlaut\n"])
def test_keys_that_cannot_be_sent_are_refused(tiny_model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    refused = call("serve", tiny_model, "--api-key-file", tmp_path / "keys")
    assert refused.exit_code == 2 and "key" in refused.stderr


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/page", "", "https://"])
def test_origins_that_no_browser_sends_are_refused(tiny_model: Path, origin: str) -> None:
    refused = call("serve", tiny_model, "--allowed-origins", origin)
    assert refused.exit_code == 2 and "https://chat.example" in refused.stderr


def test_defaults_are_the_model_s_own(tiny_model: Path) -> None:
    llm = LLM(tiny_model, kv_memory=4 << 20, threads=1)
    llm.checkpoint.generation_config = {"temperature": 0.6, "top_p": 0.95}
    assert defaults_text(llm).startswith("defaults of requests: temperature 0.6, top_p 0.95, top_k 0,")
    assert "max_tokens 16" in defaults_text(llm) and str(llm.config.max_model_len) in defaults_text(llm)
