"""Starts with a cache of packed weights: the same text, less work; and the commands that show and drop it."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM, SamplingParams, hub
from dovetail.cli.models import model_of
from dovetail.config import PACKED_CACHE_SIZE, resolve_packed_cache
from dovetail.core.errors import ConfigError
from dovetail.hub import aliases
from dovetail.hub.models import CachedModel
from dovetail.ops import cpu
from dovetail.options import Options
from tests.helpers import ggufs
from tests.helpers.program import SMALL, argv, call

pytest.importorskip("dovetail._native")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DOVETAIL_PACKED_CACHE")
    return tmp_path / "home" / "packed"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Rows of q and k are in another order in the file than in the model."""
    quantized = {f"blk.{i}.{name}.weight": "Q8_0" for i in range(ggufs.LAYERS) for name in ("attn_q", "ffn_up")}
    return ggufs.write(tmp_path / "model.gguf", formats=quantized)


def answer(model: Path, **options: Any) -> list[int]:
    llm = LLM(model, kv_memory="4MiB", threads=1, **options)
    tokens: list[int] = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
    if llm.packed is not None:
        llm.packed.finish()
    return tokens


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(*_: Any) -> None:
        raise AssertionError("a weight was packed again")

    monkeypatch.setattr(cpu, "pack", pack)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_second_start_packs_nothing_and_answers_the_same(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    plain = answer(model, dtype=dtype, packed_cache="off")
    assert not folder.exists()
    assert answer(model, dtype=dtype) == plain
    assert len(list(folder.glob("*.packed"))) == 1
    no_packing(monkeypatch)
    assert answer(model, dtype=dtype) == plain


def test_types_do_not_share_a_file(model: Path, folder: Path) -> None:
    texts = [answer(model), answer(model, dtype="bfloat16")]
    assert len(list(folder.glob("*.packed"))) == 2
    assert [answer(model), answer(model, dtype="bfloat16")] == texts


def test_hugging_face_folders(tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(tiny_model)
    no_packing(monkeypatch)
    assert answer(tiny_model) == first


def test_models_in_parts(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ggufs.write(tmp_path / "parts.gguf", split=9)
    first = answer(path)
    part = sorted(tmp_path.glob("parts-0000*"))[1]
    with monkeypatch.context() as patch:
        no_packing(patch)
        assert answer(path) == first
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    assert answer(path)
    assert len(list(folder.glob("*.packed"))) == 1


def test_nothing_is_written_before_the_first_answer_has_begun(model: Path, folder: Path) -> None:
    llm = LLM(model, kv_memory="4MiB", threads=1)
    assert llm.packed is not None
    llm.packed.finish()
    assert not folder.exists()
    steps = llm.stream("hello", GREEDY)
    next(steps)
    llm.packed.finish()
    assert len(list(folder.glob("*.packed"))) == 1
    assert len(list(steps)) > 5


def test_a_process_that_ends_has_written_it(model: Path, folder: Path) -> None:
    command = argv(["run", model, "hello", "--raw", "--max-tokens", "1", *SMALL])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert len(list(folder.glob("*.packed"))) == 1
    assert [p.name for p in folder.glob(".*")] == [".lock"]


def test_list_and_rm(model: Path, folder: Path, tmp_path: Path) -> None:
    answer(model)
    alias = aliases.ALIASES["smollm2-135m"]
    path = aliases.location(alias, hub.models_home())
    path.parent.mkdir(parents=True)
    model.rename(path)
    answer(path)
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.truncate(alias.size)
    other = ggufs.write(tmp_path / "other.gguf")
    answer(other)
    (packed, packed_other) = sorted(folder.glob("*.packed"))
    assert size and packed.name.startswith("SmolLM2") and packed_other.name.startswith("other")

    result = call("list", "--json", tmp_path / "list.json")
    assert "packed weights of smollm2-135m " in result.stdout
    assert f"packed weights of {other} " in result.stdout
    kept = json.loads((tmp_path / "list.json").read_text())["packed"]
    assert {e["model"]: e["bytes"] for e in kept} == {
        str(path): packed.stat().st_size,
        str(other): packed_other.stat().st_size,
    }

    assert call("rm", "--packed", other).exit_code == 0
    assert list(folder.glob("*.packed")) == [packed]
    assert other.exists()
    assert "freed" in call("rm", "smollm2-135m").stdout
    assert not list(folder.glob("*.packed"))


def test_list_names_the_model_that_packed_weights_are_of(tmp_path: Path) -> None:
    models = [
        CachedModel("alias", tmp_path / "alias/file.gguf", 1, "alias"),
        CachedModel("org/name", tmp_path / "hub/models--org--name", 1, "hugging face"),
    ]
    snapshot = tmp_path / "hub/models--org--name/snapshots/1"
    expected = {
        tmp_path / "alias/file.gguf": "alias",
        snapshot: "org/name",
        snapshot / "Q4_K_M.gguf": "org/name:Q4_K_M.gguf",
        tmp_path / "mine.gguf": str(tmp_path / "mine.gguf"),
    }
    assert {path: model_of(str(path), models) for path in expected} == expected
    assert model_of("", models) == "no model"


def test_rm_says_when_there_is_nothing(model: Path) -> None:
    result = call("rm", "--packed", model)
    assert result.exit_code == 2
    assert f"no packed weights of {model} are kept" in result.stderr


@pytest.mark.parametrize(
    ("options", "environment", "found"),
    [
        ({}, "", ("/packed", PACKED_CACHE_SIZE)),
        ({"packed_cache_size": 5}, "auto", ("/packed", 5)),
        ({"packed_cache": "off"}, "auto", ("", 0)),
        ({}, "off", ("", 0)),
        ({"packed_cache_size": 5}, "off", ("", 0)),
    ],
)
def test_options(
    options: dict[str, Any], environment: str, found: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_PACKED_CACHE", environment)
    assert resolve_packed_cache(Options(**options), "avx2", Path("/packed")) == found
    assert resolve_packed_cache(Options(**options), "torch", Path("/packed")) == ("", 0)
    assert resolve_packed_cache(Options(**options), "avx2", None) == ("", 0)


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ({"packed_cache": "on"}, "", "auto and off"),
        ({"packed_cache": "off", "packed_cache_size": 5}, "", "drop one"),
        ({"packed_cache_size": 0}, "", "at least 1"),
        ({}, "no", "DOVETAIL_PACKED_CACHE"),
    ],
)
def test_impossible_options(
    options: dict[str, Any], environment: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_PACKED_CACHE", environment)
    with pytest.raises(ConfigError, match=words):
        resolve_packed_cache(Options(**options), "avx2", Path("/packed"))


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
from dovetail.checkpoint import packed_cache
write = os.writev
def interrupted(*arguments):
    os.kill(os.getpid(), 2)
    for cache in packed_cache.running():
        cache.abandoned.wait()
    return write(*arguments)
os.writev = interrupted
"""


@pytest.mark.parametrize("tokens", ["1", "60"])
def test_ctrl_c_abandons_it(model: Path, folder: Path, tokens: str) -> None:
    """Whether it comes while the answer goes on or after it."""
    command = argv(["run", model, "hello", "--raw", "--max-tokens", tokens, "--ignore-eos", *SMALL])
    command[2] = INTERRUPTED + command[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 130), done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_a_system_without_threads_left_keeps_nothing_and_goes_on(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert answer(model) == answer(model, packed_cache="off")
    assert not list(folder.glob("*.packed"))
    assert "are not kept: can't start new thread" in capsys.readouterr().err


def test_measurements_have_it_written_first(model: Path, folder: Path) -> None:
    llm = LLM(model, kv_memory="4MiB", threads=1)
    llm.keep_packed()
    assert len(list(folder.glob("*.packed"))) == 1
    LLM(model, kv_memory="4MiB", threads=1, packed_cache="off").keep_packed()
